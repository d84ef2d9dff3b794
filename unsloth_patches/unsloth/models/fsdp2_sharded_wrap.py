# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""``shard_model`` of a sharded 4-bit load: before it placeholders that FSDP2 can cut, behind it the shards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, Callable, List

import torch

from .fsdp2_sharded_4bit import LOAD_WHOLE, LOADED_OVER, mesh_ranks, refuse_forward
from .fsdp2_sharded_load import HOST_TABLE
from .fsdp2_sharded_params import Linear4bit, Params4bit, WeightShard, fsdp_params, get_shard

__all__ = ["install_4bit_shards", "take_4bit_shards"]


def take_4bit_shards(stock: Callable) -> Callable:
    """Decorator of ``begin_shard``, ``shard_model``'s first step: sharded 4-bit weights become
    placeholders that FSDP2 can cut.
    """

    @functools.wraps(stock)
    def begin_shard(model, mesh, config):
        modules = _sharded_modules(model)
        if not modules:
            return stock(model, mesh, config)
        from unsloth.models.fsdp2_qlora import patch_fsdp2_params4bit

        _check_wrap(model, mesh, config)
        patched, reason = patch_fsdp2_params4bit()
        if not patched:
            raise RuntimeError(f"Unsloth: this torch cannot shard 4-bit weights: {reason}")
        _register_context()
        _unguard_forward(model)
        device = torch.device("cpu") if config.cpu_offload else modules[0].weight.device
        pending = _take_tables(model, mesh, device)
        for module in modules:
            shard = pending[(id(module), "weight")] = get_shard(module)
            module._parameters["weight"] = shard.layout.placeholder()
        return pending, dataclasses.replace(config, shard_frozen = True, fit_layout = False)

    return begin_shard


def install_4bit_shards(stock: Callable) -> Callable:
    """Decorator of ``finish_shard``, ``shard_model``'s last step: what this rank read becomes the
    local tensors of the FSDP2 parameters.
    """

    @functools.wraps(stock)
    def finish_shard(model, pending):
        shards = {key: value for key, value in pending.items() if isinstance(value, WeightShard)}
        tables = {key: value for key, value in pending.items() if key not in shards}
        count = _install(model, shards)
        return count + stock(model, tables)

    return finish_shard


def _install(model: torch.nn.Module, shards: dict) -> int:
    if not shards:
        return 0
    left = dict(shards)
    for fsdp_param in fsdp_params(model):
        info = fsdp_param._module_info
        shard = left.pop((id(info.module), info.param_name), None)
        if shard is not None:
            shard.install(fsdp_param)
    if left:
        raise RuntimeError(
            f"Unsloth: {len(left)} sharded 4-bit weights are in no FSDP2 unit. Wrap the module that "
            f"holds them, or {LOAD_WHOLE}."
        )
    return len(shards)


def _sharded_modules(model: torch.nn.Module) -> List[Linear4bit]:
    found = [module for module in model.modules() if get_shard(module) is not None]
    strangers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
        and isinstance(module.weight, Params4bit)
        and get_shard(module) is None
    ]
    if found and strangers:
        raise RuntimeError(
            f"Unsloth: {strangers[0]!r} is a 4-bit layer beside sharded ones that this load did not "
            f"make (a copy by modules_to_save, or an added layer). To train it, {LOAD_WHOLE}."
        )
    return found


def _check_wrap(model: torch.nn.Module, mesh: Any, config: Any) -> None:
    if config.shard_placement_fn is not None:
        raise RuntimeError(
            "Unsloth: sharded 4-bit weights are cut on rows. Leave shard_placement_fn out, or "
            f"{LOAD_WHOLE}."
        )
    found = (m.__dict__[LOADED_OVER] for m in model.modules() if LOADED_OVER in m.__dict__)
    loaded = next(found, None)
    if loaded != mesh_ranks(mesh):
        raise RuntimeError(
            f"Unsloth: this model was loaded over the ranks {loaded}, and the wrap shards over "
            f"{mesh_ranks(mesh)}. Give sharded_4bit_loading and FSDP2Config the same mesh."
        )
    for name, lora in _lora_configs(model).items():
        start, what = getattr(lora, "init_lora_weights", True), ""
        if getattr(lora, "use_dora", False):
            what = "use_dora = True"
        elif start not in (True, False, "gaussian", "orthogonal"):
            what = f"init_lora_weights = {start!r}"
        if what:
            raise ValueError(
                f"Unsloth: adapter {name!r} has {what}, which reads whole base weights, and a rank has "
                f"its shard only. Use plain LoRA, or {LOAD_WHOLE}."
            )
    ignored = {id(p) for p in config.ignored_params or ()}
    if any(id(p) in ignored for m in model.modules() if get_shard(m) for p in m.parameters(False)):
        raise RuntimeError(
            "Unsloth: ignored_params names a sharded 4-bit weight, which no rank holds whole. Leave it "
            f"out, or {LOAD_WHOLE}."
        )


def _lora_configs(model: torch.nn.Module) -> dict:
    found = {}
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):
            found.update(configs)
    return found


def _take_tables(model: torch.nn.Module, mesh: Any, device: torch.device) -> dict:
    """Embedding and head: this rank's rows on the device, a full-size placeholder in the model.

    Entries are what upstream's ``finish_shard`` installs: (rows, {shape, world}).
    """
    pending, seen = {}, {}
    world, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not getattr(parameter, HOST_TABLE, False):
                continue
            if id(parameter) not in seen:
                size = -(-parameter.shape[0] // world)
                rows = parameter.detach()[rank * size : (rank + 1) * size]
                # A copy even on the CPU: a view would keep the whole table alive.
                rows = rows.to(device, copy = True)
                meta = torch.nn.Parameter(
                    torch.empty_like(parameter, device = "meta"),
                    requires_grad = parameter.requires_grad,
                )
                entry = (rows, {"shape": tuple(parameter.shape), "world": world})
                seen[id(parameter)] = (parameter, meta, entry)
            _, module._parameters[name], pending[(id(module), name)] = seen[id(parameter)]
    return pending


def _register_context() -> None:
    """torch before 2.12 makes sharded parameters trainable for a moment, which uint8 cannot be."""
    from unsloth.models.fsdp2_native import register_shard_context
    from unsloth.models.fsdp2_qlora import nonfloat_param_guard

    def context(model, param_dtype = None):
        if any(get_shard(module) is not None for module in model.modules()):
            return nonfloat_param_guard(model)
        return contextlib.nullcontext()

    register_shard_context("sharded_4bit", context)


def _unguard_forward(model: torch.nn.Module) -> None:
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is refuse_forward]:
            del hooks[key]
