# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Put an offload plan into effect on a model that native FSDP2 has sharded.

Only frozen parameters move: their shards to (pinned) host memory, from where every gather copies
them to the device first. FSDP2 has one offload policy for a whole unit; here its flag is set on
single parameters, so LoRA factors, their gradients and the optimizer stay on the device.
"""

from __future__ import annotations

import contextvars
import functools
import os
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

import torch

from .fsdp2_gather import HostBlock
from .fsdp2_memory_count import (
    FRAGMENTATION,
    LORA_TARGETS,
    Training,
    sharded_phases,
    usable_device_memory,
)
from .fsdp2_model_shape import read_shape
from .fsdp2_offload_plan import (
    OFFLOAD_ENV,
    OffloadPlan,
    evenly_spaced,
    offload_override,
    plan_offload,
)
from .fsdp2_sharded_4bit import register_host_chooser
from .fsdp2_sharded_params import WeightShard, fsdp_params, get_shard, param_groups

__all__ = [
    "explain_out_of_memory",
    "offload_blocks",
    "offload_sharded_model",
    "offload_what_does_not_fit",
]

_PLAN = "_fsdp2_offload_plan"
# Tokens of a micro-batch of the Trainer that is being built, and whether it accumulates gradients.
_batch_tokens: contextvars.ContextVar = contextvars.ContextVar("offload_batch_tokens", default = None)
_accumulates: contextvars.ContextVar = contextvars.ContextVar("accumulates", default = False)


def offload_blocks(
    model: torch.nn.Module,
    blocks: Tuple[int, ...],
    tables: bool = False,
    pin: Optional[bool] = None,
) -> int:
    """Move the frozen shards of the decoder blocks ``blocks`` (indices of FSDP2 units in order) to
    host memory, with ``tables`` those of the root unit too (embedding, head, last norm).

    pin: page-locked memory; default: where the mesh is on a GPU. Returns the bytes moved off this
    rank's device. Raises ValueError if ``model`` is not sharded block by block.
    """
    units = list(getattr(model, "_unsloth_fsdp2_units", None) or ())
    if not units or max(blocks, default = -1) >= len(units):
        raise ValueError(
            f"offload_blocks: blocks {blocks} of a model with {len(units)} FSDP2 units; shard it block "
            "by block with unsloth.models.fsdp2_native.shard_model first."
        )
    moved = sum(_to_host(list(_frozen(units[index])), pin) for index in blocks)
    for index in blocks:
        if index:
            _copy_ahead(units[index - 1], units[index])
    if tables:
        inside = {id(p) for unit in units for p in fsdp_params(unit)}
        moved += _to_host([p for p in _frozen(model) if id(p) not in inside], pin)
    return moved


def _copy_ahead(before: torch.nn.Module, unit: torch.nn.Module) -> None:
    """In a forward the copy of ``unit`` begins as soon as ``before`` was gathered, on the stream of
    FSDP2's copies. In a backward FSDP2 itself gathers one unit ahead.
    """
    groups = list(param_groups(unit))

    def begin(module, args):
        if torch._C._current_graph_task_id() != -1:
            return  # a recomputation
        for group in groups:
            # torch makes a parameter's buffers at its first gather, and copies in its own way then.
            first = not all(hasattr(p, "_unsharded_param") for p in group.fsdp_params)
            if first or not group.is_sharded or group._all_gather_result is not None:
                continue
            shards = (_shard(fsdp_param) for fsdp_param in group.fsdp_params)
            hosts = {id(s.host): s.host for s in shards if s is not None and s.on_host}
            with group.device_handle.stream(group.comm_ctx.all_gather_copy_in_stream):
                for host in hosts.values():
                    host.begin(group.device)

    before.register_forward_pre_hook(begin)


def _frozen(module: torch.nn.Module) -> Iterator[Any]:
    return (p for p in fsdp_params(module) if not p.sharded_param.requires_grad)


def _shard(fsdp_param: Any) -> Optional[WeightShard]:
    if fsdp_param._module_info.param_name != "weight":
        return None
    return get_shard(fsdp_param._module_info.module)


def _to_host(params: List[Any], pin: Optional[bool]) -> int:
    """Bytes moved. Vectors, as norms are, stay: their copies would cost more than they hold."""
    params = [p for p in params if p.sharded_param.dim() > 1]
    if not params:
        return 0
    pin = params[0].device.type != "cpu" if pin is None else pin
    shards = [_shard(p) for p in params]
    moved = sum(shard.nbytes() for shard in shards if shard is not None and not shard.on_host)
    held = [shard for shard in shards if shard is not None]
    if len({id(shard.host) for shard in held}) > 1 or moved:  # else a load has put them together
        HostBlock(held, pin)
    for fsdp_param, shard in zip(params, shards):
        if shard is not None:
            attributes = dict(fsdp_param.sharded_param.__dict__)
            shard.install(fsdp_param)
            _restore_attributes(fsdp_param.sharded_param, attributes)
        elif not fsdp_param.offload_to_cpu:
            fsdp_param.offload_to_cpu, fsdp_param.pin_memory = True, pin
            moved += _plain_to_host(fsdp_param, pin)
    return moved


def _plain_to_host(fsdp_param: Any, pin: bool) -> int:
    old = fsdp_param.sharded_param
    data = fsdp_param._sharded_param_data.cpu()
    data = data.pin_memory() if pin else data
    rows = old._local_tensor.shape[0] if old._local_tensor.numel() else 0
    local = data.view(fsdp_param.padded_sharded_param_size)[:rows]
    new = torch.nn.Parameter(fsdp_param.to_sharded_dtensor(local), requires_grad = False)
    _restore_attributes(new, old.__dict__)
    fsdp_param._setattr_on_modules(new)
    fsdp_param.sharded_param = new
    fsdp_param._sharded_param_data = data
    return data.numel() * data.element_size()


def _restore_attributes(parameter: torch.nn.Parameter, attributes: dict) -> None:
    for name, value in attributes.items():
        if name not in ("_local_tensor", "_spec"):
            setattr(parameter, name, value)


def _lora(model: torch.nn.Module) -> Tuple[int, Tuple[str, ...]]:
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict) and configs:
            config = next(iter(configs.values()))
            wanted = config.target_modules
            names = [
                name for name in LORA_TARGETS if not isinstance(wanted, str) and name in wanted
            ]
            return config.r, tuple(names or LORA_TARGETS)
    raise ValueError("the model has no LoRA adapter")


def _say(text: str) -> None:
    import torch.distributed as dist
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"Unsloth: {text}")


def offload_sharded_model(model: torch.nn.Module) -> Optional[OffloadPlan]:
    """Plan from the memory that is there now, print the count, and offload what the plan says.

    Collective over the model's mesh. Returns the plan, or None where there is nothing to decide (a
    layout that replicates frozen weights, a model that the count does not know, a CPU mesh without
    an override). Raises RuntimeError with the count if not even offloading everything is enough.
    """
    mode, count = offload_override()
    mesh = model.__dict__.get("_unsloth_fsdp2_mesh")
    units = getattr(model, "_unsloth_fsdp2_units", None)
    sharded = any(hasattr(p.sharded_param, "quant_state") for p in fsdp_params(model))
    if mode == "never" or mesh is None or not units or not sharded:
        return None
    if mesh.device_type == "cpu":
        if mode == "auto":
            return None  # host memory on both sides: nothing to gain
        offload_blocks(model, evenly_spaced(count or len(units), len(units)), mode == "all")
        return None
    try:
        plan = _plan(model, mesh)
    except ValueError as error:
        _say(f"no offload plan for this model: {error}")
        return None
    model.__dict__[_PLAN] = plan
    _say(f"offload plan for {plan.world} ranks\n{plan.table()}")
    if not plan.fits and mode == "auto":
        raise RuntimeError(
            "Unsloth: this training does not fit, with all frozen weights in host memory too:\n"
            f"{plan.table()}\nUse fewer tokens a step or more ranks; {OFFLOAD_ENV}=all tries it all the "
            "same."
        )
    offload_blocks(model, plan.blocks, plan.tables)
    torch.cuda.empty_cache()
    return plan


def _plan(model: torch.nn.Module, mesh: Any) -> OffloadPlan:
    rank, targets = _lora(model)
    tokens = _batch_tokens.get() or getattr(model, "max_seq_length", None) or 2048
    shards = (get_shard(module) for module in model.modules())
    shard = next((shard for shard in shards if shard is not None), None)
    job = Training(
        world = mesh.size(mesh.ndim - 1),
        tokens = int(tokens),
        lora_rank = rank,
        lora_targets = targets,
        double_quant = shard is None or shard.nested is not None,
        checkpointing = _checkpointing(model),
        accumulates = _accumulates.get(),
    )
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or mesh.size())
    return plan_offload(model, job, mesh, local_world = local_world, on_host = _blocks_on_host(model))


def _blocks_on_host(model: torch.nn.Module) -> Tuple[int, ...]:
    units = model._unsloth_fsdp2_units
    return tuple(
        index
        for index, unit in enumerate(units)
        if any(fsdp_param.offload_to_cpu for fsdp_param in _frozen(unit))
    )


def blocks_to_load_on_host(model: torch.nn.Module, mesh: Any) -> List[torch.nn.Module]:
    """Blocks of a meta model whose shards are to be read into host memory: what the override says,
    or the fewest with which the others fit the device until the wrap. Collective over ``mesh``.
    """
    from unsloth.models.fsdp2_native import find_shard_units

    mode, count = offload_override()
    if mode == "never" or (mode == "auto" and mesh.device_type == "cpu"):
        return []
    units = find_shard_units(model)
    if mode == "all":
        count = len(units)
    elif mode == "auto":
        count = _fewest_at_load(model, mesh, len(units))
    if count > len(units):
        raise ValueError(f"{OFFLOAD_ENV}=blocks:{count}: the model has {len(units)} blocks.")
    if count:
        _say(f"{count} of {len(units)} blocks are loaded into host memory")
    return [units[index] for index in evenly_spaced(count, len(units))]


def _fewest_at_load(model: torch.nn.Module, mesh: Any, blocks: int) -> int:
    """The adapter comes later: rank 16 on every linear is counted."""
    try:
        shape = read_shape(model)
    except ValueError:
        return 0
    world = mesh.size(mesh.ndim - 1)
    usable = usable_device_memory(mesh, fresh = True) / (1 + FRAGMENTATION)
    job = Training(world, tokens = 1)

    def at_wrap(count):
        return sum(size for _, size in sharded_phases(shape, job, count)[0]["wrap"])

    return next((count for count in range(blocks) if at_wrap(count) <= usable), blocks)


def offload_what_does_not_fit(stock: Callable) -> Callable:
    """Decorator of ``shard_model``: the offload plan follows, unless the caller chose CPU offload."""
    register_host_chooser(blocks_to_load_on_host)

    @functools.wraps(stock)
    def shard_model(model, config = None):
        done = getattr(model, "_unsloth_fsdp2_native", False)
        model = stock(model, config)
        if not done and not getattr(config, "cpu_offload", False):
            offload_sharded_model(model)
        return model

    return shard_model


def explain_out_of_memory(stock: Callable) -> Callable:
    """Decorator of ``native_fsdp2_trainer_setup``: tells the plan the tokens of a micro-batch, and
    later explains an out-of-memory by it.
    """

    @functools.wraps(stock)
    def native_fsdp2_trainer_setup(
        trainer = None,
        *args,
        **kwargs,
    ):
        arguments = kwargs.get("training_args")
        token = _batch_tokens.set(_trainer_tokens(arguments))
        several = _accumulates.set(getattr(arguments, "gradient_accumulation_steps", 1) > 1)
        try:
            model = stock(trainer, *args, **kwargs)
        finally:
            _batch_tokens.reset(token)
            _accumulates.reset(several)
        plan = getattr(getattr(trainer, "model", None), _PLAN, None)
        if kwargs.get("phase") == "post" and plan is not None:
            trainer.training_step = explaining(trainer.training_step, plan)
        return model

    return native_fsdp2_trainer_setup


def _trainer_tokens(arguments: Any) -> Optional[int]:
    length = getattr(arguments, "max_length", None) or getattr(arguments, "max_seq_length", None)
    return length * getattr(arguments, "per_device_train_batch_size", 1) if length else None


def _checkpointing(model: torch.nn.Module) -> Union[bool, str]:
    """Unsloth's flag on the model, or what transformers set on its blocks."""
    for module in model.modules():
        asked = module.__dict__.get("_unsloth_gradient_checkpointing")
        if asked is not None:
            return asked if asked == "unsloth" else bool(asked)
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def explaining(step: Callable, plan: OffloadPlan) -> Callable:
    """``step``, whose out-of-memory compares what ``plan`` predicted with what was used."""

    @functools.wraps(step)
    def training_step(*args, **kwargs):
        try:
            return step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            raise torch.OutOfMemoryError(plan.explain_out_of_memory(used)) from error

    return training_step
