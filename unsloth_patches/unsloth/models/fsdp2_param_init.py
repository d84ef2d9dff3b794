# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Fill a meta 4-bit model that the caller wraps with `fully_shard`: what FSDP's `param_init_fn` was
to do.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional, Sequence

import torch

from .fsdp2_checkpoint import Checkpoint
from .fsdp2_sharded_load import packed_key, read_weight
from .fsdp2_sharded_params import Linear4bit, RowLayout, fsdp_params, unpack_tensor_to_dict

__all__ = ["param_init_fn"]


def param_init_fn(
    model: torch.nn.Module,
    files: Sequence[str],
    mesh: Any,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Initialise a meta 4-bit model that you `fully_shard` yourself, each rank from its slices of
    `files`.

        with torch.device("meta"):
            model = replace_with_bnb_linear(AutoModelForCausalLM.from_config(config), ...)
        init = param_init_fn(model, files, mesh)   # before the wrap: puts placeholders in
        for block in model.model.layers:
            fully_shard(block, mesh = mesh)
        fully_shard(model, mesh = mesh)
        model.apply(init)                           # init(module) fills that module's parameters

    model: 4-bit layers are Linear4bit, all parameters on meta and named as in the checkpoint.
    dtype: of the 16-bit parameters, and what weights are quantized from. `init` is collective over
    the mesh's shard ranks: call it on every rank in the same order. Buffers are the caller's.
    Raises ValueError for a parameter that is not on meta or not in the checkpoint.
    """
    from unsloth.models.fsdp2_qlora import patch_fsdp2_params4bit

    patched, reason = patch_fsdp2_params4bit()
    if not patched:
        raise RuntimeError(f"Unsloth: this torch cannot shard 4-bit weights: {reason}")
    _let_bytes_be_sharded()
    checkpoint = Checkpoint(files)
    names = {id(module): prefix for prefix, module in model.named_modules()}
    olds = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            raise ValueError(
                f"param_init_fn: {name!r} is on {parameter.device}; build the model on meta."
            )
        if name not in checkpoint:
            raise ValueError(f"param_init_fn: the checkpoint has no tensor {name!r}.")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            olds[id(module)] = module.weight
            module._parameters["weight"] = _placeholder(
                module, mesh, packed_key(f"{names[id(module)]}.weight", checkpoint), checkpoint
            )
    device = torch.device(mesh.device_type)
    if mesh.device_type != "cpu":
        device = torch.device(mesh.device_type, getattr(torch, mesh.device_type).current_device())

    def init(module):
        for fsdp_param in fsdp_params(model):
            info = fsdp_param._module_info
            if info.module is not module:
                continue
            key = f"{names[id(module)]}.{info.param_name}"
            if id(module) in olds and info.param_name == "weight":
                module._parameters["weight"], held = olds[id(module)], module._parameters["weight"]
                try:
                    shard = read_weight(module, key, checkpoint, mesh, device, dtype)
                finally:
                    module._parameters["weight"] = held
                shard.install(fsdp_param)
            else:
                _install_rows(fsdp_param, checkpoint, key, device, dtype)
        return module

    return init


def _let_bytes_be_sharded() -> None:
    """torch before 2.12 makes every sharded parameter trainable for a moment, which uint8 cannot
    be. Unsloth guards its own wrap against that; here the caller wraps: that moment is guarded.
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


def _placeholder(
    module: Linear4bit,
    mesh: Any,
    described: Optional[str],
    checkpoint: Checkpoint,
) -> torch.nn.Parameter:
    blocksize = getattr(module.weight, "blocksize", None) or 64
    if described is not None:
        blocksize = unpack_tensor_to_dict(checkpoint.whole(described))["blocksize"]
    layout = RowLayout(
        module.in_features * module.out_features, mesh.size(mesh.ndim - 1), 0, blocksize
    )
    return torch.nn.Parameter(
        torch.empty(layout.rows, layout.row // 2, dtype = torch.uint8, device = "meta"),
        requires_grad = False,
    )


def _install_rows(
    fsdp_param: Any,
    checkpoint: Checkpoint,
    key: str,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    old = fsdp_param.sharded_param
    size = fsdp_param.padded_sharded_param_size[0]
    rank = fsdp_param.mesh_info.shard_mesh_rank
    length = old._local_tensor.shape[0]
    rows = checkpoint.rows(key, rank * size, rank * size + length).to(device = device, dtype = dtype)
    parameter = torch.nn.Parameter(
        fsdp_param.to_sharded_dtensor(rows), requires_grad = old.requires_grad
    )
    fsdp_param._setattr_on_modules(parameter)
    fsdp_param.reset_sharded_param()
