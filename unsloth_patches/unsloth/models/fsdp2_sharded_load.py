# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Read a checkpoint into a 4-bit model of which every rank keeps, and reads, its shard only.

Sources are safetensors files, in 16 bits (quantized on the fly) or pre-quantized by bitsandbytes.
4-bit weights become ``WeightShard``s. The embedding and the output head stay whole but in host
memory, mapped from the file: nothing is read until the wrap takes this rank's rows. The rest
(norms, biases) is small and read whole.

A rank that cannot read says so to all: names, shapes and dtypes are compared before the first byte
is read, later failures every few GiB; until then the failed rank takes part in every collective, so
that no rank waits for it.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist

from .fsdp2_gather import HostBlock
from .fsdp2_shard_reader import ShardReader, StoredWeight
from .fsdp2_sharded_params import Linear4bit, Params4bit, WeightShard, set_shard, shard_group

__all__ = ["HOST_TABLE", "ShardedLoadError", "fail_together", "fill_sharded"]

HOST_TABLE = "_fsdp2_host_table"
# Of whole weights, in 16 bits: after so many the ranks tell each other of failures. At 200 MB/s a
# rank and two ranks that is every 5 s.
BYTES_BETWEEN_CHECKS = 2 * 2**30
# Threads that read, and weights (this rank's part, in 16 bits) that wait in host memory at most.
READERS, AHEAD = 2, 2


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
    weight: Optional[StoredWeight]  # of a 4-bit weight
    table: bool  # embedding or head

    @property
    def module(self) -> torch.nn.Module:
        return self.places[0][0]


def fail_together(error: Optional[BaseException], group: Any) -> None:
    """Collective: raise on every rank of ``group`` what failed on one, with that rank's reason."""
    text = None if error is None else f"{type(error).__name__}: {error}"
    found: List[Optional[str]] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, text, group = group)
    except RuntimeError as lost:
        raise ShardedLoadError(
            f"Unsloth: the sharded 4-bit load lost a rank ({lost}); the output of that rank says why."
        ) from (error or lost)
    reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(found) if reason]
    if reasons:
        raise ShardedLoadError(
            f"Unsloth: the sharded 4-bit load failed on {'; '.join(reasons)}. "
            "UNSLOTH_FSDP2_SHARDED_LOAD=0 loads the whole model on every rank."
        ) from error


def fill_sharded(
    model: torch.nn.Module,
    files: Sequence[str],
    mesh: Any,
    device: torch.device,
    renamings: Sequence[Any] = (),
    dtypes: Optional[Dict[str, torch.dtype]] = None,
    on_host: Sequence[torch.nn.Module] = (),
) -> int:
    """Fill a meta model, in place; returns the bytes that this rank read. Collective over the shard
    ranks of ``mesh``.

    renamings: transformers' WeightRenaming objects, for checkpoints saved under older names.
    dtypes: a regular expression of names -> dtype that they are kept in. on_host: modules whose
    4-bit shards go to host memory as soon as they are read, where the wrap leaves them. Raises
    ShardedLoadError on every rank if one of them cannot load.
    """
    group = shard_group(mesh)
    error, jobs, reader = None, [], None
    try:
        reader = ShardReader(files)
        jobs = _find_jobs(model, reader, mesh, device, renamings)
    except Exception as problem:
        error = problem
    fail_together(error, group)
    # layer -> what its block has read, of how many
    together: Dict[int, Tuple[List[tuple], int]] = {}
    for module in on_host:
        layers = [id(layer) for layer in module.modules() if isinstance(layer, Linear4bit)]
        together.update(dict.fromkeys(layers, ([], len(layers))))

    def read(job):
        return None if error is not None else _read(job, reader, device, dtypes or {})

    unchecked = 0
    with ThreadPoolExecutor(READERS) as pool:
        for job, part in _read_ahead(_shown(jobs), read, pool):
            value = None
            try:
                value = part.result()
            except Exception as problem:
                error = error or problem
            try:
                if job.weight is not None and job.weight.described is None:
                    value = job.weight.quantize(value)  # collective, on a rank that failed too
                if error is None:
                    _place(job, value, device, together.get(id(job.module)))
            except Exception as problem:
                error = error or problem
            whole = job.parameter.numel() if job.weight is None else job.weight.layout.numel
            unchecked += 2 * whole
            if unchecked > BYTES_BETWEEN_CHECKS:
                fail_together(error, group)
                unchecked = 0
    fail_together(error, group)
    return reader.read_bytes


def _read_ahead(jobs: Iterable[_Job], read: Callable, pool: ThreadPoolExecutor) -> Iterator[tuple]:
    """(job, future of ``read(job)``) in order, with the next AHEAD under way: while one weight is
    quantized, threads bring the next from their files into host memory.
    """
    waiting: List[tuple] = []
    for job in jobs:
        waiting.append((job, pool.submit(read, job)))
        if len(waiting) > AHEAD:
            yield waiting.pop(0)
    yield from waiting


def _shown(jobs: List[_Job]) -> Any:
    from tqdm.auto import tqdm
    return tqdm(jobs, desc = "Loading this rank's 4-bit shards", disable = dist.get_rank() != 0)


def _find_jobs(
    model: torch.nn.Module,
    reader: ShardReader,
    mesh: Any,
    device: torch.device,
    renamings: Sequence[Any],
) -> List[_Job]:
    # Of every parameter, by its id: itself, where it sits, under which names.
    slots: Dict[int, Tuple[torch.nn.Parameter, List[Tuple[torch.nn.Module, str]], List[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate = False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            _, places, names = slots.setdefault(id(parameter), (parameter, [], []))
            places.append((module, name))
            names.append(f"{prefix}.{name}" if prefix else name)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    renamed = _renamed(model, reader, renamings)
    tables = _table_ids(model)
    jobs = []
    for parameter, places, names in slots.values():
        candidates = [key for name in names for key in (name, renamed.get(name))]
        key = next((key for key in candidates if key is not None and key in reader), None)
        if key is None and any(name in tied for name in names):
            continue  # transformers ties it after the load
        if key is None:
            raise ValueError(
                f"no tensor for {names[0]!r} in the checkpoint (or transformers builds it from several)"
            )
        weight, module = None, places[0][0]
        if isinstance(parameter, Params4bit):
            if not isinstance(module, Linear4bit) or parameter.dim() != 2:
                raise ValueError(
                    f"{names[0]!r} is a 4-bit weight of a {type(module).__name__}; only Linear4bit "
                    "layers are sharded"
                )
            weight = StoredWeight(module, key, reader, mesh, device, parameter.dtype)
        jobs.append(_Job(names[0], key, places, parameter, weight, id(parameter) in tables))
        _check_stored(jobs[-1], reader)
    return jobs


def _renamed(
    model: torch.nn.Module, reader: ShardReader, renamings: Sequence[Any]
) -> Dict[str, str]:
    """Model name -> checkpoint name, where transformers renames."""
    prefix = getattr(model, "base_model_prefix", "")
    names = {name for name, _ in model.named_parameters(remove_duplicate = False)}
    found = {}
    for key in reader.keys():
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


def _check_stored(job: _Job, reader: ShardReader) -> None:
    shape, expected = reader.shape(job.key), tuple(job.parameter.shape)
    itemsize = reader.itemsize(job.key)
    if job.weight is not None:
        expected = tuple(job.weight.format.shape)
    if job.weight is not None and job.weight.described:
        expected = (-(-expected[0] * expected[1] // 2) // itemsize, 1)
    elif itemsize == 1:
        raise ValueError(
            f"{job.key!r} holds bytes, but no {job.key}.quant_state.bitsandbytes__* is beside it"
        )
    if shape != expected:
        raise ValueError(
            f"{job.key!r} has shape {shape} in the checkpoint, and the model expects {expected}"
        )


def _read(job: _Job, reader: ShardReader, device: torch.device, dtypes: Dict[str, Any]) -> Any:
    """What this rank needs of the job's tensor. In a thread: without collectives."""
    if job.weight is not None:
        return job.weight.read()
    kept = (dtype for pattern, dtype in dtypes.items() if re.search(pattern, job.name))
    value = reader.whole(job.key).to(next(kept, job.parameter.dtype))
    return value if job.table else value.to(device)


def _place(job: _Job, value: Any, device: torch.device, block: Optional[tuple]) -> None:
    """Make ``value`` the job's parameter. block: of a layer that goes to host memory; its shards do
    once the last of them is read.
    """
    placed = [(job, value)]
    if block is not None and job.weight is not None:
        read, count = block
        read.append((job, value))
        placed = read if len(read) == count else []
        if placed:
            HostBlock([shard for _, shard in placed], pin = device.type != "cpu")
    for job, value in placed:
        if isinstance(value, WeightShard):
            new = _unwrapped_parameter(value, job.module)
        else:
            new = torch.nn.Parameter(value, requires_grad = job.parameter.requires_grad)
        if job.table:
            setattr(new, HOST_TABLE, True)
        new._is_hf_initialized = True
        for module, name in job.places:
            module._parameters[name] = new


def _unwrapped_parameter(shard: WeightShard, module: Linear4bit) -> Params4bit:
    """The shard as the module's weight until the wrap, so that PEFT and Unsloth see a 4-bit layer.

    A shard in host memory is represented by an empty weight on the device, from which they take the
    adapter's device.
    """
    state, packed = shard.state, shard.packed.view(-1, 1)
    if shard.on_host:
        packed = torch.empty((0, 1), dtype = torch.uint8, device = state.code.device)
    set_shard(module, shard)
    return Params4bit(
        packed,
        requires_grad = False,
        quant_state = state,
        blocksize = shard.layout.blocksize,
        compress_statistics = shard.nested is not None,
        quant_type = state.quant_type,
        module = module,
        bnb_quantized = True,
    )
