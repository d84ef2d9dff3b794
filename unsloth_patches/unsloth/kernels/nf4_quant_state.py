# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""bitsandbytes' 4-bit quant states, read and checked before a kernel is launched on them."""

import math
from typing import NamedTuple, Optional, Tuple

import torch

from .nf4_dequantize_kernel import CHUNK

QUANT_TYPES = ("nf4", "fp4")
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


class State(NamedTuple):
    """A 4-bit quant state of either form, its tensors untouched.

    absmax: uint8 if double quantized, else float32; one per block of ``blocksize`` elements.
    absmax2, code2 [256], offset: the second level, float32; None, and blocksize2 0, without one.
    """

    absmax: torch.Tensor
    shape: Tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    absmax2: Optional[torch.Tensor]
    code2: Optional[torch.Tensor]
    offset: Optional[object]
    blocksize2: int

    @property
    def nested(self) -> bool:
        return self.absmax2 is not None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_quant_state(quant_state) -> State:
    """State of a bitsandbytes QuantState, or of its older list form
    [absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type, code]."""
    if type(quant_state) is list:
        absmax, shape, dtype, blocksize, second, quant_type = quant_state[:6]
        offset, state2 = second if second is not None else (None, None)
    else:
        absmax, shape, dtype = quant_state.absmax, quant_state.shape, quant_state.dtype
        blocksize, quant_type = quant_state.blocksize, quant_state.quant_type
        offset, state2 = quant_state.offset, quant_state.state2
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "dequantize_4bit: this weight was repacked for bitsandbytes' CPU inference kernel"
                " (packing_format_for_cpu is set), which no dequantize function reads. Repack it "
                "with bitsandbytes.functional._convert_weight_packed_for_cpu_inverse, or load the"
                " model again."
            )
    if state2 is None:
        return State(absmax, shape, dtype, blocksize, quant_type, None, None, None, 0)
    if type(state2) is list:
        absmax2, code2, blocksize2 = state2[:3]
    else:
        absmax2, code2, blocksize2 = state2.absmax, state2.code, state2.blocksize
    return State(absmax, shape, dtype, blocksize, quant_type, absmax2, code2, offset, blocksize2)


def _is_power_of_two(value) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0


def packed_bytes(W: torch.Tensor, numel: int) -> int:
    """Bytes that W must hold for ``numel`` elements: two a byte, filled up to W's own dtype."""
    size = W.element_size()
    return -(-((numel + 1) // 2) // size) * size


def check_format(state: State) -> None:
    """Raises ValueError or TypeError unless the kernels know this format."""
    if state.quant_type not in QUANT_TYPES:
        raise ValueError(
            f"dequantize_4bit: quant_type is {state.quant_type!r}; it must be 'nf4' or 'fp4'. "
            "Other formats have functions of their own."
        )
    if state.dtype not in OUT_DTYPES:
        raise TypeError(
            f"dequantize_4bit: quant_state.dtype is {state.dtype}; it must be float16, bfloat16 or"
            " float32. Set it to one of them and convert the result."
        )
    if not _is_power_of_two(state.blocksize) or state.blocksize < CHUNK:
        raise ValueError(
            f"dequantize_4bit: blocksize is {state.blocksize!r}; it must be a power of two, "
            f"{CHUNK} or more (bitsandbytes makes 32, 64, 128, 256, 512, 1024, 2048 and 4096). "
            "Quantize the weight again with one."
        )
    if state.nested and not _is_power_of_two(state.blocksize2):
        raise ValueError(
            f"dequantize_4bit: state2.blocksize is {state.blocksize2!r}; it must be a power of two"
            " (bitsandbytes makes 256). Quantize the weight again."
        )


def check_weight(W: torch.Tensor, state: State) -> None:
    """Raises ValueError or TypeError unless W holds the packed bytes of ``state``."""
    if W.device.type == "meta":
        raise ValueError(
            "dequantize_4bit: the weight is on the meta device, where there are no bytes to "
            "decode. Load its values first (load_state_dict(..., assign = True), or to_empty and "
            "a checkpoint)."
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
    held, needed = W.numel() * W.element_size(), packed_bytes(W, state.numel)
    if held != needed:
        raise ValueError(
            f"dequantize_4bit: the packed weight holds {held} bytes, but shape "
            f"{tuple(state.shape)} packs into {needed}. Pass the weight that belongs to this "
            "quant_state."
        )


def _check_tensor(name, tensor, dtype, numel, device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"dequantize_4bit: {name} is {tensor!r}; it must be a tensor. Quantize the weight "
            "again."
        )
    if tensor.dtype != dtype:
        raise TypeError(
            f"dequantize_4bit: {name} has dtype {tensor.dtype}; it must be {dtype}. Quantize the "
            "weight again."
        )
    if tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(
            f"dequantize_4bit: {name} has {tensor.numel()} elements with strides "
            f"{tuple(tensor.stride())}; it must have {numel}, contiguous. Pass the quant_state "
            "that belongs to this weight."
        )
    if tensor.device != device:
        raise ValueError(
            f"dequantize_4bit: {name} is on {tensor.device} and the weight on {device}. Move both "
            "to one device (quant_state.to(device))."
        )


def check_scales(state: State, device: torch.device) -> None:
    """Raises ValueError or TypeError unless the scales match shape, blocksizes and device."""
    blocks = -(-state.numel // state.blocksize)
    dtype = torch.uint8 if state.nested else torch.float32
    _check_tensor("absmax", state.absmax, dtype, blocks, device)
    if state.nested:
        blocks2 = -(-blocks // state.blocksize2)
        _check_tensor("state2.absmax", state.absmax2, torch.float32, blocks2, device)
        _check_tensor("state2.code", state.code2, torch.float32, 256, device)
        if isinstance(state.offset, torch.Tensor):
            _check_tensor("offset", state.offset, torch.float32, 1, device)
        elif not isinstance(state.offset, (int, float)):
            raise TypeError(
                f"dequantize_4bit: offset is {state.offset!r}; it must be a tensor or a number. "
                "Quantize the weight again."
            )


def check_out(out: torch.Tensor, shape, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless ``out`` is a contiguous tensor of that shape, dtype and device."""
    if tuple(out.shape) != tuple(shape):
        raise ValueError(
            f"dequantize_4bit: out has shape {tuple(out.shape)}; the weight has {tuple(shape)}. "
            "Pass out of that shape, or none."
        )
    if out.dtype != dtype:
        raise ValueError(
            f"dequantize_4bit: out has dtype {out.dtype}; quant_state.dtype is {dtype}. Pass out "
            "of that dtype, or none."
        )
    if out.device != device:
        raise ValueError(
            f"dequantize_4bit: out is on {out.device} and the weight on {device}. Pass out on the "
            "weight's device, or none."
        )
    if not out.is_contiguous():
        raise ValueError(
            f"dequantize_4bit: out has strides {tuple(out.stride())} for shape {tuple(out.shape)};"
            " it must be contiguous."
        )


def check_one_kind(devices, dtypes) -> None:
    """Raises ValueError unless weights of these devices and dtypes can share a buffer."""
    kinds = sorted({f"{dtype} on {device}" for dtype, device in zip(dtypes, devices)})
    if len(kinds) > 1:
        raise ValueError(
            f"dequantize_4bit_many: one buffer cannot hold {' and '.join(kinds)}; call it once for"
            " each device and dtype."
        )
