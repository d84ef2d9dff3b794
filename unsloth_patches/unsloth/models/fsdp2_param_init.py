# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Fill a meta 4-bit model that the caller wraps with ``fully_shard``, by a ``param_init_fn``."""

from __future__ import annotations

import functools
from typing import Any, Callable, Sequence

import torch

from .fsdp2_shard_reader import ShardReader, StoredWeight
from .fsdp2_sharded_params import Linear4bit, fsdp_params, mesh_device

__all__ = ["param_init_fn"]


def param_init_fn(
    model: torch.nn.Module,
    files: Sequence[str],
    mesh: Any,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Initialise a meta 4-bit model that you ``fully_shard`` yourself: each rank reads its slices
    only.

        with torch.device("meta"):
            model = replace_with_bnb_linear(AutoModelForCausalLM.from_config(config), ...)
        init = param_init_fn(model, files, mesh)   # before the wrap: puts placeholders in
        for block in model.model.layers:
            fully_shard(block, mesh = mesh)
        fully_shard(model, mesh = mesh)
        model.apply(init)                           # init(module) fills that module's parameters

    model: 4-bit layers are Linear4bit, all parameters on meta and named as in ``files``
    (safetensors). dtype: of the 16-bit parameters, and what weights are quantized from. ``init`` is
    collective over the mesh's shard ranks: call it on every rank in the same order. Buffers are the
    caller's. Raises ValueError for a parameter that is not on meta or not in the files.
    """
    from unsloth.models.fsdp2_qlora import patch_fsdp2_params4bit

    patched, reason = patch_fsdp2_params4bit()
    if not patched:
        raise RuntimeError(f"Unsloth: this torch cannot shard 4-bit weights: {reason}")
    reader = ShardReader(files)
    _check_parameters(model, reader)
    _let_bytes_be_sharded()
    names = {id(module): prefix for prefix, module in model.named_modules()}
    device, stored = mesh_device(mesh), {}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            key = f"{names[id(module)]}.weight"
            weight = stored[id(module)] = StoredWeight(module, key, reader, mesh, device, dtype)
            module._parameters["weight"] = weight.layout.placeholder()

    def init(module):
        for fsdp_param in fsdp_params(model):
            info = fsdp_param._module_info
            if info.module is not module:
                continue
            if id(module) in stored and info.param_name == "weight":
                stored[id(module)].load().install(fsdp_param)
            else:
                key = f"{names[id(module)]}.{info.param_name}"
                _install_rows(fsdp_param, reader, key, device, dtype)
        return module

    return init


def _check_parameters(model: torch.nn.Module, reader: ShardReader) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            raise ValueError(
                f"param_init_fn: {name!r} is on {parameter.device}; build the model under "
                'torch.device("meta").'
            )
        if name not in reader:
            raise ValueError(
                f"param_init_fn: the files have no tensor {name!r}; name the model's parameters as "
                "its checkpoint does."
            )


def _let_bytes_be_sharded() -> None:
    """torch before 2.12 makes sharded parameters trainable for a moment, which uint8 cannot be.

    Unsloth guards its own wrap against that; here the caller wraps, and that moment is guarded.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from unsloth.models.fsdp2_qlora import nonfloat_param_guard

    stock = FSDPParam._init_sharded_param
    if torch.__version__ >= (2, 12) or getattr(stock, "_guards_bytes", False):
        return

    @functools.wraps(stock)
    def _init_sharded_param(self, param, *args, **kwargs):
        if param.is_floating_point():
            return stock(self, param, *args, **kwargs)
        with nonfloat_param_guard():
            return stock(self, param, *args, **kwargs)

    _init_sharded_param._guards_bytes = True
    FSDPParam._init_sharded_param = _init_sharded_param


def _install_rows(
    fsdp_param: Any, reader: ShardReader, key: str, device: torch.device, dtype: torch.dtype
) -> None:
    old = fsdp_param.sharded_param
    size = fsdp_param.padded_sharded_param_size[0]
    start = fsdp_param.mesh_info.shard_mesh_rank * size
    rows = reader.rows(key, start, start + old._local_tensor.shape[0])
    local = fsdp_param.to_sharded_dtensor(rows.to(device = device, dtype = dtype))
    parameter = torch.nn.Parameter(local, requires_grad = old.requires_grad)
    fsdp_param._setattr_on_modules(parameter)
    fsdp_param.reset_sharded_param()
