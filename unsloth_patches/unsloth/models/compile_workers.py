# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Start Inductor's compile workers while the model loads, so that they are there when it compiles.

Inductor compiles Triton kernels in worker processes, side by side. It starts them when the first
graph is traced, and compiles in the calling process, one kernel after another, until they are
ready: they import torch first. In a QLoRA run they became ready after everything had been compiled.
Loading the weights takes about as long as they do.
"""

from __future__ import annotations

import functools
import os
from typing import Callable

import torch

__all__ = ["start_compile_workers", "start_compile_workers_early"]

VARIABLE = "UNSLOTH_COMPILE_WORKERS_EARLY"


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def start_compile_workers() -> bool:
    """Start the worker processes that torch.compile will use; returns at once, whether they start.

    They do not where nothing will be compiled for a CUDA GPU (UNSLOTH_COMPILE_DISABLE or
    UNSLOTH_BLOCK_COMPILE=0, no GPU), where compiling is confined to one process
    (TORCHINDUCTOR_COMPILE_THREADS=1), or with UNSLOTH_COMPILE_WORKERS_EARLY=0. PyTorch ends workers
    that are idle for a minute, and starts them again when something compiles.
    """
    off = (
        os.environ.get(VARIABLE, "1") == "0"
        or os.environ.get("UNSLOTH_COMPILE_DISABLE", "0") in ("1", "partial")
        or os.environ.get("UNSLOTH_BLOCK_COMPILE", "1") == "0"
    )
    if off or not _has_gpu():
        return False
    from torch._inductor import async_compile

    warm = getattr(async_compile, "maybe_warm_pool", None)  # PyTorch 2.6 and newer
    try:
        if warm is None or async_compile.get_compile_threads() <= 1:
            return False
        warm()
    except Exception:  # then they start when something compiles, as without this
        return False
    return True


def start_compile_workers_early(stock: Callable) -> Callable:
    """``from_pretrained`` of FastLanguageModel and FastModel: the workers start, then stock loads."""
    plain = stock.__func__ if isinstance(stock, staticmethod) else stock

    @functools.wraps(plain)
    def from_pretrained(*args, **kwargs):
        # vLLM, behind fast_inference, has compile workers and processes of its own.
        if not kwargs.get("fast_inference", False):
            start_compile_workers()
        return plain(*args, **kwargs)

    return staticmethod(from_pretrained) if isinstance(stock, staticmethod) else from_pretrained
