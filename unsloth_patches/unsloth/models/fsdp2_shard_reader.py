# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One rank's part of a weight, read from safetensors files: 16-bit, or quantized by bitsandbytes."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Any, List, Optional, Sequence, Tuple, Union

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

__all__ = ["ShardReader", "StoredWeight"]

_ITEMSIZE = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}


class ShardReader:
    """Slices of safetensors files by tensor name, for several threads at once."""

    def __init__(self, files: Sequence[str]):
        if not files or any(not str(file).endswith(".safetensors") for file in files):
            raise ValueError(
                "Unsloth: 4-bit shards are read as slices of safetensors files, and this checkpoint has "
                f"{', '.join(map(str, files or ['none']))}. Save it with safe_serialization = True."
            )
        self._files = {}
        self._read: List[int] = []
        for file in files:
            handle = safe_open(str(file), framework = "pt", device = "cpu")
            for key in handle.keys():
                self._files[key] = handle

    @property
    def read_bytes(self) -> int:
        """Read by ``rows`` so far."""
        return sum(self._read)

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
        self._read.append(value.numel() * value.element_size())
        return value

    def whole(self, key: str) -> torch.Tensor:
        """The tensor, mapped from the file: its pages are read when they are touched."""
        return self._files[key].get_tensor(key)


def packed_key(key: str, reader: ShardReader) -> Optional[str]:
    """The name of a pre-quantized weight's description in the files; None for a 16-bit weight."""
    names = [f"{key}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    return next((name for name in names if name in reader), None)


@dataclass
class StoredWeight:
    """``module``'s weight in the files, under ``key``: which part of it this rank of ``mesh`` needs,
    and how to get it. dtype: the 16-bit dtype that it is quantized from.
    """

    module: InitVar[Linear4bit]
    key: str
    reader: ShardReader
    mesh: Any
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self, module):
        self.described = packed_key(self.key, self.reader)
        weight, blocksize = module.weight, getattr(module.weight, "blocksize", None) or 64
        if self.described is not None:  # a quantized file has a blocksize of its own
            blocksize = unpack_tensor_to_dict(self.reader.whole(self.described))["blocksize"]
        self.layout = RowLayout(
            numel = module.out_features * module.in_features,
            world = self.mesh.size(self.mesh.ndim - 1),
            rank = self.mesh.get_local_rank(self.mesh.ndim - 1),
            blocksize = blocksize,
        )
        self.format = WeightFormat(
            shape = torch.Size((module.out_features, module.in_features)),
            dtype = self.dtype,
            quant_type = getattr(weight, "quant_type", "nf4"),
            nested = bool(getattr(weight, "compress_statistics", True)),
        )

    def read(self) -> Union[torch.Tensor, WeightShard]:
        """This rank's part: its shard where the file is quantized already, else the weights as they
        are stored, for ``quantize``. No other rank is needed.
        """
        if self.described is not None:
            return _read_packed(self)
        flat = _read_flat(self)
        if self.device.type == "cpu":
            return flat
        # So far nothing but a mapping of the file. Page-locked, it gets to the device while the next
        # is read.
        return torch.empty(flat.shape, dtype = flat.dtype, pin_memory = True).copy_(flat)

    def quantize(self, part: Optional[torch.Tensor]) -> WeightShard:
        """The shard of what ``read`` gave, None on a rank that failed. Collective, as ``load`` is."""
        return quantize_rows(part, self.layout, self.format, self.device, shard_group(self.mesh))

    def load(self) -> WeightShard:
        """``read`` and ``quantize`` at once. A read error is raised after the collective, so that no
        rank waits.
        """
        if self.described is not None:
            return self.read()
        part, error = None, None
        try:
            part = self.read()
        except Exception as problem:
            error = problem
        shard = self.quantize(part)
        if error is not None:
            raise error
        return shard


def _read_flat(weight: StoredWeight) -> torch.Tensor:
    """Weights [start, stop) of the flattened matrix: the rows that hold them, cut at both ends."""
    layout, columns = weight.layout, weight.format.shape[1]
    first, last = layout.start // columns, -(-layout.stop // columns)
    flat = weight.reader.rows(weight.key, first, last).reshape(-1)
    return flat[layout.start - first * columns : layout.stop - first * columns].contiguous()


def _read_packed(weight: StoredWeight) -> WeightShard:
    """Slices of a pre-quantized weight: no arithmetic, so no other rank either."""
    key, reader, layout, device = weight.key, weight.reader, weight.layout, weight.device
    shape = weight.format.shape
    values = unpack_tensor_to_dict(reader.whole(weight.described))
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
