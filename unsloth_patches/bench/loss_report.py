# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Tables and figures of the loss benchmark's results."""

from __future__ import annotations

from pathlib import Path

from . import harness


def summary(rows) -> dict:
    """Geometric means of peers' time over ours; the largest time over floor."""
    result = {
        "over_floor": {row["shape"]: _median(row, "ours") / row["floor_us"] for row in rows},
        "over_products": {
            row["shape"]: _median(row, "ours") / row["products_us"]["median"] for row in rows
        },
    }
    for peer in ("unsloth_zoo", "liger", "cce", "torch", "quack", "trl", "dense"):
        ratios = {
            row["shape"]: _median(row, peer) / _median(row, "ours")
            for row in rows
            if peer in row["time_us"]
        }
        if ratios:
            result[peer] = {
                "geometric_mean": harness.geometric_mean(ratios.values()),
                "ratios": ratios,
            }
    return result


def _median(row: dict, name: str) -> float:
    return row["time_us"][name]["median"]


def print_tables(payload: dict) -> None:
    names = list(payload["rows"][0]["time_us"])
    table = []
    for row in payload["rows"]:
        cells = [row["shape"]]
        for name in names:
            there = name in row["time_us"]
            cells.append(
                f"{_median(row, name) / 1e3:.2f} ({row['peak_mib'][name]:.0f})" if there else "-"
            )
        products = row["products_us"]["median"]
        table.append([*cells, f"{products / 1e3:.2f}", f"{row['floor_us'] / 1e3:.2f}"])
    columns = ["shape", *names, "products alone", "floor"]
    harness.print_table("forward + backward, ms (peak MiB above inputs)", columns, table)
    means = {
        peer: found["geometric_mean"]
        for peer, found in payload["summary"].items()
        if "ratios" in found
    }
    harness.print_table("time over ours, geometric mean", list(means), [list(means.values())])
    for part in payload["accuracy"]:
        columns = ["loss", "hidden", "weight"]
        cells = [
            [name, *(f"{errors[c]:.2e}" if c in errors else "" for c in columns)]
            + [f"{part['peak_mib'][name]:.0f}"]
            for name, errors in part["errors"].items()
        ]
        title = f"relative error, {part['shape']}"
        harness.print_table(title, ["", *columns, "peak MiB"], cells)
    timed = payload["options"]["time_us"]
    plain = timed["plain"]["median"]
    cells = [
        [name, t["median"] / 1e3, f"{t['median'] / plain - 1:+.1%}"] for name, t in timed.items()
    ]
    harness.print_table("options, ms", ["option", "ms", "over plain"], cells)
    for part in payload["log_probs"]:
        cells = [
            [
                name,
                f"{_median(part, name) / 1e3:.2f}",
                f"{part['peak_mib'][name]:.0f}",
                f"{part['gradient_over_dense'].get(name, 0):.1e}",
            ]
            for name in part["time_us"]
        ]
        columns = ["", "ms", "peak MiB", "gradient, from dense"]
        harness.print_table(f"log-probabilities, {part['shape']}", columns, cells)
    cells = [
        [sums, count, f"{errors['weight']:.2e}", f"{errors['hidden']:.2e}"]
        for sums, by_count in payload["chunks"]["errors"].items()
        for count, errors in by_count.items()
    ]
    harness.print_table(
        "error against chunks", ["head summed in", "chunks", "weight", "hidden"], cells
    )


def _short(mib: float) -> str:
    """A number that fits over a bar."""
    return (
        f"{mib:.0f}"
        if mib < 1000
        else f"{mib / 1024:.1f}k"
        if mib < 10000
        else f"{mib / 1024:.0f}k"
    )


def plot(payload: dict, path: Path) -> None:
    """Draws a results file's figures."""
    look = {
        "ours": harness.COLORS["ours"],
        "ours, float32 logits": "#5eead4",
        "unsloth_zoo": harness.COLORS["upstream"],
        "liger": harness.COLORS["peer"],
        "cce": harness.COLORS["extra"],
        "torch": "#a78bfa",
        "quack": "#f472b6",
        "trl": "#facc15",
        "dense": harness.COLORS["baseline"],
    }
    rows = payload["rows"]
    with harness.plot_style() as plt:
        figure, axes = plt.subplots(3, 1, figsize = (harness.WIDTH, 11))
        for axis, kind in zip(axes, ("time", "memory")):
            names = [name for name in look if name in rows[0]["time_us"]]
            width = 0.9 / len(names)
            for number, name in enumerate(names):
                where, values, heights = [], [], []
                for place, row in enumerate(rows):
                    if name not in row["time_us"]:
                        continue
                    ours_time = _median(row, "ours")
                    time, peak = _median(row, name) / ours_time, row["peak_mib"][name]
                    values.append(time if kind == "time" else peak)
                    heights.append(min(time, 4.0) if kind == "time" else peak)
                    where.append(place + (number - (len(names) - 1) / 2) * width)
                bars = axis.bar(where, heights, width * 0.92, color = look[name], label = name)
                text = [f"{v:.2f}" if kind == "time" else _short(v) for v in values]
                axis.bar_label(bars, text, fontsize = 7, padding = 2, rotation = 90)
            shapes = [row["shape"].replace(" x ", " x\n").replace(", ", "\n") for row in rows]
            axis.set_xticks(range(len(rows)), shapes, fontsize = 7)
            if kind == "time":
                floors = [row["products_us"]["median"] / _median(row, "ours") for row in rows]
                for place, floor in enumerate(floors):
                    label = "matrix products alone" if place == 0 else None
                    axis.hlines(floor, place - 0.45, place + 0.45, color = "black", lw = 1, label = label)
                axis.set_title(
                    "Forward + backward: time over ours (lower is better; bars end at 4)"
                )
                axis.set_ylim(0, 6)
            else:
                axis.set_yscale("log")
                axis.set_title("Peak memory above inputs, MiB; k: 1024 (lower is better)")
                axis.set_ylim(10, 2e6)
            axis.set_xlabel("tokens x hidden size x vocabulary, head, labels", fontsize = 8)
            axis.margins(x = 0.01)
            axis.legend(ncols = 4, loc = "upper left")
        axis = axes[2]
        for sums, color in (("bfloat16", "upstream"), ("float32", "ours")):
            by_count = payload["chunks"]["errors"][sums]
            axis.plot(
                [int(count) for count in by_count],
                [errors["weight"] for errors in by_count.values()],
                marker = "o",
                color = harness.COLORS[color],
                label = f"summed in {sums}",
            )
        axis.set_xscale("log", base = 2)
        axis.set_ylim(bottom = 0)
        axis.set_xlabel("chunks")
        axis.set_title(
            f"Head gradient's relative error against float64 ({payload['chunks']['shape']})"
        )
        axis.legend()
        figure.savefig(path)
