# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Whether a 4-bit load under native FSDP2 is sharded, decided from the memory that is there.

``UNSLOTH_FSDP2_SHARDED_LOAD`` = auto (default) | 1 | 0. With auto, every rank counts the training
peak of the layout that native FSDP2 takes otherwise (the whole 4-bit model on every rank) and
compares it with its usable memory. Only where that does not fit on some rank is the load sharded:
where it fits, gathering no frozen weights is faster. One line says what was decided and from which
figures.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from typing import Any, Callable, List, Optional, Tuple

import torch

from .fsdp2_memory_count import (
    FRAGMENTATION,
    GIB,
    Training,
    largest_phase,
    usable_device_memory,
    usable_host_memory,
    whole_model_phases,
)
from .fsdp2_model_shape import LlamaShape, read_shape
from .fsdp2_sharded_4bit import (
    OFF,
    ON,
    loader_arguments,
    loading_step,
    loads_4bit,
    outermost_loader,
    sharded_4bit_loading,
    variable,
    whole_weights_wanted,
)

__all__ = ["choose_sharded_load", "shard_where_whole_does_not_fit", "sharded_load_mode"]

MODE_ENV = "UNSLOTH_FSDP2_SHARDED_LOAD"
TOKENS_ENV = "UNSLOTH_FSDP2_BATCH_TOKENS"
# NCCL's buffers, which are not there yet when the model is loaded.
NCCL_BYTES = 2**30
# How long a rank may be later than the others.
WAIT = datetime.timedelta(minutes = 20)

_stores: list = []  # the launcher's key-value store; closing it would end rank 0's server


def sharded_load_mode() -> str:
    """What a 4-bit load in this process is to be, from the environment: "1", "0" or "auto".

    "0" without native FSDP2, and where another variable asks for whole weights. Raises ValueError
    for a value that is none of the three.
    """
    from unsloth.models.fsdp2_native import native_fsdp2_requested

    if not native_fsdp2_requested():
        return "0"
    asked = variable(MODE_ENV) or "auto"
    if asked not in (*OFF, *ON, "auto"):
        raise ValueError(f"{MODE_ENV}={asked!r}: choose auto, 1 or 0.")
    if asked in OFF or whole_weights_wanted():
        return "0"
    return "1" if asked in ON else "auto"


def shard_where_whole_does_not_fit(stock: Callable) -> Callable:
    """Decorator of ``sharded_load_env``, over the one that shards 4-bit loads: undecided loads are
    sharded where the whole model would not fit on some rank.
    """

    @functools.wraps(stock)
    def sharded_load_env(loader):
        decided = stock(loader)

        @functools.wraps(loader)
        def wrapper(*args, **kwargs):
            if sharded_load_mode() != "auto" or not loads_4bit(loader, args, kwargs):
                return decided(*args, **kwargs)
            with outermost_loader() as outermost:
                undecided = outermost and loading_step() is not None
                if not undecided or not choose_sharded_load(loader, args, kwargs):
                    return decided(*args, **kwargs)
                with sharded_4bit_loading():
                    return loader(*args, **kwargs)

        return wrapper

    return sharded_load_env


def choose_sharded_load(loader: Callable, args: tuple, kwargs: dict) -> bool:
    """Collective over all ranks: whether this 4-bit load is to be sharded. Call it within native
    FSDP2 and mode "auto" only. Prints the decision on rank 0.
    """
    given = loader_arguments(loader, args, kwargs)
    tokens, needed, failed, notes = _batch_tokens(given), 0, "", ()
    try:
        shape = _shape(given)
        needed, notes = _whole_peak(shape, given, tokens), shape.notes
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    found = _exchange({"needed": needed, "failed": failed, "usable": _usable()})
    failures = [f"rank {rank}: {one['failed']}" for rank, one in enumerate(found) if one["failed"]]
    if failures:
        _say(f"whole on every rank, since its size is not known: {failures[0]}")
        return False
    needed = max(one["needed"] for one in found)
    usable = [one["usable"] for one in found]
    sharded = any(needed > memory for memory in usable)
    smallest = min(range(len(usable)), key = usable.__getitem__)
    _say(
        f"{'sharded over' if sharded else 'whole on each of'} {len(found)} ranks, since training "
        f"with the whole model on a rank is planned to need {needed / GIB:.2f} GiB "
        f"({tokens} tokens a micro-batch), and {usable[smallest] / GIB:.2f} GiB are usable on rank "
        f"{smallest} ({'; '.join([*notes, f'{MODE_ENV}=1 or 0 decides otherwise'])})"
    )
    return sharded


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"Unsloth: 4-bit load under FSDP2: {text}.", flush = True)


def _batch_tokens(given: dict) -> int:
    """Tokens of a micro-batch: UNSLOTH_FSDP2_BATCH_TOKENS, or one sequence of max_seq_length."""
    stated = variable(TOKENS_ENV)
    if stated:
        if not stated.isdigit() or int(stated) < 1:
            raise ValueError(f"{TOKENS_ENV}={stated!r}: has to be a positive whole number.")
        return int(stated)
    length = given.get("max_seq_length")
    return length if isinstance(length, int) and length > 0 else 2048


def _whole_peak(shape: LlamaShape, given: dict, tokens: int) -> int:
    """Bytes that upstream's layout needs on one rank. The adapter is made after the load: rank 16
    on all linears is counted.
    """
    world, checkpointing = int(os.environ["WORLD_SIZE"]), _checkpointing(given)
    job = Training(world = world, tokens = tokens, checkpointing = checkpointing)
    peak = largest_phase(whole_model_phases(shape, job))[2]
    return int(peak * (1 + FRAGMENTATION))


def _checkpointing(given: dict) -> Any:
    asked = given.get("use_gradient_checkpointing", "unsloth")
    return asked if asked == "unsloth" else bool(asked)


def _shape(given: dict) -> LlamaShape:
    from transformers import AutoConfig

    names = ("token", "revision", "trust_remote_code")
    options = {name: given[name] for name in names if given.get(name)}
    return read_shape(AutoConfig.from_pretrained(given["model_name"], **options))


def _usable() -> int:
    """Bytes that this rank may fill: of its GPU, or its share of the host's memory without one."""
    if not torch.cuda.is_available():
        host = usable_host_memory()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
        return 2**62 if host is None else host // ranks
    with torch.cuda.device(_device_index()):
        return usable_device_memory(reserve = NCCL_BYTES, fresh = True)


def _device_index() -> int:
    local = os.environ.get("LOCAL_RANK", "")
    known = local.isdigit() and int(local) < torch.cuda.device_count()
    return int(local) if known else torch.cuda.current_device()


def _exchange(mine: dict) -> List[dict]:
    """``mine`` of every rank, in the order of the ranks.

    Through the process group if there is one, else through the launcher's store: a process group
    that is made here would ignore the backend and the timeout of the TrainingArguments to come.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(_device_index())
        found: List[Optional[dict]] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return found
    store, rank, world = _launcher_store()
    store.set(str(rank), json.dumps(mine))
    return [json.loads(store.get(str(other))) for other in range(world)]


def _launcher_store() -> Tuple[Any, int, int]:
    import torch.distributed as dist

    if not _stores:
        _stores.append(next(dist.rendezvous("env://", timeout = WAIT)))
    store, rank, world = _stores[0]
    _stores.append(None)  # every load has keys of its own
    return dist.PrefixStore(f"unsloth_fsdp2_load/{len(_stores)}", store), rank, world
