# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""How many rows of logits a chunked loss holds at once.

More rows make the matrix products more efficient up to a point; memory grows with every row. The
number comes, in this order, from the caller, from ``UNSLOTH_LOSS_CHUNK_ROWS``, from the budget that
``UNSLOTH_LOSS_CHUNK_FILE`` has for this GPU, or from one for every GPU, bounded by the memory that is
free. Of the row counts that a budget leaves, a frozen head's first loss tries which suits its products.
"""

import functools
import json
import os
import warnings
import weakref
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

from ..cross_entropy_spec import padded_columns

__all__ = [
    "BUDGET_MIB",
    "choose_chunk_rows",
    "fastest_rows",
    "fit_rows",
    "graph_pools",
    "stored_budget",
]

MIN_ROWS = 16
MAX_ROWS = 8192
# Row counts that matrix products take without a cut tile on every current GPU.
FEW_ROWS, MANY_ROWS = 128, 256

# MiB of logits: no more than Unsloth's own loss takes on an H200 and an H100, where it is measured.
# Elsewhere it is computed from published figures: T4, L4 and A100 want as much.
BUDGET_MIB = 256
# Beside step graphs, whose memory no loss can use. Of 8192 tokens on an H100 a loss takes 8% longer.
BUDGET_BESIDE_GRAPHS_MIB = 128
CPU_BUDGET_MIB = 64
# A trained head's chunk may be as large as its gradient, up to this. Unsloth's own loss holds that
# gradient twice.
TRAINED_BUDGET_MIB = 1024
# The logits take at most this part of the memory that is free.
FREE_SHARE = 0.25


def choose_chunk_rows(
    rows: int,
    vocab_size: int,
    itemsize: int,
    device: torch.device,
    chunk_rows: Optional[int] = None,
    head_grad_bytes: int = 0,
    products: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
) -> int:
    """Rows per chunk, at least 1 and at most ``max(rows, 1)``.

    rows: rows that take part. itemsize: bytes of a logit as it is held.
    head_grad_bytes: size of the head's gradient, 0 for a frozen head. Every chunk reads and writes it
        whole, so a trained head gets larger chunks.
    products: hidden states and a frozen head, on which row counts may be tried; see `fastest_rows`.
    chunk_rows: the caller's choice, which wins. Raises ValueError for one that is no positive
    integer, and for an ``UNSLOTH_LOSS_CHUNK_ROWS`` that is none.
    """
    chosen = _positive("chunk_rows", chunk_rows)
    if chosen is None:
        chosen = _positive(
            "UNSLOTH_LOSS_CHUNK_ROWS", os.environ.get("UNSLOTH_LOSS_CHUNK_ROWS") or None
        )
    if chosen is None:
        budget = _budget_bytes(device, min(head_grad_bytes, TRAINED_BUDGET_MIB << 20))
        chosen = min(budget // max(vocab_size * itemsize, 1), MAX_ROWS)
        chosen = fit_rows(chosen) if device.type == "cuda" else max(chosen, MIN_ROWS)
        if products is not None and FEW_ROWS < chosen < rows:
            chosen = fastest_rows(chosen, *products)
    return max(1, min(chosen, rows))


def _positive(name: str, value) -> Optional[int]:
    if value is None:
        return None
    try:
        number = int(value)
        exact = not isinstance(value, bool) and (isinstance(value, str) or number == value)
    except (TypeError, ValueError):
        exact, number = False, 0
    if not exact or number < 1:
        raise ValueError(
            f"{name} must be a positive number of rows, got {value!r}; leave it out to have it chosen."
        )
    return number


def fit_rows(most: int) -> int:
    """The largest row count up to ``most`` that matrix products take well; at least MIN_ROWS.

    On an H200 multiples of 256 were the best from 512 rows on, multiples of 128 below; a row count
    between them costs as much time as the next multiple.
    """
    for step in (MANY_ROWS, FEW_ROWS):
        if most >= 2 * step:
            return most // step * step
    return FEW_ROWS if most >= FEW_ROWS else max(most, MIN_ROWS)


# What `fastest_rows` has found, by device, shapes and dtype.
_fastest: Dict[tuple, int] = {}
# A smaller chunk has to be this much faster.
_GAIN = 0.98


def fastest_rows(most: int, hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Of row counts between ``most / 2`` and ``most``, the one whose products take least time a row.

    How well a product of so many rows fills a GPU depends on the head's width: on an H100, 1280 rows
    of width 5120 took 14% more time a row than 1024 did, and 512 of width 3584 11% more than 768.
    Tried once a head and process, which takes some 50 ms; not while a CUDA graph is captured, nor
    under ``torch.use_deterministic_algorithms``: there it is ``most``.
    """
    if not weight.is_cuda or torch.are_deterministic_algorithms_enabled():
        return most
    key = (most, weight.device.index, weight.dtype, *weight.shape)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return most
        # 2 ** n and 3 * 2 ** n.
        counts = [
            c << n for n in range(16) for c in (2, 3) if most <= 2 * (c << n) and c << n < most
        ]
        try:
            seconds = _seconds_a_row([most, *sorted(counts, reverse = True)], hidden, weight)
        except torch.OutOfMemoryError:
            return most
        best = most
        for count, taken in seconds.items():
            if taken < _GAIN * seconds[best]:
                best = count
        _fastest[key] = best
    return _fastest[key]


@torch.no_grad()
def _seconds_a_row(
    counts: List[int], hidden: torch.Tensor, weight: torch.Tensor
) -> Dict[int, float]:
    """The time that both products of a chunk of so many rows take, over its rows."""
    with torch.autocast("cuda", enabled = False):
        hidden = hidden.detach()[: counts[0]]
        vocab_size = weight.shape[0]
        logits = hidden.new_empty((counts[0], padded_columns(vocab_size)))[:, :vocab_size]
        gradient = torch.empty_like(hidden)

        def run(count):
            torch.mm(hidden[:count], weight.t(), out = logits[:count])
            torch.mm(logits[:count], weight, out = gradient[:count])

        spans: Dict[int, list] = {count: [] for count in counts}
        for turn in range(4):
            for count in counts:
                start, stop = (torch.cuda.Event(enable_timing = True) for _ in range(2))
                start.record()
                run(count)
                stop.record()
                if turn:  # the first one loads kernels
                    spans[count].append((start, stop))
        torch.cuda.synchronize()
        return {
            count: min(start.elapsed_time(stop) for start, stop in pairs) / count
            for count, pairs in spans.items()
        }


# Device index -> [bytes that were free when last asked, losses until it is asked again]. Asking takes
# the host 0.1 ms; memory that has gone since then shows when the logits' buffer is allocated.
_room: Dict[int, List[int]] = {}
_ASK_EVERY = 32
# Pools of captured step graphs, which add themselves.
graph_pools: "weakref.WeakSet" = weakref.WeakSet()


def _budget_bytes(device: torch.device, at_least: int) -> int:
    if device.type != "cuda":
        return CPU_BUDGET_MIB << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    mib = _gpu_budget(index) or (BUDGET_BESIDE_GRAPHS_MIB if graph_pools else BUDGET_MIB)
    budget = max(mib << 20, at_least)
    wanted = int(budget / FREE_SHARE)
    room = _room.get(index)
    if room is not None and room[1] > 0 and room[0] >= 2 * wanted:
        room[1] -= 1
        return budget
    # torch's allocator says for next to nothing what it holds unused; the driver is asked after it.
    free = _held_bytes(index)
    if free < 2 * wanted:
        free += torch.cuda.mem_get_info(index)[0]
    _room[index] = [free, _ASK_EVERY]
    return min(budget, int(FREE_SHARE * free))


@functools.lru_cache(maxsize = None)
def _gpu_budget(index: int) -> Optional[int]:
    return stored_budget(torch.cuda.get_device_name(index))


def _held_bytes(index: int) -> int:
    """Memory that torch's allocator has reserved and does not use."""
    # Not memory_reserved() - memory_allocated(): each flattens and sorts all statistics.
    stats = torch.cuda.memory_stats_as_nested_dict(index)
    if not stats:
        return 0
    return stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"]


# --------------------------------------------------------------- the choice for one GPU


def store_path() -> Path:
    """``UNSLOTH_LOSS_CHUNK_FILE``, or ``unsloth/loss_chunk.json`` in the user's cache folder: JSON,
    ``{"NVIDIA H200": 320}``, MiB of logits by the GPU's name.
    """
    explicit = os.environ.get("UNSLOTH_LOSS_CHUNK_FILE")
    if explicit:
        return Path(os.path.expanduser(explicit))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "unsloth" / "loss_chunk.json"


def read_store() -> dict:
    try:
        stored = json.loads(store_path().read_text(encoding = "utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def is_budget(value: object) -> bool:
    return type(value) is int and value > 0


def stored_budget(device_name: str) -> Optional[int]:
    """MiB of logits that the file has for GPUs of this name, or None; warns of a file without sizes."""
    stored, path = read_store(), store_path()
    value = stored.get(device_name)
    if is_budget(value):
        return value
    named = os.environ.get("UNSLOTH_LOSS_CHUNK_FILE") or path.exists()
    if device_name in stored or not stored and named:
        what = (
            f"{device_name!r} is {value!r}"
            if device_name in stored
            else "no JSON of sizes is there"
        )
        warnings.warn(
            f"Unsloth: {path} is ignored, and the size of a loss's chunks computed: {what}. Write "
            f'{{"{device_name}": MiB of logits}}, or delete the file and unset UNSLOTH_LOSS_CHUNK_FILE.',
            stacklevel = 2,
        )
    return None
