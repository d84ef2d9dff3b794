# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Cross entropy of logits that are there anyway, with the options of nn.CrossEntropyLoss."""

import functools
from dataclasses import replace
from typing import Optional, Union

import torch

from ..cross_entropy_spec import RowLoss
from ..loss_calls import count_call, require_parameters
from .cross_entropy_rows import cross_entropy_rows
from .second_derivative import refuse_second_derivative

__all__ = ["dense_cross_entropy", "with_cross_entropy_options"]

_NAME = "fast_cross_entropy_loss"
_PARAMETERS = ("logits", "labels", "logit_softcapping", "logit_scaling", "n_items")


def with_cross_entropy_options(stock):
    """``fast_cross_entropy_loss`` with the options of `dense_cross_entropy`.

    Without any of them the stock kernel runs.
    """
    require_parameters(stock, _PARAMETERS)

    @functools.wraps(stock)
    def fast_cross_entropy_loss(
        logits,
        labels,
        logit_softcapping = 0,
        logit_scaling = 0,
        n_items = None,
        *,
        label_smoothing = 0.0,
        class_weight = None,
        ignore_index = -100,
        z_loss = 0.0,
        **options,
    ):
        asked = class_weight is not None or options
        if not asked and (label_smoothing, ignore_index, z_loss) == (0.0, -100, 0.0):
            return stock(logits, labels, logit_softcapping, logit_scaling, n_items)
        count_call("dense")
        return dense_cross_entropy(
            logits,
            labels,
            n_items,
            class_weight = class_weight,
            ignore_index = ignore_index,
            label_smoothing = label_smoothing,
            logit_scale = logit_scaling or 1.0,
            softcap = logit_softcapping,
            z_loss = z_loss,
            **options,
        )

    return fast_cross_entropy_loss


def dense_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    n_items: Union[None, int, float, torch.Tensor] = None,
    *,
    class_weight: Optional[torch.Tensor] = None,
    loss_weights: Optional[torch.Tensor] = None,
    reduction: str = "mean",
    class_weight_mean: str = "weights",
    weight_items: Union[None, int, float, torch.Tensor] = None,
    **options,
) -> torch.Tensor:
    """Sum of the rows' losses over ``n_items``, or the number of labels (their weights' sum).

    logits: [..., vocab], kept for the backward and left as they are. labels: integers [...].
    class_weight and options: those of `RowLoss.validated`. loss_weights: [...], one a row.
    reduction: "mean", "sum" or "none". class_weight_mean: the mean of weighted rows is over their
    "weights" (``weight_items`` is their sum where n_items is given) or over the number of "labels".
    Rows labelled ``ignore_index`` or -100 count nothing; a denominator of 0 counts as 1, so that a
    batch whose labels are all ignored trains on with loss 0. Float32 arithmetic; a label outside the
    vocabulary makes the loss NaN and reads nothing. Returns float32 (float64 for float64).
    Raises TypeError or ValueError for arguments that do not fit.
    """
    vocab_size = logits.shape[-1]
    for name, tensor in (("labels", labels), ("loss_weights", loss_weights)):
        if tensor is not None and tensor.shape != logits.shape[:-1]:
            raise ValueError(
                f"{_NAME}: {name} have shape {tuple(tensor.shape)}, logits {tuple(logits.shape)}; "
                "one for each row of logits."
            )
    if reduction not in ("none", "mean", "sum") or class_weight_mean not in ("weights", "labels"):
        raise ValueError(
            f"{_NAME}: reduction must be none, mean or sum and class_weight_mean weights or labels; "
            f"got {reduction!r} and {class_weight_mean!r}."
        )
    if isinstance(class_weight, torch.Tensor):
        class_weight = class_weight.to(logits.device)
    spec = RowLoss.validated(_NAME, logits, vocab_size, class_weight, **options)
    flat = labels.reshape(-1).to(logits.device).long()
    if spec.ignore_index != -100:
        # Collators and packing mark with -100 whatever the model's ignore_index is.
        flat = flat.masked_fill(flat == -100, spec.ignore_index)
    weights = None if loss_weights is None else loss_weights.reshape(-1).to(logits.device)
    keep = flat != spec.ignore_index
    count = divisor = keep.sum() if n_items is None else n_items
    if class_weight_mean == "weights" and (weights is not None or spec.class_weight is not None):
        if n_items is None:
            divisor = keep if weights is None else keep * weights
            if spec.class_weight is not None:
                divisor = divisor * spec.class_weight[flat.clamp(0, vocab_size - 1)]
            divisor = divisor.sum()
        elif weight_items is not None:
            divisor = weight_items
    if spec.z_loss and reduction == "mean" and divisor is not count and count > 0:
        # z_loss is a mean over the labels, not over their weights.
        spec = replace(spec, z_loss = spec.z_loss * float(divisor / count))
    rows = _DenseCrossEntropy.apply(logits.reshape(-1, vocab_size), flat, spec)
    if weights is not None:
        rows = rows * weights
    if reduction != "mean":
        return rows.sum() if reduction == "sum" else rows.reshape(labels.shape)
    divisor = torch.as_tensor(divisor, dtype = rows.dtype, device = rows.device).reshape(-1)[0]
    return rows.sum() / torch.where(divisor == 0, 1.0, divisor)


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
            losses, gradient = torch.empty_like(upstream), torch.empty_like(logits)
            scale = upstream.contiguous()
            cross_entropy_rows(logits, labels, ctx.spec, losses, gradient, scale)
        return (*refuse_second_derivative(_NAME, (gradient,), logits, upstream), None, None)
