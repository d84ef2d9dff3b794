# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""How many rows of logits a chunked loss holds at once.

More rows make the matrix products more efficient up to a point; memory grows with every row. The
number comes, in this order, from the caller, from ``UNSLOTH_LOSS_CHUNK_ROWS``, from the budget that
a sweep on this GPU stored, or from a budget by architecture, bounded by the memory that is free.
"""

from typing import Optional
import functools
import json
import os
from pathlib import Path

import torch

__all__ = ["choose_chunk_rows", "store_budget", "stored_budget", "fit_rows", "BUDGET_MIB"]

MIN_ROWS = 16
MAX_ROWS = 8192
# The rows of one tile of a matrix product on every current GPU.
TILE_ROWS = 128
TILE_COLUMNS = 256

# MiB of logits by compute capability. 9.0 is measured on an H200; 7.5, 8.0 and 8.9 are computed
# from published figures of T4, A100 and L4 (the benchmark chunk-size repeats both).
BUDGET_MIB = {(7, 5): 128, (8, 0): 128, (8, 9): 256, (9, 0): 256}
DEFAULT_BUDGET_MIB = 256
CPU_BUDGET_MIB = 64
# A trained head's chunk may be as large as its gradient, up to this.
TRAINED_BUDGET_MIB = 512
# The logits take at most this part of the memory that is free.
FREE_SHARE = 0.25


def choose_chunk_rows(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    itemsize: int,
    device: torch.device,
    chunk_rows: Optional[int] = None,
    head_grad_bytes: int = 0,
) -> int:
    """Rows per chunk, at least 1 and at most ``max(rows, 1)``.

    rows: rows that take part. itemsize: bytes of a logit as it is held.
    head_grad_bytes: size of the head's gradient, 0 for a frozen head. Every chunk reads and writes it
        whole, so a trained head gets larger chunks.
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
        chosen = fit_rows(
            budget // max(vocab_size * itemsize, 1), hidden_size, _multiprocessors(device)
        )
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


def fit_rows(most: int, hidden_size: int, multiprocessors: int) -> int:
    """The row count up to ``most`` whose product with the head fills the GPU best.

    The [rows, hidden] product works on tiles of 128 x 256; a last wave that leaves multiprocessors
    idle costs as much as a full one. Rows below half of ``most`` are not worth their smaller chunks.
    """
    most = max(MIN_ROWS, min(most, MAX_ROWS))
    if most < TILE_ROWS or multiprocessors == 0:
        return most
    column_tiles = -(-hidden_size // TILE_COLUMNS)

    def filled(rows: int) -> float:
        tiles = rows // TILE_ROWS * column_tiles
        return tiles / (-(-tiles // multiprocessors) * multiprocessors)

    largest = most // TILE_ROWS * TILE_ROWS
    smallest = max(TILE_ROWS, largest // 2 // TILE_ROWS * TILE_ROWS)
    candidates = range(smallest, largest + 1, TILE_ROWS)
    return max(candidates, key = lambda rows: (round(filled(rows), 2), rows))


def _budget_bytes(device: torch.device, at_least: int) -> int:
    if device.type != "cuda":
        return CPU_BUDGET_MIB << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    budget = max(_architecture_budget(index) << 20, at_least)
    wanted = int(budget / FREE_SHARE)
    # torch's allocator says for next to nothing what it holds unused; the driver is asked after it.
    free = _held_bytes(index)
    if free < wanted:
        free += torch.cuda.mem_get_info(index)[0]
    return min(budget, int(FREE_SHARE * free))


@functools.lru_cache(maxsize = None)
def _architecture_budget(index: int) -> int:
    stored = stored_budget(torch.cuda.get_device_name(index))
    if stored is not None:
        return stored
    return BUDGET_MIB.get(torch.cuda.get_device_capability(index), DEFAULT_BUDGET_MIB)


def _held_bytes(index: int) -> int:
    """Memory that torch's allocator has reserved and does not use."""
    # Not memory_reserved() - memory_allocated(): each flattens and sorts all statistics.
    stats = torch.cuda.memory_stats_as_nested_dict(index)
    if not stats:
        return 0
    return stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"]


@functools.lru_cache(maxsize = None)
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return _multiprocessors_of(
        torch.cuda.current_device() if device.index is None else device.index
    )


# --------------------------------------------------------------- the choice stored for a GPU


def _store_path() -> Path:
    """``UNSLOTH_LOSS_CHUNK_FILE``, or ``unsloth/loss_chunk.json`` in the user's cache folder."""
    explicit = os.environ.get("UNSLOTH_LOSS_CHUNK_FILE")
    if explicit:
        return Path(explicit)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "unsloth" / "loss_chunk.json"


def _read_store() -> dict:
    try:
        stored = json.loads(_store_path().read_text(encoding = "utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def stored_budget(device_name: str) -> Optional[int]:
    """MiB of logits that a sweep stored for GPUs of this name, or None."""
    value = _read_store().get(device_name)
    return value if isinstance(value, int) and value > 0 else None


def store_budget(device_name: str, mib: int) -> Path:
    """Stores ``mib`` MiB of logits as the choice for GPUs of this name; returns the file."""
    if not isinstance(mib, int) or mib < 1:
        raise ValueError(f"store_budget: mib must be a positive integer, got {mib!r}.")
    path = _store_path()
    path.parent.mkdir(parents = True, exist_ok = True)
    path.write_text(
        json.dumps({**_read_store(), device_name: mib}, indent = 1) + "\n", encoding = "utf-8"
    )
    _architecture_budget.cache_clear()
    return path
