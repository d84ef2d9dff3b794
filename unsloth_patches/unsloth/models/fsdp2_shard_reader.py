# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One rank's part of a weight, read from safetensors files: 16-bit, or quantized by bitsandbytes."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import torch
from safetensors import safe_open

from .fsdp2_sharded_params import (
    NESTED_BLOCKSIZE,
    Linear4bit,
    RowLayout,
    WeightFormat,
    WeightShard,
    copy_front,
    make_shard,
    quantize_rows,
    shard_group,
    unpack_tensor_to_dict,
)

__all__ = [
    "ShardReader",
    "packed_key",
    "read_weight",
    "weight_format",
    "weight_layout",
]

_ITEMSIZE = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}


class ShardReader:
    """Slices of safetensors files by tensor name. ``read_bytes`` counts what was read."""

    def __init__(self, files: Sequence[str]):
        if not files or any(not str(file).endswith(".safetensors") for file in files):
            raise ValueError(
                "Unsloth: 4-bit shards are read as slices of safetensors files, and this checkpoint has "
                f"{', '.join(map(str, files or ['none']))}. Save it with safe_serialization = True."
            )
        self._files = {}
        self.read_bytes = 0
        for file in files:
            handle = safe_open(str(file), framework = "pt", device = "cpu")
            for key in handle.keys():
                self._files[key] = handle

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def keys(self) -> List[str]:
        return list(self._files)

    def shape(self, key: str) -> Tuple[int, ...]:
        return tuple(self._files[key].get_slice(key).get_shape())

    def itemsize(self, key: str) -> int:
        name = self._files[key].get_slice(key).get_dtype()
        if name not in _ITEMSIZE:
            raise ValueError(
                f"Unsloth: {key!r} is stored as {name}; 4-bit shards are read from bfloat16, float16, "
                "float32 and bitsandbytes' uint8. Save the checkpoint in one of them."
            )
        return _ITEMSIZE[name]

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        value = self._files[key].get_slice(key)[start:stop]
        self.read_bytes += value.numel() * value.element_size()
        return value

    def whole(self, key: str) -> torch.Tensor:
        """The tensor, mapped from the file: its pages are read when they are touched."""
        return self._files[key].get_tensor(key)


def packed_key(key: str, reader: ShardReader) -> Optional[str]:
    """The name of a pre-quantized weight's description in the files; None for a 16-bit weight."""
    names = [f"{key}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    return next((name for name in names if name in reader), None)


def weight_layout(module: Linear4bit, key: str, reader: ShardReader, mesh: Any) -> RowLayout:
    """Which part of ``module``'s weight this rank reads; the blocksize is a quantized file's own."""
    described = packed_key(key, reader)
    blocksize = getattr(module.weight, "blocksize", None) or 64
    if described is not None:
        blocksize = unpack_tensor_to_dict(reader.whole(described))["blocksize"]
    return RowLayout(
        numel = module.out_features * module.in_features,
        world = mesh.size(mesh.ndim - 1),
        rank = mesh.get_local_rank(mesh.ndim - 1),
        blocksize = blocksize,
    )


def read_weight(
    module: Linear4bit,
    key: str,
    reader: ShardReader,
    mesh: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> WeightShard:
    """This rank's shard of ``module``'s weight. dtype: the 16-bit dtype that it is quantized from.

    Collective over the shard ranks of ``mesh`` unless the file is quantized already. A read error
    is raised after the collectives, so that no rank waits.
    """
    layout = weight_layout(module, key, reader, mesh)
    shape = torch.Size((module.out_features, module.in_features))
    if packed_key(key, reader) is not None:
        return _read_packed(key, reader, layout, shape, device)
    weights, error = None, None
    try:
        weights = _read_flat(key, reader, layout, module.in_features)
        weights = weights.to(device = device, dtype = dtype)
    except Exception as problem:
        error = problem
    shard = quantize_rows(weights, layout, weight_format(module, dtype), device, shard_group(mesh))
    if error is not None:
        raise error
    return shard


def weight_format(module: Linear4bit, dtype: torch.dtype) -> WeightFormat:
    """What ``module`` asks its weight to be quantized to."""
    return WeightFormat(
        shape = torch.Size((module.out_features, module.in_features)),
        dtype = dtype,
        quant_type = getattr(module.weight, "quant_type", "nf4"),
        nested = bool(getattr(module.weight, "compress_statistics", True)),
    )


def _read_flat(key: str, reader: ShardReader, layout: RowLayout, columns: int) -> torch.Tensor:
    """Weights [start, stop) of the flattened matrix: the rows that hold them, cut at both ends."""
    first, last = layout.start // columns, -(-layout.stop // columns)
    flat = reader.rows(key, first, last).reshape(-1)
    return flat[layout.start - first * columns : layout.stop - first * columns].contiguous()


def _read_packed(
    key: str, reader: ShardReader, layout: RowLayout, shape: torch.Size, device: torch.device
) -> WeightShard:
    """Slices of a pre-quantized weight: no arithmetic, so no other rank either."""
    values = unpack_tensor_to_dict(reader.whole(packed_key(key, reader)))
    if tuple(values["shape"]) != tuple(shape):
        raise ValueError(
            f"{key!r} was quantized with shape {values['shape']}, the model expects {shape}"
        )
    nested = "nested_blocksize" in values
    if nested and values["nested_blocksize"] != NESTED_BLOCKSIZE:
        raise ValueError(
            f"{key!r}: nested blocksize {values['nested_blocksize']}, and only {NESTED_BLOCKSIZE} is "
            "known"
        )
    rows, size = layout.local_rows, reader.itemsize(key)
    packed = torch.zeros(rows, layout.row // 2, dtype = torch.uint8, device = device)
    stored = reader.rows(key, layout.start // 2 // size, -(-layout.stop // 2) // size)
    copy_front(packed, stored.reshape(-1).view(torch.uint8))
    first, last = layout.start // layout.blocksize, -(-layout.stop // layout.blocksize)
    absmax_dtype = torch.uint8 if nested else torch.float32
    absmax = torch.zeros(rows, NESTED_BLOCKSIZE, dtype = absmax_dtype, device = device)
    copy_front(absmax, reader.rows(f"{key}.absmax", first, last))
    scales = None
    if nested:
        outer = torch.zeros(rows, 1, device = device)
        spans = first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE)
        copy_front(outer, reader.rows(f"{key}.nested_absmax", *spans))
        offset = torch.tensor(float(values["nested_offset"]), device = device)
        scales = (outer, reader.whole(f"{key}.nested_quant_map").to(device), offset)
    stored_format = WeightFormat(
        shape, getattr(torch, values["dtype"]), values["quant_type"], nested
    )
    code = reader.whole(f"{key}.quant_map").to(device)
    return make_shard(layout, stored_format, packed, absmax, code, scales)
