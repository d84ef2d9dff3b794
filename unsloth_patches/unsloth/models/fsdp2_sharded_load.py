# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Read a checkpoint into a 4-bit model of which every rank keeps, and reads, its shard only.

    fill_sharded(model, files, mesh, device)

Sources are safetensors files, in 16 bits (quantized on the fly) or pre-quantized by bitsandbytes.
4-bit weights become `WeightShard`s. The embedding and the output head stay whole but in host
memory, mapped from the file: nothing is read until the wrap takes this rank's rows. The rest
(norms, biases) is small and read whole.

A rank that cannot read says so to all: names, shapes and dtypes are compared before the first byte
is read, and a later failure still takes part in every collective, so no rank waits for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist

from .fsdp2_checkpoint import Checkpoint
from .fsdp2_quantize_rows import make_state, quantize_rows
from .fsdp2_sharded_params import (
    NESTED_BLOCKSIZE,
    Linear4bit,
    Params4bit,
    RowLayout,
    WeightShard,
    shard_group,
    unpack_tensor_to_dict,
)

__all__ = ["ShardedLoadError", "fail_together", "fill_sharded", "read_weight"]

HOST_TABLE = "_fsdp2_host_table"


class ShardedLoadError(Exception):
    """A rank could not load its shards; every rank raises it, with that rank's reason.

    Not a RuntimeError: the CPU loader answers those by loading 16-bit weights instead.
    """


@dataclass
class _Job:
    """One parameter to fill: where it sits (tied parameters sit in several places) and its tensor."""

    name: str
    key: str
    places: List[Tuple[torch.nn.Module, str]]
    parameter: torch.nn.Parameter
    kind: str  # "4bit", "packed" (4-bit already), "table" or "whole"


def fail_together(error: Optional[BaseException], group: Any) -> None:
    """Collective: raise on every rank of `group` what failed on one, with that rank's reason."""
    text = None if error is None else f"{type(error).__name__}: {error}"
    found: List[Optional[str]] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, text, group = group)
    reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(found) if reason]
    if not reasons:
        return
    raise ShardedLoadError(
        "Unsloth: the sharded 4-bit load failed on " + "; ".join(reasons)
    ) from error


def fill_sharded(
    model: torch.nn.Module,
    files: Sequence[str],
    mesh: Any,
    device: torch.device,
    renamings: Sequence[Any] = (),
    dtypes: Optional[Dict[str, torch.dtype]] = None,
    progress: bool = True,
    on_host: Sequence[torch.nn.Module] = (),
) -> Dict[str, int]:
    """Fill a meta model, in place. Collective over the shard ranks of `mesh`.

    on_host: modules whose 4-bit shards go to host memory as soon as they are read, where the wrap
    leaves them.

    renamings: transformers' WeightRenaming objects, for checkpoints saved under older names.
    dtypes: a regular expression of names -> dtype that they are kept in. Returns {weights,
    shard_bytes, read_bytes}. Raises ShardedLoadError on every rank if one of them cannot load.
    """
    group = shard_group(mesh)
    error, jobs, checkpoint = None, [], None
    try:
        checkpoint = Checkpoint(files)
        jobs = _jobs(model, checkpoint, renamings)
    except Exception as problem:
        error = problem
    fail_together(error, group)
    stats = {"weights": 0, "shard_bytes": 0, "read_bytes": 0}
    hosted = {id(layer) for module in on_host for layer in module.modules()}
    for job in _shown(jobs, progress and dist.get_rank() == 0):
        try:
            source = checkpoint if error is None else None
            host = id(job.places[0][0]) in hosted
            new = _fill(job, source, mesh, device, dtypes or {}, stats, host)
        except Exception as problem:
            error = error or problem
            continue
        new._is_hf_initialized = True
        for module, name in job.places:
            module._parameters[name] = new
    fail_together(error, group)
    stats["read_bytes"] = checkpoint.read_bytes
    return stats


def _shown(jobs: List[_Job], show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(jobs, desc = "Loading this rank's 4-bit shards", disable = not show)


def _jobs(model: torch.nn.Module, checkpoint: Checkpoint, renamings: Sequence[Any]) -> List[_Job]:
    slots: Dict[int, Tuple[torch.nn.Parameter, List[Tuple[torch.nn.Module, str]], List[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate = False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            _, places, names = slots.setdefault(id(parameter), (parameter, [], []))
            if not any(module is other and name == known for other, known in places):
                places.append((module, name))
            names.append(f"{prefix}.{name}" if prefix else name)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    renamed = _renamed(model, checkpoint, renamings)
    tables = _table_ids(model)
    jobs = []
    for parameter, places, names in slots.values():
        key = next((found for name in names for found in _keys(name, renamed, checkpoint)), None)
        if key is None and any(name in tied for name in names):
            continue  # transformers ties it after the load
        if key is None:
            raise ValueError(
                f"no tensor for {names[0]!r} in the checkpoint (or transformers builds it from "
                "several); set "
                "UNSLOTH_FSDP2_SHARDED_LOAD=0 to load the whole model on every rank"
            )
        kind = _kind(places[0][0], parameter, tables, names[0])
        if kind == "4bit" and packed_key(key, checkpoint):
            kind = "packed"
        job = _Job(names[0], key, places, parameter, kind)
        _check_stored(job, checkpoint)
        jobs.append(job)
    return jobs


def _keys(name: str, renamed: Dict[str, str], checkpoint: Checkpoint) -> List[str]:
    candidates = [name, renamed.get(name)]
    return [key for key in candidates if key is not None and key in checkpoint]


def _renamed(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    renamings: Sequence[Any],
) -> Dict[str, str]:
    """Model name -> checkpoint name, where transformers renames."""
    prefix = getattr(model, "base_model_prefix", "")
    names = {name for name, _ in model.named_parameters(remove_duplicate = False)}
    found = {}
    for key in checkpoint.keys():
        new = key
        for renaming in renamings:
            new = renaming.rename_source_key(new)[0]
        if new not in names and f"{prefix}.{new}" in names:
            new = f"{prefix}.{new}"
        if new != key:
            found[new] = key
    return found


def _table_ids(model: torch.nn.Module) -> set:
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter):
            found.add(id(weight))
    return found


def _kind(module: torch.nn.Module, parameter: torch.nn.Parameter, tables: set, name: str) -> str:
    if isinstance(parameter, Params4bit):
        if not isinstance(module, Linear4bit) or parameter.dim() != 2:
            raise ValueError(
                f"{name!r} is a 4-bit weight of a {type(module).__name__}; only Linear4bit layers "
                "are sharded. "
                "Set UNSLOTH_FSDP2_SHARDED_LOAD=0 to load the whole model on every rank"
            )
        return "4bit"
    return "table" if id(parameter) in tables else "whole"


def _check_stored(job: _Job, checkpoint: Checkpoint) -> None:
    shape, expected = checkpoint.shape(job.key), tuple(job.parameter.shape)
    itemsize = checkpoint.itemsize(job.key)
    if job.kind in ("4bit", "packed"):
        module = job.places[0][0]
        expected = (module.out_features, module.in_features)
    if job.kind == "packed":
        expected = (-(-expected[0] * expected[1] // 2) // itemsize, 1)
    elif itemsize == 1:
        raise ValueError(
            f"{job.key!r} holds bytes, but no {job.key}.quant_state.bitsandbytes__* is beside it"
        )
    if shape != expected:
        raise ValueError(
            f"{job.key!r} has shape {shape} in the checkpoint, and the model expects {expected}"
        )


def packed_key(key: str, checkpoint: Checkpoint) -> Optional[str]:
    """The name of a pre-quantized weight's description in the checkpoint; None for a 16-bit weight."""
    names = [f"{key}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    return next((name for name in names if name in checkpoint), None)


def _fill(
    job: _Job,
    checkpoint: Optional[Checkpoint],
    mesh: Any,
    device: torch.device,
    dtypes: Dict[str, torch.dtype],
    stats: Dict[str, int],
    host: bool,
) -> torch.nn.Parameter:
    """The new parameter. `checkpoint` None: this rank failed before; only take part in collectives."""
    if checkpoint is None and job.kind != "4bit":
        return job.parameter
    if job.kind in ("4bit", "packed"):
        module = job.places[0][0]
        shard = read_weight(module, job.key, checkpoint, mesh, device, job.parameter.dtype)
        if host:
            shard.to_host(pin = device.type != "cpu")
        stats["weights"] += 1
        stats["shard_bytes"] += shard.nbytes()
        return shard.local_parameter(module)
    dtype = next(
        (d for pattern, d in dtypes.items() if re.search(pattern, job.name)), job.parameter.dtype
    )
    value = checkpoint.whole(job.key).to(dtype)
    value = value if job.kind == "table" else value.to(device)
    new = torch.nn.Parameter(value, requires_grad = job.parameter.requires_grad)
    if job.kind == "table":
        setattr(new, HOST_TABLE, True)
    return new


def read_weight(
    module: Linear4bit,
    key: str,
    checkpoint: Optional[Checkpoint],
    mesh: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> WeightShard:
    """This rank's shard of `module`'s weight. dtype: the 16-bit dtype that it is quantized from.

    Collective over the shard ranks of `mesh` unless the checkpoint is quantized already. An error
    is raised after the collectives, so that no rank waits; checkpoint None only takes part in them
    and raises.
    """
    old = module.weight
    layout = RowLayout(
        numel = module.out_features * module.in_features,
        world = mesh.size(mesh.ndim - 1),
        rank = mesh.get_local_rank(mesh.ndim - 1),
        blocksize = getattr(old, "blocksize", None) or 64,
    )
    shape = torch.Size((module.out_features, module.in_features))
    packed = None if checkpoint is None else packed_key(key, checkpoint)
    if packed is not None:
        return _read_packed(key, packed, checkpoint, layout, shape, device)
    weights, error = None, None
    try:
        if checkpoint is None:
            raise RuntimeError("an earlier tensor failed on this rank")
        weights = _read_flat(key, checkpoint, layout, module.in_features).to(
            device = device, dtype = dtype
        )
    except Exception as problem:
        error = problem
    shard = quantize_rows(
        weights,
        layout,
        shape,
        dtype,
        getattr(old, "quant_type", "nf4"),
        bool(getattr(old, "compress_statistics", True)),
        device,
        shard_group(mesh),
    )
    if error is not None:
        raise error
    return shard


def _read_flat(key: str, checkpoint: Checkpoint, layout: RowLayout, columns: int) -> torch.Tensor:
    """Weights [start, stop) of the flattened matrix: the rows that hold them, cut at both ends."""
    first = layout.start // columns
    last = -(-layout.stop // columns)
    rows = checkpoint.rows(key, first, last)
    return rows.reshape(-1)[
        layout.start - first * columns : layout.stop - first * columns
    ].contiguous()


def _read_packed(
    key: str,
    described: str,
    checkpoint: Checkpoint,
    layout: RowLayout,
    shape: torch.Size,
    device: torch.device,
) -> WeightShard:
    """Slices of a pre-quantized weight: no arithmetic, so no other rank either."""
    values = unpack_tensor_to_dict(checkpoint.whole(described))
    blocksize = values["blocksize"]
    layout = RowLayout(layout.numel, layout.world, layout.rank, blocksize)
    if tuple(values["shape"]) != tuple(shape):
        raise ValueError(
            f"{key!r} was quantized with shape {values['shape']}, the model expects {shape}"
        )
    nested = "nested_blocksize" in values
    if nested and values["nested_blocksize"] != NESTED_BLOCKSIZE:
        raise ValueError(
            f"{key!r}: nested blocksize {values['nested_blocksize']}, and only 256 is known"
        )
    rows, size = layout.local_rows, checkpoint.itemsize(key)
    packed = torch.zeros(rows, layout.row // 2, dtype = torch.uint8, device = device)
    stored = checkpoint.rows(key, layout.start // 2 // size, -(-layout.stop // 2) // size)
    _copy_front(packed, stored.reshape(-1).view(torch.uint8))
    first, last = layout.start // blocksize, -(-layout.stop // blocksize)
    absmax_dtype = torch.uint8 if nested else torch.float32
    absmax = torch.zeros(rows, NESTED_BLOCKSIZE, dtype = absmax_dtype, device = device)
    _copy_front(absmax, checkpoint.rows(f"{key}.absmax", first, last))
    outer = offset = code2 = None
    if nested:
        outer = torch.zeros(rows, 1, device = device)
        spans = first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE)
        _copy_front(outer, checkpoint.rows(f"{key}.nested_absmax", *spans))
        offset = torch.tensor(float(values["nested_offset"]), device = device)
        code2 = checkpoint.whole(f"{key}.nested_quant_map").to(device)
    code = checkpoint.whole(f"{key}.quant_map").to(device)
    dtype = getattr(torch, values["dtype"])
    state = make_state(
        layout, shape, dtype, values["quant_type"], code, absmax, offset, outer, code2
    )
    return WeightShard(layout, packed, absmax, outer, state)


def _copy_front(target: torch.Tensor, source: torch.Tensor) -> None:
    target.view(-1)[: source.numel()].copy_(source.view(-1))
