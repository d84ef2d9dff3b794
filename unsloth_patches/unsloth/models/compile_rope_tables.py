# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Keep the graphs of a block when a batch is as long as a head is wide.

Block compile marks lengths as dynamic by comparing a tensor's sizes with the batch's length. The cos
and sin tables of RoPE, shared by all batches, match when the length equals the head's width (64,
128): the mark then stays on them and invalidates the graphs compiled before.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch

__all__ = ["without_rope_tables"]

_TABLES = "position_embeddings"


def _is_tables(value: Any) -> bool:
    """(cos, sin) as [positions, head_dim] tables; transformers' are [batch, length, head_dim]."""
    return isinstance(value, (tuple, list)) and all(
        isinstance(x, torch.Tensor) and x.dim() == 2 and x.is_floating_point() for x in value
    )


def without_rope_tables(stock: Callable) -> Callable:
    """``_mark_seq_dynamic(seq_len, arguments)`` without the RoPE tables."""

    @functools.wraps(stock)
    def _mark_seq_dynamic(seq_len, obj):
        if isinstance(obj, dict) and _is_tables(obj.get(_TABLES)):
            obj = {name: value for name, value in obj.items() if name != _TABLES}
        return stock(seq_len, obj)

    return _mark_seq_dynamic
