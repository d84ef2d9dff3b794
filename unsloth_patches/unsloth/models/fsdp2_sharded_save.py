# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Saving a model of sharded 4-bit weights: rank 0 sees whole weights with whole QuantStates for the
time.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from typing import Any, Callable, List

import torch

from .fsdp2_sharded_params import shard_of

__all__ = ["replace_fsdp2_gathered", "replace_gather_full", "replace_native_full_state_dict"]

_gathered_states: contextvars.ContextVar = contextvars.ContextVar("gathered_states", default = None)


def replace_gather_full(stock: Callable) -> Callable:
    """Gathering one parameter for a save: packed bytes without padding, and the whole QuantState."""

    @functools.wraps(stock)
    def _gather_full(param, DTensor):
        state = getattr(param, "quant_state", None)
        shard = getattr(param, "_fsdp2_weight_shard", None)
        if shard is None:
            return stock(param, DTensor)
        packed, whole = shard.gather_whole(param.device_mesh)
        param.quant_state = whole
        saved = _gathered_states.get()
        if saved is not None:
            saved.append((param, state))
        return packed

    return _gather_full


def replace_fsdp2_gathered(stock: Callable) -> Callable:
    """The context of every save: afterwards each sharded weight has its own, sharded state again."""

    @contextlib.contextmanager
    @functools.wraps(stock)
    def fsdp2_gathered(*args, **kwargs):
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


def replace_native_full_state_dict(stock: Callable) -> Callable:
    """A full state dict of sharded 4-bit weights: whole on the host, with bitsandbytes' entries.

    FSDP2's own collects the local tensors, which are packed bytes without their scales. Trainer
    saves of an adapter need no full state dict; `accelerator.get_state_dict` does.
    """

    @functools.wraps(stock)
    def native_full_state_dict(
        model,
        trainable_only = False,
        cpu_offload = True,
    ):
        if trainable_only or all(shard_of(module) is None for module in model.modules()):
            return stock(model, trainable_only = trainable_only, cpu_offload = cpu_offload)
        if not cpu_offload:
            raise ValueError(
                "Unsloth: a full state dict of sharded 4-bit weights is gathered in host memory, "
                "one weight after the other; leave cpu_offload = True."
            )
        from unsloth.models.fsdp2_save import fsdp2_gathered

        with fsdp2_gathered(model, offload_4bit = True) as writer:
            if not writer:
                return {}
            return {name: _on_host(value) for name, value in model.state_dict().items()}

    return native_full_state_dict


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
