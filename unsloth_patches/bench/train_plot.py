# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The picture of `bench train`: of each model step time, losses and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import List, Tuple

from . import harness

CONTROL = "stock again"  # its losses beside stock's
FORMS = {"stock": "upstream", "patched": "ours"}  # form -> key of COLORS
SLICES = ("#334155", "#b45309", "#0f766e", "#6d28d9", "#be123c", "#64748b", "#a3a3a3", "#e2e8f0")


def plot(results: List[Tuple[dict, dict]], path: Path, bound: float) -> None:
    """results: (payload of `train.compare`, its `train.breakdowns`) of each model."""
    with harness.plot_style() as plt:
        figure = plt.figure(figsize = (harness.WIDTH, 6 * len(results)))
        parts = figure.subfigures(len(results), 1, squeeze = False)[:, 0]
        for (payload, kinds), part in zip(results, parts):
            part.suptitle(payload["title"], fontsize = 11, fontweight = "bold")
            panels = part.subplot_mosaic([["times", "losses"], ["kinds", "kinds"]])
            _step_times(panels["times"], payload)
            _differences(panels["losses"], payload, bound)
            _kinds(panels["kinds"], kinds)
        figure.savefig(path)


def _step_times(axes, payload: dict) -> None:
    shares = payload["shares"]
    for offset, (form, color) in zip((-0.2, 0.2), FORMS.items()):
        steps = [share[form]["step_seconds"] for share in shares.values()]
        medians = [step["median"] * 1e3 for step in steps]
        spread = [
            [(s["median"] - s["q1"]) * 1e3 for s in steps],
            [(s["q3"] - s["median"]) * 1e3 for s in steps],
        ]
        places = [i + offset for i in range(len(steps))]
        peak = max(share[form]["peak_mib"] for share in shares.values())
        label = f"{form}, {peak:.0f} MiB" if peak else form
        bars = axes.bar(
            places, medians, 0.38, yerr = spread, color = harness.COLORS[color], label = label
        )
        axes.bar_label(bars, [f"{m:.0f}" for m in medians], fontsize = 8, padding = 2)
    names = [f"{name}\n{share['speedup']:.2f}x" for name, share in shares.items()]
    axes.set_xticks(range(len(names)), names)
    axes.set_title("Step time, ms")
    axes.set_xlabel("labels ignored; stock / patched")
    axes.margins(y = 0.3)
    axes.legend(loc = "upper left", ncols = 2, columnspacing = 1)


def _kinds(axes, kinds: dict) -> None:
    axes.set_title("Where a step goes, half ignored, ms")
    axes.grid(False)
    names = list(next(iter(kinds.values())))
    for row, (form, ms) in enumerate(kinds.items()):
        start = 0.0
        for name, color in zip(names, SLICES):
            label = name if row == 0 else None
            axes.barh(row, ms[name], left = start, color = color, label = label, height = 0.62)
            if ms[name] > 0.05 * sum(ms.values()):
                ink = "black" if name == "idle" else "white"
                middle = start + ms[name] / 2
                axes.text(
                    middle, row, f"{ms[name]:.0f}", ha = "center", va = "center", color = ink, fontsize = 8
                )
            start += ms[name]
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_ylim(len(kinds) + 0.5, -0.6)  # room for the legend below
    axes.legend(ncols = 4, loc = "lower left")


def _differences(axes, payload: dict, bound: float) -> None:
    colors = (harness.COLORS[name] for name in ("baseline", "peer", "ours"))
    for (name, share), color in zip(payload["shares"].items(), colors):
        losses = share["patched"]["losses"]
        label = f"{name} ignored: {losses[0]:.2f} to {losses[-1]:.2f}"
        axes.semilogy(
            [max(d, 1e-9) for d in share["relative_difference"]], color = color, label = label
        )
        again = share.get(CONTROL)
        if again is not None:
            apart = [max(d, 1e-9) for d in again["relative_difference"]]
            axes.semilogy(apart, color = color, ls = "--", lw = 0.9, label = f"{name}, {CONTROL}")
    for number, share in enumerate(s for s in payload["shares"].values() if "float32" in s):
        exact, stock = share["float32"]["losses"], share["stock"]["losses"]
        far = [max(abs(a - b) / abs(b), 1e-9) for a, b in zip(stock, exact)]
        label = None if number else "stock to float32"
        axes.semilogy(far, color = "#111827", ls = "-.", lw = 0.9, label = label)
    axes.axhline(bound, color = "black", lw = 0.8, ls = ":")
    axes.set_title("Losses: stock to patched, relative")
    axes.set_xlabel(f"step; dotted: {bound:g}")
    axes.set_ylim(5e-10, 1e7 * bound)  # room for the legend above the bound
    axes.legend(loc = "upper left")
