# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Which of Unsloth's backends a test file needs. It is chosen once, when Unsloth is imported.

    cpu          Unsloth's CPU backend: no Triton kernel, no model classes of its own
    interpreter  the GPU code paths on the CPU, Triton's kernels in its interpreter
    gloo         the CPU backend in a process that only forks ranks

With a GPU, ``cpu`` and ``interpreter`` are that GPU. A file calls ``require`` before it imports unsloth:

    from backend import DEVICE, require

    require("interpreter")
    import unsloth
"""

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# pytest listens to every logger, and torch then formats each graph for its structured trace.
logging.getLogger("torch.__trace").disabled = True


def require(backend: str) -> None:
    """Choose ``backend`` where Unsloth is not imported yet; otherwise skip the file if another was chosen."""
    if GPU and backend != "gloo":
        return
    if "unsloth" not in sys.modules:
        if backend == "interpreter":
            os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
            os.environ.setdefault("TRITON_INTERPRET", "1")
            _patch_language_once_a_launch()
        return
    chosen = _chosen()
    if chosen != ("interpreter" if backend == "interpreter" else "cpu"):
        pytest.skip(
            f"needs Unsloth's {backend} backend, and this process has imported unsloth for {chosen}; "
            "run this file in a process of its own",
            allow_module_level = True,
        )


def _chosen() -> str:
    zoo, allowed = sys.modules.get("unsloth_zoo"), os.environ.get("UNSLOTH_ALLOW_CPU") == "1"
    if getattr(zoo, "_IS_CPU_BACKEND", False):
        return "cpu"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    # Before 2026.10.9 there is no CPU backend; what these files need runs without one there.
    return "cpu" if allowed and not hasattr(zoo, "_IS_CPU_BACKEND") else "cuda"


def _patch_language_once_a_launch() -> None:
    """Triton's interpreter replaces the functions of ``triton.language`` at each launch, and again at each
    call of a device function (``tl.sum`` is one), which is most of a small launch's time."""
    from triton.runtime import interpreter

    patch, done = getattr(interpreter, "_patch_lang", None), set()
    if not hasattr(interpreter, "_LangPatchScope") or patch.__name__ == "patch_once":
        return

    @functools.lru_cache(maxsize = None)
    def languages_of(function):
        modules = {id(x) for x in function.__globals__.values() if isinstance(x, ModuleType)}
        return modules & {id(interpreter.tl), id(interpreter.tl.core)}

    def patch_once(function):
        languages = languages_of(function)
        if languages and languages <= done:
            return interpreter._LangPatchScope()
        launches, scope = not done, patch(function)
        done.update(languages)
        if launches:  # else a device function of a module that imports the other of the two
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once
    if hasattr(
        interpreter, "_get_np_dtype"
    ):  # makes a table of all types for each that it looks up
        look_up = interpreter._get_np_dtype
        known = functools.lru_cache(maxsize = None)(look_up)  # pointers' types have no hash
        interpreter._get_np_dtype = lambda x: (look_up if x.scalar.is_ptr() else known)(x.scalar)


_AS_PACKAGE = """
import sys, types
for name, folder in zip(("bare", "bare.kernels"), sys.argv[1:]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
"""


def check_compiled(module, code, folder):
    """Run ``code`` without Triton's interpreter: it compiles kernels of ``module`` for GPUs that need not be
    there, by ASTSource, compile and GPUTarget. ``bare.kernels`` is its folder, without Unsloth's imports."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    kernels = Path(module.__file__).parent
    command = [sys.executable, "-c", _AS_PACKAGE + code, str(kernels.parent), str(kernels)]
    done = subprocess.run(command, env = environment, capture_output = True, text = True)
    assert done.returncode == 0, done.stderr
