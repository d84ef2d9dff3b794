# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Per-token statistics of ``hidden @ weight.T + bias``, for losses that couple rows.

GRPO, DPO and KL penalties are functions of log-probabilities of whole sequences, so their
gradients by the logits are not known when a chunk is at hand. The forward keeps four numbers a
row; the backward computes the logits again.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch

from ..cross_entropy_spec import RowLoss
from .log_probs_kernel import log_prob_gradients, log_prob_rows
from .loss_chunking import (
    ChunkPlan,
    HeadGradients,
    check_device,
    iterate_chunks,
    prepare_head,
    without_autocast,
)
from .loss_validation import check_dtype, check_range, flat_labels
from .second_derivative import refuse_second_derivative

__all__ = ["LogProbs", "linear_log_probs"]

_NAME = "linear_log_probs"


class LogProbs(NamedTuple):
    """Of every row, in the targets' shape; rows whose target is ignored hold 0 (top1: -1).

    log_probs: log-probability of the target. logsumexp: of the logits. entropy: of the softmax, in
    nats. top1: the most likely class, int64 (no gradient); ties go to the lowest.
    """

    log_probs: torch.Tensor
    logsumexp: torch.Tensor
    entropy: torch.Tensor
    top1: torch.Tensor


@torch.compiler.disable  # the number of labelled rows decides what is launched
def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    shift: bool = False,
    chunk_rows: Optional[int] = None,
    logits_dtype: Optional[torch.dtype] = None,
    head_grad_dtype: Optional[torch.dtype] = None,
) -> LogProbs:
    """Log-probability of each target, logsumexp, entropy and most likely class, in chunks.

    Any autograd loss stands on top of the first three; their gradients by hidden, weight and bias are
    computed in the backward from logits that are computed again there (one product in the forward,
    two more with a frozen head in the backward, three with a trained one).

    targets: [...] integers, hidden's leading shape; rows with ``ignore_index`` reach no product.
    temperature: divides the logits after scale and soft cap. Everything else as in
    `linear_cross_entropy`, errors included: IndexError for a target outside the vocabulary on
    the CPU, NaN on a GPU. Returns `LogProbs` in float32 (float64 for float64 inputs).
    """
    head = prepare_head(_NAME, hidden, weight, bias)
    spec = RowLoss.validated(
        _NAME,
        head.hidden,
        head.weight.shape[0],
        ignore_index = ignore_index,
        logit_scale = logit_scale,
        softcap = softcap,
    )
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0.0 < temperature < float("inf"):
        raise ValueError(f"{_NAME}: temperature must be a positive number, got {temperature!r}.")
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point():
        raise TypeError(f"{_NAME}: targets must be a tensor of integers.")
    check_dtype(_NAME, "logits_dtype", logits_dtype, head.hidden.dtype)
    check_dtype(_NAME, "head_grad_dtype", head_grad_dtype, head.weight.dtype)
    check_device(_NAME, head.hidden, targets = targets)
    flat = flat_labels(_NAME, targets, head, ignore_index, shift)
    plan = ChunkPlan.make(head, flat != ignore_index, chunk_rows, logits_dtype)
    check_range(_NAME, flat, plan.index, plan.count, head.weight.shape[0])
    job = _Job(spec, plan, 1.0 / float(temperature), head_grad_dtype)
    found = _LinearLogProbs.apply(head.hidden, head.weight, head.bias, flat, job)
    return LogProbs(*(value.reshape(targets.shape) for value in found))


@dataclass(frozen = True)
class _Job:
    """What one call computes, for its forward and its backward."""

    spec: RowLoss
    plan: ChunkPlan
    inverse_temperature: float
    head_grad_dtype: Optional[torch.dtype]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, job):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = targets.shape[0]
        # log-probability, logsumexp, entropy: one row of memory each.
        values = torch.zeros((3, rows), dtype = wide, device = hidden.device)
        top1 = torch.full((rows,), -1, dtype = torch.int64, device = hidden.device)
        with without_autocast(hidden.device.type):
            for chunk in iterate_chunks(hidden, weight, job.plan):
                found, best = log_prob_rows(
                    chunk.logits, chunk.take_rows(targets), job.spec, job.inverse_temperature, bias
                )
                chunk.place(found, values, dim = 1)
                chunk.place(best, top1)
        ctx.save_for_backward(hidden, weight, bias, targets, values)
        ctx.job = job
        ctx.mark_non_differentiable(top1)
        return *(row.clone() for row in values), top1

    @staticmethod
    def backward(ctx, by_log_probs, by_lse, by_entropy, _):
        hidden, weight, bias, targets, values = ctx.saved_tensors
        job, wanted = ctx.job, tuple(ctx.needs_input_grad[:3])
        with torch.no_grad(), without_autocast(hidden.device.type):
            gradients = HeadGradients(hidden, weight, bias, wanted, job.plan, job.head_grad_dtype)
            upstream = torch.stack((by_log_probs, by_lse, by_entropy))
            for chunk in iterate_chunks(hidden, weight, job.plan):
                into = chunk.gradients(hidden.dtype)
                log_prob_gradients(
                    chunk.logits,
                    chunk.take_rows(targets),
                    job.spec,
                    job.inverse_temperature,
                    bias,
                    chunk.take_rows(values, dim = 1),
                    chunk.take_rows(upstream, dim = 1),
                    into,
                )
                gradients.add(chunk, into)
            found = gradients.scaled(torch.ones((), device = hidden.device), bias)
        given = (hidden, weight, bias, by_log_probs, by_lse, by_entropy)
        return (*refuse_second_derivative(_NAME, found, *given), None, None)
