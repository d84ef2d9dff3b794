# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``python -m unsloth_patches bench fsdp2-plan``: the offload plan's training peak against the
measured one.

Over the cells of ``fsdp2_cells`` (model shape, depth, tokens, checkpointing, offload, LoRA rank),
each sharded over all GPUs. Without a GPU, and with ``--quick``, two toy cells on CPU ranks: they
train, and nothing is measured.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Dict, List

from . import fsdp2_cells
from .fsdp2 import merged_row, say_without_gpu, show, units
from .fsdp2_checkpoint import fast_folder, make_checkpoints
from .fsdp2_launch import Group
from .fsdp2_plot import plot_plan
from .harness import save_json

COMMAND = "python -m unsloth_patches bench fsdp2-plan"


def run(out: Path, quick: bool = False) -> int:
    """Writes ``fsdp2_plan.json``. Returns 1 where a cell failed."""
    import torch

    gpus = torch.cuda.device_count()
    quick = quick or gpus == 0
    if gpus == 0:
        say_without_gpu("fsdp2-plan", "that they load, offload and train, beside the planned peak")
    work = Path(tempfile.mkdtemp(prefix = "fsdp2-plan-", dir = None if quick else fast_folder()))
    groups: List[Group] = []
    try:
        rows = _measure(work, quick, gpus, groups)
    finally:
        for group in groups:
            group.end()
        shutil.rmtree(work, ignore_errors = True)
    for row in rows:
        if row["train_peak"]:
            row["error_percent"] = round(100 * (row["planned_peak"] / row["train_peak"] - 1), 2)
    name = "fsdp2_plan-quick" if quick else "fsdp2_plan"
    save_json(Path(out) / f"{name}.json", {"rows": rows}, COMMAND)
    pairs = [(row["train_peak"], row["planned_peak"]) for row in rows if row["train_peak"]]
    if pairs:
        plot_plan(pairs, Path(out) / f"{name}.png")
    show(f"Offload plan, {units(gpus)}", rows)
    return 1 if any(row["error"] for row in rows) else 0


def _measure(work: Path, quick: bool, gpus: int, groups: List[Group]) -> List[dict]:
    cells = fsdp2_cells.CELLS
    if quick:
        cells = [("toy", 2, {"length": 32}), ("toy", 2, {"length": 32, "offload": "blocks:1"})]
    shapes = {**fsdp2_cells.SHAPES, "toy": fsdp2_cells.TOY}
    depths: Dict[str, int] = {name: layers for name, layers, _ in cells}
    folders = {name: work / name for name in depths}
    cases = fsdp2_cells.planner_cases(folders, cells)
    groups.append(Group(cases, "ours", max(gpus, 2), work, gpus == 1))
    make_checkpoints([(folders[name], shapes[name], layers) for name, layers in depths.items()])
    rows = []
    for index in range(len(cases)):
        rows.append(merged_row(groups[0], index, groups[0].run(index)))
        print(rows[-1]["case"]["name"], rows[-1]["error"][:300], flush = True)
    return rows
