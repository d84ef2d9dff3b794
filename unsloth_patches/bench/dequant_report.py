# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Summary, tables and figure of the dequantize benchmark's results."""

from __future__ import annotations

from pathlib import Path
from typing import List

from . import harness


def ratios(rows: List[dict], over: str, **where) -> List[float]:
    """ours / ``over`` of the rows that match."""
    return [
        row["us"]["ours"]["median"] / row["us"][over]["median"]
        for row in rows
        if all(row[key] == value for key, value in where.items())
    ]


def summarize(rows: List[dict]) -> dict:
    """Geometric means and extremes: what the goals are about."""
    half = [row for row in rows if row["dtype"] != "float32"]
    elements = lambda row: row["shape"][0] * row["shape"][1]
    large = [row for row in half if elements(row) >= 2**24]
    medium = [row for row in half if elements(row) >= 2**22]
    nf4 = ratios(half, "upstream", quant_type = "nf4")
    summary = {
        "NF4 time / upstream, geometric mean": harness.geometric_mean(nf4),
        "NF4 time / upstream, worst": max(nf4),
    }
    if large:
        fp4 = ratios(large, "upstream", quant_type = "fp4")
        copies = ratios(large, "copy", quant_type = "nf4")
        summary["NF4 time / copy from 16 M elements, worst"] = max(copies)
        summary["FP4 speedup over upstream from 16 M elements, least"] = 1 / max(fp4)
    if medium:
        peers = ratios(medium, "bitsandbytes", quant_type = "nf4")
        summary["NF4 speedup over bitsandbytes from 4 M elements, least"] = 1 / max(peers)
    return summary


def print_tables(results: dict) -> None:
    """The tables of the README."""
    rows = []
    for row in results["single"]:
        us = {name: time["median"] for name, time in row["us"].items()}
        name = f"{row['shape'][0]} x {row['shape'][1]} {row['quant_type']} {row['dtype']}"
        rows.append(
            [name, us["upstream"], us["bitsandbytes"], us["ours"], us["copy"]]
            + [us["ours"] / us["upstream"], us["ours"] / us["copy"]]
        )
    columns = ["weight", "upstream", "bitsandbytes", "ours", "copy", "ours/upstream", "ours/copy"]
    harness.print_table("GPU microseconds", columns, rows)
    print("host us a call:", {n: round(t["median"], 2) for n, t in results["host"].items()})
    for row in results["mlp"]:
        print(f"MLP {row['mlp']}, {row['calls']} calls, seconds:", row["seconds"])
    for row in results["ablation"]:
        print("ablation", row["shape"], {n: round(t["median"], 1) for n, t in row["us"].items()})
    for name, value in results["summary"].items():
        print(f"{name}: {value:.3f}")


def _plot_single(axes, rows, quant_type):
    chosen = [r for r in rows if r["quant_type"] == quant_type and r["dtype"] == "bfloat16"]
    median = lambda row, name: row["us"][name]["median"]
    labels = [f"{r['shape'][0]}\nx {r['shape'][1]}" for r in chosen]
    names = {"bitsandbytes": "peer", "upstream": "upstream", "ours": "ours"}
    series = {n: [median(r, n) / median(r, "copy") for r in chosen] for n in names}
    harness.grouped_bars(axes, labels, series, "time / copy of the same bytes", names)
    axes.axhline(1, color = harness.COLORS["baseline"], linewidth = 0.8)
    axes.set_title(f"{quant_type.upper()} to bfloat16, one weight (1 = a copy of the same bytes)")
    axes.tick_params(axis = "x", labelsize = 7)


def plot(results: dict, path: Path, gpu: str) -> None:
    """Writes the PNG: NF4 and FP4 by shape, host time of a call."""
    with harness.plot_style() as plt:
        figure, (nf4, fp4, axes) = plt.subplots(3, 1, figsize = (harness.WIDTH, 9.5))
        _plot_single(nf4, results["single"], "nf4")
        _plot_single(fp4, results["single"], "fp4")
        host = {name: time["median"] for name, time in results["host"].items()}
        kinds = {"NF4": "", "NF4, global buffer": ", global buffer", "FP4": ", FP4"}
        names = {"upstream": "upstream", "ours": "ours"}
        series = {n: [host[n + suffix] for suffix in kinds.values()] for n in names}
        harness.grouped_bars(axes, list(kinds), series, "host microseconds a call", names, "{:.1f}")
        axes.set_title("Host time of a call (512 x 2048)")
        figure.suptitle(f"4-bit dequantize on one {gpu}: GPU medians, L2 flushed", fontsize = 11)
        path.parent.mkdir(parents = True, exist_ok = True)
        figure.savefig(path)
