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


@pytest.mark.parametrize("imported", IMPORTS)
@pytest.mark.parametrize("wanted", ("cpu", "interpreter", "gloo"))
def test_the_backend_is_chosen_or_the_file_skipped(tmp_path, wanted, imported):
    (tmp_path / "conftest.py").write_text(IMPORTS[imported], encoding = "utf-8")
    (tmp_path / "torch.py").write_text(TORCH, encoding = "utf-8")
    (tmp_path / "test_file.py").write_text(FILE.format(wanted = wanted), encoding = "utf-8")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "UNSLOTH_ALLOW_CPU")
    }
    paths = os.pathsep.join([str(SHARED), str(tmp_path)])
    environment.update(PYTHONPATH = paths, PYTEST_DISABLE_PLUGIN_AUTOLOAD = "1")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env = environment, capture_output = True, text = True, cwd = tmp_path)
    fits = imported in (None, "interpreter" if wanted == "interpreter" else "cpu")
    if fits:
        assert "1 passed" in done.stdout, done.stdout
    else:
        assert f"needs Unsloth's {wanted} backend" in done.stdout
        assert f"imported unsloth for {imported}" in done.stdout
