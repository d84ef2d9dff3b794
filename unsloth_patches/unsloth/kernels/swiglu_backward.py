# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""SwiGLU's backward in a compiled block, with one buffer less.

Traced, Inductor fuses the backward into one kernel that reads dY W, e and g and writes h, df and
de, each into memory of its own: six [tokens, intermediate] tensors at the block's peak, where the
eager kernel overwrites its three. e and g are the backward graph's inputs, which an operator may
not overwrite; the incoming gradient is not. Here de takes its place: five tensors, the same reads
and writes.
"""

from __future__ import annotations

import functools
from typing import Callable, Tuple

import torch
import triton
import triton.language as tl

__all__ = ["backward_in_place_when_traced", "swiglu_backward_"]

_DEVICES = ("cuda",)  # where Triton's kernels run
_BLOCK = 1024
_INT32 = 2**31 - _BLOCK


@triton.jit
def _swiglu_backward_kernel(gradient, e, g, h, df, count, LONG: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    index = tl.program_id(0)
    if LONG:
        index = index.to(tl.int64)
        count = tl.cast(count, tl.int64)
    at = index * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(gradient + at, mask = inside, other = 0)
    x = tl.load(e + at, mask = inside, other = 0).to(tl.float32)
    y = tl.load(g + at, mask = inside, other = 0)
    # Rounded where the eager kernel rounds: f, h, df, dg to the tensors' dtype, else float32.
    s = tl.sigmoid(x)
    f = (s * x).to(d.dtype)
    dg = d * y
    de = dg.to(tl.float32) * s * (1.0 + x * (1.0 - s))
    tl.store(h + at, f * y, mask = inside)
    tl.store(df + at, d * f, mask = inside)
    tl.store(gradient + at, de.to(d.dtype), mask = inside)


def swiglu_backward_(
    gradient: torch.Tensor, e: torch.Tensor, g: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """(h, df) of h = silu(e) * g, and de in ``gradient``'s place.

    gradient: dL/dh, [tokens, width], contiguous, float16, bfloat16 or float32; e, g: its shape and
    dtype. h is the forward's output, df = gradient * silu(e) is dL/dg, and de is dL/de. Raises
    ValueError for other shapes or strides.
    """
    if not (gradient.shape == e.shape == g.shape and gradient.is_contiguous()):
        raise ValueError(
            f"swiglu_backward_: gradient {tuple(gradient.shape)} with strides {gradient.stride()}, "
            f"e {tuple(e.shape)}, g {tuple(g.shape)}: give equal shapes and a contiguous gradient."
        )
    e, g = e.contiguous(), g.contiguous()
    h, df = torch.empty_like(e), torch.empty_like(e)
    count = gradient.numel()
    if count:
        _swiglu_backward_kernel[(triton.cdiv(count, _BLOCK),)](
            gradient, e, g, h, df, count, LONG = count > _INT32, BLOCK = _BLOCK
        )
    return h, df


def _fake(
    gradient: torch.Tensor, e: torch.Tensor, g: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    h = torch.empty_like(e, memory_format = torch.contiguous_format)
    return h, torch.empty_like(h)


# Library and not custom_op: in a compiled block a call of that costs the host 20 us.
_library = torch.library.Library("unsloth", "FRAGMENT")  # collected, it takes its operators with it
_schema = torch.library.infer_schema(swiglu_backward_, mutates_args = ("gradient",))
_library.define("swiglu_backward_" + _schema)
_library.impl("swiglu_backward_", swiglu_backward_, "CompositeExplicitAutograd")
torch.library.register_fake("unsloth::swiglu_backward_", _fake, lib = _library)


def backward_in_place_when_traced(stock: Callable) -> Callable:
    """``swiglu_DWf_DW_dfg_kernel(DW, e, g)`` -> (h, df, de), in a trace by ``swiglu_backward_``."""

    @functools.wraps(stock)
    def swiglu_DWf_DW_dfg_kernel(DW, e, g):
        traced = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if not traced or DW.device.type not in _DEVICES:
            return stock(DW, e, g)
        h, df = torch.ops.unsloth.swiglu_backward_(DW, e, g)
        return h, df, DW

    return swiglu_DWf_DW_dfg_kernel
