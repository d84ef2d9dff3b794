# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Loss options of a model reach the loss that its forward computes.

The forwards are wrapped: options among a call's keyword arguments, or set once with
`set_loss_options`, a bias of the head, and labels that are shifted already are there for the loss
while the forward runs. transformers' Trainer hands its ``label_smoothing_factor`` over the same way.
"""

from dataclasses import replace
import functools
import inspect
import os

import torch

from .kernels.loss_calls import calls, count_call, require_parameters
from .loss_options import (
    CALL_ARGUMENTS,
    PLAIN,
    LossOptions,
    active_options,
    collect_options,
    model_taking_options,
    set_loss_options,
    using_options,
)

__all__ = ["LossOptions", "calls", "set_loss_options"]


# --- the losses ---------------------------------------------------------------------------------


def fused_loss_with_model_options(stock):
    """``unsloth_fused_ce_loss`` with the options of the forward that calls it."""

    @functools.wraps(stock)
    def unsloth_fused_ce_loss(
        trainer, hidden_states, lm_head_weight, lm_head_bias, labels, *args, **kwargs
    ):
        options = active_options()
        if options is not PLAIN:
            if lm_head_bias is None:
                lm_head_bias = options.bias
            if options.shifted_labels is not None:
                labels, kwargs["shift_labels"] = options.shifted_labels, False
            kwargs.update(options.changed(*CALL_ARGUMENTS, "logits_dtype", "chunk_rows"))
        return stock(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, *args, **kwargs)

    return unsloth_fused_ce_loss


def dense_loss_with_model_options(stock):
    """``fast_cross_entropy_loss`` with the options of the forward that calls it."""

    @functools.wraps(stock)
    def fast_cross_entropy_loss(logits, labels, *args, **kwargs):
        options = active_options()
        if options is not PLAIN:
            if options.shifted_labels is not None:
                labels = options.shifted_labels.to(labels.device)
            kwargs = {**options.changed(*CALL_ARGUMENTS), **kwargs}
        return stock(logits, labels, *args, **kwargs)

    return fast_cross_entropy_loss


# --- the forwards -------------------------------------------------------------------------------


def forward_factory_with_loss_options(stock):
    """The factory of Llama's, Qwen's, Gemma's … forward: what it makes takes loss options."""
    require_parameters(stock, ("fast_forward_inference",))

    @functools.wraps(stock)
    def CausalLM_fast_forward(fast_forward_inference):
        forward = stock(fast_forward_inference)
        return taking_options(forward, shifts_itself = _knows_shift_labels(forward))

    return CausalLM_fast_forward


def forward_with_loss_options(stock):
    """Mistral's forward, with loss options and shifted labels."""
    if "labels" not in inspect.signature(stock).parameters:
        raise NotImplementedError(f"{stock.__name__} takes no labels here")
    return taking_options(stock, shifts_itself = _knows_shift_labels(stock))


def _knows_shift_labels(forward) -> bool:
    # It asks its keyword arguments for them; a local variable of that name is no constant.
    return "shift_labels" in getattr(forward, "__code__", forward).co_consts


def taking_options(
    forward,
    shifts_itself: bool,
    computes_loss = lambda model: True,
):
    """``forward`` with loss options among its keyword arguments.

    shifts_itself: it knows ``shift_labels``; otherwise they reach the loss past it.
    computes_loss: whether a call on this model ends in one of our losses. Where it does not, a call
        with options gets its loss from the logits.
    """

    @functools.wraps(forward)
    def with_options(self, *args, **kwargs):
        options = collect_options(self, kwargs)
        shifted = kwargs.get("shift_labels")
        if isinstance(shifted, torch.Tensor):
            # The fused branch is taken where labels are given; it reads the shifted ones.
            if kwargs.get("labels") is None:
                kwargs["labels"] = shifted
            if not shifts_itself:
                options = replace(options, shifted_labels = kwargs.pop("shift_labels"))
        if options is PLAIN:
            return forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None and not computes_loss(self):
            return _with_dense_loss(forward, self, args, kwargs, options)
        with using_options(options):
            return forward(self, *args, **kwargs)

    with_options._takes_loss_options = True
    return with_options


def _with_dense_loss(forward, model, args, kwargs, options: LossOptions):
    """``forward``'s outputs with the loss that the options ask for, from their logits."""
    from .kernels.dense_cross_entropy import dense_cross_entropy

    labels, shifted = kwargs.pop("labels"), kwargs.pop("shift_labels", None)
    n_items = kwargs.pop("num_items_in_batch", None)
    kwargs["return_dict"] = True
    outputs = forward(model, *args, **kwargs)
    if shifted is None:
        shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value = -100)
    count_call("dense")
    loss = dense_cross_entropy(outputs.logits, shifted, n_items, **options.changed(*CALL_ARGUMENTS))
    return type(outputs)(**{**outputs, "loss": loss})


# --- the Trainer's label_smoothing_factor ---------------------------------------------------------


def label_smoothing_in_the_model(compute_loss):
    """``label_smoothing_factor`` reaches the model's loss, instead of asking for all logits."""
    if tuple(inspect.signature(compute_loss).parameters)[:3] != ("self", "model", "inputs"):
        raise NotImplementedError(
            f"{compute_loss.__name__} does not take (self, model, inputs) here"
        )

    @functools.wraps(compute_loss)
    def with_smoothing(self, model, inputs, *args, **kwargs):
        smoother = getattr(self, "label_smoother", None)
        if not _smooths_in_model(self, model, inputs, smoother):
            return compute_loss(self, model, inputs, *args, **kwargs)
        self.label_smoother = None
        try:
            inputs = {**inputs, "label_smoothing": float(smoother.epsilon)}
            return compute_loss(self, model, inputs, *args, **kwargs)
        finally:
            self.label_smoother = smoother

    with_smoothing._takes_loss_options = True
    return with_smoothing


def _smooths_in_model(trainer, model, inputs, smoother) -> bool:
    if smoother is None or type(smoother).__name__ != "LabelSmoother" or "labels" not in inputs:
        return False
    if getattr(trainer, "compute_loss_func", None) is not None or smoother.ignore_index != -100:
        return False
    if os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES", "0") == "1":
        return False
    return model_taking_options(model) is not None
