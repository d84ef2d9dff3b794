# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Processes that have imported the installed Unsloth already, forked from one that did so once.

An import takes ten seconds of a core. What has to come before it (a variable, another order of imports)
needs a process of its own: ``fake_unsloth.python``.
"""

import json
import os
import subprocess
import sys
import textwrap

from fake_unsloth import ROOT

FIRST = {
    "patched": "import unsloth_patches, unsloth, unsloth.chat_templates",
    "late": "import unsloth, unsloth.chat_templates",
}
SERVER = """
import gc, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
gc.disable()  # a sixth of the import
exec(sys.argv[1])
gc.freeze()
gc.enable()
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        code = 0
        try:
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1), os.dup2(output, 2)
            exec(job["code"], globals())
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitpid(child, 0)[1], file = answers, flush = True)
"""


class Imported:
    """One such process, on the CPU backend. It ends when this one does, by the end of its input."""

    def __init__(self, first):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "_shared")])
        environment = dict(os.environ, PYTHONPATH = path, CUDA_VISIBLE_DEVICES = "")
        environment["UNSLOTH_PATCHES_QUIET"] = environment["OMP_NUM_THREADS"] = "1"
        environment.pop("UNSLOTH_PATCHES_DISABLE", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, FIRST[first]],
            cwd = ROOT,
            env = environment,
            stdin = subprocess.PIPE,
            stdout = subprocess.PIPE,
            text = True,
        )

    def run(self, code, folder):
        """What ``code`` printed in a fork of its own, or a failure that shows it."""
        output = folder / "output"
        job = {"code": textwrap.dedent(code), "output": str(output)}
        print(json.dumps(job), file = self._process.stdin, flush = True)
        answer = self._process.stdout.readline()
        printed = output.read_text(encoding = "utf-8") if output.is_file() else "no output"
        assert answer.strip() == "0", printed[-3000:] if answer else "the process has ended"
        return printed

    def end(self):
        self._process.communicate(timeout = 60)
