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

import os
import sys

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def require(backend: str) -> None:
    """Choose ``backend`` where Unsloth is not imported yet; otherwise skip the file if another was chosen."""
    if GPU and backend != "gloo":
        return
    if "unsloth" not in sys.modules:
        if backend == "interpreter":
            os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
            os.environ.setdefault("TRITON_INTERPRET", "1")
        return
    chosen = _chosen()
    if chosen != ("interpreter" if backend == "interpreter" else "cpu"):
        pytest.skip(
            f"needs Unsloth's {backend} backend, and this process has imported unsloth for {chosen}; "
            "run this file in a process of its own",
            allow_module_level = True,
        )


def _chosen() -> str:
    if getattr(sys.modules.get("unsloth_zoo"), "_IS_CPU_BACKEND", False):
        return "cpu"
    return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
