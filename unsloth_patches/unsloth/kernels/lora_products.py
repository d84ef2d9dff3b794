# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
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

from typing import Any, List, Optional, Sequence, Tuple

import torch

from .lora_mlp_recompute import Projection, define_inplace_operator

__all__ = ["narrow", "project", "project_back", "stacked_A"]

fast_lora: Any = None  # unsloth.kernels.fast_lora, set by lora_functions; a global for Dynamo


def _products_(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    alpha: float,
    beta: float,
    c: Optional[torch.Tensor] = None,
    d: Optional[torch.Tensor] = None,
) -> None:
    """out = beta * out + alpha * a @ b (+ c @ d); what out held is not read where beta is 0."""
    out.addmm_(a, b, alpha = alpha, beta = beta)
    if c is not None:
        out.addmm_(c, d)


# Traced, addmm_ copies what it adds to first; an operator that mutates ``out`` stays in place. One
# call for both products of a projection: every call of an operator costs the host.
_operator: Any = define_inplace_operator("lora_products_", _products_)


def _into(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    S: float,
    beta: float,
    *second: torch.Tensor,
) -> torch.Tensor:
    """out = beta * out + S * a @ b, plus the product of ``second`` if there is one; returns out."""
    traced = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    (_operator if traced and type(S) in (int, float) else _products_)(out, a, b, S, beta, *second)
    return out


def narrow(X: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """X b, (M, r), of X (M, K) and b (K, r), r being a rank or a sum of ranks.

    Traced, a width that is no multiple of 8 is kept from Inductor: it asks of such a product whether
    padding pays, compares M with K for that, and guards on the answer. Batches of other lengths
    then got a graph for each range of M between the layer's widths.
    """
    if b.shape[1] % 8 == 0 or not torch.compiler.is_compiling():
        return X @ b
    return _into(X.new_empty(X.shape[0], b.shape[1]), X, b, 1.0, 0.0)


def _base(W: torch.Tensor, W_quant: Any, dtype: torch.dtype) -> torch.Tensor:
    """W^T, dequantized into the buffer that all forward products share."""
    return fast_lora.fast_dequantize(W, W_quant, use_global_buffer = True, dtype = dtype).t()


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
    W = _base(p.W, p.W_quant, X.dtype)
    return _into(X.new_empty(X.shape[0], p.B.shape[0]), XA, p.B.to(X.dtype).t(), p.S, 0.0, X, W)


def project_back(dY: torch.Tensor, dYB: torch.Tensor, p: Projection) -> torch.Tensor:
    """dX (M, K) of one projection from dY (M, N) and dYB = dY B (M, r)."""
    W = _base(p.W.t(), p.W_quant, dY.dtype)
    return _into(dY.new_empty(dY.shape[0], p.A.shape[1]), dYB, p.A.to(dY.dtype), p.S, 0.0, dY, W)


def gradient_A(dYB: torch.Tensor, X: torch.Tensor, S: float) -> torch.Tensor:
    """dA (r, K)"""
    return _into(X.new_empty(dYB.shape[1], X.shape[1]), dYB.t(), X, S, 0.0)


def gradient_B(dY: torch.Tensor, XA: torch.Tensor, S: float) -> torch.Tensor:
    """dB (N, r)"""
    return _into(dY.new_empty(dY.shape[1], XA.shape[1]), dY.t(), XA, S, 0.0)


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
    dYB = torch.cat([narrow(dY, p.B.to(dtype)) for dY, p in zip(dYs, projections)], 1)
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
        _into(dX, dYB[:, start:end], A[start:end], S, 1.0 if index else 0.0)
    for dY, p in zip(dYs, projections):
        W = fast_lora.fast_dequantize(p.W.t(), p.W_quant, dtype = dtype)
        _into(dX, dY, W.t(), 1.0, 1.0)
        del W
    return [gradient for pair in zip(dAs, dBs) for gradient in pair]
