# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What a model's loss does beyond plain cross entropy, and how the loss gets to know it."""

import contextlib
import reprlib
import threading
from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch

from .cross_entropy_spec import RowLoss, finite_number
from .loss_calls import refuse_lookalikes

__all__ = [
    "LossOptions",
    "active_options",
    "checked_options",
    "collect_options",
    "trainer_options",
    "using_options",
]


@dataclass(frozen = True, repr = False)
class LossOptions:
    """What a model's loss does beyond plain cross entropy.

    class_weight: [vocab] or None. label_smoothing: 0 to 1. z_loss: factor of logsumexp squared.
    ignore_index: besides -100, a label that does not count.
    class_weight_mean: a weighted mean is over the "weights" of its labels, as in nn.CrossEntropyLoss
        (in a trainer: of the labels of the whole step), or over the number of "labels".
    loss_fn, loss_columns: a loss of one's own, ``loss_fn(logits, labels, *columns)``, which returns
        each token's; loss_columns names columns of the batch, shaped and shifted as the labels are.
    logits_dtype: ``torch.float32`` holds the logits in float32. chunk_rows: rows of logits at once.
    observe: sees the chunks of logits, for statistics; see ``linear_cross_entropy``. The others are of
    one call: loss_weights, a weight a token; reduction; and what the forward and the trainer fill in.
    """

    class_weight: Optional[torch.Tensor] = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    class_weight_mean: str = "weights"
    loss_fn: Optional[Callable] = None
    loss_columns: Tuple[Any, ...] = ()
    logits_dtype: Optional[torch.dtype] = None
    chunk_rows: Optional[int] = None
    observe: Optional[Callable] = None
    loss_weights: Optional[torch.Tensor] = None
    reduction: str = "mean"
    weight_items: Any = None
    bias: Optional[torch.Tensor] = None
    shifted_labels: Optional[torch.Tensor] = None

    def changed(self, *without: str) -> Dict[str, Any]:
        """The options that are not the default, as keyword arguments; ``without`` some."""
        names = (f.name for f in fields(self) if f.name not in without)
        return {name: getattr(self, name) for name in names if self._differs(name)}

    def __repr__(self) -> str:
        """What a user has set, as it is written in the call."""
        given = self.changed(*_FILLED_IN)
        return f"LossOptions({', '.join(f'{name} = {_shown(value)}' for name, value in given.items())})"

    def _differs(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, torch.Tensor) or value != getattr(PLAIN, name)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{value.numel()} weights>"
    return getattr(value, "__name__", None) or repr(value)


PLAIN = LossOptions()
# Taken from a model call's keyword arguments.
CALL_ARGUMENTS = (
    "class_weight",
    "label_smoothing",
    "z_loss",
    "ignore_index",
    "class_weight_mean",
    "loss_weights",
    "reduction",
    "weight_items",
)
_FILLED_IN = ("observe", "loss_weights", "reduction", "weight_items", "bias", "shifted_labels")
SETTABLE = tuple(f.name for f in fields(LossOptions) if f.name not in _FILLED_IN)
_local = threading.local()
# Forwards in progress with options, over all threads: while it is 0, thread state is not looked at.
_in_use = 0
_lock = threading.Lock()


def checked_options(name: str, vocab_size: int, options: Dict[str, Any]) -> LossOptions:
    """LossOptions of what a user gave; TypeError or ValueError that name what does not fit.

    Lists and arrays become tensors, on the CPU until the first loss needs them elsewhere.
    """
    refuse_lookalikes(name, options, SETTABLE)
    unknown = sorted(set(options) - set(SETTABLE))
    if unknown:
        raise TypeError(f"{name}: no option {unknown[0]!r}; there are {', '.join(SETTABLE)}.")
    options = {key: value for key, value in options.items() if value is not None}
    weight = options.get("class_weight")
    if weight is not None:
        try:
            weight = torch.as_tensor(weight).detach()
        except (TypeError, ValueError, RuntimeError) as error:  # text, or None in it
            raise TypeError(
                f"{name}: class_weight must be [{vocab_size}] numbers, got {reprlib.repr(weight)}."
            ) from error
        weight = weight if weight.is_floating_point() else weight.float()
        if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
            raise ValueError(f"{name}: class_weight must be finite and not negative.")
        if not bool(weight.any()):
            raise ValueError(f"{name}: class_weight must have a weight that is not 0.")
        options["class_weight"] = weight
    like = torch.empty(0, device = "cpu" if weight is None else weight.device)
    numbers = ("class_weight", "label_smoothing", "z_loss", "ignore_index")
    given = {key: options[key] for key in numbers if key in options}
    checked = RowLoss.validated(name, like, vocab_size, **given)
    options.update({key: getattr(checked, key) for key in given if key != "class_weight"})
    if checked.z_loss < 0.0:
        raise ValueError(f"{name}: z_loss must not be negative, got {checked.z_loss}.")
    if options.get("class_weight_mean", "weights") not in ("weights", "labels"):
        got = options["class_weight_mean"]
        raise ValueError(f'{name}: class_weight_mean must be "weights" or "labels", got {got!r}.')
    if options.get("logits_dtype") not in (None, torch.float32):
        got = options["logits_dtype"]
        raise ValueError(f"{name}: logits_dtype must be torch.float32 or left out, got {got}.")
    rows = options.get("chunk_rows")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"{name}: chunk_rows must be a positive number of rows, got {rows!r}.")
    columns = options.get("loss_columns", ())
    options["loss_columns"] = (columns,) if isinstance(columns, str) else tuple(columns)
    if options.get("loss_fn") is None:
        if columns:
            raise ValueError(f"{name}: loss_columns are for a loss_fn; give one or leave them out.")
    elif not callable(options["loss_fn"]):
        raise TypeError(f"{name}: loss_fn must be a function, got {options['loss_fn']!r}.")
    else:
        unused = [key for key in ("class_weight", "label_smoothing", "z_loss") if key in given]
        if unused:
            raise ValueError(
                f"{name}: {unused[0]} is an option of cross entropy, which loss_fn replaces; "
                "leave one of them out."
            )
    return LossOptions(**options)


def active_options() -> LossOptions:
    """Those of the forward that runs in this thread; `PLAIN` outside of one."""
    if _in_use == 0:
        return PLAIN
    return getattr(_local, "options", None) or PLAIN


@contextlib.contextmanager
def using_options(options: LossOptions):
    """They are this thread's `active_options` inside, and what was before is back after."""
    global _in_use
    before = getattr(_local, "options", None)
    with _lock:
        _in_use += 1
    try:
        _local.options = options
        yield
    finally:
        _local.options = before
        with _lock:
            _in_use -= 1


def collect_options(model: Any, arguments: Dict[str, Any]) -> LossOptions:
    """The options of one model call; takes them out of its keyword arguments.

    TypeError for an argument that means an option by another name: it would be ignored.
    """
    name = f"{type(model).__name__}'s loss"
    refuse_lookalikes(name, arguments, CALL_ARGUMENTS)
    options = getattr(model, "_unsloth_loss_options", None) or PLAIN
    given = {key: arguments.pop(key) for key in CALL_ARGUMENTS if key in arguments}
    given = {key: value for key, value in given.items() if value is not None}
    _check_call(name, arguments, given)
    if options.loss_fn is not None:
        unused = [key for key in ("class_weight", "label_smoothing", "z_loss") if given.get(key)]
        if unused:
            raise ValueError(
                f"{name}: {unused[0]} is an option of cross entropy, which the model's loss_fn replaces; "
                "leave one of them out."
            )
        missing = [column for column in options.loss_columns if column not in arguments]
        labelled = arguments.get("labels") is not None or arguments.get("shift_labels") is not None
        if missing and labelled:
            raise ValueError(
                f"{name}: the batch has no column {missing[0]!r}, which loss_fn asked for; "
                "keep it in the data set and the collator (remove_unused_columns = False), and call "
                "set_loss_options before the trainer is made."
            )
        given["loss_columns"] = tuple(
            arguments.pop(column) for column in options.loss_columns if column in arguments
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    bias = getattr(head, "bias", None)
    if isinstance(bias, torch.Tensor):
        given["bias"] = bias
    return replace(options, **given) if given else options


def _check_call(name: str, arguments: Dict[str, Any], given: Dict[str, Any]) -> None:
    z_loss = finite_number(name, "z_loss", given.get("z_loss", 0.0))
    if z_loss < 0.0:
        raise ValueError(f"{name}: z_loss must not be negative, got {z_loss}.")
    if "loss_weights" in given:
        shifted = arguments.get("shift_labels")
        labels = arguments.get("labels") if shifted is None else shifted
        weights = given["loss_weights"] = torch.as_tensor(given["loss_weights"])
        if labels is not None and weights.shape != labels.shape:
            raise ValueError(
                f"{name}: loss_weights must be {tuple(labels.shape)} as the labels are, a weight a token; "
                f"got {tuple(weights.shape)}."
            )


def _takes_options(module: Any) -> bool:
    # TRL wraps a model's forward on the instance, so a model whose own forward takes options is marked
    # itself. Not getattr: PEFT forwards attribute reads to what it wraps.
    own = vars(module)
    if own.get("_takes_loss_options", False):
        return True
    forwards = (own.get("forward"), getattr(type(module), "forward", None))
    return any(getattr(forward, "_takes_loss_options", False) for forward in forwards)


def _inside(model: Any) -> Iterator[Any]:
    """The model and those inside its wrappers (PEFT, DDP)."""
    for _ in range(8):  # more than there are wrappers; ends where a module holds itself
        if not isinstance(model, torch.nn.Module):
            return
        yield model
        inside = model._modules
        model = inside.get("module", inside.get("base_model", inside.get("model")))


def model_taking_options(model: Any) -> Any:
    """The model inside wrappers whose forward takes loss options, or None."""
    return next(filter(_takes_options, _inside(model)), None)


def trainer_options(model: Any) -> Optional[LossOptions]:
    """The options set for a trainer's model, or None."""
    inner = model_taking_options(model)
    return None if inner is None else vars(inner).get("_unsloth_loss_options")


def causal_model(model: Any) -> Any:
    """The causal language model inside wrappers, of whatever kind, or None."""
    kinds = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
    named = (part for part in _inside(model) if type(part).__name__.endswith(kinds))
    found = next((part for part in named if part.get_output_embeddings() is not None), None)
    # The labels of encoders with decoders (T5, Whisper) are in their places: nothing is shifted.
    return None if getattr(getattr(found, "config", None), "is_encoder_decoder", False) else found
