# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""A fake Unsloth of a few lines (a folder on PYTHONPATH), and processes that import it.

What is tested with it is ours: order, threads, errors, undo. The catalogue of such a process is
replaced before the first import of ``unsloth``.
"""

import compileall
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FAKE_UNSLOTH = {
    "unsloth/__init__.py": "from .kernels.utils import fast\nfrom . import user\n",
    "unsloth/kernels/__init__.py": "",
    "unsloth/kernels/utils.py": """
        def fast(x):
            return ("stock", x)

        class Layer:
            @staticmethod
            def scale(x):
                return ("stock", x)

        nothing = None  # what this host lacks
        """,
    "unsloth/user.py": "from .kernels.utils import fast\ndef use(x):\n    return fast(x)\n",
    "unsloth/late.py": "def slow(x):\n    return ('stock', x)\n",
    "unsloth_zoo/__init__.py": "",
}
REPLACEMENTS = """
    def replace_fast(stock):
        def fast(x):
            return ("patched", stock(x))
        return fast

    def replace_slow(stock):
        return lambda x: ("patched", stock(x))

    def replace_reaching(stock):
        # Wraps a function of another library, but only once it is called.
        import functools, textwrap
        def fast(x):
            inner = textwrap.TextWrapper.fill
            textwrap.TextWrapper.fill = functools.wraps(inner)(lambda *args: inner(*args))
            return ("patched", stock(x))
        return fast

    def replace_scale(stock):
        return lambda *x: ("patched", stock(*x))

    def replace_raising(stock):
        raise ValueError("boom")

    def replace_refusing(stock):
        raise NotImplementedError("upstream text changed")
    """
OURS = {
    "__init__.py": "",
    "repl.py": REPLACEMENTS,
    "kernels/__init__.py": "",
    "kernels/fresh.py": "value = object()\n",
}
PREAMBLE = """
    import importlib, sys, types
    import unsloth_patches
    from unsloth_patches import private_names, registry
    from unsloth_patches.registry import Patch, Target

    # status() reads the sources of the installed torch for them; test_private_names.py is about those.
    private_names.PRIVATE_NAMES = ()

    def T(attribute, replacement, **more):
        return Target(attribute, "repl:" + replacement, **more)

    def catalogue(*patches):
        from unsloth_patches import states
        registry.PATCHES = states.PATCHES = patches
        states.forget_all()

    FAST = Patch("fast", "t", (T("unsloth.kernels.utils:fast", "replace_fast"),))

    def states():
        return {row.name: row.state for row in unsloth_patches.status()}

    def reasons():
        return {row.name: row.reason for row in unsloth_patches.status()}
    """


def make_fake(folder):
    """In ``folder`` a fake Unsloth, and a copy of our package with a module of replacements."""
    write(folder, FAKE_UNSLOTH)
    ours = folder / "unsloth_patches"
    write(ours / "unsloth", OURS)
    for file in (ROOT / "unsloth_patches").glob("*.py"):
        (ours / file.name).write_bytes(file.read_bytes())
    shutil.copytree(ROOT / "unsloth_patches" / "registry", ours / "registry")
    compileall.compile_dir(ours, quiet = 1)
    return folder


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents = True, exist_ok = True)
        path.write_text(textwrap.dedent(text), encoding = "utf-8")


def python(
    code,
    path,
    environment = None,
):
    """Run code in a process of its own; its stdout, or a failure that shows its stderr."""
    variables = dict(os.environ, PYTHONPATH = str(path), UNSLOTH_PATCHES_QUIET = "1")
    variables.pop("UNSLOTH_PATCHES_DISABLE", None)
    variables.update(environment or {})
    variables = {name: value for name, value in variables.items() if value is not None}
    done = subprocess.run(
        # Searching for garbage takes a sixth of an import of Unsloth.
        [sys.executable, "-c", "import gc; gc.disable()\n" + code],
        # Python puts the current folder first; it must not hide the package under test.
        cwd = path if Path(path).is_dir() else ROOT,
        env = variables,
        capture_output = True,
        text = True,
        timeout = 240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run(
    body,
    fake,
    environment = None,
):
    code = textwrap.dedent(PREAMBLE) + textwrap.dedent(body)
    return python(code, fake, environment)
