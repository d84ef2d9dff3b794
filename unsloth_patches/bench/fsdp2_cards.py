# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``python -m unsloth_patches bench fsdp2-cards``: the smallest card on which QLoRA trains, under
Unsloth's sharded layout and under ours.

A card is a limit of torch's allocator (``set_per_process_memory_fraction``). Each turn tries some
cards between the bounds, from the largest on until one is too small, which ends its processes, and
narrows the bounds to the two cards between which training begins to fit. Both sides go at once.
Without a GPU there is no memory to limit, and nothing runs.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Tuple

from .fsdp2 import GIB, LAYERS, LENGTH, SHAPE, merged_row
from .fsdp2_cells import whole_frozen
from .fsdp2_checkpoint import fast_folder, make_checkpoint
from .fsdp2_launch import Group
from .harness import save_json

COMMAND = "python -m unsloth_patches bench fsdp2-cards"
# Cards of one turn, and how often the bounds are narrowed.
CARDS, TURNS = 5, 2
OPTIONS = {"ours": {"load": "auto", "offload": "auto"}, "upstream": {"layout": "sharded"}}


def between(
    low: float,
    high: float,
    count: int = CARDS,
) -> List[float]:
    """``count`` cards inside (low, high), at equal distances, in GiB."""
    return [round(low + (high - low) * (i + 1) / (count + 1), 3) for i in range(count)]


def narrowed(low: float, high: float, tried: List[Tuple[float, bool]]) -> Tuple[float, float]:
    """The bounds after ``tried``: below the smallest card from which on all trained."""
    for card, trained in sorted(tried, reverse = True):
        if not trained:
            return card, high
        high = card
    return low, high


def run(out: Path, quick: bool = False) -> int:
    """Writes ``fsdp2_cards.json``. Returns 1 where a side trained on no card, 2 without two GPUs."""
    import torch

    world = torch.cuda.device_count()
    if world < 2 or quick:
        print("bench fsdp2-cards: needs two GPUs, whose memory it limits.")
        return 2
    work = Path(tempfile.mkdtemp(prefix = "fsdp2-cards-", dir = fast_folder()))
    try:
        make_checkpoint(work / "llama", SHAPE, LAYERS)
        rows = _search(work, world)
    finally:
        shutil.rmtree(work, ignore_errors = True)
    save_json(Path(out) / "fsdp2_cards.json", {"rows": rows}, COMMAND)
    for row in rows:
        print(
            f"{row['who']}: trains on {row['trains']} GiB, not on {row['fails']} GiB ({row['why']})"
        )
    return 1 if any(row["trains"] is None for row in rows) else 0


def _search(work: Path, world: int) -> List[dict]:
    whole = whole_frozen(SHAPE, LAYERS) / GIB
    case = {"checkpoint": str(work / "llama"), "shape": SHAPE, "layers": LAYERS, "steps": 3}
    case.update(length = LENGTH // 8, checkpointing = True)
    start = (round(whole / 4, 3), round(2 * whole, 3))
    tried: dict = {who: [] for who in OPTIONS}
    why = dict.fromkeys(OPTIONS, "")

    def turn(who: str) -> None:
        cards = between(*narrowed(*start, tried[who]))[::-1]
        cases = [
            {**case, **OPTIONS[who], "name": f"card of {card} GiB", "card_gib": card}
            for card in cards
        ]
        group = Group(cases, who, world, work)
        try:
            for index, card in enumerate(cards):
                row = merged_row(group, index, group.run(index))
                tried[who].append((card, not row["error"]))
                print(f"{who}: {card} GiB: {row['error'][:80] or 'trains'}", flush = True)
                if row["error"]:
                    why[who] = row["error"]
                    break
        finally:
            group.end()

    for _ in range(TURNS):
        with ThreadPoolExecutor(len(OPTIONS)) as pool:
            list(pool.map(turn, OPTIONS))
    bounds = {who: narrowed(*start, tried[who]) for who in OPTIONS}
    return [
        {
            "who": who,
            "trains": bounds[who][1] if any(ok for _, ok in tried[who]) else None,
            "fails": bounds[who][0],
            "why": why[who][:200],
            "tried": sorted(tried[who]),
        }
        for who in OPTIONS
    ]
