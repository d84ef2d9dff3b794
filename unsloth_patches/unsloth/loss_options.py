# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What a model's loss does beyond plain cross entropy, and how the loss gets to know it."""

from dataclasses import dataclass, fields, replace
from typing import Any, Dict, Optional
import contextlib
import threading

import torch

__all__ = ["LossOptions", "active_options", "collect_options", "set_loss_options", "using_options"]


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

    def changed(self, *names: str) -> Dict[str, Any]:
        """Those of the options ``names`` that are not the default, as keyword arguments."""
        values = ((name, getattr(self, name)) for name in names)
        return {name: v for name, v in values if v is not getattr(PLAIN, name) and not _is(name, v)}


def _is(name: str, value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and value == getattr(PLAIN, name)


PLAIN = LossOptions()
# Taken from a model call's keyword arguments.
CALL_ARGUMENTS = ("class_weight", "label_smoothing", "z_loss", "ignore_index")
SETTABLE = tuple(f.name for f in fields(LossOptions) if f.name not in ("bias", "shifted_labels"))
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
    unknown = set(options) - set(SETTABLE)
    if unknown:
        raise TypeError(
            f"set_loss_options: no option {sorted(unknown)[0]!r}; there are {', '.join(SETTABLE)}."
        )
    inner = model_taking_options(model)
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


def model_taking_options(model: Any) -> Any:
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


def collect_options(model: Any, arguments: Dict[str, Any]) -> LossOptions:
    """The options of one model call; takes them out of its keyword arguments."""
    options = getattr(model, "_unsloth_loss_options", None) or PLAIN
    given = {name: arguments.pop(name) for name in CALL_ARGUMENTS if name in arguments}
    given = {name: value for name, value in given.items() if value is not None}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    bias = getattr(head, "bias", None)
    if isinstance(bias, torch.Tensor):
        given["bias"] = bias
    return replace(options, **given) if given else options
