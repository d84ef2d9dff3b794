# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""4-bit dequantize beside upstream's fast_dequantize, bitsandbytes and a copy of the same bytes.

``python -m unsloth_patches bench dequant`` writes dequant_<gpu>.json and .png. GPU times are
medians with the L2 cache flushed before every call; host times are what a call takes to return.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Callable, List, Tuple

from . import harness
from .dequant_report import plot, print_tables, summarize

# Projections [out, in]; k and v are one shape, as are gate and up.
MODELS = {
    name: {"q, o": (d, d), "k, v": (kv, d), "gate, up": (hidden, d), "down": (d, hidden)}
    for name, d, kv, hidden in (
        ("Llama-1B", 2048, 512, 8192),
        ("Llama-8B", 4096, 1024, 14336),
        ("Llama-70B", 8192, 1024, 28672),
    )
}
OTHER_SHAPES = ((1024, 14336),)
MLPS = ((2, 3333, 2048, 8192), (5, 777, 1024, 4096), (3, 2048, 4096, 14336))  # of the puzzle


def shapes() -> List[Tuple[int, int]]:
    """Every weight shape of the table, by size."""
    found = {shape for model in MODELS.values() for shape in model.values()} | set(OTHER_SHAPES)
    return sorted(found, key = lambda shape: (shape[0] * shape[1], shape))


class Functions:
    """The functions compared: ours as installed, upstream's stock one, and bitsandbytes'."""

    def __init__(self):
        import bitsandbytes.functional
        import unsloth  # noqa: F401
        from unsloth.kernels import utils

        self.ours = utils.fast_dequantize
        self.upstream = getattr(self.ours, "__wrapped__", None)
        if self.upstream is None:
            raise RuntimeError(
                "bench dequant: unsloth.kernels.utils.fast_dequantize is not the patched one, so "
                "there is nothing to compare. See `python -m unsloth_patches status`."
            )
        self.bitsandbytes = bitsandbytes.functional.dequantize_4bit


def make_weight(
    shape,
    dtype,
    quant_type: str = "nf4",
):
    """(packed, quant_state): random values, double quantized by bitsandbytes, blocksize 64."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    values = torch.randn(shape, dtype = dtype, device = "cuda")
    return quantize_4bit(values, blocksize = 64, compress_statistics = True, quant_type = quant_type)


def make_copy(packed, state) -> Callable[[], object]:
    """A device copy that moves as many bytes as decoding that weight reads and writes."""
    import torch

    element = torch.empty(0, dtype = state.dtype).element_size()
    total = packed.numel() + state.absmax.numel() + state.shape.numel() * element
    source = torch.randint(0, 2**31 - 1, (total // 8,), dtype = torch.int32, device = "cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check_equal(functions: Functions, packed, state) -> None:
    """The three give the same bits, or the times compare nothing."""
    import torch

    every = (functions.ours, functions.upstream, functions.bitsandbytes)
    results = [f(packed, state) for f in every]
    integer = {2: torch.int16, 4: torch.int32}[results[0].element_size()]
    bits = [result.view(integer) for result in results]
    if not (torch.equal(bits[0], bits[2]) and torch.equal(bits[1], bits[2])):
        raise RuntimeError(
            f"bench dequant: results differ for {tuple(state.shape)}, {state.dtype}; times of "
            "different results compare nothing. Run tests/test_nf4_dequantize.py on this GPU."
        )


def bench_single(functions: Functions, rounds: int, quick: bool) -> List[dict]:
    """One weight a call: every shape, NF4 and FP4, bfloat16 and float16; float32 for three."""
    import torch

    cases = list(itertools.product(shapes(), (torch.bfloat16, torch.float16), ("nf4", "fp4")))
    cases += [(s, torch.float32, "nf4") for s in ((1024, 4096), (4096, 4096), (4096, 14336))]
    rows = []
    for shape, dtype, quant_type in cases[:4] if quick else cases:
        packed, state = make_weight(shape, dtype, quant_type)
        check_equal(functions, packed, state)
        times = harness.measure(
            {
                "upstream": lambda: functions.upstream(packed, state),
                "bitsandbytes": lambda: functions.bitsandbytes(packed, state),
                "ours": lambda: functions.ours(packed, state),
                "copy": make_copy(packed, state),
            },
            rounds = rounds,
        )
        rows.append(
            {
                "shape": list(shape),
                "dtype": str(dtype).replace("torch.", ""),
                "quant_type": quant_type,
                "us": times,
            }
        )
    return rows


def bench_host(functions: Functions) -> dict:
    """Host microseconds of a call on a small weight, fresh output and Unsloth's global buffer."""
    import torch

    packed, state = make_weight((512, 2048), torch.bfloat16)
    _, fp4_state = fp4 = make_weight((512, 2048), torch.bfloat16, "fp4")
    return harness.host_time(
        {
            "upstream": lambda: functions.upstream(packed, state),
            "ours": lambda: functions.ours(packed, state),
            "bitsandbytes": lambda: functions.bitsandbytes(packed, state),
            "upstream, global buffer": lambda: functions.upstream(packed, state, None, True),
            "ours, global buffer": lambda: functions.ours(packed, state, None, True),
            "upstream, FP4": lambda: functions.upstream(*fp4),
            "ours, FP4": lambda: functions.ours(*fp4),
            "torch.empty": lambda: torch.empty(
                state.shape, dtype = state.dtype, device = packed.device
            ),
        }
    )


def bench_mlp(functions: Functions, calls: int) -> List[dict]:
    """The NF4 puzzle's harness: a Linear4bit MLP's three weights decoded, each waited for."""
    import torch
    from bitsandbytes.nn import Linear4bit

    rows = []
    for batch, length, width, hidden in MLPS:
        dtype = torch.float16 if width == 2048 else torch.bfloat16
        sizes = ((width, hidden), (width, hidden), (hidden, width))
        layers = [
            Linear4bit(
                *size,
                bias = False,
                compute_dtype = dtype,
                compress_statistics = True,
                quant_type = "nf4",
            )
            .to(dtype)
            .to("cuda")
            for size in sizes
        ]
        tensors = [(layer.weight, layer.weight.quant_state) for layer in layers]

        def repeat(f):
            for _ in range(calls // 10):
                for packed, state in tensors:
                    f(packed, state)
                    torch.cuda.synchronize()

        times = harness.wall_time(
            {
                "bitsandbytes": lambda: repeat(functions.bitsandbytes),
                "upstream": lambda: repeat(functions.upstream),
                "ours": lambda: repeat(functions.ours),
            },
            rounds = 10,
        )
        seconds = {name: time["median"] * 10 for name, time in times.items()}
        rows.append({"mlp": [batch, length, width, hidden], "calls": calls, "seconds": seconds})
    return rows


def bench_ablation(rounds: int) -> List[dict]:
    """What the 16-byte hints and the PTX decode are worth: the same kernel without one of them."""
    import torch
    from unsloth.kernels import nf4_dequantize
    from unsloth.kernels.nf4_dequantize_kernel import WARPS, dequantize_kernel

    rows = []
    for shape in ((1024, 4096), (4096, 14336)):
        packed, state = make_weight(shape, torch.bfloat16)
        plan = nf4_dequantize.plan_for(packed, state)
        out = torch.empty(shape, dtype = torch.bfloat16, device = "cuda")
        arguments = (packed, *plan.tensors, out, plan.numel)

        def variant(**changed):
            options = {**plan.launch.constants, "ALIGN": 16, **changed}
            return lambda: dequantize_kernel[plan.launch.grid](
                *arguments, **options, num_warps = WARPS
            )

        times = harness.measure(
            {
                "as shipped": variant(),
                "without hints": variant(ALIGN = 4),
                "without PTX": variant(PTX = False),
                "guarded throughout": variant(ALIGN = 1, ON_GRID = False),
            },
            rounds = rounds,
        )
        rows.append({"shape": list(shape), "us": times})
    return rows


def run(out: Path, quick: bool = False) -> int:
    """Runs the benchmark into folder ``out``; returns a process exit code."""
    if not harness.gpu_available("dequant"):
        return 2
    import torch

    functions = Functions()
    rounds = 20 if quick else 100
    results = {"single": bench_single(functions, rounds, quick)}
    results["host"] = bench_host(functions)
    results["mlp"] = bench_mlp(functions, 100 if quick else 1000)
    results["ablation"] = bench_ablation(rounds)
    results["summary"] = summarize(results["single"])
    print_tables(results)

    name = harness.gpu_slug(torch.cuda.get_device_name())
    command = "python -m unsloth_patches bench dequant" + (" --quick" if quick else "")
    harness.save_json(Path(out) / f"dequant_{name}.json", results, command)
    plot(results, Path(out) / f"dequant_{name}.png", torch.cuda.get_device_name())
    return 0
