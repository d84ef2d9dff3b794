# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""How many rows of logits to hold at once: a sweep on this GPU, and a model for others.

The sweep stores its choice for GPUs of this name, where `chunk_rows.choose_chunk_rows` finds it. The
model is a roofline from published figures; it is checked against the sweep where both exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List

from . import harness
from .loss import Problem, Shape, _gpu_slug, ours

BUDGETS_MIB = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SHAPES = (
    Shape(8192, 4096, 128256, False, 0.0),
    Shape(8192, 2304, 256000, False, 0.0),
    Shape(8192, 2048, 128256, True, 0.0),
)
QUICK = (Shape(2048, 512, 32000, False, 0.0),)
# The smallest budget within this of the fastest is chosen: the last percents cost a multiple of memory.
TOLERANCE = 0.07


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


def rows_of(shape: Shape, budget_mib: int, multiprocessors: int) -> int:
    """The rows that this budget of logits gives, by the rule that training uses."""
    from unsloth_patches.kernels.chunk_rows import fit_rows

    return min(
        fit_rows((budget_mib << 20) // (shape.vocab * 2), shape.hidden, multiprocessors),
        shape.active,
    )


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
            {b: predict(gpu, shape, rows_of(shape, b, gpu.multiprocessors)) for b in budgets}
            for shape in SHAPES
        ]
        mean = {b: harness.geometric_mean(times[b] for times in by_shape) for b in budgets}
        rows.append(
            {"gpu": gpu.name, "computed": True, "seconds": mean, "choice_mib": choose(mean)}
        )
    return rows


def sweep(shape: Shape, rounds: int) -> dict:
    """{rows, time_us, peak_mib} by budget."""
    import torch

    problem = Problem(shape)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    steps, peaks, rows = {}, {}, {}
    for budget in BUDGETS_MIB:
        rows[budget] = rows_of(shape, budget, count)
        steps[str(budget)] = problem.step(ours(chunk_rows = rows[budget]))
        steps[str(budget)]()
        problem.drop()
        peaks[budget] = harness.peak_memory(steps[str(budget)])["peak_bytes"] / 2**20
        problem.drop()
    timed = harness.measure(steps, rounds = rounds, warmup = 1, lead_cycles = 0)
    return {
        "shape": shape.name,
        "rows": rows,
        "time_us": {budget: timed[str(budget)] for budget in BUDGETS_MIB},
        "peak_mib": peaks,
    }


def run(out: Path, quick: bool = False) -> int:
    """Sweeps, prints, stores the choice, and writes ``chunk_size_<gpu>.json`` and ``.png`` under out."""
    if not harness.gpu_available("the chunk size sweep"):
        _print_model(_modelled())
        return 2
    import torch

    from unsloth_patches.kernels.chunk_rows import store_budget

    shapes, rounds = (QUICK, 3) if quick else (SHAPES, 10)
    swept = [sweep(shape, rounds) for shape in shapes]
    means = {
        b: harness.geometric_mean(part["time_us"][b]["median"] for part in swept)
        for b in BUDGETS_MIB
    }
    choice = choose(means)
    device = torch.cuda.get_device_name()
    path = None if quick else store_budget(device, choice)
    payload = {"swept": swept, "mean_us": means, "choice_mib": choice, "model": _modelled()}
    payload["model_check"] = _check_model(swept) if not quick else {}
    name = f"chunk_size_{_gpu_slug(device)}"
    harness.save_json(
        Path(out) / f"{name}.json", payload, "python -m unsloth_patches bench chunk-size"
    )
    _print_sweep(payload)
    _print_model(payload["model"])
    if path is not None:
        print(f"chosen for {device}: {choice} MiB of logits, stored in {path}")
    try:
        plot(payload, Path(out) / f"{name}.png")
    except ImportError:
        print("bench chunk-size: no matplotlib here; the figures are in the JSON file.")
    return 0


def _check_model(swept: List[dict]) -> dict:
    """Measured over modelled time on the H200, by shape and budget."""
    gpu = next(gpu for gpu in GPUS if gpu.name == "H200")
    return {
        part["shape"]: {
            b: part["time_us"][b]["median"] / 1e6 / predict(gpu, shape, part["rows"][b])
            for b in BUDGETS_MIB
        }
        for shape, part in zip(SHAPES, swept)
    }


def _print_sweep(payload: dict) -> None:
    rows = []
    for part in payload["swept"]:
        for b in BUDGETS_MIB:
            check = payload["model_check"].get(part["shape"], {}).get(b)
            time = part["time_us"][b]["median"] / 1e3
            rows.append(
                [
                    part["shape"],
                    b,
                    part["rows"][b],
                    f"{time:.2f}",
                    f"{part['peak_mib'][b]:.0f}",
                    check,
                ]
            )
    columns = ["shape", "logits MiB", "rows", "ms", "peak MiB", "measured / model"]
    harness.print_table("chunk size, forward + backward", columns, rows)


def _print_model(model: List[dict]) -> None:
    rows = [
        [
            part["gpu"],
            part["choice_mib"],
            *(f"{t / min(part['seconds'].values()):.3f}" for t in part["seconds"].values()),
        ]
        for part in model
    ]
    widest = max(len(part["seconds"]) for part in model)
    rows = [row + [""] * (widest + 2 - len(row)) for row in rows]
    columns = ["computed", "chosen MiB", *(str(b) for b in BUDGETS_MIB[:widest])]
    harness.print_table("modelled time over the best, by MiB of logits", columns, rows)


def plot(payload: dict, path: Path) -> None:
    """Draws a results file's figures."""
    colors = [harness.COLORS[name] for name in ("ours", "upstream", "peer", "extra", "baseline")]
    with harness.plot_style() as plt:
        figure, (left, middle, right) = plt.subplots(1, 3, figsize = (13, 4))
        for part, color in zip(payload["swept"], colors):
            budgets = [int(b) for b in part["time_us"]]
            times = [t["median"] / 1e3 for t in part["time_us"].values()]
            left.plot(
                budgets,
                [t / min(times) for t in times],
                marker = "o",
                color = color,
                label = part["shape"],
            )
            middle.plot(budgets, list(part["peak_mib"].values()), marker = "o", color = color)
        left.axvline(payload["choice_mib"], color = "black", lw = 0.8, ls = "--")
        left.text(payload["choice_mib"], left.get_ylim()[1], " chosen", va = "top", fontsize = 8)
        left.set_title("Measured time over the best")
        middle.set_title("Measured peak memory above inputs, MiB")
        for part, color in zip(payload["model"], colors):
            budgets, seconds = [int(b) for b in part["seconds"]], list(part["seconds"].values())
            label = f"{part['gpu']} (computed): {part['choice_mib']} MiB"
            right.plot(
                budgets, [t / min(seconds) for t in seconds], marker = ".", color = color, label = label
            )
        right.set_title("Computed time over the best")
        right.set_ylim(0.98, 1.5)
        for axis in (left, middle, right):
            axis.set_xscale("log", base = 2)
            axis.set_xlabel("logits held at once, MiB")
        left.legend(fontsize = 7)
        right.legend(fontsize = 7)
        figure.savefig(path)
