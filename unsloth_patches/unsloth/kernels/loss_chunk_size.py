# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""How many rows of logits a chunked loss holds at once.

More rows make the matrix products more efficient up to a point; memory grows with every row. The
number comes, in this order, from the caller, from ``UNSLOTH_LOSS_CHUNK_ROWS``, from the budget that
``UNSLOTH_LOSS_CHUNK_FILE`` has for this GPU, or from one for every GPU, bounded by the memory that is
free.
"""

import functools
import json
import os
from pathlib import Path
from typing import Dict, List, Optional

import torch

__all__ = ["BUDGET_MIB", "choose_chunk_rows", "fit_rows", "stored_budget"]

MIN_ROWS = 16
MAX_ROWS = 8192
# Row counts that matrix products take without a cut tile on every current GPU.
FEW_ROWS, MANY_ROWS = 128, 256

# MiB of logits: no more than Unsloth's own loss takes on an H200 and an H100, where it is measured.
# Elsewhere it is computed from published figures: T4, L4 and A100 want as much.
BUDGET_MIB = 320
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
        chosen = min(budget // max(vocab_size * itemsize, 1), MAX_ROWS)
        chosen = fit_rows(chosen) if device.type == "cuda" else max(chosen, MIN_ROWS)
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


# Device index -> [bytes that were free when last asked, losses until it is asked again]. Asking takes
# the host 0.1 ms; memory that has gone since then shows when the logits' buffer is allocated.
_room: Dict[int, List[int]] = {}
_ASK_EVERY = 32


def _budget_bytes(device: torch.device, at_least: int) -> int:
    if device.type != "cuda":
        return CPU_BUDGET_MIB << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    budget = max(_gpu_budget(index) << 20, at_least)
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
def _gpu_budget(index: int) -> int:
    return stored_budget(torch.cuda.get_device_name(index)) or BUDGET_MIB


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
        return Path(explicit)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "unsloth" / "loss_chunk.json"


def read_store() -> dict:
    try:
        stored = json.loads(store_path().read_text(encoding = "utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def stored_budget(device_name: str) -> Optional[int]:
    """MiB of logits that the file has for GPUs of this name, or None."""
    value = read_store().get(device_name)
    return value if isinstance(value, int) and value > 0 else None
