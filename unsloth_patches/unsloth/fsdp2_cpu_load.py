# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The CPU backend's `from_pretrained` under FSDP2 (gloo ranks: tests, and machines without GPUs).

Apart from `models/`, because importing that package loads Unsloth's GPU stack, which the CPU backend
leaves out on purpose.
"""

from __future__ import annotations

import functools
import os
from typing import Callable


def replace_cpu_from_pretrained(stock: Callable) -> Callable:
    """`FastLanguageModel.from_pretrained` of the CPU backend: 4-bit loads are sharded as on a GPU.

    Without UNSLOTH_FSDP2 in the environment it is the stock function.
    """

    @functools.wraps(stock)
    def from_pretrained(*args, **kwargs):
        if os.environ.get("UNSLOTH_FSDP2", "").strip().lower() in ("", "0", "false", "no", "off"):
            return stock(*args, **kwargs)
        from .models.fsdp2_sharded_4bit import replace_sharded_load_env

        return replace_sharded_load_env(lambda loader: loader)(stock)(*args, **kwargs)

    return from_pretrained
