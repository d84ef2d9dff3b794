# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Linear + cross entropy, forward and backward: ours beside Unsloth's, Liger's, Apple's and dense.

Time and peak memory by shape, gradient error against float64, the price of every option, and the
head gradient's error against the number of chunks. All candidates share one process.
"""

from __future__ import annotations

from dataclasses import dataclass
import math
from pathlib import Path
from typing import Callable, Dict, Optional

from . import harness

IGNORED = -100


@dataclass(frozen = True)
class Shape:
    tokens: int
    hidden: int
    vocab: int
    trained: bool
    ignored: float

    @property
    def name(self) -> str:
        head = "trained" if self.trained else "frozen"
        return f"{self.tokens} x {self.hidden} x {self.vocab}, {head}, {self.ignored:.0%} ignored"

    @property
    def active(self) -> int:
        return self.tokens - int(self.tokens * self.ignored)

    @property
    def flops(self) -> float:
        products = 3 if self.trained else 2
        return 2.0 * products * self.active * self.hidden * self.vocab


SHAPES = (
    Shape(16384, 4096, 128256, False, 0.0),
    Shape(16384, 4096, 128256, False, 0.5),
    Shape(16384, 4096, 128256, True, 0.5),
    Shape(8192, 2304, 256000, False, 0.0),
    Shape(2048, 4096, 128256, False, 0.5),
    Shape(8192, 2048, 128256, True, 0.0),  # Llama 3.2 1B, tied
)
QUICK = (Shape(1024, 512, 8192, False, 0.5), Shape(1024, 512, 8192, True, 0.0))


class Problem:
    """Random inputs of a shape, bf16 on the GPU; logits come out with standard deviation 2."""

    def __init__(
        self,
        shape: Shape,
        seed: int = 0,
    ):
        import torch

        make = torch.Generator("cuda").manual_seed(seed)
        options = {"device": "cuda", "generator": make}
        self.shape = shape
        self.hidden = torch.randn(shape.tokens, shape.hidden, **options).bfloat16()
        spread = 2.0 / math.sqrt(shape.hidden)
        self.weight = torch.empty(shape.vocab, shape.hidden, dtype = torch.bfloat16, device = "cuda")
        self.weight.normal_(0.0, spread, generator = make)
        self.labels = torch.randint(0, shape.vocab, (shape.tokens,), **options)
        order = torch.randperm(shape.tokens, **options)
        self.labels[order[: shape.tokens - shape.active]] = IGNORED
        self.hidden.requires_grad_(True)
        self.weight.requires_grad_(shape.trained)

    def step(self, loss: Callable) -> Callable:
        """Forward and backward once, the gradients dropped."""

        def run():
            self.hidden.grad = self.weight.grad = None
            value = loss(self.hidden, self.weight, self.labels)
            value.backward()
            return value

        return run

    def drop(self) -> None:
        self.hidden.grad = self.weight.grad = None


# ------------------------------------------------------------------------------- candidates


def ours(**options) -> Callable:
    from unsloth_patches.kernels.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, **options)


def _zoo() -> Callable:
    import unsloth  # noqa: F401  (the zoo wants it first)
    from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss

    def loss(hidden, weight, labels):
        return unsloth_fused_ce_loss(
            None, hidden[None], weight, None, labels[None], shift_labels = False
        )

    return loss


def _liger() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: function(weight, hidden, labels)


def _cce() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)


def dense(hidden, weight, labels):
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def candidates() -> Dict[str, Optional[Callable]]:
    """name -> loss(hidden, weight, labels); None with a note where a peer is not installed."""
    import torch

    found: Dict[str, Optional[Callable]] = {
        "ours": ours(),
        "ours, float32 logits": ours(logits_dtype = torch.float32),
    }
    for name, make in (("unsloth_zoo", _zoo), ("liger", _liger), ("cce", _cce)):
        try:
            found[name] = make()
        except ImportError as error:
            print(f"bench loss: {name} left out: {error}")
    found["dense"] = dense
    return found


def products_alone(problem: "Problem") -> Callable:
    """Only the matrix products that ours runs, 4096 rows at a time: the floor as this GPU gives it.

    Timed in the same rounds as the losses, so at the same clocks and power limit.
    """
    import torch

    from unsloth_patches.kernels.linear_chunks import multiply_, project

    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    active, vocab = problem.shape.active, problem.shape.vocab

    def run():
        step = min(active, 4096)
        logits = torch.empty(step, vocab, dtype = hidden.dtype, device = "cuda")
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.empty_like(weight) if problem.shape.trained else None
        for start in range(0, active, step):
            rows = hidden[start : start + step]
            block = logits[: rows.shape[0]]
            project(rows, weight, block)
            multiply_(by_hidden[start : start + step][: rows.shape[0]], block, weight, 1.0, False)
            if by_weight is not None:
                multiply_(by_weight, block.t(), rows, 1.0, start > 0)

    return run


# ------------------------------------------------------------------------------- measurements


def product_rate() -> float:
    """FLOP/s of a large bf16 product here: what the floor is computed from."""
    import torch

    a = torch.randn(8192, 8192, device = "cuda").bfloat16()
    b = torch.randn(8192, 8192, device = "cuda").bfloat16()
    out = torch.empty_like(a)
    timed = harness.measure({"mm": lambda: torch.mm(a, b.t(), out = out)}, rounds = 30, flush = False)
    return 2.0 * 8192**3 / (timed["mm"]["median"] * 1e-6)


def time_and_memory(shape: Shape, losses: Dict[str, Callable], rate: float, rounds: int) -> dict:
    """{time_us, peak_mib} by candidate, and the products' floor."""
    import torch

    problem = Problem(shape)
    steps = {name: problem.step(loss) for name, loss in losses.items()}
    memory = {}
    for name, step in list(steps.items()):
        try:
            step()
            problem.drop()
            memory[name] = harness.peak_memory(step)["peak_bytes"] / 2**20
        except Exception as error:  # a peer may not support the shape
            print(
                f"bench loss: {name} left out of {shape.name}: {type(error).__name__}: {error}"[
                    :300
                ]
            )
            steps.pop(name)
        problem.drop()
        torch.cuda.empty_cache()
    steps["products alone"] = products_alone(problem)
    timed = harness.measure(steps, rounds = rounds, warmup = 1, lead_cycles = 0)
    problem.drop()
    return {
        "shape": shape.name,
        "products_us": timed.pop("products alone"),
        "floor_us": shape.flops / rate * 1e6,
        "time_us": timed,
        "peak_mib": memory,
    }


def oracle(problem: Problem):
    """(loss, hidden gradient, weight gradient) in float64, 256 rows at a time."""
    import torch

    hidden, weight = problem.hidden.detach(), problem.weight.detach().double()
    keep = problem.labels != IGNORED
    count = keep.sum().item()
    by_hidden = torch.zeros(hidden.shape, dtype = torch.float64, device = "cuda")
    by_weight = torch.zeros_like(weight) if problem.shape.trained else None
    total = torch.zeros((), dtype = torch.float64, device = "cuda")
    for rows in keep.nonzero().squeeze(1).split(256):
        x = hidden[rows].double()
        logits = x @ weight.t()
        target = problem.labels[rows].unsqueeze(1)
        log_p = torch.log_softmax(logits, 1)
        total -= log_p.gather(1, target).sum()
        gradient = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype = log_p.dtype))
        gradient /= count
        by_hidden[rows] = gradient @ weight
        if by_weight is not None:
            by_weight.addmm_(gradient.t(), x)
    return total / count, by_hidden, by_weight


def relative_error(value, reference) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def gradient_errors(shape: Shape, losses: Dict[str, Callable]) -> dict:
    """Relative errors ||x - oracle|| / ||oracle|| of loss and gradients by candidate."""
    problem = Problem(shape, seed = 1)
    loss64, hidden64, weight64 = oracle(problem)
    result = {}
    for name, loss in losses.items():
        value = problem.step(loss)()
        errors = {"loss": abs((value.double() - loss64) / loss64).item()}
        errors["hidden"] = relative_error(problem.hidden.grad, hidden64)
        if weight64 is not None:
            errors["weight"] = relative_error(problem.weight.grad, weight64)
        result[name] = errors
        problem.drop()
    return {"shape": shape.name, "errors": result}


def option_price(shape: Shape, rounds: int) -> dict:
    """Microseconds with each option on, beside the plain loss."""
    import torch

    class_weight = torch.rand(shape.vocab, device = "cuda") + 0.5
    variants = {
        "plain": {},
        "class weight": {"class_weight": class_weight},
        "smoothing": {"label_smoothing": 0.1},
        "softcap": {"softcap": 30.0},
        "z-loss": {"z_loss": 1e-4},
        "all four": {
            "class_weight": class_weight,
            "label_smoothing": 0.1,
            "softcap": 30.0,
            "z_loss": 1e-4,
        },
    }
    problem = Problem(shape)
    steps = {name: problem.step(ours(**options)) for name, options in variants.items()}
    timed = harness.measure(steps, rounds = rounds, warmup = 1, lead_cycles = 0)
    return {"shape": shape.name, "time_us": timed}


def chunk_count_errors(shape: Shape, counts = (1, 2, 4, 8, 16, 64, 256)) -> dict:
    """The head gradient's error against the number of chunks, summed in bf16 and in float32."""
    import torch

    problem = Problem(shape, seed = 2)
    _, hidden64, weight64 = oracle(problem)
    result = {}
    for sums, dtype in (("bfloat16", None), ("float32", torch.float32)):
        for count in counts:
            rows = -(-shape.active // count)
            problem.step(ours(chunk_rows = rows, head_grad_dtype = dtype))()
            result.setdefault(sums, {})[count] = {
                "weight": relative_error(problem.weight.grad, weight64),
                "hidden": relative_error(problem.hidden.grad, hidden64),
            }
            problem.drop()
    return {"shape": shape.name, "errors": result}


# ------------------------------------------------------------------------------- report


def run(out: Path, quick: bool = False) -> int:
    """Measures, prints, and writes ``loss_<gpu>.json`` and ``.png`` under out."""
    if not harness.gpu_available("the loss benchmark"):
        return 2
    import torch

    losses = candidates()
    rate = product_rate()
    shapes, rounds = (QUICK, 5) if quick else (SHAPES, 12)
    rows = [time_and_memory(shape, losses, rate, rounds) for shape in shapes]
    small = (
        QUICK
        if quick
        else (Shape(2048, 4096, 128256, True, 0.25), Shape(2048, 2304, 256000, True, 0.0))
    )
    accuracy = [gradient_errors(shape, losses) for shape in small]
    options = option_price(shapes[0], rounds)
    chunks = chunk_count_errors(QUICK[1] if quick else Shape(4096, 2048, 128256, True, 0.0))
    payload = {
        "product_tflops": rate / 1e12,
        "rows": rows,
        "summary": _summary(rows),
        "accuracy": accuracy,
        "options": options,
        "chunks": chunks,
    }
    name = "loss_" + _gpu_slug(torch.cuda.get_device_name())
    harness.save_json(Path(out) / f"{name}.json", payload, "python -m unsloth_patches bench loss")
    _print(payload)
    try:
        plot(payload, Path(out) / f"{name}.png")
    except ImportError:
        print("bench loss: no matplotlib here; the figures are in the JSON file.")
    return 0


def _gpu_slug(name: str) -> str:
    return name.replace("NVIDIA", "").strip().split()[0].lower().replace("-", "_")


def _summary(rows) -> dict:
    """Geometric means of peers' time over ours; the largest time over floor."""
    result = {
        "over_floor": {row["shape"]: _median(row, "ours") / row["floor_us"] for row in rows},
        "over_products": {
            row["shape"]: _median(row, "ours") / row["products_us"]["median"] for row in rows
        },
    }
    for peer in ("unsloth_zoo", "liger", "cce", "dense"):
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


def _print(payload: dict) -> None:
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
            for name, errors in part["errors"].items()
        ]
        harness.print_table(f"relative error, {part['shape']}", ["", *columns], cells)
    timed = payload["options"]["time_us"]
    plain = timed["plain"]["median"]
    cells = [
        [name, t["median"] / 1e3, f"{t['median'] / plain - 1:+.1%}"] for name, t in timed.items()
    ]
    harness.print_table("options, ms", ["option", "ms", "over plain"], cells)
    cells = [
        [sums, count, f"{errors['weight']:.2e}", f"{errors['hidden']:.2e}"]
        for sums, by_count in payload["chunks"]["errors"].items()
        for count, errors in by_count.items()
    ]
    harness.print_table(
        "error against chunks", ["head summed in", "chunks", "weight", "hidden"], cells
    )


def plot(payload: dict, path: Path) -> None:
    """Draws a results file's figures."""
    look = {
        "ours": harness.COLORS["ours"],
        "ours, float32 logits": "#5eead4",
        "unsloth_zoo": harness.COLORS["upstream"],
        "liger": harness.COLORS["peer"],
        "cce": harness.COLORS["extra"],
        "dense": harness.COLORS["baseline"],
    }
    rows = payload["rows"]
    with harness.plot_style() as plt:
        figure, axes = plt.subplots(3, 1, figsize = (10, 10.5))
        for axis, kind in zip(axes, ("time", "memory")):
            names = [name for name in look if name in rows[0]["time_us"]]
            width = 0.8 / len(names)
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
                text = [f"{v:.2f}" if kind == "time" else f"{v:.0f}" for v in values]
                axis.bar_label(bars, text, fontsize = 6, padding = 1)
            axis.set_xticks(
                range(len(rows)), [row["shape"].replace(", ", "\n", 1) for row in rows], fontsize = 7
            )
            if kind == "time":
                floors = [row["products_us"]["median"] / _median(row, "ours") for row in rows]
                for place, floor in enumerate(floors):
                    label = "matrix products alone" if place == 0 else None
                    axis.hlines(floor, place - 0.42, place + 0.42, color = "black", lw = 1, label = label)
                axis.set_title(
                    "Forward + backward: time over ours (lower is better; bars end at 4)"
                )
                axis.set_ylim(0, 5.2)
            else:
                axis.set_yscale("log")
                axis.set_title("Peak memory above inputs, MiB (lower is better)")
                axis.set_ylim(10, 3e5)
            axis.legend(ncols = 7, fontsize = 7, loc = "upper left")
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
