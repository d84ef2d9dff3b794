# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The plots of ``bench fsdp2`` and ``bench fsdp2-plan``."""

from __future__ import annotations

from pathlib import Path
from typing import List

from .harness import COLORS, plot_style

__all__ = ["plot", "plot_plan"]

STAGES = {"after_load": "after load", "wrap_peak": "wrap", "train_peak": "training peak"}


def plot(rows: List[dict], world: int, path: Path) -> Path:
    """Left: memory of a rank in each stage, ours beside upstream's. Right: seconds a step."""
    named = {(row["who"], row["world"], row["case"]["name"]): row for row in rows}
    shown = [
        ("sharded load", named.get(("ours", world, "sharded")), "ours"),
        ("whole, its own layout", named.get(("upstream", world, "stock layout")), "upstream"),
        ("whole, sharded", named.get(("upstream", world, "stock, sharded layout")), "baseline"),
    ]
    shown = [
        (label, row, COLORS[color]) for label, row, color in shown if row and row["train_peak"]
    ]
    with plot_style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize = (9, 3.4))
        for index, (label, row, color) in enumerate(shown):
            places = [place + 0.27 * (index - 1) for place in range(len(STAGES))]
            left.bar(places, [row[key] for key in STAGES], 0.25, label = label, color = color)
            bar = right.bar([index], [row["step_s"]], 0.6, color = color)
            right.bar_label(bar, fmt = "%.3f", padding = 2)
        left.set_xticks(range(len(STAGES)), list(STAGES.values()))
        left.set_ylabel("GiB of one rank")
        left.set_title(f"QLoRA on {world} GPUs, 12 of an 8B Llama's 32 blocks")
        left.legend()
        right.set_xticks(range(len(shown)), [label.replace(", ", ",\n") for label, *_ in shown])
        right.set_ylabel("seconds a step")
        figure.savefig(path)
    return path


def plot_plan(pairs: List[tuple], path: Path) -> Path:
    """pairs: (measured, planned) peaks in GiB."""
    with plot_style() as plt:
        figure, axes = plt.subplots(figsize = (4.6, 3.6))
        top = 1.1 * max(map(max, pairs))
        band = COLORS["baseline"]
        axes.plot([0, top], [0, top], color = band, linewidth = 1)
        axes.fill_between([0, top], [0, 0.9 * top], [0, 1.1 * top], color = band, alpha = 0.25)
        axes.scatter(*zip(*pairs), color = COLORS["ours"], zorder = 3)
        axes.set_xlabel("measured peak, GiB")
        axes.set_ylabel("planned peak, GiB")
        axes.set_title("Offload plan (band: 10%)")
        figure.savefig(path)
    return path
