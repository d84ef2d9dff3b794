# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Any differentiable loss of ``hidden @ weight.T`` that treats every row by itself, in chunks."""

from dataclasses import dataclass
from typing import Callable, Optional, Tuple

import torch

from .loss_chunking import (
    ChunkPlan,
    HeadGradients,
    HeadInputs,
    check_device,
    iterate_chunks,
    prepare_head,
    without_autocast,
)
from .second_derivative import refuse_second_derivative

__all__ = ["linear_loss"]

_NAME = "linear_loss"
# float32 logits, what loss_fn saves for its backward, and the gradient, beside the logits.
_BYTES_PER_LOGIT = 16


@torch.compiler.disable  # the number of labelled rows decides what is launched
def linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    loss_fn: Callable[..., torch.Tensor],
    *row_args: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    keep: Optional[torch.Tensor] = None,
    chunk_rows: Optional[int] = None,
) -> torch.Tensor:
    """``loss_fn(hidden @ weight.T + bias, *row_args)`` for a loss that treats every row by itself.

    loss_fn: gets a chunk's logits, float32 [rows, vocab] (float64 for float64 inputs), and the same
        rows of every row argument. It returns either the losses of its rows, [rows], or their sum,
        a scalar. Its gradients come from autograd on the chunk.
    hidden: [..., width]; weight: [vocab, width]; bias: [vocab] or None, as in `linear_cross_entropy`.
    row_args: tensors whose leading dimensions are hidden's; they reach loss_fn as [rows, ...]. Those
        that require grad get their gradient.
    keep: bool [...]; rows where it is False have loss 0 and never reach a product.
    chunk_rows: rows of logits held at once; chosen from the GPU and its memory by default.

    Returns the sum over rows, a scalar, where loss_fn returns one; else the losses in hidden's
    leading shape. A scalar costs three products a row (two with a frozen head), with its gradients
    computed in the forward; row losses cost one more, as the logits are computed again in the backward.

    Raises ValueError where loss_fn is not separable over rows (a mean over them, say), which is
    tried on a few rows, or reads a tensor that requires grad and is no row argument, whose gradient
    would be lost. A second derivative is refused.
    """
    head = prepare_head(_NAME, hidden, weight, bias)
    flat = tuple(_row_argument(number, arg, head) for number, arg in enumerate(row_args))
    if keep is not None:
        if keep.dtype != torch.bool or keep.shape != head.shape:
            raise ValueError(
                f"{_NAME}: keep must be a bool tensor of shape {tuple(head.shape)}, "
                f"got {keep.dtype} of {tuple(keep.shape)}."
            )
        check_device(_NAME, head.hidden, keep = keep)
        keep = keep.reshape(-1)
    per_row = _returns_rows(loss_fn, head, flat, keep)
    result = chunked_rows_loss(_NAME, head, loss_fn, flat, keep, chunk_rows, per_row)
    return result.reshape(head.shape) if per_row else result


def _row_argument(number: int, arg, head: HeadInputs) -> torch.Tensor:
    if not isinstance(arg, torch.Tensor):
        raise TypeError(
            f"{_NAME}: row argument {number} must be a tensor with a value for every row, got "
            f"{type(arg).__name__}; give loss_fn constants through a closure or functools.partial."
        )
    lead = len(head.shape)
    if arg.shape[:lead] != head.shape:
        raise ValueError(
            f"{_NAME}: row argument {number} has shape {tuple(arg.shape)}, which must begin with "
            f"hidden's {tuple(head.shape)}."
        )
    check_device(_NAME, head.hidden, **{f"row argument {number}": arg})
    return arg.reshape(head.hidden.shape[0], *arg.shape[lead:])


def _returns_rows(loss_fn, head: HeadInputs, flat, keep: Optional[torch.Tensor]) -> bool:
    """Whether loss_fn returns row losses; tried on a few rows to keep, together and in two halves."""
    rows = torch.arange(head.hidden.shape[0], device = head.hidden.device)
    rows = rows if keep is None else rows[keep]
    few = rows[:: max(len(rows) // 8, 1)][:8]
    with torch.no_grad(), without_autocast(head.hidden.device.type):
        hidden = head.hidden.detach()[few]
        logits = _wide(torch.nn.functional.linear(hidden, head.weight.detach()), head.bias)
        args = [arg.detach()[few] for arg in flat]

    def on(part):
        return loss_fn(logits[part], *(arg[part] for arg in args))

    leaves = [logits, *args]
    for leaf, original in zip(leaves, [logits, *flat]):
        leaf.requires_grad_(torch.is_grad_enabled() and (leaf is logits or original.requires_grad))
    together = on(slice(None))
    if not isinstance(together, torch.Tensor) or together.shape not in ((), few.shape):
        raise ValueError(
            f"{_NAME}: loss_fn must return one loss a row or their sum, a scalar; for {len(few)} rows "
            f"it returned {tuple(getattr(together, 'shape', ())) or type(together).__name__}."
        )
    _refuse_other_leaves(together, leaves)
    per_row = together.dim() == 1
    if len(few) < 2:
        return per_row
    with torch.no_grad():
        halves = [on(slice(0, len(few) // 2)), on(slice(len(few) // 2, None))]
        apart = torch.cat(halves) if per_row else halves[0] + halves[1]
    if not torch.allclose(apart, together.detach(), rtol = 1e-3, atol = 1e-4, equal_nan = True):
        raise ValueError(
            f"{_NAME}: loss_fn is not separable over rows: {len(few)} rows together give "
            f"{together.sum().item():.6g}, in two halves {apart.sum().item():.6g}. Return each row's loss, "
            'or their sum (reduction = "sum"), and divide the result of linear_loss.'
        )
    return per_row


def _refuse_other_leaves(loss: torch.Tensor, leaves) -> None:
    """Raises ValueError where loss_fn's graph reaches a leaf whose gradient nobody collects."""
    known = {id(leaf) for leaf in leaves}
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"{_NAME}: loss_fn reads a tensor of shape {tuple(variable.shape)} that requires grad "
                "and is no row argument, so its gradient would be lost. Pass it as a row argument "
                "(expanded to a value for every row), or detach it."
            )
        pending.extend(next_node for next_node, _ in node.next_functions)


def _wide(logits: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    x = logits if logits.dtype == torch.float64 else logits.float()
    return x if bias is None else x + bias.detach().to(x.dtype)


@dataclass(frozen = True)
class _Job:
    """What one call computes, for its forward and its backward."""

    name: str
    loss_fn: Callable[..., torch.Tensor]
    plan: ChunkPlan
    per_row: bool
    differentiable: bool


def chunked_rows_loss(
    name: str,
    head: HeadInputs,
    loss_fn: Callable[..., torch.Tensor],
    row_args: Tuple[torch.Tensor, ...],
    keep: Optional[torch.Tensor],
    chunk_rows: Optional[int],
    per_row: bool,
) -> torch.Tensor:
    """`linear_loss` behind its checks: a scalar, or [rows] where ``per_row``."""
    plan = ChunkPlan.make(head, keep, chunk_rows, bytes_per_logit = _BYTES_PER_LOGIT)
    job = _Job(name, loss_fn, plan, per_row, torch.is_grad_enabled())
    return _LinearLoss.apply(job, head.hidden, head.weight, head.bias, *row_args)


def _chunk_loss(job: _Job, chunk, bias, row_args, upstream):
    """(loss of a chunk, gradients by logits and by each row argument)."""
    x = _wide(chunk.logits, bias)
    x = x.clone() if x.data_ptr() == chunk.logits.data_ptr() else x
    args = [chunk.take_rows(arg).detach() for arg in row_args]
    for arg, whole in zip(args, row_args):
        arg.requires_grad_(whole.requires_grad)
    with torch.enable_grad():
        x.requires_grad_(True)
        loss = job.loss_fn(x, *args)
        leaves = [x] + [arg for arg in args if arg.requires_grad]
        if not loss.requires_grad:  # a constant
            return loss, [torch.zeros_like(leaf) for leaf in leaves]
        seed = None if upstream is None else chunk.take_rows(upstream).to(loss.dtype)
        found = torch.autograd.grad(loss, leaves, seed, allow_unused = True)
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]
    return loss.detach(), found


def _chunked(
    hidden,
    weight,
    bias,
    row_args,
    job: _Job,
    wanted,
    upstream = None,
):
    """(loss, head gradients or None, gradients of the row arguments)."""
    rows = hidden.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = torch.zeros((rows,) if job.per_row else (), dtype = wide, device = hidden.device)
    head_wanted = wanted[:3]
    gradients = HeadGradients(hidden, weight, bias, head_wanted, job.plan) if any(wanted) else None
    by_args = [torch.zeros_like(arg) if want else None for arg, want in zip(row_args, wanted[3:])]
    for chunk in iterate_chunks(hidden, weight, job.plan):
        if not any(wanted):
            args = [chunk.take_rows(arg) for arg in row_args]
            with torch.no_grad():
                part = job.loss_fn(_wide(chunk.logits, bias), *args)
        else:
            part, found = _chunk_loss(job, chunk, bias, row_args, upstream)
            into = chunk.gradients(hidden.dtype)
            into.copy_(found[0])
            gradients.add(chunk, into)
            given = iter(found[1:])
            for arg, sums, want in zip(row_args, by_args, wanted[3:]):
                got = next(given) if arg.requires_grad else None
                if want:
                    chunk.place(got, sums)
        if job.per_row:
            chunk.place(part.detach(), loss)
        else:
            loss.add_(part.detach())
    return loss, gradients, by_args


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, hidden, weight, bias, *row_args):
        wanted = tuple(need and job.differentiable for need in ctx.needs_input_grad[1:])
        now = (False,) * len(wanted) if job.per_row else wanted
        with without_autocast(hidden.device.type):
            loss, gradients, by_args = _chunked(hidden, weight, bias, row_args, job, now)
        ctx.save_for_backward(hidden, weight, bias, *row_args)
        ctx.job, ctx.wanted = job, wanted
        ctx.gradients = None if gradients is None else (gradients, by_args)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        with torch.no_grad(), without_autocast(upstream.device.type):
            gradients = _backward(ctx, upstream)
        given = (*ctx.saved_tensors, upstream)
        return (None, *refuse_second_derivative(ctx.job.name, gradients, *given))


def _backward(ctx, upstream):
    job = ctx.job
    hidden, weight, bias, *row_args = ctx.saved_tensors
    if not any(ctx.wanted):
        return (None,) * len(ctx.wanted)
    ready, ctx.gradients = ctx.gradients, None
    if ready is None:
        rows = upstream if job.per_row else None
        ready = _chunked(hidden, weight, bias, row_args, job, ctx.wanted, rows)[1:]
    gradients, by_args = ready
    factor = upstream.new_ones(()) if job.per_row else upstream
    scaled_args = [None if g is None else g.mul_(factor) for g in by_args]
    return (*gradients.scaled(factor, bias), *scaled_args)
