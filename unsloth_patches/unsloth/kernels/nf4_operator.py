# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The operator that torch.compile sees in place of a plan: unsloth::dequantize_4bit_."""

from typing import Any, List, Sequence

import torch

from .nf4_launch import alignment, groups_of, launch, start_bits
from .nf4_plan import check, scale_tensors
from .nf4_quant_state import State


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
    bits = out.data_ptr() | start_bits(numels, out.element_size())
    for W in weights:
        bits |= W.data_ptr()
    each = list(zip(weights, absmax, code2, absmax2, offset))
    state_format = (quant_type, blocksize, blocksize2)
    launch(each, out, numels, state_format, alignment(bits), out.device.index)


_library: Any = None  # a Library takes its operators with it when it is collected


def _register() -> None:
    """Make the operator known to torch.compile, which does not look into it.

    As a torch.library.triton_op Inductor would see the kernel, and had nothing to gain from it:
    each weight of each graph was parsed, analysed and compiled anew, 7 s of the first step of a
    Llama, and Inductor's launch costs the host no less than ours. torch.library.Library rather than
    custom_op, for a call of that costs the host 20 us.
    """
    global _library
    _library = torch.library.Library("unsloth", "FRAGMENT")
    schema = torch.library.infer_schema(_dequantize_into, mutates_args = ("out",))
    _library.define("dequantize_4bit_" + schema)
    _library.impl("dequantize_4bit_", _dequantize_into, "CompositeExplicitAutograd")
    torch.library.register_fake("unsloth::dequantize_4bit_", lambda *_: None, lib = _library)


_register()


def _constant(power: int) -> int:
    """A power of two, or 0, as a constant of the graph: where shapes are dynamic, the numbers of a
    quant state are traced as symbols, and Inductor loses those that are no tensor's size."""
    for shift in range(31):
        if power == 1 << shift:
            return 1 << shift
    return 0


def decode_traced(
    weights: Sequence[torch.Tensor],
    states: Sequence[State],
    out: torch.Tensor,
) -> None:
    """Decodes weights of any formats, one after another, into out (1-D), while being traced."""
    for W, state in zip(weights, states):
        check(W, state)
    formats = [
        (state.quant_type, _constant(state.blocksize), _constant(state.blocksize2))
        for state in states
    ]
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
