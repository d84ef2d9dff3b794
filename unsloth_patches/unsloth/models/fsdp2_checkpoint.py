# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Slices of safetensors files, read as they are asked for."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch
from safetensors import safe_open

__all__ = ["Checkpoint"]

_ITEMSIZE = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}


class Checkpoint:
    """Slices of safetensors files by tensor name. `read_bytes` counts what was read."""

    def __init__(self, files: Sequence[str]):
        if not files or any(not str(file).endswith(".safetensors") for file in files):
            raise ValueError(
                "Unsloth: a sharded 4-bit load reads slices of safetensors files, and this "
                "checkpoint has "
                f"{', '.join(map(str, files or ['none']))}. Save it with safe_serialization = "
                "True, or "
                "set UNSLOTH_FSDP2_SHARDED_LOAD=0 to load it whole on every rank."
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
                f"Unsloth: {key!r} is stored as {name}; a sharded 4-bit load reads bfloat16, "
                "float16, float32 "
                "and bitsandbytes' uint8. Set UNSLOTH_FSDP2_SHARDED_LOAD=0 to load it whole."
            )
        return _ITEMSIZE[name]

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        value = self._files[key].get_slice(key)[start:stop]
        self.read_bytes += value.numel() * value.element_size()
        return value

    def whole(self, key: str) -> torch.Tensor:
        """The tensor, mapped from the file: its pages are read when they are touched."""
        return self._files[key].get_tensor(key)
