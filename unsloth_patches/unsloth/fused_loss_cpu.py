# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The CPU backend's causal language model loss on ``kernels.linear_cross_entropy``, with options."""

import functools
import os
import types
from typing import Any, Callable, Optional

import torch

from .fused_cross_entropy import head_loss, unless_zoo_is_unknown, without_our_keywords
from .fused_loss import (
    label_smoothing_in_the_model,
    still_there,
    take_options_from_logits,
    taking_options,
)
from .loss_calls import count_call, require_parameters
from .loss_in_trainers import check_what_trainers_are_given
from .loss_options import active_options, causal_model

_PARAMETERS = (
    "hidden",
    "weight",
    "labels",
    "num_items_in_batch",
    "ignore_index",
    "shift_labels",
    "chunk_rows",
)


def cpu_loss_on_linear_cross_entropy(stock):
    """The CPU backend's loss on ours, with the options of the forward that calls it."""
    loss = _on_linear_cross_entropy(stock)

    @functools.wraps(stock)
    def chunked_linear_cross_entropy(*args, **kwargs):
        options = active_options().changed("shifted_labels")
        return loss(*args, **{**kwargs, **options})

    chunked_linear_cross_entropy._takes_loss_options = True
    return chunked_linear_cross_entropy


@unless_zoo_is_unknown
def _on_linear_cross_entropy(stock):
    require_parameters(stock, _PARAMETERS)

    @functools.wraps(stock)
    def chunked_linear_cross_entropy(
        hidden,
        weight,
        labels,
        num_items_in_batch = None,
        ignore_index = -100,
        shift_labels = None,
        chunk_rows = None,
        bias = None,
        **options,
    ):
        try:
            from .kernels import linear_cross_entropy  # noqa: F401  (needs Triton's package)
        except ImportError as error:
            count_call(f"stock: {error}")
            without_our_keywords(options, str(error))
            return stock(
                hidden, weight, labels, num_items_in_batch, ignore_index, shift_labels, chunk_rows
            )
        count_call("cpu")
        shifted = shift_labels is not None
        return head_loss(
            hidden,
            weight,
            shift_labels if shifted else labels,
            bias,
            num_items_in_batch,
            shift = not shifted,
            ignore_index = ignore_index,
            chunk_rows = chunk_rows,
            **options,
        )

    return chunked_linear_cross_entropy


@unless_zoo_is_unknown
def cpu_forward_with_loss_options(stock):
    """The CPU backend's per-model hook: the forward that it installs takes loss options.

    Models whose logits are scaled or capped, which it leaves to transformers, get a forward, too.
    """
    require_parameters(stock, ("model",))
    in_force = still_there(stock, "unsloth_zoo.cpu.loader")

    @functools.wraps(stock)
    def patch_chunked_causal_lm_loss(model):
        installed = stock(model) or _install_for_scaled_logits(model, in_force)
        forward = vars(model).get("forward")
        if installed and forward is not None and not getattr(forward, "_takes_loss_options", False):
            plain = forward.__func__
            taking = taking_options(plain, True, _in_cpu_step, in_force)
            model.forward = type(forward)(taking, model)
            model._takes_loss_options = True
            smooth_in_the_model(in_force)
        elif not installed and causal_model(model) is model:
            # Routers, other heads: the options' loss comes from the logits.
            take_options_from_logits(model, in_force)
            smooth_in_the_model(in_force)
        return installed

    patch_chunked_causal_lm_loss._takes_loss_options = True
    return patch_chunked_causal_lm_loss


def _in_cpu_step(model: Any) -> bool:
    """The CPU backend computes its loss in chunks within SFTTrainer's own training step alone."""
    if not vars(model).get("_unsloth_cpu_chunked_ce_active", False) or not torch.is_grad_enabled():
        return False
    return _head_weight(model) is not None


def _head_weight(model: Any) -> Optional[torch.Tensor]:
    """What alone makes the model's logits; None where there is more, as LoRA on the head."""
    from unsloth_zoo.cpu import ops

    head = model.get_output_embeddings()
    plain_weight = getattr(ops, "_plain_head_weight", lambda head: getattr(head, "weight", None))
    return plain_weight(head)


# Models whose logits are the head's product, scaled and capped as their configuration says.
_SCALED_MODELS = ("gemma2", "gemma3_text", "granite", "cohere", "cohere2")
_SCALES = {
    "final_logit_softcapping": "logit_softcapping",
    "logit_scale": "logit_scale_multiply",
    "logits_scaling": "logit_scale_divide",
}


def _install_for_scaled_logits(model: Any, in_force: Callable[[], bool]) -> bool:
    """Gives a model of `_SCALED_MODELS` a forward that computes SFTTrainer's loss in chunks."""
    if vars(model).get("_unsloth_cpu_chunked_ce", False):
        return True
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _SCALED_MODELS or os.environ.get("UNSLOTH_CPU_CHUNKED_CE", "1") == "0":
        return False
    if causal_model(model) is not model or _head_weight(model) is None or "forward" in vars(model):
        return False
    try:
        from .kernels import linear_cross_entropy  # noqa: F401  (needs Triton's package)
    except ImportError:
        return False
    forward = _forward_of_scaled_logits(type(model).forward, in_force)
    model.forward = types.MethodType(forward, model)
    model._unsloth_cpu_chunked_ce = True  # the CPU backend's SFTTrainer asks for it
    return True


def _forward_of_scaled_logits(plain, in_force: Callable[[], bool]):
    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if (labels is None and shifted is None) or not in_force() or not _in_cpu_step(self):
            return plain(self, *args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        n_items = kwargs.pop("num_items_in_batch", None)
        for name in ("labels", "shift_labels", "logits_to_keep"):
            kwargs.pop(name, None)
        # Not by base_model_prefix, which transformers 4.57 states wrongly for Gemma 3.
        outputs = self.model(*args, **{**kwargs, "return_dict": True})
        scales = {word: getattr(self.config, name, None) for name, word in _SCALES.items()}
        count_call("cpu")
        loss = head_loss(
            outputs.last_hidden_state,
            _head_weight(self),
            labels if shifted is None else shifted,
            n_items = n_items,
            shift = shifted is None,
            **scales,
            **active_options().changed("shifted_labels"),
        )
        kept = {
            name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")
        }
        return CausalLMOutputWithPast(loss = loss, **kept)

    return forward


def smooth_in_the_model(in_force = lambda: True) -> None:
    """transformers' Trainer hands ``label_smoothing_factor`` to models that take loss options.

    The CPU backend calls ``Trainer.compute_loss`` as it is. On a GPU Unsloth has its own in its place,
    and that one is wrapped instead.
    """
    from transformers import Trainer

    check_what_trainers_are_given()
    if not getattr(Trainer.compute_loss, "_takes_loss_options", False):
        Trainer.compute_loss = label_smoothing_in_the_model(Trainer.compute_loss, in_force)
