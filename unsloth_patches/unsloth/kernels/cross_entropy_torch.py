# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The arithmetic of ``cross_entropy_rows`` in plain torch, and what logits become before a loss."""

from typing import Optional

import torch


def transform_logits(
    logits: torch.Tensor,
    spec,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Bias, scale, then soft cap, in float32 (float64 logits stay float64)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        x = x + bias.to(x.dtype)
    if spec.logit_scale != 1.0:
        x = x * spec.logit_scale
    if spec.softcap != 0.0:
        x = torch.tanh(x / spec.softcap) * spec.softcap
    return x


def transform_slope(x: torch.Tensor, spec) -> torch.Tensor:
    """d x / d raw logit, from the transformed logits x."""
    slope = torch.full_like(x, spec.logit_scale)
    if spec.softcap != 0.0:
        slope.mul_(1.0 - (x / spec.softcap) ** 2)
    return slope


def torch_rows(logits, labels, spec, losses, grads, row_scale, bias, scratch) -> None:
    """`cross_entropy_rows` on any device and in float64."""
    vocab_size = logits.shape[1]
    x = transform_logits(logits, spec, bias)
    if x.data_ptr() == logits.data_ptr() and not scratch:
        x = x.clone()
    ignored = labels == spec.ignore_index
    known = ((labels >= 0) & (labels < vocab_size)).unsqueeze(1)
    index = torch.where(known, labels.unsqueeze(1), 0)
    target = x.gather(1, index)
    weight = None if spec.class_weight is None else spec.class_weight.to(x.dtype)
    linear = None
    if spec.label_smoothing:
        linear = x.sum(1, keepdim = True) if weight is None else (x @ weight).unsqueeze(1)
    slope = transform_slope(x, spec) if spec.softcap and grads is not None else spec.logit_scale

    # A finite floor: -inf, where the label is the only class, would give exp(-inf + inf) = NaN.
    x.scatter_(1, index, float("-inf"))
    top = x.amax(1, keepdim = True).clamp_(min = torch.finfo(x.dtype).min / 2)
    others = x.sub_(top).exp_()
    margin = top + others.sum(1, keepdim = True).log_() - target
    nll = torch.nn.functional.softplus(margin, threshold = 50.0)
    # A label outside the vocabulary makes its whole row NaN, and so does one whose logit is +inf.
    known &= target != float("inf")
    lse = torch.where(known | ignored.unsqueeze(1), target + nll, float("nan"))
    hard = (
        1.0 - spec.label_smoothing
        if weight is None
        else (1.0 - spec.label_smoothing) * weight[index]
    )
    soft_each = spec.label_smoothing / vocab_size
    spread = soft_each * (vocab_size if weight is None else weight.sum())
    loss = hard * torch.where(lse.isnan(), lse, nll)
    if spec.label_smoothing:
        loss = loss + spread * lse - soft_each * linear
    if spec.z_loss:
        loss = loss + spec.z_loss * lse * lse
        spread = spread + 2.0 * spec.z_loss * lse
    losses.copy_(loss.squeeze(1).masked_fill_(ignored, 0.0))
    if grads is None:
        return

    gradient = others.mul_(torch.exp(top - lse) * (hard + spread))
    at_label = torch.exp(-nll) * spread - hard * torch.sigmoid(margin)
    gradient.scatter_(1, index, torch.where(lse.isnan(), lse, at_label))
    if spec.label_smoothing:
        gradient.sub_(soft_each if weight is None else soft_each * weight)
    if spec.softcap or spec.logit_scale != 1.0:
        gradient.mul_(slope)
    if row_scale is not None:
        gradient.mul_(row_scale.to(x.dtype).unsqueeze(1))
    if not scratch:
        gradient.masked_fill_(ignored.unsqueeze(1), 0.0)
    if grads.dtype != gradient.dtype:
        # Not at once: the narrower rows may lie over the wide ones.
        grads.copy_(gradient.to(grads.dtype))
    elif gradient.data_ptr() != grads.data_ptr():
        grads.copy_(gradient)
