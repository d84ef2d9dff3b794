# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The CPU backend's causal language model loss on ``kernels.linear_loss``, with `LossOptions`."""

from dataclasses import replace
from typing import Any
import functools

import torch

from .fused_loss import head_loss, of_zoo, refuse_unhonoured, require_parameters
from .loss_options import (
    active_options,
    count_call,
    leave_the_trainer,
    smooth_in_the_loss,
    taking_options,
)

_CPU_PARAMETERS = (
    "hidden",
    "weight",
    "labels",
    "num_items_in_batch",
    "ignore_index",
    "shift_labels",
    "chunk_rows",
)


@of_zoo
def replace_chunked_linear_cross_entropy(stock):
    """The CPU backend's loss."""
    require_parameters(stock, _CPU_PARAMETERS)

    @functools.wraps(stock)
    def chunked_linear_cross_entropy(
        hidden,
        weight,
        labels,
        num_items_in_batch = None,
        ignore_index = -100,
        shift_labels = None,
        chunk_rows = None,
    ):
        options = active_options()
        try:
            from .kernels import linear_cross_entropy  # noqa: F401  (needs Triton's package)
        except ImportError as error:
            count_call(f"stock: {error}")
            refuse_unhonoured(options, str(error))
            return stock(
                hidden, weight, labels, num_items_in_batch, ignore_index, shift_labels, chunk_rows
            )
        count_call("cpu")
        if chunk_rows is not None:
            options = replace(options, chunk_rows = chunk_rows)
        shifted = shift_labels is not None
        keywords = {"ignore_index": ignore_index}
        target = shift_labels if shifted else labels
        return head_loss(hidden, weight, target, options, num_items_in_batch, not shifted, keywords)

    chunked_linear_cross_entropy._takes_loss_options = True
    return chunked_linear_cross_entropy


@of_zoo
def replace_patch_chunked_causal_lm_loss(stock):
    """The CPU backend's per-model hook: the forward that it installs takes loss options."""
    require_parameters(stock, ("model",))

    @functools.wraps(stock)
    def patch_chunked_causal_lm_loss(model):
        installed = stock(model)
        forward = vars(model).get("forward")
        if installed and forward is not None and not getattr(forward, "_takes_loss_options", False):
            plain = forward.__func__
            taking = taking_options(plain, shifts_itself = True, computes_loss = _in_cpu_step)
            model.forward = type(forward)(taking, model)
            model._takes_loss_options = True
            smooth_in_the_loss()
        return installed

    patch_chunked_causal_lm_loss._undo_replacement = leave_the_trainer
    return patch_chunked_causal_lm_loss


def _in_cpu_step(model: Any) -> bool:
    """The CPU backend computes its loss in chunks within SFTTrainer's own training step alone."""
    return torch.is_grad_enabled() and bool(
        vars(model).get("_unsloth_cpu_chunked_ce_active", False)
    )
