# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Linear + cross entropy, forward and backward: ours beside Unsloth's, Liger's, Apple's and dense.

Time and peak memory by shape, gradient error against float64, the price of every option, and the
head gradient's error against the number of chunks. All candidates share one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict

from . import harness
from .loss_problem import (
    QUICK,
    SHAPES,
    Problem,
    Shape,
    candidates,
    log_prob_candidates,
    oracle,
    ours,
    products_alone,
    relative_error,
)
from .loss_report import plot, print_tables, summary

LOG_PROB_SHAPES = (Shape(8192, 4096, 128256, False, 0.0), Shape(8192, 2048, 151936, True, 0.0))

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


def gradient_errors(shape: Shape, losses: Dict[str, Callable]) -> dict:
    """Relative errors ||x - oracle|| / ||oracle|| of loss and gradients by candidate."""
    import torch

    problem = Problem(shape, seed = 1)
    loss64, hidden64, weight64 = oracle(problem)
    result, memory = {}, {}
    for name, loss in losses.items():
        step = problem.step(loss)
        memory[name] = harness.peak_memory(step)["peak_bytes"] / 2**20
        value = step()
        errors = {"loss": abs((value.double() - loss64) / loss64).item()}
        errors["hidden"] = relative_error(problem.hidden.grad, hidden64)
        if weight64 is not None:
            errors["weight"] = relative_error(problem.weight.grad, weight64)
        result[name] = errors
        problem.drop()
        torch.cuda.empty_cache()
    return {"shape": shape.name, "errors": result, "peak_mib": memory}


def option_price(shape: Shape, rounds: int) -> dict:
    """Microseconds with each option on, beside the plain loss."""
    import torch

    from unsloth_patches.unsloth.loss_metrics import TokenMetrics

    problem = Problem(shape)
    class_weight = torch.rand(shape.vocab, device = "cuda") + 0.5
    variants = {
        "plain": {},
        "class weight": {"class_weight": class_weight},
        "smoothing": {"label_smoothing": 0.1},
        "softcap": {"softcap": 30.0},
        "z-loss": {"z_loss": 1e-4},
        "token weights": {"loss_weights": torch.rand(problem.labels.shape, device = "cuda") + 0.5},
        "metrics": {"observe": TokenMetrics()},
        "all four": {
            "class_weight": class_weight,
            "label_smoothing": 0.1,
            "softcap": 30.0,
            "z_loss": 1e-4,
        },
    }
    steps = {name: problem.step(ours(**options)) for name, options in variants.items()}
    timed = harness.measure(steps, rounds = rounds, warmup = 1, lead_cycles = 0)
    return {"shape": shape.name, "time_us": timed}


def log_probs(shape: Shape, rounds: int) -> dict:
    """Per-token log-probabilities, forward and backward of a weighted sum, as a GRPO step takes them."""
    import torch

    problem = Problem(shape)
    advantage = torch.randn(shape.tokens, device = "cuda")

    def loss_of(function: Callable) -> Callable:
        return lambda *arguments: (function(*arguments) * advantage).mean()

    losses = {name: loss_of(function) for name, function in log_prob_candidates().items()}
    gradients = {}
    for name, loss in losses.items():
        problem.step(loss)()
        gradients[name] = problem.hidden.grad.float()
        problem.drop()
    part = time_and_memory(shape, losses, product_rate(), rounds)
    reference = gradients.pop("dense")
    part["gradient_over_dense"] = {
        name: relative_error(gradient, reference.double()) for name, gradient in gradients.items()
    }
    return part


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
    scored = [log_probs(shape, rounds) for shape in (QUICK if quick else LOG_PROB_SHAPES)]
    payload = {
        "product_tflops": rate / 1e12,
        "rows": rows,
        "summary": summary(rows),
        "accuracy": accuracy,
        "options": options,
        "log_probs": scored,
        "chunks": chunks,
    }
    name = "loss_" + harness.gpu_slug(torch.cuda.get_device_name())
    harness.save_json(Path(out) / f"{name}.json", payload, "python -m unsloth_patches bench loss")
    print_tables(payload)
    try:
        plot(payload, Path(out) / f"{name}.png")
    except ImportError:
        print("bench loss: no matplotlib here; the figures are in the JSON file.")
    return 0
