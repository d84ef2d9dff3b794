# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""How many rows of logits to hold at once: a sweep on this GPU, and a model for others.

The sweep stores its choice for GPUs of this name, where `loss_chunk_size.choose_chunk_rows` finds it. The
model is a roofline from published figures. Its constants and the default budget were set with sweeps of
`SHAPES` at hand, so what they are worth is measured on other heads, `CHECK_SHAPES`: how much slower than
the best budget found there is the one that the model names, and what training takes by default?
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List

from . import harness
from .loss_problem import Problem, Shape, ours, stock_loss

BUDGETS_MIB = (64, 128, 160, 192, 224, 256, 288, 320, 384, 512, 768, 1024)
SHAPES = (
    Shape(8192, 4096, 128256, False, 0.0),
    Shape(8192, 2304, 256000, False, 0.0),
    Shape(8192, 2048, 128256, True, 0.0),
    Shape(8192, 3584, 152064, False, 0.0),
    Shape(8192, 2560, 262144, False, 0.0),
    Shape(4096, 8192, 128256, False, 0.5),
    Shape(16384, 4096, 32768, True, 0.0),
    Shape(8192, 1024, 151936, True, 0.0),
)
# Never used to set anything: heads of Gemma 3 1B, Qwen3 30B-A3B, gpt-oss 20B, Mistral Small, Phi 4,
# Gemma 2 9B and Llama 3.2 3B.
CHECK_SHAPES = (
    Shape(8192, 1152, 262144, False, 0.0),
    Shape(8192, 2048, 151936, False, 0.0),
    Shape(8192, 2880, 201088, False, 0.0),
    Shape(8192, 5120, 131072, False, 0.5),
    Shape(8192, 5120, 100352, False, 0.0),
    Shape(8192, 3584, 256000, False, 0.25),
    Shape(8192, 3072, 128256, True, 0.0),
)
QUICK = (Shape(2048, 512, 32000, False, 0.0),)
# The smallest budget within this of the fastest is chosen.
TOLERANCE = 0.02


@dataclass(frozen = True)
class Gpu:
    """Published figures: dense half precision FLOP/s, bytes/s, GiB, multiprocessors."""

    name: str
    flops: float
    bandwidth: float
    memory_gib: int
    multiprocessors: int


GPUS = (
    Gpu("T4", 65e12, 320e9, 16, 40),
    Gpu("L4", 121e12, 300e9, 24, 58),
    Gpu("A100 SXM 80 GB", 312e12, 2039e9, 80, 108),
    Gpu("H100 SXM", 989e12, 3350e9, 80, 132),
    Gpu("H200", 989e12, 4800e9, 141, 132),
)
# What an H200 sustained of its published figures: bf16 products of the losses' shapes at its power
# limit (690 to 790 TFLOP/s), and a copy of device memory.
FLOP_SHARE, BANDWIDTH_SHARE = 0.74, 0.886
LAUNCH_SECONDS = 6e-6


def rows_of(shape: Shape, budget_mib: int) -> int:
    """The rows that this budget of logits gives, by the rule that training uses."""
    from unsloth_patches.unsloth.kernels.loss_chunk_size import fit_rows
    return min(fit_rows((budget_mib << 20) // (shape.vocab * 2)), shape.active)


def training_rows(problem: Problem) -> int:
    """The rows that training takes for this head; without a stored choice, by default."""
    from unsloth_patches.unsloth.kernels.loss_chunk_size import choose_chunk_rows

    shape, head = problem.shape, problem.weight
    gradient = head.numel() * 2 if shape.trained else 0
    products = None if shape.trained else (problem.hidden, head)
    found = (shape.tokens, shape.vocab, 2, head.device, None, gradient, products)
    return min(choose_chunk_rows(*found), shape.active)


def predict(gpu: Gpu, shape: Shape, rows: int) -> float:
    """Seconds of forward and backward, as the sum of rooflines of the kernels of every chunk."""
    flops, bandwidth = gpu.flops * FLOP_SHARE, gpu.bandwidth * BANDWIDTH_SHARE
    head, logits, states = (
        shape.vocab * shape.hidden * 2,
        rows * shape.vocab * 2,
        rows * shape.hidden * 2,
    )

    def roofline(traffic: float, work: float = 0.0) -> float:
        return max(work / flops, traffic / bandwidth) + LAUNCH_SECONDS

    product = 2.0 * rows * shape.vocab * shape.hidden
    # The kernel between the products reads the logits twice and writes their gradients.
    chunk = 2 * roofline(head + logits + states, product) + roofline(3 * logits)
    if shape.trained:
        chunk += roofline(2 * head + logits + states, product)
    return chunk * shape.active / rows


def choose(times: Dict[int, float]) -> int:
    """The smallest budget whose time is within TOLERANCE of the best."""
    best = min(times.values())
    return min(budget for budget, time in times.items() if time <= best * (1 + TOLERANCE))


def _modelled() -> List[dict]:
    """For every GPU: relative times by budget (geometric mean over the shapes), and the choice."""
    rows = []
    for gpu in GPUS:
        budgets = [b for b in BUDGETS_MIB if b <= gpu.memory_gib * 1024 // 16]
        by_shape = [
            {b: predict(gpu, shape, rows_of(shape, b)) for b in budgets} for shape in SHAPES
        ]
        mean = {b: harness.geometric_mean(times[b] for times in by_shape) for b in budgets}
        rows.append(
            {"gpu": gpu.name, "computed": True, "seconds": mean, "choice_mib": choose(mean)}
        )
    return rows


def sweep(shape: Shape, rounds: int) -> dict:
    """{rows, time_us, peak_mib} by budget, of what training takes and of Unsloth's own loss where it is there."""
    problem = Problem(shape)
    rows = {budget: rows_of(shape, budget) for budget in BUDGETS_MIB}
    taken = training_rows(problem)
    losses = {str(count): ours(chunk_rows = count) for count in sorted({*rows.values(), taken})}
    stock = stock_loss()
    if stock is not None:
        losses["stock"] = stock
    steps = {name: problem.step(loss) for name, loss in losses.items()}
    peaks = {}
    for name, step in steps.items():
        step()
        problem.drop()
        peaks[name] = harness.peak_memory(step)["peak_bytes"] / 2**20
        problem.drop()
    timed = harness.measure(steps, rounds = rounds, warmup = 1, lead_cycles = 0)
    return {
        "of": shape,
        "shape": shape.name,
        "rows": rows,
        "time_us": {budget: timed[str(count)] for budget, count in rows.items()},
        "peak_mib": {budget: peaks[str(count)] for budget, count in rows.items()},
        "training": _part(taken, timed[str(taken)], peaks[str(taken)]),
        "stock": _part(None, timed.get("stock"), peaks.get("stock")),
    }


def _part(rows, time_us, peak_mib) -> dict:
    return {"rows": rows, "time_us": time_us, "peak_mib": peak_mib}


def run(out: Path, quick: bool = False) -> int:
    """Sweeps, prints, stores the choice, and writes ``chunk_size_<gpu>.json`` and ``.png`` under out."""
    if not harness.gpu_available("the chunk size sweep"):
        print("What can be had without one is computed from published figures; nothing is stored:")
        _print_model(_modelled())
        return 0
    import torch

    from unsloth_patches.unsloth.kernels.loss_chunk_size import BUDGET_MIB

    shapes, rounds = (QUICK, 3) if quick else (SHAPES, 16)
    swept = [sweep(shape, rounds) for shape in shapes]
    held_out = [sweep(shape, rounds) for shape in (QUICK if quick else CHECK_SHAPES)]
    means = {
        b: harness.geometric_mean(part["time_us"][b]["median"] for part in swept)
        for b in BUDGETS_MIB
    }
    choice = choose(means)
    device = torch.cuda.get_device_name()
    path = None if quick else _store(device, choice)
    payload = {
        "swept": swept,
        "mean_us": means,
        "choice_mib": choice,
        "budget_mib": BUDGET_MIB,
        "model": _modelled(),
        "fitted_on": check_model(swept),
        "check": {"shapes": held_out, "model": check_model(held_out)},
    }
    for part in (*swept, *held_out):
        del part["of"]
    name = f"chunk_size_{harness.gpu_slug(device)}"
    harness.save_json(
        Path(out) / f"{name}.json", payload, "python -m unsloth_patches bench chunk-size"
    )
    _print_sweep(payload)
    _print_check(payload)
    _print_model(payload["model"])
    if path is not None:
        print(f"chosen for {device}: {choice} MiB of logits, stored in {path}")
    try:
        plot(payload, Path(out) / f"{name}.png")
    except ImportError:
        print("bench chunk-size: no matplotlib here; the figures are in the JSON file.")
    return 0


def _store(device: str, mib: int) -> Path:
    """Every later loss on GPUs of this name takes ``mib`` MiB of logits; returns the file."""
    from unsloth_patches.unsloth.kernels.loss_chunk_size import read_store, store_path

    path = store_path()
    path.parent.mkdir(parents = True, exist_ok = True)
    path.write_text(json.dumps({**read_store(), device: mib}, indent = 1) + "\n", encoding = "utf-8")
    return path


def check_model(swept: List[dict]) -> List[dict]:
    """For each swept shape: what the model predicts, and the price of what was chosen.

    regret: measured time over the shortest measured one, less 1: of the model's own choice for this
    shape, and of what training takes; within_stock_regret: among what takes no more memory than
    Unsloth's own loss.
    model_error: the farthest that modelled time over its best is from measured time over its best.
    """
    gpu = next(gpu for gpu in GPUS if gpu.name == "H200")
    rows = []
    for part in swept:
        measured = {b: t["median"] / 1e6 for b, t in part["time_us"].items()}
        modelled = {b: predict(gpu, part["of"], part["rows"][b]) for b in measured}
        best, modelled_best = min(measured.values()), min(modelled.values())
        choice, taken = choose(modelled), part["training"]
        seconds = taken["time_us"]["median"] / 1e6
        rows.append(
            {
                "shape": part["shape"],
                "measured_best_mib": min(measured, key = measured.get),
                "model_best_mib": min(modelled, key = modelled.get),
                "model_choice_mib": choice,
                "model_choice_regret": measured[choice] / best - 1,
                "training_rows": taken["rows"],
                "training_regret": seconds / min(best, seconds) - 1,
                "within_stock_regret": _within_stock(part, measured, seconds),
                "memory_over_stock": _memory_over_stock(part),
                "model_error": max(
                    abs(modelled[b] / modelled_best / (measured[b] / best) - 1) for b in measured
                ),
                "measured_over_model": {b: measured[b] / modelled[b] for b in measured},
            }
        )
    return rows


def _memory_over_stock(part: dict):
    most = part["stock"]["peak_mib"]
    return None if most is None else part["training"]["peak_mib"] / most - 1


def _within_stock(part: dict, measured: Dict[int, float], seconds: float):
    """Training's time over the best among budgets that take no more memory than Unsloth's own loss."""
    most = part["stock"]["peak_mib"]
    if most is None:
        return None
    there = [time for budget, time in measured.items() if part["peak_mib"][budget] <= most]
    return seconds / min([*there, seconds]) - 1


def _print_sweep(payload: dict) -> None:
    rows = []
    for part in (*payload["swept"], *payload["check"]["shapes"]):
        for b in BUDGETS_MIB:
            time = f"{part['time_us'][b]['median'] / 1e3:.2f}"
            rows.append([part["shape"], b, part["rows"][b], time, f"{part['peak_mib'][b]:.0f}"])
        for name in ("training", "stock"):
            found = part[name]
            if found["time_us"] is not None:
                time = f"{found['time_us']['median'] / 1e3:.2f}"
                rows.append([part["shape"], name, found["rows"], time, f"{found['peak_mib']:.0f}"])
    columns = ["shape", "logits MiB", "rows", "ms", "peak MiB"]
    harness.print_table("chunk size, forward + backward", columns, rows)


def _print_check(payload: dict) -> None:
    columns = {
        "shape": "",
        "measured_best_mib": "",
        "model_best_mib": "",
        "model_choice_mib": "",
        "model_choice_regret": "%",
        "training_rows": "",
        "training_regret": "%",
        "within_stock_regret": "%",
        "memory_over_stock": "%",
        "model_error": "%",
    }
    for title, rows in (
        ("model on the shapes that it was set with", payload["fitted_on"]),
        ("model on shapes that it never saw", payload["check"]["model"]),
    ):
        cells = [
            [
                "-" if row[c] is None else f"{row[c]:.1%}" if p else row[c]
                for c, p in columns.items()
            ]
            for row in rows
        ]
        harness.print_table(title, [c.replace("_", " ") for c in columns], cells)


def _print_model(model: List[dict]) -> None:
    best = [min(part["seconds"].values()) for part in model]
    rows = [
        [
            b,
            *(
                f"{p['seconds'][b] / t:.3f}" if b in p["seconds"] else ""
                for p, t in zip(model, best)
            ),
        ]
        for b in BUDGETS_MIB
    ]
    rows.append(["chosen MiB", *(part["choice_mib"] for part in model)])
    columns = ["logits MiB", *(part["gpu"] for part in model)]
    harness.print_table("computed, not measured: time over the best", columns, rows)


def plot(payload: dict, path: Path) -> None:
    """Draws a results file's figures."""
    colors = [*harness.COLORS.values(), "#111827", "#65a30d", "#0284c7"]  # one a shape
    with harness.plot_style() as plt:
        figure, (top, middle, bottom) = plt.subplots(3, 1, figsize = (harness.WIDTH, 10))
        for part, color in zip(payload["swept"], colors):
            budgets = [int(b) for b in part["time_us"]]
            times = [t["median"] / 1e3 for t in part["time_us"].values()]
            top.plot(
                budgets,
                [t / min(times) for t in times],
                marker = "o",
                color = color,
                label = part["shape"],
            )
            middle.plot(budgets, list(part["peak_mib"].values()), marker = "o", color = color)
        top.axvline(payload["choice_mib"], color = "black", lw = 0.8, ls = "--")
        top.text(payload["choice_mib"], top.get_ylim()[1], " chosen", va = "top", fontsize = 8)
        top.set_title("Measured time over the best")
        middle.set_title("Measured peak memory above inputs, MiB")
        for part, color in zip(payload["model"], colors):
            budgets, seconds = [int(b) for b in part["seconds"]], list(part["seconds"].values())
            label = f"{part['gpu']} (computed): {part['choice_mib']} MiB"
            bottom.plot(
                budgets, [t / min(seconds) for t in seconds], marker = ".", color = color, label = label
            )
        bottom.set_title("Computed time over the best (the axis ends at 1.5)")
        bottom.set_ylim(0.98, 1.5)
        for axis in (top, middle, bottom):
            axis.set_xscale("log", base = 2)
            ticks = [b for b in budgets if b & (b - 1) == 0]
            axis.set_xticks(ticks, ticks)
            axis.set_xlabel("logits held at once, MiB")
        lines = top.get_legend_handles_labels()
        figure.legend(
            *lines,
            title = "tokens x hidden size x vocabulary, head, labels",
            title_fontsize = 8,
            alignment = "left",
            loc = "outside upper left",
            ncols = 2,
        )
        bottom.legend()
        figure.savefig(path)
