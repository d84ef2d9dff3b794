# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Saving a model of sharded 4-bit weights: rank 0 sees whole weights with whole QuantStates
meanwhile.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from typing import Any, Callable, Iterator, List, Tuple

import torch

from .fsdp2_gather import SHARD
from .fsdp2_sharded_params import (
    NESTED_BLOCKSIZE,
    WeightShard,
    all_gather_rows,
    bnb_functional,
    get_shard,
    mesh_device,
    shard_group,
)

__all__ = ["gather_4bit_on_host", "gather_with_scales", "restore_sharded_states"]

_gathered_states: contextvars.ContextVar = contextvars.ContextVar("gathered_states", default = None)


def gather_with_scales(stock: Callable) -> Callable:
    """Decorator of ``_gather_full``: a sharded 4-bit weight comes without padding, and with the
    whole QuantState.
    """

    @functools.wraps(stock)
    def _gather_full(param, DTensor):
        shard = getattr(param, SHARD, None)
        if shard is None:
            return stock(param, DTensor)
        sharded = getattr(param, "quant_state", None)
        packed, param.quant_state = _gather_weight(shard, param.device_mesh)
        saved = _gathered_states.get()
        if saved is not None:
            saved.append((param, sharded))
        return packed

    return _gather_full


def restore_sharded_states(stock: Callable) -> Callable:
    """Decorator of ``fsdp2_gathered``, the context of every save: afterwards each sharded weight
    has its own, sharded QuantState again.
    """

    @contextlib.contextmanager
    @functools.wraps(stock)
    def fsdp2_gathered(*args, **kwargs) -> Iterator[Any]:
        if _gathered_states.get() is not None:
            with stock(*args, **kwargs) as writer:
                yield writer
            return
        saved: List[Any] = []
        token = _gathered_states.set(saved)
        try:
            with stock(*args, **kwargs) as writer:
                yield writer
        finally:
            _gathered_states.reset(token)
            for param, state in saved:
                param.quant_state = state

    return fsdp2_gathered


def gather_4bit_on_host(stock: Callable) -> Callable:
    """Decorator of ``native_full_state_dict``: sharded 4-bit weights come whole, with bitsandbytes'
    entries, in host memory.

    FSDP2's own collects the local tensors, which are packed bytes without their scales. Trainer
    saves of an adapter need no full state dict; ``accelerator.get_state_dict`` does.
    """

    @functools.wraps(stock)
    def native_full_state_dict(
        model,
        trainable_only = False,
        cpu_offload = True,
    ):
        if trainable_only or all(get_shard(module) is None for module in model.modules()):
            return stock(model, trainable_only = trainable_only, cpu_offload = cpu_offload)
        if not cpu_offload:
            raise ValueError(
                "Unsloth: a full state dict of sharded 4-bit weights is gathered in host memory, one "
                "weight after the other; leave cpu_offload = True."
            )
        from unsloth.models.fsdp2_save import fsdp2_gathered

        with fsdp2_gathered(model, offload_4bit = True) as writer:
            if not writer:
                return {}
            return {name: _to_host(value) for name, value in model.state_dict().items()}

    return native_full_state_dict


def _to_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _gather_weight(shard: WeightShard, mesh: Any) -> Tuple[torch.Tensor, Any]:
    """Collective over the mesh's shard ranks: (packed uint8 ``(bytes, 1)``, QuantState), as one GPU
    has.
    """
    group, state, layout = shard_group(mesh), shard.state, shard.layout
    device, tensors = mesh_device(mesh), (shard.packed, *shard.scales())
    packed, absmax, *nested = [all_gather_rows(t.to(device), group).view(-1) for t in tensors]
    state2 = None
    if nested:
        state2 = bnb_functional.QuantState(
            absmax = nested[0][: layout.nested_blocks].clone(),
            code = state.state2.code,
            blocksize = NESTED_BLOCKSIZE,
            dtype = state.state2.dtype,
        )
    whole = bnb_functional.QuantState(
        absmax = absmax[: layout.blocks].clone(),
        shape = state.shape,
        code = state.code,
        blocksize = state.blocksize,
        quant_type = state.quant_type,
        dtype = state.dtype,
        offset = state.offset,
        state2 = state2,
    )
    return packed[: layout.packed_bytes].view(-1, 1).clone(), whole
