# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Quantize one rank's rows of a weight as bitsandbytes quantizes the whole weight."""

from __future__ import annotations

from typing import Any, Optional

import torch

from .fsdp2_sharded_params import (
    NESTED_BLOCKSIZE,
    RowLayout,
    ShardedQuantState,
    WeightShard,
    all_gather_rows,
    bnb_functional,
)

__all__ = ["make_state", "quantize_rows"]


def quantize_rows(
    weights: Optional[torch.Tensor],
    layout: RowLayout,
    shape: torch.Size,
    dtype: torch.dtype,
    quant_type: str,
    nested: bool,
    device: torch.device,
    group: Any,
) -> WeightShard:
    """Quantize this rank's weights, flat `[stop - start]` in `dtype` on `device` (None where it has
    none).

    Collective over `group` with nested quantization. The result is bit-identical to the same slice
    of `bitsandbytes.functional.quantize_4bit(whole, compress_statistics = nested)`.
    """
    rows, row = layout.local_rows, layout.row
    packed = torch.zeros(rows, row // 2, dtype = torch.uint8, device = device)
    absmax = torch.zeros(rows, NESTED_BLOCKSIZE, device = device)
    if weights is not None and weights.numel():
        data, state = bnb_functional.quantize_4bit(
            weights, blocksize = layout.blocksize, compress_statistics = False, quant_type = quant_type
        )
        packed.view(-1)[: data.numel()] = data.view(-1)
        absmax.view(-1)[: state.absmax.numel()] = state.absmax
    code = bnb_functional.get_4bit_type(quant_type, device = device)
    if not nested:
        state = make_state(layout, shape, dtype, quant_type, code, absmax, None, None, None)
        return WeightShard(layout, packed, absmax, None, state)
    # The mean of the whole absmax, not a mean of means: the order of its additions is part of the
    # bits.
    offset = all_gather_rows(absmax, group).view(-1)[: layout.blocks].mean()
    scales = torch.zeros(rows, NESTED_BLOCKSIZE, dtype = torch.uint8, device = device)
    outer = torch.zeros(rows, 1, device = device)
    count = -(-(layout.stop - layout.start) // layout.blocksize)
    code2 = bnb_functional.create_dynamic_map().to(device)
    if count:
        bytes_, state2 = bnb_functional.quantize_blockwise(
            absmax.view(-1)[:count] - offset, blocksize = NESTED_BLOCKSIZE
        )
        scales.view(-1)[:count] = bytes_
        outer.view(-1)[: state2.absmax.numel()] = state2.absmax
        code2 = state2.code
    state = make_state(layout, shape, dtype, quant_type, code, scales, offset, outer, code2)
    return WeightShard(layout, packed, scales, outer, state)


def make_state(
    layout: RowLayout,
    shape: torch.Size,
    dtype: torch.dtype,
    quant_type: str,
    code: torch.Tensor,
    absmax: torch.Tensor,
    offset: Optional[torch.Tensor],
    nested: Optional[torch.Tensor],
    code2: Optional[torch.Tensor],
) -> ShardedQuantState:
    """The QuantState of a shard. `shape` is the whole weight's, the scales are the shard's until a
    gather.
    """
    state2 = None
    if nested is not None:
        state2 = bnb_functional.QuantState(
            absmax = nested.view(-1), blocksize = NESTED_BLOCKSIZE, code = code2, dtype = torch.float32
        )
    return ShardedQuantState(
        absmax = absmax.view(-1),
        shape = torch.Size(shape),
        code = code,
        blocksize = layout.blocksize,
        quant_type = quant_type,
        dtype = dtype,
        offset = offset,
        state2 = state2,
    )
