# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""A LoRA projection's products in four orders, at Llama-8B's shapes: what the order of them costs.

Weights are dense, so dequantize is left out of every candidate. ``docs/lora_products.md`` reads the
figures; ``bench train`` shows what is left of them in a whole step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict

from . import DONE, NOT_HERE, harness

ROWS, RANK, SCALE = 8192, 16, 2.0
SHAPES = {
    "q, o": (4096, 4096),
    "k, v": (4096, 1024),
    "gate, up": (4096, 14336),
    "down": (14336, 4096),
}
PAD = 64  # columns beside X that hold X A^T: the rank, filled up to a tile of the product


def run(out: Path, quick: bool = False) -> int:
    """Writes ``lora_<gpu>.json`` under out: microseconds of every candidate at every shape."""
    if not harness.gpu_available("the order of LoRA's products"):
        return NOT_HERE
    import torch

    found = {}
    for name, (K, N) in SHAPES.items():
        cases = {**forward_cases(K, N), **backward_cases(K, N)}
        found[name] = harness.measure(cases, rounds = 10 if quick else 50, warmup = 3)
        torch.cuda.empty_cache()
    payload = {
        "rows": ROWS,
        "rank": RANK,
        "dtype": "bfloat16",
        "shapes": SHAPES,
        "microseconds": found,
    }
    slug = harness.gpu_slug(torch.cuda.get_device_name())
    harness.save_json(
        Path(out) / f"lora_{slug}.json", payload, "python -m unsloth_patches bench lora"
    )
    rows = [[case, *(found[name][case]["median"] for name in SHAPES)] for case in found["q, o"]]
    columns = ["microseconds", *(f"{name} {K}x{N}" for name, (K, N) in SHAPES.items())]
    harness.print_table(f"LoRA's products, {ROWS} rows, rank {RANK}, bfloat16", columns, rows)
    return DONE


def _random(*shape: int):
    import torch
    return torch.randn(*shape, device = "cuda", dtype = torch.bfloat16) * 0.05


def forward_cases(K: int, N: int) -> Dict[str, Callable[[], object]]:
    """Y (ROWS, N) = X W^T + S (X A^T) B^T, X (ROWS, K); and the parts that it is made of."""
    import torch

    X, W, A, B, Y = (
        _random(ROWS, K),
        _random(N, K),
        _random(RANK, K),
        _random(N, RANK),
        _random(ROWS, N),
    )
    A3, XA = _random(3 * RANK, K), _random(ROWS, RANK)
    wide_X, wide_W = _random(ROWS, K + PAD), _random(N, K + PAD)
    wide_X[:, K + RANK :] = 0  # what is beside the rank counts nothing
    x, xa = wide_X[:, :K], wide_X[:, K : K + RANK]

    def added_after():
        torch.mm(X, W.t(), out = Y)
        Y.addmm_(X @ A.t(), B.t(), alpha = SCALE)

    def written_first():
        Y.addmm_(X @ A.t(), B.t(), alpha = SCALE, beta = 0)
        Y.addmm_(X, W.t())

    def beside():
        xa.copy_(x @ A.t())
        torch.mm(wide_X, wide_W.t(), out = Y)

    def beside_with_copy():
        x.copy_(X)
        beside()

    return {
        "Y: base alone": lambda: torch.mm(X, W.t(), out = Y),
        "Y: LoRA added after (stock)": added_after,
        "Y: LoRA written first (patch)": written_first,
        "Y: one product, X and W wider": beside,
        "Y: the same, X copied to it": beside_with_copy,
        "X A^T, one A": lambda: X @ A.t(),
        "X A^T, three A": lambda: X @ A3.t(),
        "Y += LoRA": lambda: Y.addmm_(XA, B.t(), alpha = SCALE),
        "Y = LoRA": lambda: Y.addmm_(XA, B.t(), alpha = SCALE, beta = 0),
        "Y += base": lambda: Y.addmm_(X, W.t(), beta = 0.5),
    }


def backward_cases(K: int, N: int) -> Dict[str, Callable[[], object]]:
    """dX (ROWS, K), dA and dB from dY (ROWS, N)."""
    import torch

    X, W, A, B = _random(ROWS, K), _random(N, K), _random(RANK, K), _random(N, RANK)
    dY, dX, XA = _random(ROWS, N), _random(ROWS, K), _random(ROWS, RANK)
    dYB, dYB3 = _random(ROWS, RANK), _random(ROWS, 3 * RANK)

    def added_after():
        torch.mm(dY, W, out = dX)
        dX.addmm_(dYB, A, alpha = SCALE)

    def written_first():
        dX.addmm_(dYB, A, alpha = SCALE, beta = 0)
        dX.addmm_(dY, W)

    return {
        "dX: base alone": lambda: torch.mm(dY, W, out = dX),
        "dX: LoRA added after (stock)": added_after,
        "dX: LoRA written first (patch)": written_first,
        "dY B": lambda: dY @ B,
        "dA, one": lambda: dYB.t() @ X,
        "dA, three": lambda: dYB3.t() @ X,
        "dB": lambda: dY.t() @ XA,
    }
