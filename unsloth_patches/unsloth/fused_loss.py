# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Unsloth's causal language model losses on ``kernels.linear_loss``.

Replaced are the fused loss that FastLanguageModel's forwards call on a GPU and the loss of dense
logits; ``fused_loss_cpu`` does the same on the CPU backend. The forwards are wrapped so that what
they drop reaches the loss: ``label_smoothing``, ``ignore_index``, ``class_weight`` and ``z_loss``
as model arguments or set once with `set_loss_options`, a bias of the head, and labels that are
shifted already.

What we do not serve goes to the stock function; `calls` counts both.
"""

from dataclasses import replace
from typing import Any, Dict, Optional
import functools
import inspect
import os
import warnings

import torch

from .loss_options import (
    PLAIN,
    LossOptions,
    active_options,
    calls,
    count_call,
    set_loss_options,
    smoothing_compute_loss,
    taking_options,
)

__all__ = ["LossOptions", "calls", "set_loss_options"]


# ------------------------------------------------------------------------------- GPU: fused loss

_FUSED_PARAMETERS = (
    "trainer",
    "hidden_states",
    "lm_head_weight",
    "lm_head_bias",
    "labels",
    "mask",
    "n_items",
    "scaling",
    "target_gb",
    "torch_compile",
    "overwrite",
    "shift_labels",
    "kwargs",
)
_FUSED_KEYWORDS = frozenset(
    (
        "logit_softcapping",
        "logit_scale_multiply",
        "logit_scale_divide",
        "ignore_index",
        "label_smoothing",
    )
)
# Whether this module is a part of Unsloth itself, rather than put in by import hooks.
_IN_UNSLOTH = __name__.partition(".")[0] == "unsloth"
# Settings of the stock loss's own chunking: who sets one gets the stock loss.
_STOCK_SETTINGS = ("UNSLOTH_CE_LOSS_TARGET_GB", "UNSLOTH_CE_LOSS_N_CHUNKS")


def require_parameters(function, expected) -> None:
    """Raises NotImplementedError where an upstream function has other parameters than we know."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(expected):
        raise NotImplementedError(
            f"{function.__name__} takes ({', '.join(found)}) here, not ({', '.join(expected)})"
        )


def of_zoo(replace_stock):
    """For replacements of functions of unsloth_zoo, whose release is chosen apart from Unsloth's.

    Import hooks skip the whole patch where one raises NotImplementedError. As a line of Unsloth's own
    source it must not break ``import unsloth``: there the stock function stays, with a warning, and
    loss options that it would drop in silence are refused.
    """

    @functools.wraps(replace_stock)
    def guarded(stock):
        try:
            return replace_stock(stock)
        except NotImplementedError as error:
            if not _IN_UNSLOTH:
                raise
            reason = f"this unsloth_zoo is not known: {error}"
            warnings.warn(f"Unsloth: its own loss stays in place of the fused one; {reason}.")
            return _stock_alone(stock, reason)

    return guarded


def _stock_alone(stock, reason: str):
    @functools.wraps(stock)
    def stock_function(*args, **kwargs):
        count_call(f"stock: {reason}")
        refuse_unhonoured(active_options(), reason)
        return stock(*args, **kwargs)

    return stock_function


@of_zoo
def replace_unsloth_fused_ce_loss(stock):
    """The fused loss of ``models/llama.py`` and ``models/mistral.py``; stock serves what we do not."""
    require_parameters(stock, _FUSED_PARAMETERS)

    @functools.wraps(stock)
    def unsloth_fused_ce_loss(
        trainer,
        hidden_states,
        lm_head_weight,
        lm_head_bias,
        labels,
        mask = None,
        n_items = None,
        scaling = None,
        target_gb = None,
        torch_compile = True,
        overwrite = False,
        shift_labels = True,
        **kwargs,
    ):
        options = active_options()
        reason = _unserved(hidden_states, lm_head_weight, mask, target_gb, overwrite, kwargs)
        if reason:
            count_call(f"stock: {reason}")
            refuse_unhonoured(options, reason)
            for name in ("label_smoothing", "ignore_index"):
                if getattr(options, name) != getattr(PLAIN, name):
                    kwargs[name] = getattr(options, name)
            bias = options.bias if lm_head_bias is None else lm_head_bias
            return stock(
                trainer,
                hidden_states,
                lm_head_weight,
                bias,
                labels,
                mask = mask,
                n_items = n_items,
                scaling = scaling,
                target_gb = target_gb,
                torch_compile = torch_compile,
                overwrite = overwrite,
                shift_labels = shift_labels,
                **kwargs,
            )
        count_call("fused")
        if options.shifted_labels is not None:
            labels, shift_labels = options.shifted_labels, False
        return head_loss(
            hidden_states,
            lm_head_weight,
            labels,
            options if lm_head_bias is None else replace(options, bias = lm_head_bias),
            n_items,
            shift_labels,
            kwargs,
        )

    return unsloth_fused_ce_loss


def _unserved(hidden, weight, mask, target_gb, overwrite, keywords) -> str:
    """Why the stock loss has to run; empty where ours does."""
    if torch.compiler.is_compiling():
        return "inside torch.compile"
    if mask is not None:
        return "mask"
    if target_gb is not None or any(os.environ.get(name) for name in _STOCK_SETTINGS):
        return "memory target of the stock loss"
    if overwrite:
        return "overwrite"
    unknown = [
        name
        for name, value in keywords.items()
        if name not in _FUSED_KEYWORDS and value is not None
    ]
    if unknown:
        return f"keyword {sorted(unknown)[0]}"
    if weight.device.type not in ("cuda", "cpu"):
        return f"device {weight.device.type}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 head"
    if weight.dim() != 2 or not weight.is_floating_point() or weight.element_size() < 2:
        return f"{weight.dtype} head"
    if not hidden.is_floating_point():
        return f"{hidden.dtype} hidden states"
    return ""


def refuse_unhonoured(options: LossOptions, reason: str) -> None:
    """The stock loss would drop these in silence."""
    for name in ("class_weight", "z_loss", "shifted_labels"):
        value = getattr(options, name)
        if value is not None and (isinstance(value, torch.Tensor) or value):
            raise NotImplementedError(
                f"{name} cannot be honoured here, as the stock loss has to run ({reason}); "
                f"leave {name} out or remove the cause."
            )


def head_loss(
    hidden,
    weight,
    labels,
    options: LossOptions,
    n_items,
    shift: bool,
    keywords: Dict[str, Any],
) -> torch.Tensor:
    """Loss of a head's weight and its inputs, with the options and the stock loss's keywords.

    hidden: [..., width]; labels: integers of hidden's leading shape; see `linear_cross_entropy`.
    """
    from .kernels.linear_cross_entropy import linear_cross_entropy

    device = weight.device
    hidden = hidden.to(device)
    labels = labels.to(device)
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(device.type):
        hidden = hidden.to(weight.dtype)
    ignore_index = options.ignore_index
    if keywords.get("ignore_index") is not None and ignore_index == -100:
        ignore_index = int(keywords["ignore_index"])
    if ignore_index != -100:
        # Collators and packing mark with -100 whatever the model's ignore_index is.
        labels = labels.masked_fill(labels == -100, ignore_index)
    class_weight = options.class_weight
    return linear_cross_entropy(
        hidden,
        weight,
        labels,
        None if options.bias is None else options.bias.to(device),
        class_weight = None if class_weight is None else class_weight.to(device),
        ignore_index = ignore_index,
        label_smoothing = options.label_smoothing or float(keywords.get("label_smoothing") or 0.0),
        n_items = n_items,
        logit_scale = (keywords.get("logit_scale_multiply") or 1.0)
        / (keywords.get("logit_scale_divide") or 1.0),
        softcap = keywords.get("logit_softcapping") or 0.0,
        z_loss = options.z_loss,
        shift = shift,
        nan_if_empty = False,
        chunk_rows = options.chunk_rows,
        logits_dtype = _logits_dtype(options, hidden),
        head_grad_dtype = _head_grad_dtype(weight),
    )


def _logits_dtype(options: LossOptions, hidden) -> Optional[torch.dtype]:
    """``UNSLOTH_LOSS_FLOAT32_LOGITS=1`` turns the precise mode on for every model."""
    precise = os.environ.get("UNSLOTH_LOSS_FLOAT32_LOGITS", "0") == "1"
    wanted = torch.float32 if precise else options.logits_dtype
    return None if hidden.dtype == torch.float64 else wanted


def _head_grad_dtype(weight) -> Optional[torch.dtype]:
    # Upstream's setting for a trained head; ours honours it too.
    wide = os.environ.get("UNSLOTH_CE_FP32_HEAD_GRAD", "0") == "1"
    return torch.float32 if wide and weight.dtype != torch.float64 else None


def replace_CausalLM_fast_forward(stock):
    """The factory of Llama's, Qwen's, Gemma's … forward: what it makes takes loss options."""
    require_parameters(stock, ("fast_forward_inference",))

    @functools.wraps(stock)
    def CausalLM_fast_forward(fast_forward_inference):
        forward = stock(fast_forward_inference)
        return taking_options(forward, shifts_itself = _knows_shift_labels(forward))

    return CausalLM_fast_forward


def replace_MistralForCausalLM_fast_forward(stock):
    """Mistral's forward, with loss options and shifted labels."""
    if "labels" not in inspect.signature(stock).parameters:
        raise NotImplementedError("MistralForCausalLM_fast_forward takes no labels here")
    return taking_options(stock, shifts_itself = _knows_shift_labels(stock))


def _knows_shift_labels(forward) -> bool:
    # It asks its keyword arguments for them; a local variable of that name is no constant.
    return "shift_labels" in getattr(forward, "__code__", forward).co_consts


# ------------------------------------------------------------------------------- dense logits

_DENSE_PARAMETERS = ("logits", "labels", "logit_softcapping", "logit_scaling", "n_items")


def replace_fast_cross_entropy_loss(stock):
    """Cross entropy of dense logits with label_smoothing, class_weight, ignore_index and z_loss.

    Without any of them, given here or to the model, the stock kernel runs.
    """
    require_parameters(stock, _DENSE_PARAMETERS)

    @functools.wraps(stock)
    def fast_cross_entropy_loss(
        logits,
        labels,
        logit_softcapping = 0,
        logit_scaling = 0,
        n_items = None,
        *,
        label_smoothing = 0.0,
        class_weight = None,
        ignore_index = -100,
        z_loss = 0.0,
    ):
        asked = (class_weight, label_smoothing, z_loss, ignore_index)
        options = active_options()
        if asked != (None, 0.0, 0.0, -100):
            given = zip(("class_weight", "label_smoothing", "z_loss", "ignore_index"), asked)
            options = replace(options, **dict(given))
        if options.shifted_labels is not None:
            labels = options.shifted_labels.to(labels.device)
        if (
            replace(options, bias = None, shifted_labels = None, chunk_rows = None, logits_dtype = None)
            == PLAIN
        ):
            return stock(logits, labels, logit_softcapping, logit_scaling, n_items)
        count_call("dense")
        return dense_loss(logits, labels, logit_softcapping, logit_scaling, n_items, options)

    return fast_cross_entropy_loss


def dense_loss(logits, labels, softcap, scale, n_items, options: LossOptions) -> torch.Tensor:
    from .kernels.cross_entropy_rows import RowLoss
    from .kernels.dense_cross_entropy import dense_cross_entropy

    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {options.label_smoothing}.")
    weight = options.class_weight
    if weight is not None:
        weight = weight.to(device = logits.device, dtype = torch.float32).contiguous()
    labels = labels.to(logits.device)
    if options.ignore_index != -100:
        labels = labels.masked_fill(labels == -100, options.ignore_index)
    spec = RowLoss(
        weight,
        options.ignore_index,
        float(options.label_smoothing),
        float(scale) or 1.0,
        float(softcap),
        float(options.z_loss),
    )
    return dense_cross_entropy(logits, labels, spec, n_items)


# ------------------------------------------------------------------------------- Trainer


def replace_unsloth_pre_compute_loss(stock):
    """``label_smoothing_factor`` reaches the fused loss, instead of asking for all logits."""
    if tuple(inspect.signature(stock).parameters)[:3] != ("self", "model", "inputs"):
        raise NotImplementedError(
            "_unsloth_pre_compute_loss does not take (self, model, inputs) here"
        )
    return smoothing_compute_loss(stock)
