# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""nn.CrossEntropyLoss of ``hidden @ weight.T + bias`` without the logits ever being whole."""

from dataclasses import dataclass, replace
from typing import Optional, Union
import os

import torch
import torch.nn.functional as F

from .cross_entropy_rows import RowLoss, cross_entropy_rows
from .cross_entropy_torch import transform_logits
from .linear_chunks import (
    ChunkPlan,
    HeadGradients,
    HeadInputs,
    active_rows,
    check_device,
    iterate_chunks,
    narrow_logits,
    prepare_head,
    refuse_second_derivative,
    without_autocast,
)

__all__ = ["linear_cross_entropy"]

_NAME = "linear_cross_entropy"
_REDUCTIONS = ("none", "mean", "sum")


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
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    nan_if_empty: bool = True,
    chunk_rows: Optional[int] = None,
    logits_dtype: Optional[torch.dtype] = None,
    head_grad_dtype: Optional[torch.dtype] = None,
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
    reduction: "mean", "sum", or "none" (shape of labels, 0 where ignored).
    n_items: divides the sum instead of the number of labels: the count over a whole gradient
        accumulation group. Only with "mean"; 0 counts as 1, so a group without labels trains on.
    logit_scale, softcap: logits become ``softcap * tanh(logit_scale * logits / softcap)``; a
        softcap of 0 is none.
    z_loss: adds ``z_loss * logsumexp(logits)**2`` to every row that has a label (PaLM, section 5);
        reduced like the rest.
    shift: labels are the input tokens; position t is scored against label t + 1, the last not at all.
    nan_if_empty: a mean over no labels is NaN, as in PyTorch; False makes it 0, so that a batch whose
        labels are all ignored trains on.
    chunk_rows: rows of logits held at once; chosen from the GPU and its memory by default.
    logits_dtype: ``torch.float32`` keeps the logits in float32 (the precise mode); by default they
        are rounded to hidden's dtype, as a linear layer rounds them.
    head_grad_dtype: ``torch.float32`` sums a trained head's gradient in float32; by default in
        weight's dtype, as autograd does (float16 always in float32).

    Returns float32 (float64 for float64 inputs).
    Raises TypeError or ValueError for arguments that do not fit, IndexError for labels outside the
    vocabulary on the CPU; on a GPU the loss of such a row is NaN, and with
    ``UNSLOTH_LOSS_CHECK_LABELS=1`` the IndexError comes there too. A second derivative is refused.

    The logits' gradient is written over the logits in the forward, as in Liger Kernel
    (arXiv 2410.10989) and "Cut Your Losses" (arXiv 2411.09009).
    """
    head = prepare_head(_NAME, hidden, weight, bias)
    spec = _check_spec(
        head, class_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss
    )
    n_items = _check_reduction(reduction, n_items)
    _check_dtype("logits_dtype", logits_dtype, head.hidden.dtype)
    _check_dtype("head_grad_dtype", head_grad_dtype, head.weight.dtype)
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{_NAME}: labels must be a tensor, got {type(labels).__name__}.")
    check_device(_NAME, head.hidden, labels = labels)
    if labels.is_floating_point():
        return _probability_targets(head, labels, spec, reduction, n_items, shift, chunk_rows)
    flat = _check_labels(labels, head, ignore_index, shift)
    index, count = active_rows(flat != ignore_index)
    _check_range(flat, index, count, head.weight.shape[0])
    plan = ChunkPlan.make(head, index, count, chunk_rows, logits_dtype)
    denominator = _denominator(reduction, n_items, flat, index, count, spec)
    if count == 0 and not nan_if_empty:
        denominator = 1.0
    job = _Job(spec, plan, reduction, denominator, head_grad_dtype, torch.is_grad_enabled())
    loss = _LinearCrossEntropy.apply(head.hidden, head.weight, head.bias, flat, job)
    return loss.reshape(labels.shape) if reduction == "none" else loss


# ------------------------------------------------------------------------------- checks


def _check_spec(
    head: HeadInputs,
    class_weight,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    z_loss,
) -> RowLoss:
    vocab_size = head.weight.shape[0]
    if class_weight is not None:
        if not isinstance(class_weight, torch.Tensor) or not class_weight.is_floating_point():
            raise TypeError(
                f"{_NAME}: class_weight must be a floating point tensor of [{vocab_size}]."
            )
        if class_weight.shape != (vocab_size,):
            raise ValueError(
                f"{_NAME}: class_weight must be [{vocab_size}], one weight a class, "
                f"got shape {tuple(class_weight.shape)}."
            )
        if class_weight.requires_grad:
            raise ValueError(f"{_NAME}: class_weight has no gradient; pass class_weight.detach().")
        check_device(_NAME, head.hidden, class_weight = class_weight)
        wide = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
        class_weight = class_weight.to(wide).contiguous()
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{_NAME}: ignore_index must be an integer, got {ignore_index!r}.")
    label_smoothing = _number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"{_NAME}: label_smoothing must be between 0 and 1, got {label_smoothing}."
        )
    softcap = _number("softcap", softcap)
    if softcap < 0.0:
        raise ValueError(f"{_NAME}: softcap must be positive, or 0 for none; got {softcap}.")
    scale, z = _number("logit_scale", logit_scale), _number("z_loss", z_loss)
    return RowLoss(class_weight, ignore_index, label_smoothing, scale, softcap, z)


def _number(label: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{_NAME}: {label} must be a finite number, got {value!r}.")
    return number


def _check_reduction(reduction, n_items) -> Optional[float]:
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{_NAME}: reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}."
        )
    if n_items is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"{_NAME}: n_items replaces the mean's denominator, so reduction {reduction!r} "
            'cannot take it; leave n_items out or use reduction = "mean".'
        )
    if isinstance(n_items, torch.Tensor):
        if n_items.numel() == 0:
            raise ValueError(f"{_NAME}: n_items must hold one number, got an empty tensor.")
        # A DataParallel replica gets a slice of the repeated count.
        n_items = n_items.reshape(-1)[0].item()
    number = _number("n_items", n_items)
    if number < 0:
        raise ValueError(f"{_NAME}: n_items must not be negative, got {number}.")
    return number or 1.0


def _check_dtype(label: str, dtype: Optional[torch.dtype], default: torch.dtype) -> None:
    if dtype not in (None, torch.float32, default):
        raise TypeError(f"{_NAME}: {label} must be torch.float32 or {default}, got {dtype}.")
    if dtype == torch.float32 and default == torch.float64:
        raise TypeError(
            f"{_NAME}: {label} torch.float32 is narrower than the inputs' torch.float64."
        )


def _check_labels(labels, head: HeadInputs, ignore_index: int, shift: bool) -> torch.Tensor:
    """int64 [rows], shifted."""
    if labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(
            f"{_NAME}: labels must be integers or class probabilities, got {labels.dtype}."
        )
    if labels.shape != head.shape:
        raise ValueError(
            f"{_NAME}: labels have shape {tuple(labels.shape)} and hidden {tuple(head.shape)} rows; "
            "one label a row, or class probabilities in floating point."
        )
    if shift:
        labels = F.pad(_shiftable(labels)[..., 1:], (0, 1), value = ignore_index)
    return labels.reshape(-1).long()


def _shiftable(labels: torch.Tensor) -> torch.Tensor:
    if labels.dim() == 0 or labels.shape[-1] == 0:
        raise ValueError(
            f"{_NAME}: shift needs a position dimension, got labels of {tuple(labels.shape)}."
        )
    return labels


def _check_range(labels, index, count: int, vocab_size: int) -> None:
    on_request = os.environ.get("UNSLOTH_LOSS_CHECK_LABELS", "0") == "1"
    if count == 0 or (labels.is_cuda and not on_request):
        return
    active = labels if index is None else labels[index]
    low, high = active.aminmax()
    if low < 0 or high >= vocab_size:
        bad = low.item() if low < 0 else high.item()
        raise IndexError(
            f"{_NAME}: label {bad} is outside the vocabulary of {vocab_size}; "
            "set it to ignore_index where the row should not count."
        )


def _denominator(
    reduction: str,
    n_items: Optional[float],
    labels,
    index,
    count: int,
    spec: RowLoss,
) -> float:
    if reduction != "mean":
        return 1.0
    if n_items is not None:
        return n_items
    if spec.class_weight is None:
        return float(count)
    active = labels if index is None else labels[index]
    # A label outside the vocabulary makes its row NaN, whatever its weight.
    active = active.clamp(0, spec.class_weight.shape[0] - 1)
    return spec.class_weight[active].sum(dtype = torch.float64).item()


# ------------------------------------------------------------------------------- autograd


@dataclass(frozen = True)
class _Job:
    spec: RowLoss
    plan: ChunkPlan
    reduction: str
    denominator: float
    head_grad_dtype: Optional[torch.dtype]
    differentiable: bool

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
    for chunk in iterate_chunks(hidden, weight, job.plan):
        into = None if gradients is None else narrow_logits(chunk, hidden.dtype)
        cross_entropy_rows(
            chunk.logits,
            chunk.rows_of(labels),
            job.spec,
            losses[chunk.start : chunk.stop],
            grads = into,
            row_scale = None if row_scale is None else chunk.rows_of(row_scale),
            bias = bias,
            scratch = True,
        )
        if gradients is not None:
            gradients.add(chunk, into, alpha)
    return losses, gradients


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, job):
        wanted = tuple(ctx.needs_input_grad[:3]) if job.differentiable else (False,) * 3
        # The per-row upstream gradients of "none" can be applied to hidden's rows afterwards, but
        # not to the head's sums over rows: those wait for the backward.
        later = job.reduction == "none" and any(wanted[1:])
        # float16 would lose small gradients before a loss scaler multiplies them.
        alpha = 1.0 if hidden.dtype == torch.float16 else job.alpha
        with without_autocast(hidden.device.type):
            now = (False,) * 3 if later else wanted
            losses, gradients = _chunked(hidden, weight, bias, labels, job, now, alpha)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.job, ctx.wanted, ctx.later, ctx.gradients = job, wanted, later, gradients
        ctx.rest = job.alpha / alpha if alpha != job.alpha and job.plan.count else 1.0
        if job.reduction == "none":
            if job.plan.index is None:
                return losses
            rows = torch.zeros(labels.shape, dtype = losses.dtype, device = losses.device)
            return rows.index_copy_(0, job.plan.index, losses)
        total = losses.sum()
        return total if job.reduction == "sum" else total / job.denominator

    @staticmethod
    def backward(ctx, upstream):
        # A leaf that receives these gradients may write over them, so they are handed out once.
        with torch.no_grad(), without_autocast(upstream.device.type):
            gradients = _backward(ctx, upstream)
        return (*refuse_second_derivative(_NAME, gradients), None, None)


def _backward(ctx, upstream):
    job, gradients = ctx.job, ctx.gradients
    ctx.gradients = None
    per_row = job.reduction == "none"
    if gradients is None and any(ctx.wanted):
        # "none" with a trained head, or a second backward through a retained graph.
        hidden, weight, bias, labels = ctx.saved_tensors
        row_scale = (
            upstream.to(torch.promote_types(upstream.dtype, torch.float32)) if ctx.later else None
        )
        alpha = job.alpha / ctx.rest if ctx.rest else 1.0
        _, gradients = _chunked(hidden, weight, bias, labels, job, ctx.wanted, alpha, row_scale)
    if gradients is None:
        return (None, None, None)
    bias = ctx.saved_tensors[2] if ctx.wanted[2] else None
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
    from .linear_loss import chunked_rows_loss

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
