# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Checks of a chunked loss's arguments, before anything is computed: each error names the value."""

import os
from typing import Optional

import torch
import torch.nn.functional as F

from ..cross_entropy_spec import finite_number
from .loss_chunking import HeadInputs, check_device

_REDUCTIONS = ("none", "mean", "sum")


def check_reduction(
    name: str,
    reduction,
    n_items,
    label: str = "n_items",
) -> Optional[float]:
    """n_items as a number that is not 0, or None where the labels are to be counted."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}."
        )
    if n_items is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"{name}: {label} replaces the mean's denominator, so reduction {reduction!r} "
            f'cannot take it; leave {label} out or use reduction = "mean".'
        )
    if isinstance(n_items, torch.Tensor):
        if n_items.numel() == 0:
            raise ValueError(f"{name}: {label} must hold one number, got an empty tensor.")
        # A DataParallel replica gets a slice of the repeated count.
        n_items = n_items.reshape(-1)[0].item()
    number = finite_number(name, label, n_items)
    if number < 0:
        raise ValueError(f"{name}: {label} must not be negative, got {number}.")
    return number or 1.0


def check_dtype(name: str, label: str, dtype: Optional[torch.dtype], default: torch.dtype) -> None:
    """Raises TypeError unless dtype is None, float32 or default, and not narrower than default."""
    if dtype not in (None, torch.float32, default):
        raise TypeError(f"{name}: {label} must be torch.float32 or {default}, got {dtype}.")
    if dtype == torch.float32 and default == torch.float64:
        raise TypeError(
            f"{name}: {label} torch.float32 is narrower than the inputs' torch.float64."
        )


def flat_labels(
    name: str, labels: torch.Tensor, head: HeadInputs, ignore_index: int, shift: bool
) -> torch.Tensor:
    """labels as int64 [rows], shifted by one where ``shift``; raises unless there is one a row."""
    if labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(
            f"{name}: labels must be integers or class probabilities, got {labels.dtype}."
        )
    if labels.shape != head.shape:
        raise ValueError(
            f"{name}: labels have shape {tuple(labels.shape)} and hidden {tuple(head.shape)} rows; "
            "one label a row, or class probabilities in floating point."
        )
    if shift:
        labels = F.pad(_shiftable(name, labels)[..., 1:], (0, 1), value = ignore_index)
    return labels.reshape(-1).long()


def flat_weights(
    name: str, weights, labels: torch.Tensor, head: HeadInputs, shift: bool
) -> torch.Tensor:
    """loss_weights as [rows] in the losses' dtype, shifted with the labels."""
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        kind = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"{name}: loss_weights must be a floating point tensor, got {kind}.")
    if weights.shape != labels.shape:
        raise ValueError(
            f"{name}: loss_weights have shape {tuple(weights.shape)} and labels "
            f"{tuple(labels.shape)}; one weight a label."
        )
    if weights.requires_grad:
        raise ValueError(f"{name}: loss_weights have no gradient; pass loss_weights.detach().")
    check_device(name, head.hidden, loss_weights = weights)
    if shift:
        weights = F.pad(weights[..., 1:], (0, 1))
    wide = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
    return weights.reshape(-1).to(wide)


def _shiftable(name: str, labels: torch.Tensor) -> torch.Tensor:
    if labels.dim() == 0 or labels.shape[-1] == 0:
        raise ValueError(
            f"{name}: shift needs a position dimension, got labels of {tuple(labels.shape)}."
        )
    return labels


def check_range(name: str, labels, index, count: int, vocab_size: int) -> None:
    """IndexError for an active label outside the vocabulary: on the CPU, and where asked for."""
    on_request = os.environ.get("UNSLOTH_LOSS_CHECK_LABELS", "0") == "1"
    if count == 0 or (labels.is_cuda and not on_request):
        return
    active = labels if index is None else labels[index]
    low, high = active.aminmax()
    if low < 0 or high >= vocab_size:
        bad = low.item() if low < 0 else high.item()
        raise IndexError(
            f"{name}: label {bad} is outside the vocabulary of {vocab_size}; "
            "set it to ignore_index where the row should not count."
        )
