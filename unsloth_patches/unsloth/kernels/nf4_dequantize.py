# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Dequantize any bitsandbytes 4-bit weight in one Triton launch.

``dequantize_4bit`` is bit-identical to ``bitsandbytes.functional.dequantize_4bit`` on CUDA, which
needs three launches for a double quantized weight (QLoRA, https://arxiv.org/abs/2305.14314). NF4 and
FP4, flat or double quantized, float16, bfloat16 and float32, any element count. The codebook is
bitsandbytes' own constant, not ``quant_state.code``, as in its CUDA kernels.

A quant state is read and checked once. Its ``Plan`` stays on it: later calls compare identities, read
addresses and launch.
"""

import functools
import math
from typing import Optional, Tuple

import torch

from .nf4_decode import FP4_CODE, NF4_CODE
from .nf4_dequantize_kernel import CHUNK, HIP, INTERPRETED, DequantizeUnavailable, launch_for

__all__ = ["dequantize_4bit"]

PLAN = "_dequantize_plan"  # where a quant state keeps its Plan
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORAGE_DTYPES = (torch.uint8, *OUT_DTYPES)
is_compiling = torch.compiler.is_compiling


class Plan:
    """A 4-bit weight's quant state, read and checked, and the launch that decodes it.

    absmax: uint8 if double quantized, else float32; one per block of ``blocksize`` elements.
    absmax2, code2 [256], offset: the second level, float32; None, and blocksize2 0, without one.
    Copies and pickles of a quant state drop its plan (it holds a loaded kernel).
    """

    def __init__(self, W: torch.Tensor, quant_state):
        """Raises ValueError, TypeError or DequantizeUnavailable for what cannot be decoded."""
        if type(quant_state) is list:
            # [absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type, code]
            absmax, shape, dtype, blocksize, second, quant_type = quant_state[:6]
            offset, state2 = second if second is not None else (None, None)
        else:
            absmax, shape, dtype = quant_state.absmax, quant_state.shape, quant_state.dtype
            blocksize, quant_type = quant_state.blocksize, quant_state.quant_type
            offset, state2 = quant_state.offset, quant_state.state2
            _check_not_repacked(quant_state)
        absmax2, code2, blocksize2 = None, None, 0
        if type(state2) is list:
            absmax2, code2, blocksize2 = state2[:3]
        elif state2 is not None:
            absmax2, code2, blocksize2 = state2.absmax, state2.code, state2.blocksize
        self.absmax, self.absmax2, self.code2, self.offset = absmax, absmax2, code2, offset
        self.shape, self.dtype, self.quant_type = shape, dtype, quant_type
        self.state2, self.blocksize, self.blocksize2 = state2, blocksize, blocksize2
        self.numel, self.device = math.prod(shape), W.device
        _check_format(self)
        _check_weight(W, self)
        _check_scales(self)

    def __reduce__(self):
        return (type(None), ())

    def scales(self) -> Tuple[torch.Tensor, ...]:
        """(absmax, code2, absmax2, offset) for the kernel; absmax fills what a flat state lacks."""
        if self.absmax2 is None:
            return (self.absmax,) * 4
        offset = self.offset
        if not isinstance(offset, torch.Tensor):
            offset = torch.full((1,), float(offset), dtype = torch.float32, device = self.device)
        return self.absmax, self.code2, self.absmax2, offset

    def keep(self, W: torch.Tensor, quant_state) -> "Plan":
        """Prepares launches, and stays on the quant state for later calls."""
        self.address, self.bytes = W.data_ptr(), W.nbytes
        self.tensors = self.scales()
        # empty_like of it costs the host half of what torch.empty does.
        self.prototype = _element(self.dtype, self.device).expand(tuple(self.shape))
        self.launch = launch_for(
            self.quant_type,
            self.blocksize,
            self.blocksize2,
            self.numel,
            self.device.index,
            self.dtype,
        )
        if type(quant_state) is not list and type(self.state2) is not list:
            setattr(quant_state, PLAN, self)
        return self

    def locate(self, W: torch.Tensor, quant_state) -> int:
        """W's address if this plan still describes W and quant_state, else 0.

        By identity: whoever moves or replaces a part of a quant state assigns another object. The
        plan holds the parts, so that no other object can get the identity of one.
        """
        state2 = self.state2
        if (
            quant_state.absmax is not self.absmax
            or quant_state.shape is not self.shape
            or quant_state.dtype is not self.dtype
            or quant_state.state2 is not state2
            or quant_state.offset is not self.offset
            or quant_state.quant_type != self.quant_type
            or quant_state.blocksize != self.blocksize
        ):
            return 0
        if state2 is not None and (
            state2.absmax is not self.absmax2
            or state2.code is not self.code2
            or state2.blocksize != self.blocksize2
        ):
            return 0
        address = W.data_ptr()
        if W.nbytes != self.bytes:
            return 0
        if address != self.address:
            # Another one each time where FSDP2 gathers the weight.
            if W.device != self.device or not W.is_contiguous():
                return 0
            self.address = address
        return address


@functools.lru_cache(maxsize = None)
def _element(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(1, dtype = dtype, device = device)


def plan_for(W: torch.Tensor, quant_state) -> Plan:
    """The quant state's plan, made and checked first if it has none that still fits."""
    plan = getattr(quant_state, PLAN, None)
    if plan is not None and plan.locate(W, quant_state):
        return plan
    return Plan(W, quant_state).keep(W, quant_state)


# ---- The function ----------------------------------------------------------------------------


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
    tensors are decoded by PyTorch. Works under torch.compile(fullgraph = True) and in CUDA graphs.

    Raises ValueError or TypeError, before anything is launched, for a quant_type, blocksize, dtype,
    shape, length, layout or device that does not fit; RuntimeError on devices without the kernel.
    """
    eager = not is_compiling() and not goes_to_pytorch(W)
    plan = plan_for(W, quant_state) if eager else Plan(W, quant_state)
    if out is not None:
        check_out(out, plan)
    if goes_to_pytorch(W):
        result = _in_pytorch(W, quant_state, plan)
        out = result if out is None else out.copy_(result)
    else:
        if out is None:
            out = torch.empty(plan.shape, dtype = plan.dtype, device = plan.device)
        if not eager:
            blocksizes = _constant(plan.blocksize), _constant(plan.blocksize2)
            torch.ops.unsloth.dequantize_4bit_(out, W, *plan.scales(), plan.quant_type, *blocksizes)
        elif plan.numel:
            plan.launch.run(W, W.data_ptr(), plan.tensors, out)
    return out.t() if W.size(0) == 1 else out


def goes_to_pytorch(W: torch.Tensor) -> bool:
    return W.device.type == "cpu" and not INTERPRETED


def _in_pytorch(W: torch.Tensor, quant_state, plan: Plan) -> torch.Tensor:
    """bitsandbytes' CPU operator where it is right, else the definition.

    bitsandbytes 0.50.2's AVX512 kernel takes rows for whole blocks: wherever a row is no multiple
    of the blocksize it returns other numbers than its CUDA kernel (and than the format says).
    """
    if plan.shape[-1] % plan.blocksize == 0 and type(quant_state) is not list:
        from bitsandbytes.functional import dequantize_4bit as bitsandbytes_dequantize

        # A transposed W returns a transposed result there; the bytes are the same.
        return bitsandbytes_dequantize(W.view(-1, 1), quant_state)
    packed = W.view(torch.uint8).reshape(-1)[: (plan.numel + 1) // 2]
    nibbles = torch.stack((packed >> 4, packed & 15), dim = 1).reshape(-1)[: plan.numel].long()
    scale = plan.absmax
    if plan.absmax2 is not None:
        scale2 = plan.absmax2.repeat_interleave(plan.blocksize2)[: scale.numel()]
        scale = plan.code2[scale.long()] * scale2 + plan.offset
    scale = scale.repeat_interleave(plan.blocksize)[: plan.numel]
    code = torch.tensor((FP4_CODE if plan.quant_type == "fp4" else NF4_CODE).value)
    return (code[nibbles] * scale).to(plan.dtype).reshape(plan.shape)


def _constant(power: int) -> int:
    """A power of two, or 0, as a constant of the graph: where shapes are dynamic, the numbers of a
    quant state are traced as symbols, and Inductor loses those that are no tensor's size."""
    for shift in range(31):
        if power == 1 << shift:
            return 1 << shift
    return 0


# ---- Checks ----------------------------------------------------------------------------------


def _is_power_of_two(value) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0


def _check_not_repacked(quant_state) -> None:
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "dequantize_4bit: this weight was repacked for bitsandbytes' CPU inference kernel "
            "(packing_format_for_cpu is set), which no dequantize function reads. Repack it with "
            "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse, or load the model again."
        )


def _check_format(plan: Plan) -> None:
    if plan.quant_type not in ("nf4", "fp4"):
        raise ValueError(
            f"dequantize_4bit: quant_type is {plan.quant_type!r}; it must be 'nf4' or 'fp4'. Other "
            "formats have functions of their own."
        )
    if plan.dtype not in OUT_DTYPES:
        raise TypeError(
            f"dequantize_4bit: quant_state.dtype is {plan.dtype}; it must be float16, bfloat16 or "
            "float32. Set it to one of them and convert the result."
        )
    if not _is_power_of_two(plan.blocksize) or plan.blocksize < CHUNK:
        raise ValueError(
            f"dequantize_4bit: blocksize is {plan.blocksize!r}; it must be a power of two, {CHUNK} "
            "or more (bitsandbytes makes 32, 64, 128, 256, 512, 1024, 2048 and 4096). Quantize the "
            "weight again with one."
        )
    if plan.absmax2 is not None and not _is_power_of_two(plan.blocksize2):
        raise ValueError(
            f"dequantize_4bit: state2.blocksize is {plan.blocksize2!r}; it must be a power of two "
            "(bitsandbytes makes 256). Quantize the weight again."
        )


def _check_weight(W: torch.Tensor, plan: Plan) -> None:
    if W.device.type == "meta":
        raise ValueError(
            "dequantize_4bit: the weight is on the meta device, where there are no bytes to decode. "
            "Load its values first (load_state_dict(..., assign = True), or to_empty and a checkpoint)."
        )
    if W.dtype not in STORAGE_DTYPES:
        raise TypeError(
            f"dequantize_4bit: the packed weight has dtype {W.dtype}; it must be uint8, float16, "
            "bfloat16 or float32. View it as uint8."
        )
    if not W.is_contiguous():
        raise ValueError(
            f"dequantize_4bit: the packed weight has strides {tuple(W.stride())} for shape "
            f"{tuple(W.shape)}; its bytes must be contiguous. Pass weight.contiguous()."
        )
    # Two elements a byte, filled up to W's own dtype.
    size = W.element_size()
    needed = -(-((plan.numel + 1) // 2) // size) * size
    held = W.numel() * size
    if held != needed:
        raise ValueError(
            f"dequantize_4bit: the packed weight holds {held} bytes, but shape "
            f"{tuple(plan.shape)} packs into {needed}. Pass the weight that belongs to this "
            "quant_state."
        )
    if W.device.type != "cpu" and (HIP or not W.is_cuda):
        raise DequantizeUnavailable(
            f"dequantize_4bit: the weight is on {W.device}, where the kernel was never tested. Use "
            "bitsandbytes.functional.dequantize_4bit there."
        )


def _check_scales(plan: Plan) -> None:
    blocks = -(-plan.numel // plan.blocksize)
    nested = plan.absmax2 is not None
    _check_scale("absmax", plan.absmax, torch.uint8 if nested else torch.float32, blocks, plan)
    if not nested:
        return
    _check_scale("state2.absmax", plan.absmax2, torch.float32, -(-blocks // plan.blocksize2), plan)
    _check_scale("state2.code", plan.code2, torch.float32, 256, plan)
    if not isinstance(plan.offset, (int, float)):
        _check_scale("offset", plan.offset, torch.float32, 1, plan)


def _check_scale(name: str, tensor, dtype: torch.dtype, numel: int, plan: Plan) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"dequantize_4bit: {name} is {tensor!r}; it must be a tensor. Quantize the weight again."
        )
    if tensor.dtype != dtype:
        raise TypeError(
            f"dequantize_4bit: {name} has dtype {tensor.dtype}; it must be {dtype}. Quantize the "
            "weight again."
        )
    if tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(
            f"dequantize_4bit: {name} has {tensor.numel()} elements with strides "
            f"{tuple(tensor.stride())}; it must have {numel}, contiguous. Pass the quant_state that "
            "belongs to this weight."
        )
    if tensor.device != plan.device:
        raise ValueError(
            f"dequantize_4bit: {name} is on {tensor.device} and the weight on {plan.device}. Move "
            "both to one device (quant_state.to(device))."
        )


def check_out(out: torch.Tensor, plan: Plan) -> None:
    """Raises ValueError unless ``out`` is contiguous and of the weight's shape, dtype and device."""
    for what, given, due in (
        ("has shape", tuple(out.shape), tuple(plan.shape)),
        ("has dtype", out.dtype, plan.dtype),
        ("is on", out.device, plan.device),
    ):
        if given != due:
            raise ValueError(
                f"dequantize_4bit: out {what} {given}; the weight {what} {due}. Pass out like that, "
                "or none."
            )
    if not out.is_contiguous():
        raise ValueError(
            f"dequantize_4bit: out has strides {tuple(out.stride())} for shape {tuple(out.shape)}; "
            "it must be contiguous."
        )
