# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""nn.CrossEntropyLoss of ``hidden @ weight.T + bias`` without the logits ever being whole."""

from dataclasses import dataclass, replace
from typing import Callable, Optional, Union

import torch
import torch.nn.functional as F

from ..cross_entropy_spec import RowLoss
from .cross_entropy_rows import cross_entropy_rows
from .cross_entropy_torch import transform_logits
from .linear_custom_loss import chunked_rows_loss
from .loss_chunking import (
    ChunkPlan,
    HeadGradients,
    HeadInputs,
    check_device,
    iterate_chunks,
    prepare_head,
    without_autocast,
)
from .loss_validation import check_dtype, check_range, check_reduction, flat_labels, flat_weights
from .second_derivative import refuse_second_derivative

__all__ = ["linear_cross_entropy"]

_NAME = "linear_cross_entropy"


@torch.compiler.disable  # the number of labelled rows decides what is launched
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    *,
    class_weight: Optional[torch.Tensor] = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    n_items: Union[None, int, float, torch.Tensor] = None,
    loss_weights: Optional[torch.Tensor] = None,
    class_weight_mean: str = "weights",
    weight_items: Union[None, int, float, torch.Tensor] = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    nan_if_empty: bool = True,
    chunk_rows: Optional[int] = None,
    logits_dtype: Optional[torch.dtype] = None,
    head_grad_dtype: Optional[torch.dtype] = None,
    observe: Optional[Callable] = None,
) -> torch.Tensor:
    """``nn.CrossEntropyLoss(...)`` of the logits ``hidden @ weight.T + bias``, computed in chunks.

    Loss and gradients equal ``F.cross_entropy(logits.float(), labels, weight = class_weight, ...)``
    in every combination of its options, NaN included, except that a confident label keeps its
    digits. Rows whose label is ignored never reach a matrix product. A frozen head takes two
    products a row, a trained one three (four with ``reduction = "none"``).

    hidden: [..., width], float64, float32, bfloat16 or float16. weight: [vocab, width], same dtype
        (or both cast by torch.autocast); a sharded DTensor is gathered. bias: [vocab] or None.
    labels: [...] integers, or [..., vocab] class probabilities in floating point.
    class_weight: [vocab]; multiplies a class's loss, and counts in the mean's denominator.
    loss_weights: [...] in floating point, labels' shape; each multiplies its row's loss, and counts in
        the mean's denominator as class weights do. Shifted with the labels.
    reduction: "mean", "sum", or "none" (shape of labels, 0 where ignored).
    n_items: divides the sum instead of the number of labels: the count over a whole gradient
        accumulation group. Only with "mean"; 0 counts as 1, so a group without labels trains on.
    class_weight_mean: the mean of weighted rows is over their "weights", as in PyTorch, or over the
        number of "labels".
    weight_items: with n_items, the sum of those weights over the whole group; without it n_items
        divides. Not read where there is no n_items.
    logit_scale, softcap: logits become ``softcap * tanh(logit_scale * logits / softcap)``; a
        softcap of 0 is none.
    z_loss: adds ``z_loss * logsumexp(logits)**2`` to every row that has a label (PaLM, section 5);
        its mean is over the labels, whatever their class weights are.
    shift: labels are the input tokens; position t is scored against label t + 1, the last not at all.
    nan_if_empty: a mean over no labels is NaN, as in PyTorch; False makes it 0, so that a batch whose
        labels are all ignored trains on.
    chunk_rows: rows of logits held at once; chosen from the GPU and its memory by default.
    logits_dtype: ``torch.float32`` keeps the logits in float32 (the precise mode); by default they
        are rounded to hidden's dtype, as a linear layer rounds them.
    head_grad_dtype: ``torch.float32`` sums a trained head's gradient in float32; by default in
        weight's dtype, as autograd does (float16 always in float32).
    observe: ``observe(logits, labels, spec, bias, training)`` sees every chunk's raw logits and labels
        before they become gradients, for statistics; integer labels only.

    Returns float32 (float64 for float64 inputs).
    Raises TypeError or ValueError for arguments that do not fit, IndexError for labels outside the
    vocabulary on the CPU; on a GPU the loss of such a row is NaN, and with
    ``UNSLOTH_LOSS_CHECK_LABELS=1`` the IndexError comes there too. A second derivative is refused.

    The logits' gradient is written over the logits in the forward, as in Liger Kernel
    (arXiv 2410.10989) and "Cut Your Losses" (arXiv 2411.09009).
    """
    head = prepare_head(_NAME, hidden, weight, bias)
    spec = RowLoss.validated(
        _NAME,
        head.hidden,
        head.weight.shape[0],
        class_weight,
        ignore_index,
        label_smoothing,
        logit_scale,
        softcap,
        z_loss,
    )
    n_items = check_reduction(_NAME, reduction, n_items)
    weight_items = check_reduction(_NAME, reduction, weight_items, "weight_items")
    if class_weight_mean not in ("weights", "labels"):
        raise ValueError(
            f'{_NAME}: class_weight_mean must be "weights" or "labels", got {class_weight_mean!r}.'
        )
    check_dtype(_NAME, "logits_dtype", logits_dtype, head.hidden.dtype)
    check_dtype(_NAME, "head_grad_dtype", head_grad_dtype, head.weight.dtype)
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{_NAME}: labels must be a tensor, got {type(labels).__name__}.")
    check_device(_NAME, head.hidden, labels = labels)
    if labels.is_floating_point():
        if loss_weights is not None:
            raise ValueError(
                f"{_NAME}: loss_weights are for integer labels; multiply the losses that "
                'reduction = "none" gives of class probabilities.'
            )
        return _probability_targets(head, labels, spec, reduction, n_items, shift, chunk_rows)
    flat = flat_labels(_NAME, labels, head, ignore_index, shift)
    plan = ChunkPlan.make(head, flat != ignore_index, chunk_rows, logits_dtype)
    check_range(_NAME, flat, plan.index, plan.count, head.weight.shape[0])
    row_weight = None
    if loss_weights is not None:
        row_weight = flat_weights(_NAME, loss_weights, labels, head, shift)
    denominator = 1.0
    if reduction == "mean" and (plan.count or nan_if_empty):
        count = denominator = plan.count if n_items is None else n_items
        weighted = spec.class_weight is not None or row_weight is not None
        if weighted and class_weight_mean == "weights":
            if n_items is None:
                denominator = _sum_of_weights(flat, row_weight, plan, spec)
            elif weight_items is not None:
                denominator = weight_items
        if spec.z_loss and denominator != count:
            # z_loss is a mean over the labels, not over their weights.
            spec = replace(spec, z_loss = spec.z_loss * denominator / count)
    job = _Job(
        spec,
        plan,
        reduction,
        denominator,
        head_grad_dtype,
        torch.is_grad_enabled(),
        row_weight,
        observe,
    )
    loss = _LinearCrossEntropy.apply(head.hidden, head.weight, head.bias, flat, job)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def _sum_of_weights(labels, row_weight, plan: ChunkPlan, spec: RowLoss) -> float:
    active = slice(None) if plan.index is None else plan.index
    weights = None if row_weight is None else row_weight[active]
    if spec.class_weight is not None:
        # A label outside the vocabulary makes its row NaN, whatever its weight.
        by_class = spec.class_weight[labels[active].clamp(0, spec.class_weight.shape[0] - 1)]
        weights = by_class if weights is None else by_class * weights
    return weights.sum(dtype = torch.float64).item()


# ------------------------------------------------------------------------------- autograd


@dataclass(frozen = True)
class _Job:
    """What one call computes, for its forward and its backward."""

    spec: RowLoss
    plan: ChunkPlan
    reduction: str
    denominator: float
    head_grad_dtype: Optional[torch.dtype]
    differentiable: bool
    row_weight: Optional[torch.Tensor] = None
    observe: Optional[Callable] = None

    @property
    def alpha(self) -> float:
        return 1.0 / self.denominator if self.denominator else float("inf")


def _chunked(
    hidden,
    weight,
    bias,
    labels,
    job: _Job,
    wanted,
    alpha: float,
    row_scale = None,
    observe = None,
):
    """(losses of the rows that take part, their gradients or None).

    alpha scales the gradients inside the products, where it costs no rounding; row_scale [rows]
    scales them row by row.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = torch.empty(job.plan.count, dtype = wide, device = hidden.device)
    gradients = None
    if any(wanted):
        gradients = HeadGradients(hidden, weight, bias, wanted, job.plan, job.head_grad_dtype)
    if job.row_weight is not None:
        row_scale = job.row_weight if row_scale is None else row_scale * job.row_weight
    for chunk in iterate_chunks(hidden, weight, job.plan):
        into = None if gradients is None else chunk.gradients(hidden.dtype)
        if observe is not None:
            observe(chunk.logits, chunk.take_rows(labels), job.spec, bias, job.differentiable)
        cross_entropy_rows(
            chunk.logits,
            chunk.take_rows(labels),
            job.spec,
            losses[chunk.start : chunk.stop],
            grads = into,
            row_scale = None if row_scale is None else chunk.take_rows(row_scale),
            bias = bias,
            scratch = True,
        )
        if gradients is not None:
            gradients.add(chunk, into, alpha)
    if job.row_weight is not None:
        losses *= job.row_weight if job.plan.index is None else job.row_weight[job.plan.index]
    return losses, gradients


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, job):
        wanted = tuple(need and job.differentiable for need in ctx.needs_input_grad[:3])
        index = job.plan.index
        # The per-row upstream gradients of "none" can be applied to hidden's rows afterwards, but
        # not to the head's sums over rows: those wait for the backward.
        later = job.reduction == "none" and any(wanted[1:])
        # float16 would lose small gradients before a loss scaler multiplies them.
        alpha = 1.0 if hidden.dtype == torch.float16 else job.alpha
        with without_autocast(hidden.device.type):
            now = (False,) * 3 if later else wanted
            arguments = (hidden, weight, bias, labels, job, now, alpha)
            losses, gradients = _chunked(*arguments, observe = job.observe)
        ctx.save_for_backward(hidden, weight, bias, labels)
        if gradients is not None:  # only a second backward needs the rows again
            job = replace(job, plan = replace(job.plan, index = None))
        ctx.job, ctx.wanted, ctx.later, ctx.gradients = job, wanted, later, gradients
        ctx.rest = job.alpha / alpha if alpha != job.alpha and job.plan.count else 1.0
        if job.reduction == "none":
            if index is None:
                return losses
            rows = torch.zeros(labels.shape, dtype = losses.dtype, device = losses.device)
            return rows.index_copy_(0, index, losses)
        total = losses.sum()
        return total if job.reduction == "sum" else total / job.denominator

    @staticmethod
    def backward(ctx, upstream):
        # A leaf that receives these gradients may write over them, so they are handed out once.
        with torch.no_grad(), without_autocast(upstream.device.type):
            gradients = _backward(ctx, upstream)
        given = (*ctx.saved_tensors, upstream)
        return (*refuse_second_derivative(_NAME, gradients, *given), None, None)


def _backward(ctx, upstream):
    # Read even where it is not needed: autograd raises here when one was changed in place.
    hidden, weight, bias, labels = ctx.saved_tensors
    job, gradients = ctx.job, ctx.gradients
    ctx.gradients = None
    per_row = job.reduction == "none"
    if gradients is None and any(ctx.wanted):
        # "none" with a trained head, or a second backward through a retained graph.
        row_scale = (
            upstream.to(torch.promote_types(upstream.dtype, torch.float32)) if ctx.later else None
        )
        alpha = job.alpha / ctx.rest if ctx.rest else 1.0
        job = replace(job, plan = job.plan.of_rows(labels != job.spec.ignore_index))
        _, gradients = _chunked(hidden, weight, bias, labels, job, ctx.wanted, alpha, row_scale)
    if gradients is None:
        return (None, None, None)
    if not per_row:
        return gradients.scaled(upstream * ctx.rest, bias)
    if not ctx.later:
        gradients.hidden.mul_(upstream.unsqueeze(1))
    return gradients.scaled(torch.ones((), device = upstream.device), bias)


# ------------------------------------------------------------------------------- probabilities


def _probability_targets(
    head: HeadInputs,
    targets: torch.Tensor,
    spec: RowLoss,
    reduction: str,
    n_items: Optional[float],
    shift: bool,
    chunk_rows: Optional[int],
) -> torch.Tensor:
    """Class probabilities as targets, which may have a gradient too: autograd on each chunk."""
    wanted = (*head.shape, head.weight.shape[0])
    if targets.shape != wanted:
        raise ValueError(
            f"{_NAME}: class probabilities must have shape {tuple(wanted)}, got {tuple(targets.shape)}."
        )
    if shift:
        raise ValueError(
            f"{_NAME}: shift is for integer labels; shift the class probabilities yourself."
        )

    plain = replace(spec, logit_scale = 1.0, softcap = 0.0)

    def row_losses(logits, target):
        x = transform_logits(logits, spec)
        loss = F.cross_entropy(
            x,
            target.to(x.dtype),
            weight = plain.class_weight,
            label_smoothing = plain.label_smoothing,
            reduction = "none",
        )
        if plain.z_loss:
            loss = loss + plain.z_loss * torch.logsumexp(x, 1) ** 2
        return loss

    per_row = reduction == "none"
    function = row_losses if per_row else (lambda logits, target: row_losses(logits, target).sum())
    flat = targets.reshape(-1, targets.shape[-1])
    loss = chunked_rows_loss(_NAME, head, function, (flat,), None, chunk_rows, per_row)
    if per_row:
        return loss.reshape(head.shape)
    if reduction == "sum":
        return loss
    rows = head.hidden.shape[0]
    return loss / (n_items if n_items is not None else rows) if rows else loss * float("nan")
