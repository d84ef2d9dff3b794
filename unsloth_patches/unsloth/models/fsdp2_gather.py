# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Gathers of sharded 4-bit weights: with less work for the host, and from its memory in one copy."""

from __future__ import annotations

import functools
from typing import Any, Dict, Sequence, Tuple

import torch

SHARD = "_fsdp2_weight_shard"  # where a Linear4bit keeps its rank's WeightShard
_ALIGNMENT = 256  # bytes; of tensors that are gathered into one storage


class HostBlock:
    """Moves shards that are gathered together into one buffer of host memory, pinned where ``pin``."""

    def __init__(self, shards: Sequence[Any], pin: bool):
        self._ids = [id(shard) for shard in shards]
        # Each part's size is a multiple of the next one's item size; shards begin aligned.
        self._sizes = [-(-shard.nbytes() // 256) * 256 for shard in shards]
        self._copied: Dict[int, torch.Tensor] = {}
        self._buffer = torch.empty(sum(self._sizes), dtype = torch.uint8, pin_memory = pin)
        for shard, space in zip(shards, self._buffer.split(self._sizes)):
            parts = (shard.packed, *shard.scales())
            pieces = space[: shard.nbytes()].split(shard.sizes())
            moved = [piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts)]
            for target, part in zip(moved, parts):
                target.copy_(part)
            shard.host, shard.packed, shard.absmax = self, *moved[:2]
            shard.nested = None if shard.nested is None else moved[2]
            if not shard.state.gathered:  # it names the device's copies, and would keep them there
                shard.state.absmax = shard.absmax.view(-1)
                if shard.nested is not None:
                    shard.state.state2.absmax = shard.nested.view(-1)

    def begin(self, device: torch.device) -> None:
        """Start the copy to ``device`` on the current stream, which has to be that of the gather."""
        parts = self._buffer.to(device, non_blocking = True).split(self._sizes)
        self._copied = dict(zip(self._ids, parts))

    def take(self, shard: Any, device: torch.device) -> Tuple[torch.Tensor, ...]:
        """The shard's parts as bytes on ``device``; each copy is handed out once."""
        if id(shard) not in self._copied:
            self.begin(device)
        return self._copied.pop(id(shard))[: shard.nbytes()].split(shard.sizes())


class _LeanGather:
    """torch's FSDPParam whose inputs are made once, with one storage for all gathered tensors."""

    _inputs: Tuple[Any, Any] = (None, None)
    _gathered: Any = None

    @property
    def all_gather_inputs(self):
        local = self.sharded_param._local_tensor
        if not hasattr(self, "_unsharded_param"):
            return super().all_gather_inputs
        shard = _shard_of(self)
        if self.offload_to_cpu:
            # One copy for the block, on the stream of the gather that asks or of the one before.
            return shard.host.take(shard, self.device)
        if self._inputs[0] is not local:
            parts = (local.as_subclass(torch.Tensor), *shard.scales())
            self._inputs = (local, [part.view(-1) for part in parts])
        return self._inputs[1]

    def init_all_gather_outputs(self, numels, dtypes, world_size, device, *args, **kwargs):
        if self.all_gather_outputs:  # type: ignore[has-type]
            return
        sizes = [numel * world_size * dtype.itemsize for numel, dtype in zip(numels, dtypes)]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        whole = torch.empty(sum(padded), dtype = torch.uint8, device = device)
        parts = zip(torch.split(whole, padded), sizes, dtypes)
        self.all_gather_outputs = [part[:size].view(dtype) for part, size, dtype in parts]
        self._gathered = whole.untyped_storage()
        self._gathered_size = sum(padded)

    def alloc_all_gather_outputs(self):
        if self._gathered.size() == 0:
            self._gathered.resize_(self._gathered_size)

    def free_unsharded_param(self):
        if self._gathered is not None and self._gathered.size() != 0:
            self._gathered.resize_(0)

    def init_unsharded_param(self):
        if hasattr(self, "_unsharded_param"):
            _shard_of(self).set_gathered(self.all_gather_outputs[1:])
        else:
            super().init_unsharded_param()


def _shard_of(fsdp_param: Any) -> Any:
    return fsdp_param._module_info.module.__dict__[SHARD]


@functools.lru_cache(maxsize = None)
def lean_class(stock: type) -> type:
    """``stock`` (torch's FSDPParam) with ``_LeanGather``, or alone where it is not as known here."""
    names = [name for name in vars(_LeanGather) if not name.startswith("_")]
    if issubclass(stock, _LeanGather) or not all(hasattr(stock, name) for name in names):
        return stock
    return type(stock.__name__, (_LeanGather, stock), {})
