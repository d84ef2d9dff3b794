# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Cross entropy of logits that are there anyway, with the options of nn.CrossEntropyLoss."""

from typing import Union

import torch

from .cross_entropy_rows import RowLoss, cross_entropy_rows
from .linear_chunks import refuse_second_derivative

__all__ = ["dense_cross_entropy"]

_NAME = "dense_cross_entropy"


def dense_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    spec: RowLoss,
    n_items: Union[None, int, float, torch.Tensor] = None,
) -> torch.Tensor:
    """Sum of the rows' losses over ``n_items``, or the number of labels (their class weights' sum).

    logits: [..., vocab], kept for the backward and left as they are. labels: integers [...].
    Rows labelled ``spec.ignore_index`` count nothing; a denominator of 0 counts as 1, so that a batch
    whose labels are all ignored trains on with loss 0. Float32 arithmetic; a label outside the
    vocabulary makes the loss NaN and reads nothing. Returns a scalar, float32 (float64 for float64).
    Raises ValueError for labels or class weights of the wrong shape.
    """
    vocab_size = logits.shape[-1]
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{_NAME}: labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}; "
            "one label for each row of logits."
        )
    weight = spec.class_weight
    if weight is not None and weight.shape != (vocab_size,):
        raise ValueError(
            f"{_NAME}: class_weight must be [{vocab_size}], got {tuple(weight.shape)}."
        )
    flat = labels.reshape(-1).to(logits.device).long()
    rows = _DenseCrossEntropy.apply(logits.reshape(-1, vocab_size), flat, spec)
    if n_items is None:
        keep = flat != spec.ignore_index
        if weight is not None:
            keep = weight[flat.clamp(0, vocab_size - 1)] * keep
        n_items = keep.sum()
    n_items = torch.as_tensor(n_items, dtype = rows.dtype, device = rows.device).reshape(-1)[0]
    return rows.sum() / torch.where(n_items == 0, 1.0, n_items)


class _DenseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, spec):
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        losses = torch.empty(labels.shape, dtype = wide, device = logits.device)
        cross_entropy_rows(logits, labels, spec, losses)
        ctx.save_for_backward(logits, labels)
        ctx.spec = spec
        return losses

    @staticmethod
    def backward(ctx, upstream):
        logits, labels = ctx.saved_tensors
        with torch.no_grad():
            losses = torch.empty_like(upstream)
            gradient = torch.empty_like(logits)
            cross_entropy_rows(
                logits,
                labels,
                ctx.spec,
                losses,
                grads = gradient,
                row_scale = upstream.contiguous(),
            )
        return (*refuse_second_derivative(_NAME, (gradient,)), None, None)
