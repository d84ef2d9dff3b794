# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What a model's loss does beyond plain cross entropy, and how it gets from a model call to the loss.

The forwards of Unsloth's models are wrapped: loss options among a call's keyword arguments, or set
once with `set_loss_options`, are there for the loss that the forward computes. transformers' Trainer
hands its ``label_smoothing_factor`` over the same way.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Dict, Optional
import contextlib
import functools
import os
import threading

import torch

__all__ = ["LossOptions", "calls", "set_loss_options"]

_COUNTS: Dict[str, int] = {}


def calls() -> Dict[str, int]:
    """How often each loss ran here: ``fused``, ``dense``, ``cpu``, and ``stock: <reason>``."""
    return dict(_COUNTS)


def count_call(name: str) -> None:
    _COUNTS[name] = _COUNTS.get(name, 0) + 1


@dataclass(frozen = True)
class LossOptions:
    """What a model's loss does beyond plain cross entropy.

    class_weight: [vocab] or None. label_smoothing: 0 to 1. z_loss: factor of logsumexp squared.
    ignore_index: besides -100, a label that does not count. logits_dtype: ``torch.float32`` holds
    the logits in float32. chunk_rows: rows of logits at once.
    bias, shifted_labels: filled in by the forward.
    """

    class_weight: Optional[torch.Tensor] = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    logits_dtype: Optional[torch.dtype] = None
    chunk_rows: Optional[int] = None
    bias: Optional[torch.Tensor] = None
    shifted_labels: Optional[torch.Tensor] = None


PLAIN = LossOptions()
_SETTABLE = tuple(f.name for f in fields(LossOptions) if f.name not in ("bias", "shifted_labels"))
# Taken from a model call's keyword arguments.
_CALL_ARGUMENTS = ("class_weight", "label_smoothing", "z_loss", "ignore_index")
_local = threading.local()
# Forwards in progress with options, over all threads: while it is 0, thread state is not looked at.
_in_use = 0
_lock = threading.Lock()


def set_loss_options(model: Any, **options: Any) -> None:
    """Options for every loss of a model from FastLanguageModel, through SFTTrainer or called directly.

    ``set_loss_options(model, class_weight = w, label_smoothing = 0.1, z_loss = 1e-4)``; fields of
    `LossOptions`. Arguments of a model call win. Called again, it replaces all options; without
    any it removes them. Raises TypeError for an unknown option, ValueError for a model whose loss
    is not computed here.
    """
    unknown = set(options) - set(_SETTABLE)
    if unknown:
        raise TypeError(
            f"set_loss_options: no option {sorted(unknown)[0]!r}; there are {', '.join(_SETTABLE)}."
        )
    inner = _causal_lm(model)
    if inner is None:
        raise ValueError(
            f"set_loss_options: the loss of {type(model).__name__} is not computed by Unsloth's fused "
            "loss; load the model with FastLanguageModel."
        )
    weight = options.get("class_weight")
    vocab_size = inner.get_output_embeddings().weight.shape[0]
    if weight is not None and tuple(weight.shape) != (vocab_size,):
        raise ValueError(
            f"set_loss_options: class_weight must be [{vocab_size}], got {tuple(weight.shape)}."
        )
    inner._unsloth_loss_options = LossOptions(**options) if options else None


def _takes_options(module: Any) -> bool:
    # TRL wraps a model's forward on the instance, so the CPU backend's model is marked itself. Not
    # getattr: PEFT forwards attribute reads to what it wraps.
    own = vars(module)
    if own.get("_takes_loss_options", False):
        return True
    forwards = (own.get("forward"), getattr(type(module), "forward", None))
    return any(getattr(forward, "_takes_loss_options", False) for forward in forwards)


def _causal_lm(model: Any) -> Any:
    """The model inside wrappers (PEFT, DDP) whose forward takes loss options, or None."""
    for _ in range(8):
        if model is None or _takes_options(model):
            return model
        inside = getattr(model, "_modules", {})
        model = inside.get("module", inside.get("base_model", inside.get("model")))
    return None


def active_options() -> LossOptions:
    if _in_use == 0:
        return PLAIN
    return getattr(_local, "options", None) or PLAIN


@contextlib.contextmanager
def using_options(options: LossOptions):
    global _in_use
    before = getattr(_local, "options", None)
    with _lock:
        _in_use += 1
    _local.options = options
    try:
        yield
    finally:
        _local.options = before
        with _lock:
            _in_use -= 1


def _collect(model: Any, arguments: Dict[str, Any]) -> LossOptions:
    """The options of one model call; takes them out of its keyword arguments."""
    options = getattr(model, "_unsloth_loss_options", None) or PLAIN
    given = {name: arguments.pop(name) for name in _CALL_ARGUMENTS if name in arguments}
    given = {name: value for name, value in given.items() if value is not None}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    bias = getattr(head, "bias", None)
    if isinstance(bias, torch.Tensor):
        given["bias"] = bias
    return replace(options, **given) if given else options


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
        options = _collect(self, kwargs)
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
    labels, shifted = kwargs.pop("labels"), kwargs.pop("shift_labels", None)
    n_items = kwargs.pop("num_items_in_batch", None)
    kwargs["return_dict"] = True
    outputs = forward(model, *args, **kwargs)
    if shifted is None:
        shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value = -100)
    count_call("dense")
    from .fused_loss import dense_loss

    loss = dense_loss(outputs.logits, shifted, 0, 0, n_items, options)
    return type(outputs)(**{**outputs, "loss": loss})


# --- the Trainer's label_smoothing_factor ---------------------------------------------------------


# Our Trainer.compute_loss and the one that it wraps, while it is in place.
_trainer_wrap = None


def smooth_in_the_loss() -> None:
    """transformers' Trainer hands ``label_smoothing_factor`` to models that take loss options.

    The CPU backend calls ``Trainer.compute_loss`` as it is. On a GPU Unsloth has its own in its place,
    and that one is wrapped instead.
    """
    global _trainer_wrap
    from transformers import Trainer

    stock = Trainer.compute_loss
    if not getattr(stock, "_takes_loss_options", False):
        _trainer_wrap = (smoothing_compute_loss(stock), stock)
        Trainer.compute_loss = _trainer_wrap[0]


def leave_the_trainer() -> None:
    """Takes `smooth_in_the_loss` back; does nothing where another wrap lies over ours by now."""
    global _trainer_wrap
    if _trainer_wrap is None:
        return
    from transformers import Trainer

    if Trainer.compute_loss is _trainer_wrap[0]:
        Trainer.compute_loss = _trainer_wrap[1]
    _trainer_wrap = None


def smoothing_compute_loss(compute_loss):
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
    return _causal_lm(model) is not None
