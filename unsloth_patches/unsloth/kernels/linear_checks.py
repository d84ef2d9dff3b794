# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Checks of a chunked loss's arguments, before anything is computed: each error names the value."""

from typing import Optional
import os

import torch
import torch.nn.functional as F

from .cross_entropy_rows import RowLoss
from .linear_chunks import HeadInputs, check_device

_REDUCTIONS = ("none", "mean", "sum")


def row_loss_of(
    name: str,
    head: HeadInputs,
    class_weight,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    z_loss,
) -> RowLoss:
    """What a row's loss is made of; raises TypeError or ValueError for values that do not fit."""
    vocab_size = head.weight.shape[0]
    if class_weight is not None:
        if not isinstance(class_weight, torch.Tensor) or not class_weight.is_floating_point():
            raise TypeError(
                f"{name}: class_weight must be a floating point tensor of [{vocab_size}]."
            )
        if class_weight.shape != (vocab_size,):
            raise ValueError(
                f"{name}: class_weight must be [{vocab_size}], one weight a class, "
                f"got shape {tuple(class_weight.shape)}."
            )
        if class_weight.requires_grad:
            raise ValueError(f"{name}: class_weight has no gradient; pass class_weight.detach().")
        check_device(name, head.hidden, class_weight = class_weight)
        wide = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
        class_weight = class_weight.to(wide).contiguous()
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{name}: ignore_index must be an integer, got {ignore_index!r}.")
    label_smoothing = _number(name, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {label_smoothing}.")
    softcap = _number(name, "softcap", softcap)
    if softcap < 0.0:
        raise ValueError(f"{name}: softcap must be positive, or 0 for none; got {softcap}.")
    scale, z = _number(name, "logit_scale", logit_scale), _number(name, "z_loss", z_loss)
    return RowLoss(class_weight, ignore_index, label_smoothing, scale, softcap, z)


def _number(name: str, label: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name}: {label} must be a finite number, got {value!r}.")
    return number


def check_reduction(name: str, reduction, n_items) -> Optional[float]:
    """n_items as a number, at least 1, or None where the labels are to be counted."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}."
        )
    if n_items is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"{name}: n_items replaces the mean's denominator, so reduction {reduction!r} "
            'cannot take it; leave n_items out or use reduction = "mean".'
        )
    if isinstance(n_items, torch.Tensor):
        if n_items.numel() == 0:
            raise ValueError(f"{name}: n_items must hold one number, got an empty tensor.")
        # A DataParallel replica gets a slice of the repeated count.
        n_items = n_items.reshape(-1)[0].item()
    number = _number(name, "n_items", n_items)
    if number < 0:
        raise ValueError(f"{name}: n_items must not be negative, got {number}.")
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
    name: str,
    labels: torch.Tensor,
    head: HeadInputs,
    ignore_index: int,
    shift: bool,
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
