# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The CPU backend's ``from_pretrained`` under FSDP2 (gloo ranks: tests, and machines without GPUs).

Apart from ``models/``, because importing that package loads Unsloth's GPU stack, which the CPU
backend leaves out on purpose.
"""

from __future__ import annotations

import functools
import os
from typing import Callable

_OFF = ("", "0", "false", "no", "off")


def shard_cpu_loads(from_pretrained: Callable) -> Callable:
    """Decorator of the CPU backend's ``FastLanguageModel.from_pretrained``: under UNSLOTH_FSDP2 its
    4-bit loads are sharded as on a GPU. It takes the plain function, or the staticmethod around it.
    """
    stock = getattr(from_pretrained, "__func__", from_pretrained)

    @functools.wraps(stock)
    def sharded(*args, **kwargs):
        if os.environ.get("UNSLOTH_FSDP2", "").strip().lower() in _OFF:
            return stock(*args, **kwargs)
        from unsloth.models.fsdp2_load import sharded_load_env

        from .models.fsdp2_sharded_4bit import loads_4bit

        if not loads_4bit(stock, args, kwargs):
            return stock(*args, **kwargs)
        return sharded_load_env(stock)(*args, **kwargs)

    return sharded
