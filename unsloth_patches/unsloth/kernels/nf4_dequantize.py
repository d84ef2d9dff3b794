# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Dequantize bitsandbytes 4-bit weights, one or several, in one Triton launch.

``dequantize_4bit`` and ``dequantize_4bit_many`` are bit-identical to
``bitsandbytes.functional.dequantize_4bit`` on CUDA, which needs three launches for a double
quantized weight (QLoRA, https://arxiv.org/abs/2305.14314). NF4 and FP4, flat or double quantized,
float16, bfloat16 and float32, any element count. The codebook is bitsandbytes' own constant, not
``quant_state.code``, as in its CUDA kernels.

``replace_fast_dequantize`` puts them behind ``unsloth.kernels.utils.fast_dequantize``.
"""

import functools
import warnings
from typing import List, Optional, Sequence

import torch

from .nf4_decode import FP4_CODE, NF4_CODE
from .nf4_launch import HIP, INTERPRETED, DequantizeUnavailable, is_compiling, raw_stream
from .nf4_operator import decode_traced
from .nf4_plan import PLAN, group_for, plan_for
from .nf4_quant_state import (
    State,
    check_format,
    check_one_kind,
    check_out,
    check_scales,
    check_weight,
    read_quant_state,
)

__all__ = ["dequantize_4bit", "dequantize_4bit_many", "replace_fast_dequantize"]


def _as_bitsandbytes(quant_state):
    """quant_state as bitsandbytes' class: its functions no longer take the list form."""
    if type(quant_state) is not list:
        return quant_state
    from bitsandbytes.functional import QuantState

    state = read_quant_state(quant_state)
    second = None
    if state.nested:
        second = QuantState(
            absmax = state.absmax2,
            code = state.code2,
            blocksize = state.blocksize2,
            dtype = torch.float32,
        )
    return QuantState(
        absmax = state.absmax,
        shape = torch.Size(state.shape),
        blocksize = state.blocksize,
        quant_type = state.quant_type,
        dtype = state.dtype,
        offset = state.offset,
        state2 = second,
    )


def _decode_in_torch(W: torch.Tensor, state: State) -> torch.Tensor:
    """The definition, in plain torch operations."""
    packed = W.view(torch.uint8).reshape(-1)[: (state.numel + 1) // 2]
    nibbles = torch.stack((packed >> 4, packed & 15), dim = 1).reshape(-1)[: state.numel].long()
    scale = state.absmax
    if state.nested:
        scale2 = state.absmax2.repeat_interleave(state.blocksize2)[: scale.numel()]
        scale = state.code2[scale.long()] * scale2 + state.offset
    scale = scale.repeat_interleave(state.blocksize)[: state.numel]
    code = torch.tensor((FP4_CODE if state.quant_type == "fp4" else NF4_CODE).value)
    return (code[nibbles] * scale).to(state.dtype).reshape(state.shape)


def _on_cpu(W: torch.Tensor, quant_state, out: Optional[torch.Tensor]) -> torch.Tensor:
    """bitsandbytes' CPU operator where it is right, else plain torch.

    bitsandbytes 0.50.2's AVX512 kernel takes rows for whole blocks: wherever a row is no multiple
    of the blocksize it returns other numbers than its CUDA kernel (and than the format says).
    """
    from bitsandbytes.functional import dequantize_4bit as bitsandbytes_dequantize

    state = read_quant_state(quant_state)
    check_format(state)
    check_weight(W, state)
    check_scales(state, W.device)
    if out is not None:
        check_out(out, state.shape, state.dtype, W.device)
    if state.shape[-1] % state.blocksize == 0:
        # A transposed W returns a transposed result there; the bytes are the same.
        result = bitsandbytes_dequantize(W.view(-1, 1), _as_bitsandbytes(quant_state))
    else:
        result = _decode_in_torch(W, state)
    result = result if out is None else out.copy_(result)
    return result.t() if W.size(0) == 1 else result


def _destination(out: Optional[torch.Tensor], shape, dtype, device) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype = dtype, device = device)
    check_out(out, shape, dtype, device)
    return out


def _views(out: torch.Tensor, states: Sequence) -> List[torch.Tensor]:
    """A view of each weight's shape into out; states: anything with numel and shape."""
    parts = out.split([state.numel for state in states])
    return [part.view(state.shape) for part, state in zip(parts, states)]


def _goes_to_bitsandbytes(W: torch.Tensor) -> bool:
    return W.device.type == "cpu" and not INTERPRETED


def dequantize_4bit(
    W: torch.Tensor,
    quant_state,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The dense weight of a bitsandbytes 4-bit weight, in one launch.

    W: packed bytes, [ceil(n / 2), 1] or its transpose [1, ceil(n / 2)], as uint8, or the same
        bytes stored as float16, bfloat16 or float32.
    quant_state: bitsandbytes' QuantState, or its older list form.
    out: where to write, contiguous, of quant_state's shape and dtype and on W's device.

    Returns a tensor of quant_state's shape and dtype, or its transpose where W is transposed, as
    bitsandbytes does. Bit-identical to ``bitsandbytes.functional.dequantize_4bit`` on CUDA. CPU
    tensors go to bitsandbytes' CPU operator. Works under torch.compile(fullgraph = True) and in
    CUDA graphs.

    Raises ValueError or TypeError, before anything is launched, for a quant_type, blocksize, dtype,
    shape, length, layout or device that does not fit; RuntimeError on devices without the kernel.
    """
    if _goes_to_bitsandbytes(W):
        return _on_cpu(W, quant_state, out)
    if is_compiling():
        state = read_quant_state(quant_state)
        out = _destination(out, state.shape, state.dtype, W.device)
        decode_traced([W], [state], out.view(-1))
    else:
        plan = plan_for(W, quant_state)
        out = _destination(out, plan.shape, plan.dtype, plan.device)
        if plan.numel:
            plan.launch(W, W.data_ptr(), out)
    return out.t() if W.size(0) == 1 else out


def dequantize_4bit_many(
    weights: Sequence[torch.Tensor],
    quant_states: Sequence,
    out: Optional[torch.Tensor] = None,
) -> List[torch.Tensor]:
    """Several 4-bit weights (Q, K and V; gate and up) in one launch, into one buffer.

    weights, quant_states: as for dequantize_4bit, all of one dtype and device. Neighbours of one
        quant_type, blocksize and nesting share a launch, up to four at a time.
    out: 1-D buffer for all elements, of that dtype and device.

    Returns a list of views into the buffer, each of its weight's shape, one after another without
    gaps, so that weights of one width are also one tall matrix: ``out.view(-1, width)``.
    Raises as dequantize_4bit does, and ValueError for lists of different lengths, or of mixed
    dtypes or devices.
    """
    weights, quant_states = list(weights), list(quant_states)
    if not weights or len(weights) != len(quant_states):
        raise ValueError(
            f"dequantize_4bit_many: {len(weights)} weights and {len(quant_states)} quant states; "
            "pass one quant state for each of at least one weight."
        )
    if is_compiling() or _goes_to_bitsandbytes(weights[0]):
        states = [read_quant_state(quant_state) for quant_state in quant_states]
        check_one_kind([W.device for W in weights], [state.dtype for state in states])
        total = sum(state.numel for state in states)
    else:
        states = [plan_for(W, quant_state) for W, quant_state in zip(weights, quant_states)]
        group = group_for(states)
        total = group.total
    out = _destination(out, (total,), states[0].dtype, weights[0].device)
    views = _views(out, states)
    if _goes_to_bitsandbytes(weights[0]):
        for W, quant_state, view in zip(weights, quant_states, views):
            _on_cpu(W, quant_state, view)
    elif is_compiling():
        decode_traced(weights, states, out)
    else:
        group.launch(weights, out)
    return [view.t() if W.size(0) == 1 else view for W, view in zip(weights, views)]


def replace_fast_dequantize(stock):
    """``unsloth.kernels.utils.fast_dequantize`` on these kernels, with ``stock`` behind them.

    Serves bitsandbytes 4-bit weights (QuantState or its list form, NF4 and FP4) on NVIDIA GPUs and
    the CPU. Everything else goes to stock: dense weights, FP8, NVFP4, Int4 and packed states, xpu,
    npu and hip, and all of it where UNSLOTH_BNB_TRITON=0 switched Unsloth's own kernels off. A
    kernel that Triton cannot compile falls back to stock for good, with one warning.

    Raises NotImplementedError if stock's module lacks the scratch buffers that
    ``use_global_buffer`` shares with it.
    """
    names = stock.__globals__
    needed = ("_SCRATCH", "_scratch", "_can_use_scratch", "_USE_NF4_KERNELS", "bnb_functional")
    missing = [name for name in needed if name not in names]
    if missing:
        raise NotImplementedError(f"unsloth.kernels.utils has no {', '.join(missing)}")
    bitsandbytes_state = getattr(names["bnb_functional"], "QuantState", ())
    scratch_of, can_use_scratch, buffers = (
        names["_scratch"],
        names["_can_use_scratch"],
        names["_SCRATCH"],
    )
    unavailable = False  # until a launch fails

    def served(W, quant_state) -> bool:
        return (
            isinstance(quant_state, (bitsandbytes_state, list))
            and (W.is_cuda and not HIP or W.device.type == "cpu")
            and names["_USE_NF4_KERNELS"]
        )

    def scratch(plan):
        """Unsloth's shared buffer, viewed as the plan's weight; the plan keeps the view."""
        index = plan.index
        # Nothing is captured on the default stream, 0: can_use_scratch would say yes.
        if index is None or raw_stream(index) and not can_use_scratch(plan.device):
            return plan.empty()
        kept = plan.scratch
        if kept is None or buffers.get(kept[0]) is not kept[1]:
            view = scratch_of("weight", plan.device, plan.numel, plan.dtype).view(plan.shape)
            key = ("weight", index)
            kept = plan.scratch = (key, buffers[key], view)
        return kept[2]

    def to_stock(W, quant_state, out, use_global_buffer, dtype):
        keywords = {} if dtype is None else {"dtype": dtype}  # 2026.10.7 has no dtype
        return stock(W, quant_state, out, use_global_buffer, **keywords)

    @functools.wraps(stock)
    def fast_dequantize(
        W,
        quant_state = None,
        out = None,
        use_global_buffer = False,
        dtype = None,
    ):
        nonlocal unavailable
        plan = None if is_compiling() else getattr(quant_state, PLAN, None)
        address = 0 if plan is None or unavailable else plan.locate(W, quant_state)
        if not address:
            if unavailable or not served(W, quant_state):
                return to_stock(W, quant_state, out, use_global_buffer, dtype)
            if is_compiling() or _goes_to_bitsandbytes(W):
                return dequantize_4bit(W, quant_state, out)
        try:
            if not address:
                plan, address = plan_for(W, quant_state), W.data_ptr()
            if out is not None:
                check_out(out, plan.shape, plan.dtype, plan.device)
                result = out
            else:
                result = scratch(plan) if use_global_buffer else plan.empty()
            if plan.numel:
                plan.launch(W, address, result)
        except DequantizeUnavailable as error:
            unavailable = True
            warnings.warn(f"{error} Unsloth's own kernels take over.", stacklevel = 2)
            return to_stock(W, quant_state, out, use_global_buffer, dtype)
        return result.t() if W.size(0) == 1 else result

    return fast_dequantize
