# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The products of LoRA projections, in an order that passes over the activations less often.

A projection is ``Y = X W^T + S (X A^T) B^T``. X, Y and their gradients have thousands of rows and
columns, the rank r is small: beside the large products, LoRA costs what it reads and writes of
them. Three things keep that small:

- LoRA's part is written first and the large product adds to it. Added after it, Y is read and
  written once more; and so ``X W^T`` is never rounded by itself.
- Projections of one X share their products with A: ``X A^T``, dA, and A's part of dX.
- ``X A^T`` is kept for the backward pass (r columns) instead of computed from X again.

Shapes: X (M, K), W (N, K) or packed 4-bit, A (r, K), B (N, r). Products are in X's dtype and sum in
float32, where S is applied too.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence, Tuple

import torch

__all__ = ["Projection", "project", "project_back", "stacked_A"]

fast_lora: Any = None  # unsloth.kernels.fast_lora, set by lora_functions; a global for Dynamo


class Projection(NamedTuple):
    """What get_lora_parameters returns: weight, quant state, A, B, scaling."""

    W: torch.Tensor
    W_quant: Any
    A: torch.Tensor
    B: torch.Tensor
    S: float


def _write(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, S: float) -> torch.Tensor:
    """out = S * a @ b, returned; what out held is not read."""
    fast_lora.addmm_(out, a, b, alpha = S, beta = 0.0)
    return out


def _add(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    S: float = 1.0,
) -> torch.Tensor:
    """out += S * a @ b, returned."""
    fast_lora.addmm_(out, a, b, alpha = S)
    return out


def _add_base(out: torch.Tensor, X: torch.Tensor, W: torch.Tensor, W_quant: Any) -> torch.Tensor:
    """out += X @ W^T, with W dequantized into the buffer that all forward products share."""
    W = fast_lora.fast_dequantize(W, W_quant, use_global_buffer = True, dtype = X.dtype)
    return _add(out, X, W.t())


def stacked_A(projections: Sequence[Projection], dtype: torch.dtype) -> torch.Tensor:
    """All A below each other: (sum of ranks, K)."""
    return torch.cat([p.A.to(dtype) for p in projections])


def split_ranks(
    t: torch.Tensor, projections: Sequence[Projection], dim: int
) -> Tuple[torch.Tensor, ...]:
    """The part of each projection along a dimension of length sum of ranks."""
    return t.split([p.A.shape[0] for p in projections], dim)


def _scale_groups(projections: Sequence[Projection]) -> List[Tuple[int, int, float]]:
    """(first row, end row, S) of the stacked A, neighbours of equal S together: mostly one."""
    groups: List[Tuple[int, int, float]] = []
    end = 0
    for p in projections:
        start, end = end, end + p.A.shape[0]
        if groups and groups[-1][2] == p.S:
            start = groups.pop()[0]
        groups.append((start, end, p.S))
    return groups


def project(X: torch.Tensor, XA: torch.Tensor, p: Projection) -> torch.Tensor:
    """Y (M, N) from X (M, K) and XA = X A^T (M, r)."""
    Y = X.new_empty(X.shape[0], p.B.shape[0])
    _write(Y, XA, p.B.to(X.dtype).t(), p.S)
    return _add_base(Y, X, p.W, p.W_quant)


def project_back(dY: torch.Tensor, dYB: torch.Tensor, p: Projection) -> torch.Tensor:
    """dX (M, K) of one projection from dY (M, N) and dYB = dY B (M, r)."""
    A = p.A.to(dY.dtype)
    dX = _write(dY.new_empty(dY.shape[0], A.shape[1]), dYB, A, p.S)
    return _add_base(dX, dY, p.W.t(), p.W_quant)


def gradient_A(dYB: torch.Tensor, X: torch.Tensor, S: float) -> torch.Tensor:
    """dA (r, K)"""
    return _write(X.new_empty(dYB.shape[1], X.shape[1]), dYB.t(), X, S)


def gradient_B(dY: torch.Tensor, XA: torch.Tensor, S: float) -> torch.Tensor:
    """dB (N, r)"""
    return _write(dY.new_empty(dY.shape[1], XA.shape[1]), dY.t(), XA, S)


def gradients(
    dYs: Sequence[torch.Tensor],
    X: torch.Tensor,
    XA: torch.Tensor,
    projections: Sequence[Projection],
    dX: torch.Tensor,
) -> List[torch.Tensor]:
    """[dA, dB] of each projection of one X, in one list; their common dX is written to ``dX``.

    dYs: (M, N) of each. XA: (M, sum of ranks). dX: (M, K), holds anything, and may be X itself.
    """
    dtype = X.dtype
    dYB = torch.cat([dY @ p.B.to(dtype) for dY, p in zip(dYs, projections)], 1)
    A = stacked_A(projections, dtype)
    groups = _scale_groups(projections)
    dAs = [gradient_A(dYB[:, start:end], X, S) for start, end, S in groups]
    dAs = split_ranks(dAs[0] if len(dAs) == 1 else torch.cat(dAs), projections, 0)
    dBs = [
        gradient_B(dY, xa, p.S)
        for dY, xa, p in zip(dYs, split_ranks(XA, projections, 1), projections)
    ]
    # X has been read for the last time.
    for index, (start, end, S) in enumerate(groups):
        (_add if index else _write)(dX, dYB[:, start:end], A[start:end], S)
    for dY, p in zip(dYs, projections):
        W = fast_lora.fast_dequantize(p.W.t(), p.W_quant, dtype = dtype)
        _add(dX, dY, W.t())
        del W
    return [gradient for pair in zip(dAs, dBs) for gradient in pair]
