# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Plans: a quant state is checked once, and later calls on it cost as little host time as they can.

A later call compares identities, reads addresses and launches the compiled kernel directly.
"""

from typing import Sequence

import torch

from .nf4_dequantize_kernel import CHUNK
from .nf4_launch import (
    HIP,
    INTERPRETED,
    DequantizeUnavailable,
    alignment,
    arguments_of,
    current_device,
    groups_of,
    launch,
    profiled,
    raw_stream,
    relaunch,
    settings,
    start_bits,
)
from .nf4_quant_state import (
    State,
    check_format,
    check_one_kind,
    check_scales,
    check_weight,
    packed_bytes,
    read_quant_state,
)

PLAN = "_dequantize_plan"  # where a quant state keeps its Plan


class Plan:
    """A checked quant state, and what launching it takes; kept on the quant state itself.

    Copies and pickles of the quant state drop it (it holds loaded kernels).
    """

    __slots__ = (
        "absmax", "shape", "dtype", "numel", "format", "offset", "state2", "absmax2", "code2",
        "tensors", "device", "index", "prototype", "bytes", "address", "tiles", "compiled",
        "scratch", "group",
    )  # fmt: skip

    def __init__(self, W: torch.Tensor, quant_state, state: State):
        self.absmax, self.shape, self.dtype = state.absmax, state.shape, state.dtype
        self.absmax2, self.code2, self.offset = state.absmax2, state.code2, state.offset
        self.state2 = getattr(quant_state, "state2", None)
        self.numel = state.numel
        self.format = (state.quant_type, state.blocksize, state.blocksize2)
        self.tensors = scale_tensors(state, W.device)
        self.device, self.index = W.device, W.device.index
        self.bytes, self.address = packed_bytes(W, state.numel), W.data_ptr()
        self.tiles = -(-self.numel // (settings(self.index)[0] * CHUNK))
        self.compiled, self.scratch, self.group = {}, None, None
        with torch.inference_mode(False):
            self.prototype = torch.empty(0, dtype = state.dtype, device = W.device)

    def __reduce__(self):
        return (type(None), ())

    def locate(self, W: torch.Tensor, quant_state) -> int:
        """W's address if this plan still describes W and quant_state, else 0.

        By identity: whoever moves or replaces a part of a quant state assigns another object.
        """
        state2 = self.state2
        quant_type, blocksize, blocksize2 = self.format
        if (
            quant_state.absmax is not self.absmax
            or quant_state.shape is not self.shape
            or quant_state.dtype is not self.dtype
            or quant_state.state2 is not state2
            or quant_state.offset is not self.offset
            or quant_state.quant_type != quant_type
            or quant_state.blocksize != blocksize
        ):
            return 0
        if state2 is not None and (
            state2.absmax is not self.absmax2
            or state2.code is not self.code2
            or state2.blocksize != blocksize2
        ):
            return 0
        address = W.data_ptr()
        if address != self.address:
            # Another address each time where FSDP2 gathers the weight.
            if (
                W.device != self.device
                or W.numel() * W.element_size() != self.bytes
                or not W.is_contiguous()
            ):
                return 0
            self.address = address
        return address

    def empty(self) -> torch.Tensor:
        """A new tensor of the weight's shape, dtype and device (cheaper than torch.empty)."""
        return self.prototype.new_empty(self.shape)

    def launch(self, W: torch.Tensor, address: int, out: torch.Tensor) -> None:
        """Decodes W, which lies at ``address``, into out: contiguous, of this dtype and device."""
        out_address = out.data_ptr()
        align = alignment(address | out_address)
        compiled = self.compiled.get(align)
        if compiled is None or current_device() != self.index or profiled():
            weights = [(W, *self.tensors)]
            self.compiled[align] = launch(
                weights, out, [self.numel], self.format, align, self.index
            )
            return
        # The scales' addresses are read anew: a storage may have been freed and filled again.
        absmax, code2, absmax2, offset = self.tensors
        start, function, metadata, constants = compiled
        start(
            self.tiles, 1, 1, raw_stream(self.index), function, metadata, None, None, None,
            address, absmax.data_ptr(), code2.data_ptr(), absmax2.data_ptr(), offset.data_ptr(),
            out_address, self.numel, *constants,
        )  # fmt: skip


class Group:
    """Plans whose weights are decoded together, one after another; kept on the first of them."""

    __slots__ = ("plans", "numels", "total", "parts", "compiled")

    def __init__(self, plans: Sequence[Plan]):
        check_one_kind([plan.device for plan in plans], [plan.dtype for plan in plans])
        self.plans, self.numels = list(plans), [plan.numel for plan in plans]
        self.total, self.compiled = sum(self.numels), {}
        formats, size = [plan.format for plan in plans], plans[0].dtype.itemsize
        # (slice of the weights, element where it starts, where it stops, byte offsets or-ed)
        self.parts = []
        for part in groups_of(formats, self.numels):
            start = sum(self.numels[: part.start])
            stop = start + sum(self.numels[part])
            self.parts.append((part, start, stop, start_bits(self.numels[part], size)))

    def launch(self, weights: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decodes the weights into out: 1-D, ``total`` elements, of their dtype and device."""
        index = self.plans[0].index
        for part, start, stop, bits in self.parts:
            plans, numels = self.plans[part], self.numels[part]
            target = out if stop - start == self.total else out[start:stop]
            addresses = [W.data_ptr() for W in weights[part]]
            bits |= target.data_ptr()
            for address in addresses:
                bits |= address
            key = (start, alignment(bits))
            compiled = self.compiled.get(key)
            if compiled is None or current_device() != index or profiled():
                tensors = [(W, *plan.tensors) for W, plan in zip(weights[part], plans)]
                self.compiled[key] = launch(tensors, target, numels, plans[0].format, key[1], index)
                continue
            located = [
                (address, *[tensor.data_ptr() for tensor in plan.tensors])
                for address, plan in zip(addresses, plans)
            ]
            chunks = settings(index)[0]
            _, grid, arguments = arguments_of(located, target.data_ptr(), numels, chunks)
            relaunch(compiled, grid, index, arguments)


def group_for(plans: Sequence[Plan]) -> Group:
    """The group of exactly these plans; the first plan keeps the last one that it began."""
    group = plans[0].group
    if group is None or group.plans != plans:  # compares by identity: Plan has no __eq__
        group = plans[0].group = Group(plans)
    return group


def scale_tensors(state: State, device: torch.device):
    """(absmax, code2, absmax2, offset) for the kernels; absmax fills what a flat state lacks."""
    if not state.nested:
        return (state.absmax,) * 4
    offset = state.offset
    if not isinstance(offset, torch.Tensor):
        offset = torch.full((1,), float(offset), dtype = torch.float32, device = device)
    return state.absmax, state.code2, state.absmax2, offset


def plan_for(W: torch.Tensor, quant_state) -> Plan:
    """The quant state's plan, made and checked first if it has none that still fits."""
    plan = getattr(quant_state, PLAN, None)
    if plan is not None and plan.locate(W, quant_state):
        return plan
    state = read_quant_state(quant_state)
    check(W, state)
    plan = Plan(W, quant_state, state)
    if type(quant_state) is not list and type(plan.state2) is not list:
        setattr(quant_state, PLAN, plan)
    return plan


def check(W: torch.Tensor, state: State) -> None:
    """Raises unless the kernels can decode W: see nf4_quant_state, and DequantizeUnavailable."""
    check_format(state)
    check_weight(W, state)
    if not (W.is_cuda and not HIP) and not (INTERPRETED and W.device.type == "cpu"):
        raise DequantizeUnavailable(
            f"dequantize_4bit: the weight is on {W.device}, where the kernel was never tested. Use "
            "bitsandbytes.functional.dequantize_4bit there."
        )
    check_scales(state, W.device)
