# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The fused loss of Unsloth's forwards on ``kernels.linear_cross_entropy``.

What that does not serve goes to the stock function; `calls` counts both.
"""

import functools
import os
import warnings
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from .cross_entropy_spec import RowLoss
from .loss_calls import count_call, refuse_lookalikes, require_parameters

__all__ = ["head_loss", "on_linear_cross_entropy", "unless_zoo_is_unknown"]

_PARAMETERS = (
    "trainer hidden_states lm_head_weight lm_head_bias labels mask n_items scaling target_gb "
    "torch_compile overwrite shift_labels kwargs"
).split()
# Keywords of the stock loss, and those that only ours has.
_STOCK_KEYWORDS = (
    "logit_softcapping",
    "logit_scale_multiply",
    "logit_scale_divide",
    "ignore_index",
    "label_smoothing",
    "logits_bias",
)
_REFUSED_BY_STOCK = ("class_weight", "z_loss", "loss_weights", "loss_fn")
_OUR_KEYWORDS = _REFUSED_BY_STOCK + (
    "reduction",
    "class_weight_mean",
    "weight_items",
    "loss_columns",
    "observe",
    "chunk_rows",
    "logits_dtype",
)
# What a forward hands on to its loss with all the rest (transformers' TransformersKwargs, and Unsloth's
# lengths of packed rows), and no loss reads.
_OF_THE_FORWARD = (
    "num_items_in_batch output_hidden_states output_attentions output_router_logits cu_seq_lens_q "
    "cu_seq_lens_k max_length_q max_length_k position_ids is_causal seq_idx use_cache packed_seq_lengths"
).split()
# Settings of the stock loss's own chunking: who sets one gets the stock loss.
_STOCK_SETTINGS = ("UNSLOTH_CE_LOSS_TARGET_GB", "UNSLOTH_CE_LOSS_N_CHUNKS")


def unless_zoo_is_unknown(decorator):
    """For decorators of functions of unsloth_zoo, whose release is chosen apart from Unsloth's.

    Where one raises NotImplementedError, ``import unsloth`` must not break: the stock function stays,
    with a warning, and loss options that it would drop in silence are refused.
    """

    @functools.wraps(decorator)
    def guarded(stock):
        try:
            return decorator(stock)
        except NotImplementedError as error:
            reason = f"this unsloth_zoo is not known: {error}"
            warnings.warn(f"Unsloth: its own loss stays in place of the fused one; {reason}.")
            return _stock_alone(stock, reason)

    return guarded


def _stock_alone(stock, reason: str):
    @functools.wraps(stock)
    def stock_function(*args, **kwargs):
        count_call(f"stock: {reason}")
        return stock(*args, **without_our_keywords(kwargs, reason))

    return stock_function


@unless_zoo_is_unknown
def on_linear_cross_entropy(stock):
    """The fused loss of ``models/llama.py`` and ``models/mistral.py``; stock serves what we do not.

    It takes the options of `head_loss` besides the stock loss's keywords. A loss that is ours already,
    as a name of unsloth_zoo is that was imported after its own replacement, stays as it is.
    """
    if getattr(stock, "_on_linear_cross_entropy", False):
        return stock
    require_parameters(stock, _PARAMETERS)

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
        kwargs = {name: kwargs[name] for name in kwargs if name not in _OF_THE_FORWARD}
        refuse_lookalikes("unsloth_fused_ce_loss", kwargs, _STOCK_KEYWORDS + _OUR_KEYWORDS)
        reason = _unserved(
            hidden_states, lm_head_weight, labels, mask, target_gb, overwrite, kwargs
        )
        if reason:
            count_call(f"stock: {reason}")
            return stock(
                trainer,
                hidden_states,
                lm_head_weight,
                lm_head_bias,
                labels,
                mask = mask,
                n_items = n_items,
                scaling = scaling,
                target_gb = target_gb,
                torch_compile = torch_compile,
                overwrite = overwrite,
                shift_labels = shift_labels,
                **without_our_keywords(kwargs, reason),
            )
        count_call("fused")
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if mask is not None:  # shifted with the labels: position t's tells whether label t counts
            ignored = kwargs.get("ignore_index", -100)
            labels = labels.masked_fill(mask.to(labels.device) == 0, ignored)
        return head_loss(
            hidden_states, lm_head_weight, labels, lm_head_bias, n_items, shift_labels, **kwargs
        )

    unsloth_fused_ce_loss._on_linear_cross_entropy = True
    return unsloth_fused_ce_loss


def _unserved(hidden, weight, labels, mask, target_gb, overwrite, keywords) -> str:
    """Why the stock loss has to run; empty where ours does."""
    if torch.compiler.is_compiling():
        return "inside torch.compile"
    if mask is not None and mask.shape != labels.shape:
        return "a mask that is not shaped as the labels"
    if target_gb is not None or any(os.environ.get(name) for name in _STOCK_SETTINGS):
        return "memory target of the stock loss"
    if overwrite:
        return "overwrite"
    for name in sorted(keywords):
        if name not in _STOCK_KEYWORDS + _OUR_KEYWORDS and keywords[name] is not None:
            return f"keyword {name}"
    if weight.device.type not in ("cuda", "cpu"):
        return f"device {weight.device.type}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 head"
    if weight.dim() != 2 or not weight.is_floating_point() or weight.element_size() < 2:
        return f"{weight.dtype} head"
    if not hidden.is_floating_point():
        return f"{hidden.dtype} hidden states"
    return ""


def without_our_keywords(keywords: Dict[str, Any], reason: str) -> Dict[str, Any]:
    """``keywords`` for the stock loss; NotImplementedError for one that it would drop in silence."""
    asked = [name for name in _REFUSED_BY_STOCK if keywords.get(name) is not None]
    asked = [name for name in asked if name != "z_loss" or keywords[name]]
    if keywords.get("reduction") not in (None, "mean"):
        asked.append("reduction")
    for name in asked:
        raise NotImplementedError(
            f"{name} cannot be honoured here, as the stock loss has to run ({reason}); "
            f"leave {name} out or remove the cause."
        )
    return {name: value for name, value in keywords.items() if name not in _OUR_KEYWORDS}


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    n_items = None,
    shift: bool = True,
    *,
    class_weight: Optional[torch.Tensor] = None,
    ignore_index: int = -100,
    logit_softcapping = 0,
    logit_scale_multiply = 0,
    logit_scale_divide = 0,
    logits_bias: Optional[torch.Tensor] = None,
    logits_dtype: Optional[torch.dtype] = None,
    loss_weights: Optional[torch.Tensor] = None,
    loss_fn: Optional[Callable] = None,
    loss_columns: Tuple[torch.Tensor, ...] = (),
    **options,
) -> torch.Tensor:
    """Loss of a model's head and its inputs as training wants it; options of `linear_cross_entropy`.

    hidden: [..., width]; labels: integers of hidden's leading shape. -100 is ignored whatever
    ``ignore_index`` is, a batch without labels has loss 0, and Unsloth's variables are read.
    loss_fn: takes the place of cross entropy; see `custom_loss`. loss_weights: labels' shape; the
    loss_columns: labels' shape and more. logits_bias: [vocab], added to bias. Raises as
    `linear_cross_entropy` does. Returns float32 (float64 for float64 inputs).
    """
    from .kernels.linear_cross_entropy import linear_cross_entropy

    device = weight.device
    hidden, labels = hidden.to(device), labels.to(device)
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(device.type):
        hidden = hidden.to(weight.dtype)
    if ignore_index != -100:
        # Collators and packing mark with -100 whatever the model's ignore_index is.
        labels = labels.masked_fill(labels == -100, ignore_index)
    if os.environ.get("UNSLOTH_LOSS_FLOAT32_LOGITS", "0") == "1":
        logits_dtype = torch.float32
    if loss_weights is not None:
        loss_weights = loss_weights.to(device)
    scale = (logit_scale_multiply or 1.0) / (logit_scale_divide or 1.0)
    softcap = logit_softcapping or 0.0
    bias = None if bias is None else bias.to(device)
    if logits_bias is not None:  # Bart's, without a gradient
        logits_bias = logits_bias.detach().reshape(-1).to(device)
        bias = logits_bias if bias is None else bias + logits_bias
    if loss_fn is not None:
        from .kernels.linear_custom_loss import linear_loss

        rows = (labels, *(column.to(device) for column in loss_columns))
        if shift:
            rows = tuple(row.roll(-1, labels.dim() - 1) for row in rows)
            rows[0][..., -1] = ignore_index
            if loss_weights is not None:
                loss_weights = loss_weights.roll(-1, labels.dim() - 1)
        chunk_rows = options.pop("chunk_rows", None)
        observe = options.pop("observe", None)
        if observe is not None:
            _observe(observe, hidden, weight, rows[0], bias, ignore_index, scale, softcap)
        apply_to_rows = functools.partial(
            linear_loss, hidden, weight, bias = bias, chunk_rows = chunk_rows
        )
        transform = RowLoss(logit_scale = scale, softcap = softcap)
        return custom_loss(
            loss_fn,
            apply_to_rows,
            rows,
            ignore_index,
            n_items,
            transform,
            loss_weights = loss_weights,
            **options,
        )
    wide_head = os.environ.get("UNSLOTH_CE_FP32_HEAD_GRAD", "0") == "1"
    return linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        class_weight = None if class_weight is None else class_weight.to(device),
        ignore_index = ignore_index,
        n_items = n_items,
        loss_weights = loss_weights,
        logit_scale = scale,
        softcap = softcap,
        shift = shift,
        nan_if_empty = False,
        logits_dtype = None if hidden.dtype == torch.float64 else logits_dtype,
        head_grad_dtype = torch.float32 if wide_head and weight.dtype != torch.float64 else None,
        **options,
    )


def _observe(observe: Callable, hidden, weight, labels, bias, ignore_index, scale, softcap) -> None:
    """Shows the logits, which a loss of one's own has in its own way: their products once more."""
    from .kernels.linear_cross_entropy import linear_cross_entropy

    training = torch.is_grad_enabled()
    with torch.no_grad():
        linear_cross_entropy(
            hidden.detach(),
            weight.detach(),
            labels,
            None if bias is None else bias.detach(),
            ignore_index = ignore_index,
            logit_scale = scale,
            softcap = softcap,
            nan_if_empty = False,
            observe = lambda *seen: observe(*seen[:-1], training),
        )


def custom_loss(
    loss_fn: Callable,
    apply_to_rows: Callable,
    rows: Tuple[torch.Tensor, ...],
    ignore_index: int,
    n_items,
    transform: RowLoss,
    *,
    loss_weights: Optional[torch.Tensor] = None,
    reduction: str = "mean",
    class_weight_mean: str = "weights",
    weight_items = None,
) -> torch.Tensor:
    """``loss_fn(logits, labels, *columns)`` of the rows that have a label, reduced like cross entropy.

    apply_to_rows: ``apply_to_rows(function, *row arguments, keep)`` applies a function to the logits of the rows
    to keep. rows: labels and columns, shifted already. loss_fn gets float32 logits, scaled and
    soft-capped as the model's are, and returns each row's loss. loss_weights: labels' shape, or None.
    Raises ValueError where it returns another shape. Returns a scalar; with ``reduction = "none"``,
    labels' shape.
    """
    from .kernels.cross_entropy_torch import transform_logits

    labels, *columns = rows
    keep = labels != ignore_index
    if loss_weights is None:
        loss_weights = torch.ones_like(labels, dtype = torch.float32)

    def weighted(logits, weights, *values):
        found = loss_fn(transform_logits(logits, transform), *values)
        if not isinstance(found, torch.Tensor) or found.shape != weights.shape:
            raise ValueError(
                f"loss_fn must return each token's loss, {tuple(weights.shape)}; it returned "
                f"{tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__}."
            )
        found = found * weights
        return found if reduction == "none" else found.sum()

    labelled = labels.masked_fill(~keep, 0).long()
    total = apply_to_rows(weighted, loss_weights, labelled, *columns, keep = keep)
    if reduction != "mean":
        return total
    if n_items is None:
        n_items = ((loss_weights * keep) if class_weight_mean == "weights" else keep).sum()
    elif class_weight_mean == "weights" and weight_items is not None:
        n_items = weight_items
    n_items = torch.as_tensor(n_items, dtype = total.dtype, device = total.device).reshape(-1)[0]
    return total / torch.where(n_items == 0, 1.0, n_items)
