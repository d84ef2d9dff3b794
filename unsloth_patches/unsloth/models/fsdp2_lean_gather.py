# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What torch's FSDPParam does at a gather of a sharded 4-bit weight, with less work for the host."""

from __future__ import annotations

import functools
from typing import Any, Tuple

import torch

__all__ = ["SHARD", "lean_class"]

SHARD = "_fsdp2_weight_shard"  # where a Linear4bit keeps its rank's shard
_ALIGNMENT = 256  # bytes; of tensors that are gathered into one storage


class _LeanGather:
    """What torch's FSDPParam does at a gather of a ``PackedShard``, after the first with less work
    for the host: inputs are made once, and one storage for all gathered tensors is freed and
    allocated.
    """

    _inputs: Tuple[Any, Any] = (None, None)
    _gathered: Any = None

    @property
    def all_gather_inputs(self):
        local = self.sharded_param._local_tensor
        if not hasattr(self, "_unsharded_param"):
            return super().all_gather_inputs
        shard = _shard_of(self)
        if self.offload_to_cpu:
            # One copy for bytes and scales, on the stream of the gather that asks.
            return shard.host.to(self.device, non_blocking = True).split(shard.sizes())
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
    """``stock`` (torch's FSDPParam) with ``_LeanGather``; ``stock`` itself where it is not as known
    here.
    """
    names = [name for name in vars(_LeanGather) if not name.startswith("_")]
    if issubclass(stock, _LeanGather) or not all(hasattr(stock, name) for name in names):
        return stock
    return type(stock.__name__, (_LeanGather, stock), {})
