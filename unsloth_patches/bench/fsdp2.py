# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``python -m unsloth_patches bench fsdp2``: QLoRA under FSDP2, beside Unsloth's own layouts.

Makes a Llama-shaped checkpoint with random weights, then measures on every GPU (2 or more): memory
after load, after the wrap and in training, seconds to load, step time, tokens a second, losses
against one GPU, and the same on cards emulated by a memory fraction, on which the load and the
offload decide for themselves. ``bench fsdp2-plan`` checks the offload plan's peaks. With
``--quick``: a toy. Without a GPU: the toy on two CPU ranks, whose losses are compared; there is no
memory of a GPU to measure, and the seconds are the CPU's.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Optional

from .fsdp2_cells import SHAPES, TOY, planned_peak, whole_frozen
from .fsdp2_checkpoint import fast_folder, make_checkpoints
from .fsdp2_launch import Group
from .fsdp2_plot import plot
from .harness import print_table, save_json

# Three eighths of an 8B, in blocks and in vocabulary: what is measured here grows with both.
SHAPE = {**SHAPES["8B"], "vocab_size": 12032}
LAYERS, LENGTH = 12, 2048
GIB = 2**30
STEPS = 6  # of a load; they are not timed where turns follow
# In a table: was not measured, or there is no such figure for this case.
NOT_THERE = "-"
LARGEST = ("load_s", "load_peak", "after_load", "wrap_peak", "after_wrap", "train_peak")
LARGEST += ("step_s", "offloaded_blocks", "planned_peak", "shards")
LARGEST += ("wrap_s", "gather_host_ms", "gather_ms")
MEDIANS = ("load_s", "step_s", "wrap_s", "gather_host_ms", "gather_ms")
# The host's speed changes from minute to minute, by more than what is compared. So loads alternate, and
# steps are timed in trainings that all stay loaded and take turns, so many after the load; of each turn
# the first step does not count.
TURNS, TURN = 5, {"turn": "again", "steps": 4, "warmup": 1}
# The whole model of an 8B: its load, its losses beside one GPU's, its speed.
WHOLE, WHOLE_LAYERS = "8B-128k", 32
WHOLE_NAME = f"all {WHOLE_LAYERS} layers of {WHOLE}"
COMPARED = [
    ("sharded", "stock, sharded layout"),
    ("half of blocks offloaded", "sharded"),
    ("auto", "stock layout"),
    (f"{WHOLE_NAME}, sharded", f"{WHOLE_NAME}, stock, sharded layout"),
]
# Of a process's first case, which is not shown: kernels are compiled, workers start, caches fill.
WARM_UP = {"name": "warm-up", "steps": 2, "shown": False}


def merged_row(group: Group, index: int, found: List[dict]) -> dict:
    """One case's row: the largest memory of the ranks, the mean of their losses."""
    case = {key: value for key, value in group.cases[index].items() if key != "checkpoint"}
    row: Dict[str, object] = {"who": group.mode, "world": group.world, "case": case}
    for key in LARGEST:
        row[key] = max((f[key] for f in found if f.get(key) is not None), default = None)
    errors = [f["error"] for f in found if "error" in f]
    reached = len(found) == group.world
    row["error"] = errors[0] if errors else ("" if reached else "no result in time")
    speeds = [f["tokens_per_s"] for f in found if "tokens_per_s" in f]
    row["tokens_per_s"] = min(speeds, default = None)
    losses = [f["losses"] for f in found if "losses" in f]
    row["losses"] = [round(sum(v) / len(v), 5) for v in zip(*losses)] if losses else []
    if group.mode == "ours" and "load" not in case:
        row["planned_peak"] = planned_peak(case, group.world)
    row["ranks"] = [{k: v for k, v in f.items() if k != "case"} for f in found]
    return row


def over_rounds(rows: List[dict]) -> List[dict]:
    """One row for the rounds of a case: medians of the loads' times, the largest memory, all rounds'
    ranks, and the time of a step over its turns, if it had any.
    """
    grouped: Dict[tuple, List[dict]] = {}
    for row in rows:
        grouped.setdefault((row["who"], row["world"], row["case"]["name"]), []).append(row)
    return [_one_row(rounds) for rounds in grouped.values()]


def _one_row(rounds: List[dict]) -> dict:
    turns = [row for row in rounds if row["case"].get("turn") == "again"]
    row = dict(rounds[0])
    for key in LARGEST:
        values = sorted(r[key] for r in rounds if r[key] is not None)
        if values:
            row[key] = values[len(values) // 2] if key in MEDIANS else values[-1]
    times = sorted(
        seconds
        for r in turns or rounds
        for rank in r["ranks"][:1]
        for seconds in rank.get("steps_s", [])[r["case"].get("warmup", 1) :]
    )
    if times:
        row.update(step_s = times[len(times) // 2], timed_steps = len(times))
        row["step_quartiles"] = [times[len(times) // 4], times[3 * len(times) // 4]]
        # One GPU takes the batch that all ranks have together.
        tokens = row["case"]["length"] * row["world"] * row["case"].get("micro_batches", 1)
        row["tokens_per_s"] = round(tokens / row["step_s"], 1)
    row["error"] = next((r["error"] for r in rounds if r["error"]), "")
    row["ranks"] = [rank for r in rounds for rank in r["ranks"]]
    return row


def turn_medians(row: dict) -> List[float]:
    """Seconds of a step in each turn after the load, on the first rank."""
    turns = (rank for rank in row["ranks"][:: row["world"]] if "load_s" not in rank)
    return [
        statistics.median(rank["steps_s"][TURN["warmup"] :]) for rank in turns if "steps_s" in rank
    ]


def ratios(rows: List[dict]) -> List[tuple]:
    """(case, the one it is compared with, step times' ratio in each turn, load times' ratio)."""
    named = {row["case"]["name"]: row for row in rows}
    found = []
    for name, other in COMPARED:
        if name in named and other in named:
            one, two = named[name], named[other]
            turns = [a / b for a, b in zip(turn_medians(one), turn_medians(two))]
            if turns:
                found.append((name, other, turns, one["load_s"] / two["load_s"]))
    return found


def show(title: str, rows: List[dict]) -> None:
    columns = ["who", "N", "case", "load s", "load peak", "after load", "wrap peak", "train peak"]
    columns += ["planned", "step s", "tok/s", "losses, error"]
    table = []
    for row in rows:
        losses = " ".join(f"{value:.4f}" for value in row["losses"][:4])
        keys = ("load_s", "load_peak", "after_load", "wrap_peak", "train_peak", "planned_peak")
        values = [row[key] for key in keys] + [row["step_s"], row["tokens_per_s"]]
        said = row["error"][:60] or losses
        cells = [row["who"], row["world"], row["case"]["name"], *values, said]
        table.append([NOT_THERE if cell is None else cell for cell in cells])
    print_table(title, columns, table)


def say_without_gpu(name: str, shown: str) -> None:
    """Before a benchmark of a toy on CPU ranks: what its table shows there, and what it cannot."""
    print(
        f"bench {name}: torch sees no CUDA GPU. A toy trains on two CPU ranks (gloo): {shown}. Not "
        f"measured: memory of a GPU ({NOT_THERE} in the table); the seconds are this CPU's and say "
        "nothing of a GPU."
    )


def _cases(
    checkpoint: Path,
    shape: dict,
    layers: int,
    length: int,
    emulated: bool = True,
    gpu: bool = True,
    big: Optional[Path] = None,
) -> List[tuple]:
    """(mode, one GPU only?, case) in the order in which they run: both sides alternate. big: the
    checkpoint of a whole model, which runs too.

    emulated: cards by a memory fraction, for a model that has the size for it.
    """

    def case(name: str, **options) -> dict:
        given = {"name": name, "checkpoint": str(checkpoint), "shape": shape, "layers": layers}
        return {**given, "length": length, "checkpointing": True, "steps": STEPS, **options}

    # A card that cannot hold the whole 4-bit weights: there the load and the offload are decided.
    gib = round(0.985 * whole_frozen(shape, layers) / GIB, 3)
    card = {"card_gib": gib, "length": length // 8, "steps": 3}
    on_card = f"card of {gib} GiB"
    if not emulated:
        card, on_card = {**card, "card_gib": None, "steps": 2}, "short, no card"
    auto = {"load": "auto", "offload": "auto"}
    stock = {"layout": "sharded"}
    compared = [
        ("ours", False, case("sharded")),
        ("upstream", False, case("stock, sharded layout", **stock)),
        ("ours", False, case("half of blocks offloaded", offload = f"blocks:{layers // 2}")),
    ]
    once = [
        ("upstream", False, case("stock layout")),
        ("ours", False, case("auto", load = "auto")),
        ("ours", True, case("one GPU" if gpu else "one rank")),
    ]
    whole = _whole_cases(big) if big else []
    return [
        ("ours", False, {**case("warm-up"), **WARM_UP}),
        ("upstream", False, {**case("warm-up", **stock), **WARM_UP}),
        *compared,
        *(by_turns([*compared, *once]) if gpu else once),
        *by_turns(whole),
        ("ours", False, case(f"auto, {on_card}", **auto, **card)),
        ("upstream", False, case(f"stock, {on_card}", **stock, **card)),
    ]


def _whole_cases(checkpoint: Path) -> List[tuple]:
    case = {"checkpoint": str(checkpoint), "shape": SHAPES[WHOLE], "layers": WHOLE_LAYERS}
    case.update(length = LENGTH, checkpointing = True, steps = STEPS)
    return [
        ("ours", False, {**case, "name": f"{WHOLE_NAME}, sharded"}),
        (
            "upstream",
            False,
            {**case, "name": f"{WHOLE_NAME}, stock, sharded layout", "layout": "sharded"},
        ),
        ("ours", True, {**case, "name": f"{WHOLE_NAME}, one GPU"}),
    ]


def by_turns(cases: List[tuple]) -> List[tuple]:
    """The cases as trainings that stay: each is loaded, then each has TURNS turns."""
    loads = [(mode, alone, {**case, "turn": "first"}) for mode, alone, case in cases]
    turns = [(mode, alone, {**case, **TURN}) for mode, alone, case in cases]
    return loads + turns * TURNS


def load_bound(case: dict, world: int) -> float:
    """What a sharded load may need at most, in GiB: its part of the blocks' 4-bit weights and the
    largest weight in 16 bits, and 15% more. Embedding and head wait in host memory.
    """
    sizes = case["shape"]
    tables = 2 * 2 * sizes["vocab_size"] * sizes["hidden_size"]
    blocks = whole_frozen(sizes, case["layers"]) - tables // (2 if sizes["tied"] else 1)
    largest = 2 * sizes["hidden_size"] * sizes["intermediate_size"]
    return round(1.15 * (blocks / world + largest) / GIB, 3)


def units(gpus: int) -> str:
    return "GiB of the fullest rank" if gpus else "a toy on CPU ranks; planned: GiB, computed"


def run(out: Path, quick: bool = False) -> int:
    """Runs everything and writes ``fsdp2.json`` to out. Returns 1 where a case of ours failed."""
    import torch

    gpus = torch.cuda.device_count()
    quick = quick or gpus == 0
    if gpus == 0:
        say_without_gpu("fsdp2", "load, wrap and training of each layout, and that losses agree")
    if gpus == 1:
        print("bench: one GPU: two ranks share it; their memory counts, their times do not.")
    work = Path(tempfile.mkdtemp(prefix = "fsdp2-", dir = None if quick else fast_folder()))
    groups: List[Group] = []
    try:
        rows = _measure(Path(out), work, quick, gpus, groups)
    finally:
        for group in groups:
            group.end()
        shutil.rmtree(work, ignore_errors = True)
    show(f"QLoRA under FSDP2, {units(gpus)}", rows)
    for row in rows:
        if row["gather_ms"] is not None:
            name, host = row["case"]["name"], row["gather_host_ms"]
            print(
                f"{row['who']}, {name}: a block's gather takes {row['gather_ms']} ms, the host {host} ms"
            )
    for name, other, turns, load in ratios(rows):
        middle, low, high = statistics.median(turns), min(turns), max(turns)
        print(
            f"{name} / {other}: step {middle:.2f} (turns: {low:.2f} to {high:.2f}), load {load:.2f}"
        )
    return 1 if any(row["error"] for row in rows if row["who"] == "ours") else 0


def _measure(out: Path, work: Path, quick: bool, gpus: int, groups: List[Group]) -> List[dict]:
    shape, layers, length = (TOY, 2, 32) if quick else (SHAPE, LAYERS, LENGTH)
    world = max(gpus, 2)
    big = None if quick else work / "whole"
    options = {"emulated": not quick, "gpu": gpus > 0, "big": big}
    order = _cases(work / "llama", shape, layers, length, **options)
    cases: Dict[tuple, List[dict]] = {}
    places = []  # of every case: which group runs it, as which of its cases
    for mode, alone, case in order:
        # One GPU takes the batch that all ranks have together.
        case = {**case, "micro_batches": world} if alone else case
        of_group = cases.setdefault((mode, alone), [])
        places.append(((mode, alone), len(of_group)))
        of_group.append(case)
    started = {
        (mode, alone): Group(some, mode, 1 if alone else world, work, gpus == 1 and not alone)
        for (mode, alone), some in cases.items()
    }
    groups += started.values()
    begin = time.perf_counter()
    wanted = [(work / "llama", shape, layers)]
    make_checkpoints([*wanted, (big, SHAPES[WHOLE], WHOLE_LAYERS)] if big else wanted)
    print(f"checkpoints in {time.perf_counter() - begin:.1f} s", flush = True)
    rows: List[dict] = []
    name = "fsdp2-quick.json" if quick else "fsdp2.json"
    for key, index in places:
        group = started[key]
        row = merged_row(group, index, group.run(index))
        if not group.cases[index].get("shown", True):
            continue
        if row["shards"] and row["load_peak"]:
            row["load_bound"] = load_bound(row["case"], world)
        rows.append(row)
        print(row["who"], row["case"]["name"], row["step_s"], row["error"][:300], flush = True)
        save_json(out / name, {"rows": over_rounds(rows)}, "python -m unsloth_patches bench fsdp2")
    rows = over_rounds(rows)
    if not quick:
        plot(rows, world, out / "fsdp2.png")
    return rows
