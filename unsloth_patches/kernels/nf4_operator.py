# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The operator that torch.compile sees in place of a plan: unsloth::dequantize_4bit_."""

import hashlib
from pathlib import Path
from typing import List, Sequence

import torch

from .nf4_launch import (
    HIP,
    INTERPRETED,
    alignment,
    arguments_of,
    constants_of,
    groups_of,
    settings,
    start_bits,
)
from .nf4_plan import check, scale_tensors
from .nf4_quant_state import State


def _storage_bits(*tensors: torch.Tensor) -> int:
    """The or-ed addresses of tensors, as far as known: a tensor that is being traced has none."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.storage_offset() * tensor.element_size()
        try:
            bits |= tensor.data_ptr()
        except RuntimeError:
            pass
    return bits


def _dequantize_into(
    out: torch.Tensor,
    weights: List[torch.Tensor],
    absmax: List[torch.Tensor],
    code2: List[torch.Tensor],
    absmax2: List[torch.Tensor],
    offset: List[torch.Tensor],
    numels: List[int],
    quant_type: str,
    blocksize: int,
    blocksize2: int,
) -> None:
    """Operator unsloth::dequantize_4bit_: one to MANY weights, one after another, into out."""
    state_format, index = (quant_type, blocksize, blocksize2), out.device.index
    align = alignment(_storage_bits(out, *weights) | start_bits(numels, out.element_size()))
    chunks, warps, _ = settings(index)
    constants = constants_of(state_format, align, numels, index)
    each = list(zip(weights, absmax, code2, absmax2, offset))
    kernel, grid, arguments = arguments_of(each, out, numels, chunks)
    _traceable(kernel)[(grid,)](*arguments, **constants, num_warps = warps)


if hasattr(torch.library, "triton_op") and not (INTERPRETED or HIP):
    # Inductor sees the kernel itself.
    _traceable = torch.library.wrap_triton
    _operator = torch.library.triton_op("unsloth::dequantize_4bit_", mutates_args = ("out",))
else:
    _traceable = lambda kernel: kernel
    _operator = torch.library.custom_op("unsloth::dequantize_4bit_", mutates_args = ("out",))
_dequantize_into = _operator(_dequantize_into)
if _traceable is not getattr(torch.library, "wrap_triton", None):
    _dequantize_into.register_fake(lambda *args: None)


def _tag_compile_cache() -> None:
    """Adds the kernels' sources to torch.compile's cache key, which has the operator's name only.

    Without it a warm cache would go on serving the kernels of an earlier version.
    """
    config = getattr(torch.compiler, "config", None)
    if not hasattr(config, "cache_key_tag"):
        return
    names = ("nf4_decode.py", "nf4_dequantize_kernel.py")
    sources = [Path(__file__).with_name(name) for name in names]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    tag = f"dequantize_4bit={digest[:16]}"
    tags = [other for other in config.cache_key_tag.split(",") if other]
    if tag not in tags:
        config.cache_key_tag = ",".join([*tags, tag])


_tag_compile_cache()


def decode_traced(
    weights: Sequence[torch.Tensor],
    states: Sequence[State],
    out: torch.Tensor,
) -> None:
    """Decodes weights of any formats, one after another, into out (1-D), while being traced."""
    for W, state in zip(weights, states):
        check(W, state)
    formats = [(state.quant_type, state.blocksize, state.blocksize2) for state in states]
    numels = [state.numel for state in states]
    for part in groups_of(formats, numels):
        start = sum(numels[: part.start])
        tensors = [scale_tensors(state, out.device) for state in states[part]]
        torch.ops.unsloth.dequantize_4bit_(
            out[start : start + sum(numels[part])],
            list(weights[part]),
            *[list(column) for column in zip(*tensors)],
            numels[part],
            *formats[part.start],
        )
