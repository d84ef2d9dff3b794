# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Loss options of a model reach the loss that its forward computes.

The forwards are wrapped: options among a call's keyword arguments, or set once with
`set_loss_options`, a bias of the head, and labels that are shifted already are there for the loss
while the forward runs. transformers' Trainer hands its ``label_smoothing_factor`` over the same way.
"""

import functools
import inspect
import os
import sys
import types
from dataclasses import replace
from typing import Any, Callable

import torch

from .loss_calls import calls, count_call, require_parameters
from .loss_columns import warn_of_dropped_weights
from .loss_in_trainers import (
    check_smoothing_factor,
    check_what_trainers_are_given,
    install_in_trainers,
)
from .loss_options import (
    PLAIN,
    LossOptions,
    active_options,
    causal_model,
    checked_options,
    collect_options,
    model_taking_options,
    using_options,
)

__all__ = ["LossOptions", "calls", "set_loss_options"]


def set_loss_options(
    model: Any,
    reset: bool = False,
    **options: Any,
) -> LossOptions:
    """Options for every loss of a model, through SFTTrainer, in its evaluation, or called directly.

    ``set_loss_options(model, class_weight = w, label_smoothing = 0.1, z_loss = 1e-4)``; fields of
    `LossOptions`, checked here. Arguments of a model call win. Called again with options, it replaces
    all of them; without any it changes nothing; ``reset = True`` removes them. Returns what is in force.

    Models of FastLanguageModel compute the loss without holding the logits; any other causal language
    model with an output head computes it from its logits. Raises TypeError for an unknown option,
    ValueError for a value that does not fit or a model without such a head.
    """
    inner = model_taking_options(model) or causal_model(model)
    head = None if inner is None else inner.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        raise ValueError(
            f"set_loss_options: {type(model).__name__} is no causal language model with an output "
            "head (get_output_embeddings() with a weight), so it has no cross entropy of logits."
        )
    vocab_size = getattr(head, "out_features", None) or head.weight.shape[0]
    if options:
        checked = checked_options("set_loss_options", vocab_size, options)
        if model_taking_options(inner) is None:
            take_options_from_logits(inner)
        install_in_trainers(checked.loss_columns)
        before = getattr(inner, "_unsloth_loss_options", None) or PLAIN
        inner._unsloth_loss_options = replace(checked, observe = before.observe)
    elif reset:
        inner._unsloth_loss_options = None
    return getattr(inner, "_unsloth_loss_options", None) or PLAIN


# --- the losses ---------------------------------------------------------------------------------


def fused_loss_with_model_options(stock):
    """``unsloth_fused_ce_loss`` with the options of the forward that calls it."""
    if getattr(stock, "_takes_model_options", False):
        return stock

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
            kwargs.update(options.changed("bias", "shifted_labels"))
        return stock(trainer, hidden_states, lm_head_weight, lm_head_bias, labels, *args, **kwargs)

    unsloth_fused_ce_loss._takes_model_options = True
    return unsloth_fused_ce_loss


def dense_loss_with_model_options(stock):
    """``fast_cross_entropy_loss`` with the options of the forward that calls it."""

    @functools.wraps(stock)
    def fast_cross_entropy_loss(logits, labels, *args, **kwargs):
        options = active_options()
        if options is not PLAIN:
            if options.shifted_labels is not None:
                labels = options.shifted_labels.to(labels.device)
            else:
                options = _with_shifted_columns(options)
            if options.loss_fn is not None or options.observe is not None:
                return _loss_of_logits(logits, labels, *args, options = options, **kwargs)
            kwargs = {**options.changed(*_OF_THE_HEAD), **kwargs}
        return stock(logits, labels, *args, **kwargs)

    return fast_cross_entropy_loss


# Options that say nothing about logits that are there already.
_OF_THE_HEAD = (
    "bias",
    "shifted_labels",
    "chunk_rows",
    "logits_dtype",
    "loss_fn",
    "loss_columns",
    "observe",
)


def _loss_of_logits(
    logits,
    labels,
    logit_softcapping = 0,
    logit_scaling = 0,
    n_items = None,
    *,
    options: LossOptions,
):
    """The loss that the options ask for, of logits that are there anyway and labels in their places."""
    if options.observe is not None:
        _observe(logits, labels, logit_softcapping, logit_scaling, options)
    if options.loss_fn is None:
        from .kernels.dense_cross_entropy import dense_cross_entropy

        settings = options.changed(*_OF_THE_HEAD)
        settings.update(logit_scale = logit_scaling or 1.0, softcap = logit_softcapping or 0.0)
        return dense_cross_entropy(logits, labels, n_items, **settings)
    from .cross_entropy_spec import RowLoss
    from .fused_cross_entropy import custom_loss

    if options.ignore_index != -100:
        labels = labels.masked_fill(labels == -100, options.ignore_index)

    def apply_to_rows(function, *arguments, keep):
        found = function(logits[keep].float(), *(argument[keep] for argument in arguments))
        return (
            found if found.dim() == 0 else found.new_zeros(keep.shape).masked_scatter(keep, found)
        )

    transform = RowLoss(logit_scale = logit_scaling or 1.0, softcap = logit_softcapping or 0.0)
    rows = (labels, *(column.to(labels.device) for column in options.loss_columns))
    settings = options.changed(*_OF_THE_HEAD, "ignore_index")
    return custom_loss(
        options.loss_fn, apply_to_rows, rows, options.ignore_index, n_items, transform, **settings
    )


def _observe(logits, labels, softcap, scale, options: LossOptions) -> None:
    from .cross_entropy_spec import RowLoss, padded_columns

    keep = (labels != -100) & (labels != options.ignore_index)
    rows, vocab_size = logits.detach()[keep], logits.shape[-1]
    rows = torch.nn.functional.pad(rows, (0, padded_columns(vocab_size) - vocab_size))
    transform = RowLoss(logit_scale = scale or 1.0, softcap = softcap or 0.0)
    training = torch.is_grad_enabled()
    options.observe(rows[:, :vocab_size], labels[keep].long(), transform, None, training)


def _with_shifted_columns(options: LossOptions) -> LossOptions:
    """The columns of the batch at the positions that its labels are scored at."""
    weights = options.loss_weights
    if weights is None and not options.loss_columns:
        return options
    columns = tuple(column.roll(-1, 1) for column in options.loss_columns)
    weights = None if weights is None else weights.roll(-1, 1)
    return replace(options, loss_columns = columns, loss_weights = weights)


# --- the forwards -------------------------------------------------------------------------------


def forward_factory_with_loss_options(stock):
    """The factory of Llama's, Qwen's, Gemma's … forward: what it makes takes loss options."""
    require_parameters(stock, ("fast_forward_inference",))

    @functools.wraps(stock)
    def CausalLM_fast_forward(fast_forward_inference):
        forward = stock(fast_forward_inference)
        shifts_itself = _knows_shift_labels(forward)
        in_force = still_there(stock, "unsloth.models.llama")
        check_what_trainers_are_given()
        return taking_options(forward, shifts_itself, in_force = in_force)

    CausalLM_fast_forward._takes_loss_options = True
    return CausalLM_fast_forward


def forward_with_loss_options(stock):
    """Mistral's forward, with loss options and shifted labels."""
    if "labels" not in inspect.signature(stock).parameters:
        raise NotImplementedError(f"{stock.__name__} takes no labels here")
    in_force = still_there(stock, "unsloth.models.mistral")
    return taking_options(stock, _knows_shift_labels(stock), in_force = in_force)


def still_there(stock, module: str) -> Callable[[], bool]:
    """Whether ``stock``'s name in ``module``, which may only import it, still stands for what takes loss
    options in its place."""
    name = stock.__name__

    def is_there():
        return getattr(getattr(sys.modules[module], name, None), "_takes_loss_options", False)

    return is_there


def _knows_shift_labels(forward) -> bool:
    # It asks its keyword arguments for them; a local variable of that name is no constant.
    return "shift_labels" in getattr(forward, "__code__", forward).co_consts


def taking_options(
    forward,
    shifts_itself: bool,
    computes_loss = lambda model: True,
    in_force = lambda: True,
):
    """``forward`` with loss options among its keyword arguments.

    shifts_itself: it knows ``shift_labels``; otherwise they reach the loss past it.
    computes_loss: whether a call on this model ends in one of our losses. Where it does not, a call
        with options gets its loss from the logits; None: the first such call finds out.
    in_force: False while whoever put the loss in has taken it out again, to compare: the call is stock.
    """

    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(forward)
    def with_options(self, *args, **kwargs):
        if not in_force():
            return forward(self, *args, **kwargs)
        named = dict(zip(names, args))
        if "labels" in named and len(named) == len(args) and not named.keys() & kwargs.keys():
            args, kwargs = (), {**named, **kwargs}
        options = collect_options(self, kwargs)
        shifted = kwargs.get("shift_labels")
        if isinstance(shifted, torch.Tensor):
            # The fused branch is taken where labels are given; it reads the shifted ones.
            if kwargs.get("labels") is None:
                kwargs["labels"] = shifted
            if options is not PLAIN or not shifts_itself:
                options = replace(options, shifted_labels = shifted)
            if not shifts_itself:
                del kwargs["shift_labels"]
        if options is PLAIN:
            return forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None:
            served = computes_loss(self)
            if not served:
                with_loss = _with_dense_loss if served is False else _with_whichever_loss
                return with_loss(forward, self, args, kwargs, options)
        with using_options(options):
            return forward(self, *args, **kwargs)

    with_options._takes_loss_options = True
    return with_options


def _with_whichever_loss(forward, model, args, kwargs, options: LossOptions):
    """``forward``'s outputs where its loss turns out to be ours; else as `_with_dense_loss`, from then on."""
    as_logits = os.environ.get("UNSLOTH_RETURN_LOGITS", "0") == "1"
    if not as_logits and not vars(model).get("_unsloth_loss_of_logits", False):
        before = calls().get("fused", 0)
        with using_options(options):
            outputs = forward(model, *args, **kwargs)
        if calls().get("fused", 0) > before:
            return outputs
        model._unsloth_loss_of_logits = True
    return _with_dense_loss(forward, model, args, kwargs, options)


def _with_dense_loss(forward, model, args, kwargs, options: LossOptions):
    """``forward``'s outputs with the loss that the options ask for, from their logits."""
    labels, shifted = kwargs.pop("labels"), kwargs.pop("shift_labels", None)
    n_items = kwargs.pop("num_items_in_batch", None)
    wants_dict = kwargs.pop("return_dict", None)
    outputs = forward(model, *args, **kwargs, return_dict = True)
    if outputs.logits is None or outputs.logits.dim() != 3:
        raise NotImplementedError(
            f"{type(model).__name__} returns no logits here, so its loss options cannot be honoured; "
            "set UNSLOTH_RETURN_LOGITS=1, or remove them with set_loss_options(model, reset = True)."
        )
    if shifted is None:
        shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value = -100)
        options = _with_shifted_columns(options)
    count_call("dense")
    loss = _loss_of_logits(
        outputs.logits, shifted.to(outputs.logits.device), 0, 0, n_items, options = options
    )
    balance = getattr(outputs, "aux_loss", None)
    if isinstance(balance, torch.Tensor):  # of a mixture of experts' router
        loss = loss + getattr(model, "router_aux_loss_coef", 0.0) * balance.to(loss.device)
    outputs = type(outputs)(**{**outputs, "loss": loss})
    return outputs.to_tuple() if wants_dict is False else outputs


def take_options_from_logits(
    model: Any,
    in_force = lambda: True,
    computes_loss = lambda model: False,
) -> None:
    """``model`` computes its loss from its logits wherever it has loss options; see `taking_options`."""
    bound = model.forward
    if getattr(bound, "__self__", None) is model:
        forward = bound.__func__  # as deepcopy rebinds the method to the copy
    else:

        @functools.wraps(type(model).forward)
        def forward(self, *args, **kwargs):
            return bound(*args, **kwargs)

    taking = taking_options(forward, True, computes_loss, in_force)
    model.forward = types.MethodType(taking, model)
    model._takes_loss_options = True


# --- the Trainer's label_smoothing_factor ---------------------------------------------------------


def label_smoothing_in_the_model(compute_loss, in_force = lambda: True):
    """``label_smoothing_factor`` reaches the model's loss, instead of asking for all logits."""
    if tuple(inspect.signature(compute_loss).parameters)[:3] != ("self", "model", "inputs"):
        raise NotImplementedError(
            f"{compute_loss.__name__} does not take (self, model, inputs) here"
        )

    @functools.wraps(compute_loss)
    def with_smoothing(self, model, inputs, *args, **kwargs):
        if not in_force():
            return compute_loss(self, model, inputs, *args, **kwargs)
        warn_of_dropped_weights(self, inputs)
        smoother = getattr(self, "label_smoother", None)
        if not _smooths_in_model(self, model, inputs, smoother):
            return compute_loss(self, model, inputs, *args, **kwargs)
        try:
            self.label_smoother = None
            inputs = {**inputs, "label_smoothing": check_smoothing_factor(smoother.epsilon)}
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
