# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""QLoRA under native FSDP2 without a whole model on any rank.

Under ``UNSLOTH_FSDP2=1 UNSLOTH_FSDP2_SHARDED_LOAD=1 torchrun ...``, a 4-bit ``from_pretrained`` of
``FastLanguageModel`` reads this rank's slices of the checkpoint only, and ``shard_model`` installs
them as the FSDP2 shards (``fsdp2_sharded_wrap.py``). Nothing else changes for the caller:

    model, tokenizer = FastLanguageModel.from_pretrained(name, load_in_4bit = True)
    model = FastLanguageModel.get_peft_model(model, r = 16)
    SFTTrainer(model = model, ...).train()

``UNSLOTH_FSDP2_LAYOUT=fit`` and ``UNSLOTH_FSDP2_REPLICATE_FROZEN=1`` ask for whole weights, and
keep the whole load. Who calls ``fully_shard`` on a meta model takes ``param_init_fn``
(``fsdp2_param_init.py``). Refused: an initialisation that reads the base weights (DoRA, PiSSA,
LoftQ), a forward before the wrap, a wrap over other ranks than the load's.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import os
from typing import Any, Callable, Iterator, List, Optional

import torch

from .fsdp2_sharded_load import fill_sharded
from .fsdp2_sharded_params import get_shard, mesh_device

__all__ = ["register_host_chooser", "shard_4bit_loads", "sharded_4bit_loading"]

OFF, ON = ("0", "false", "no", "off"), ("1", "true", "yes", "on")
LOADED_OVER = "_fsdp2_sharded_4bit_ranks"
LOAD_WHOLE = "set UNSLOTH_FSDP2_SHARDED_LOAD=0"
_mesh: contextvars.ContextVar = contextvars.ContextVar("sharded_4bit_mesh", default = None)
_loading: contextvars.ContextVar = contextvars.ContextVar("sharded_4bit_loading", default = False)

# Functions of (meta model, mesh) that say which modules' shards go to host memory as they are read.
_host_choosers: List[Callable] = []


def register_host_chooser(choose: Callable) -> None:
    """choose(model, mesh) -> modules; asked at every sharded load, on all ranks alike."""
    if choose not in _host_choosers:
        _host_choosers.append(choose)


# --- which loads -------------------------------------------------------------------------------


def shard_4bit_loads(stock: Callable) -> Callable:
    """Decorator of ``sharded_load_env``, itself the decorator of Unsloth's loaders: 4-bit loads
    under UNSLOTH_FSDP2_SHARDED_LOAD=1 are sharded too, as 16-bit loads are.
    """

    @functools.wraps(stock)
    def sharded_load_env(loader):
        whole = stock(loader)

        @functools.wraps(loader)
        def wrapper(*args, **kwargs):
            if _mesh.get() is not None:
                return loader(*args, **kwargs)
            with outermost_loader() as outermost:
                if not outermost:
                    return loader(*args, **kwargs)
                if _is_sharded(loader, args, kwargs):
                    with sharded_4bit_loading():
                        return loader(*args, **kwargs)
                # Stock would try to shard 4-bit weights, too, and refuse them.
                plain = loader if loads_4bit(loader, args, kwargs) else whole
                return plain(*args, **kwargs)

        return wrapper

    return sharded_load_env


def _is_sharded(loader: Callable, args: tuple, kwargs: dict) -> bool:
    from unsloth.models.fsdp2_load import fsdp2_sharded_load_requested

    if not fsdp2_sharded_load_requested() or whole_weights_wanted():
        return False
    if not loads_4bit(loader, args, kwargs):
        return False
    if loading_step() is None:
        print(f"Unsloth: every rank loads the whole 4-bit model. {_NEEDS_TRANSFORMERS_5}")
        return False
    return True


def whole_weights_wanted() -> bool:
    """Whether another variable of native FSDP2 asks for the whole frozen weights on every rank."""
    return (
        variable("UNSLOTH_FSDP2_LAYOUT") == "fit"
        or variable("UNSLOTH_FSDP2_REPLICATE_FROZEN") in ON
        or variable("UNSLOTH_FSDP2_SHARD_FROZEN") in OFF
    )


def variable(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def loads_4bit(loader: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether this call of a loader asks for 4-bit weights, which is Unsloth's default."""
    given = {"load_in_4bit": True, **loader_arguments(loader, args, kwargs)}
    others = ("load_in_8bit", "load_in_16bit", "full_finetuning")
    return bool(given["load_in_4bit"]) and not any(given.get(name) for name in others)


def loader_arguments(loader: Callable, args: tuple, kwargs: dict) -> dict:
    """The arguments of a loader's call by name, defaults included."""
    bound = inspect.signature(loader).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    return {**bound.arguments, **kwargs}


@contextlib.contextmanager
def outermost_loader() -> Iterator[bool]:
    """True for the outermost loader of a call; the loaders that it calls itself get False."""
    outermost = not _loading.get()
    token = _loading.set(True)
    try:
        yield outermost
    finally:
        _loading.reset(token)


# --- loading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def sharded_4bit_loading(mesh: Any = None) -> Iterator[None]:
    """Inside, a transformers ``from_pretrained`` that quantizes to 4 bits with bitsandbytes is
    sharded.

    mesh: the DeviceMesh that ``shard_model`` will use, 1-D or (replicate, shard); default: 1-D over
    the world. Loads in other formats are not touched. Raises ShardedLoadError on every rank if one
    cannot load.
    """
    if _mesh.get() is not None:
        yield
        return
    if mesh is None:
        from unsloth.models.fsdp2_load import _default_load_mesh
        mesh = _default_load_mesh()
    if mesh.ndim > 2:
        raise ValueError(
            f"Unsloth: sharded 4-bit loading takes a 1-D or HSDP mesh, not {mesh.ndim} dimensions."
        )
    if mesh.size(mesh.ndim - 1) < 2:
        raise ValueError(
            f"Unsloth: the mesh {mesh_ranks(mesh)} shards over one rank, so there is nothing to load "
            f"sharded. Use more ranks, or {LOAD_WHOLE}."
        )
    from transformers import PreTrainedModel

    step = loading_step()
    if step is None:
        raise RuntimeError(f"Unsloth: {_NEEDS_TRANSFORMERS_5}")
    token = _mesh.set(mesh)
    PreTrainedModel._load_pretrained_model = staticmethod(_sharded_step(step.__func__, mesh))
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = step
        _mesh.reset(token)


_NEEDS_TRANSFORMERS_5 = "A sharded 4-bit load needs transformers 5; upgrade it."


def loading_step() -> Optional[staticmethod]:
    """transformers' step from a meta model to a loaded one, if it is the one that is known here."""
    from transformers import PreTrainedModel

    step = PreTrainedModel.__dict__.get("_load_pretrained_model")
    known = (
        isinstance(step, staticmethod)
        and "load_config" in inspect.signature(step.__func__).parameters
    )
    return step if known else None


def _sharded_step(stock: Callable, mesh: Any) -> Callable:
    @functools.wraps(stock)
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        config = getattr(load_config.hf_quantizer, "quantization_config", None)
        if not getattr(config, "load_in_4bit", False):
            return stock(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if state_dict is not None:
            raise ValueError(
                "Unsloth: a sharded 4-bit load reads files, and from_pretrained got a state_dict. "
                f"Leave it out, or {LOAD_WHOLE}."
            )
        from transformers.core_model_loading import WeightRenaming

        renamings = [r for r in load_config.weight_mapping or () if isinstance(r, WeightRenaming)]
        device = _single_device(load_config.device_map, mesh)
        on_host = [module for choose in _host_choosers for module in choose(model, mesh)]
        dtypes = load_config.dtype_plan
        fill_sharded(model, checkpoint_files, mesh, device, renamings, dtypes, on_host)
        if device.type == "cuda":
            # Embedding and head wait on the host for the wrap; no loader may call that an offload.
            model.hf_device_map = {"": device.index}
        _guard_forward(model)
        model.__dict__[LOADED_OVER] = mesh_ranks(mesh)
        return _loading_info(model), None

    return _load_pretrained_model


def _loading_info(model: torch.nn.Module) -> Any:
    from transformers.utils.loading_report import LoadStateDictInfo

    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    empty = {field.name: set() for field in dataclasses.fields(LoadStateDictInfo)}
    empty.update(error_msgs = [], conversion_errors = {}, missing_keys = tied)
    return LoadStateDictInfo(**empty)


def _single_device(device_map: Any, mesh: Any) -> torch.device:
    found = {str(value) for value in (device_map or {}).values()}
    if len(found) > 1 or found & {"disk", "meta"} or ("cpu" in found and mesh.device_type != "cpu"):
        raise ValueError(
            f"Unsloth: FSDP2 shards over the ranks, and device_map places weights on {sorted(found)}. "
            "Load with device_map = None or {'': local_rank}."
        )
    return mesh_device(mesh)


def mesh_ranks(mesh: Any) -> List[int]:
    return mesh.mesh.tolist()


def refuse_forward(module, args):
    raise RuntimeError(
        "Unsloth: this rank holds only its shard of the 4-bit weights, so the model cannot run before "
        "it is wrapped. Let the Trainer do it under UNSLOTH_FSDP2=1, or call "
        "unsloth.models.fsdp2_native.shard_model(model) first."
    )


def _guard_forward(model: torch.nn.Module) -> None:
    # On every module above a shard: PEFT and Unsloth call some forwards directly, past the hooks.
    for module in model.modules():
        if any(get_shard(child) is not None for child in module.modules()):
            module.register_forward_pre_hook(refuse_forward)
