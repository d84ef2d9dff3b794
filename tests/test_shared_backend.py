# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A test file gets the backend that it asks for, or is skipped with the reason; never the wrong one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backend import GPU, require

require("cpu")
pytestmark = pytest.mark.skipif(GPU, reason = "with a GPU every backend but gloo is that GPU")

SHARED = Path(__file__).resolve().parent / "_shared"
FILE = """
from backend import require
require({wanted!r})
import os
def test_it():
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    assert interprets == ({wanted!r} == "interpreter")
"""
# What backend.py asks torch, and what a process that has imported unsloth looks like, without the time
# that both take.
TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
IMPORTED = """
import os, sys, types
sys.modules["unsloth"] = types.ModuleType("unsloth")
zoo = sys.modules["unsloth_zoo"] = types.ModuleType("unsloth_zoo")
zoo._IS_CPU_BACKEND = {cpu}
if {interprets}:
    os.environ["TRITON_INTERPRET"] = "1"
"""
IMPORTS = {
    None: "",
    "cpu": IMPORTED.format(cpu = True, interprets = False),
    "interpreter": IMPORTED.format(cpu = False, interprets = True),
    "cuda": IMPORTED.format(cpu = False, interprets = False),
}
CASES = {
    (wanted, imported): f"{wanted}-{imported}"
    for wanted in ("cpu", "interpreter", "gloo")
    for imported in IMPORTS
}
# One start of pytest for all cases, and a fork for each.
FORKS = """
import os, sys
import pytest
for case in sys.argv[1:]:
    child = os.fork()
    if not child:
        os.chdir(case)
        os.dup2(os.open("said", os.O_CREAT | os.O_WRONLY), 1)
        code = pytest.main(["-q", "-rs", "-p", "no:cacheprovider", "--rootdir=.", "test_file.py"])
        sys.stdout.flush()
        os._exit(code)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope = "module")
def ran(tmp_path_factory):
    """The folder with a case's output, of all cases."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "torch.py").write_text(TORCH, encoding = "utf-8")
    for (wanted, imported), case in CASES.items():
        (folder / case).mkdir()
        (folder / case / "conftest.py").write_text(IMPORTS[imported], encoding = "utf-8")
        text = FILE.format(wanted = wanted)
        (folder / case / "test_file.py").write_text(text, encoding = "utf-8")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "UNSLOTH_ALLOW_CPU")
    }
    paths = os.pathsep.join([str(SHARED), str(folder)])
    environment.update(PYTHONPATH = paths, PYTEST_DISABLE_PLUGIN_AUTOLOAD = "1")
    command = [sys.executable, "-c", FORKS, *CASES.values()]
    subprocess.run(command, env = environment, cwd = folder, check = True)
    return folder


@pytest.mark.parametrize("wanted, imported", CASES)
def test_the_backend_is_chosen_or_the_file_skipped(ran, wanted, imported):
    said = (ran / CASES[wanted, imported] / "said").read_text(encoding = "utf-8")
    fits = imported in (None, "interpreter" if wanted == "interpreter" else "cpu")
    if fits:
        assert "1 passed" in said, said
    else:
        assert f"needs Unsloth's {wanted} backend" in said
        assert f"imported unsloth for {imported}" in said
