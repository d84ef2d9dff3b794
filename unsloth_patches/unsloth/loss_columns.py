# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Columns of a data set that a loss takes (``loss_weights``, those of a loss_fn), from the data to the batch.

Trainers drop what a model's forward does not name; here these columns pass their preparation, their
selection and their collator, with a value a token where its token stands.
"""

import functools
import reprlib
import warnings
from math import isfinite
from typing import Any, Callable, Iterable, List, Optional

import torch

from .loss_options import LossOptions, model_taking_options, trainer_options

__all__ = [
    "ColumnCollator",
    "ask_for",
    "keeping_columns",
    "naming_columns",
    "preparing_columns",
    "warn_of_dropped_weights",
    "warn_where_a_trainer_is_made",
]

# Columns that a loss has been asked to take, of any model: TRL prepares its data before it has one.
_asked = ["loss_weights"]


def ask_for(columns: Iterable[str]) -> None:
    """From now on these survive the preparation of a data set."""
    _asked.extend(name for name in columns if name not in _asked)


def keeping_columns(stock):
    """``Trainer._get_dataloader``: columns of the loss pass the trainer's selection and its collator."""

    @functools.wraps(stock)
    def _get_dataloader(self, dataset, *args, **kwargs):
        names = _columns_of_the_loss(trainer_options(self.model), dataset)
        if not names:
            return stock(self, dataset, *args, **kwargs)
        self._set_signature_columns_if_needed()
        before = self._signature_columns, self.data_collator
        try:
            self._signature_columns = [*before[0], *names]
            self.data_collator = ColumnCollator(before[1], names)
            return stock(self, dataset, *args, **kwargs)
        finally:
            self._signature_columns, self.data_collator = before

    return _get_dataloader


def _columns_of_the_loss(options: Optional[LossOptions], dataset: Any) -> List[str]:
    if options is None:
        return []
    there = _column_names(dataset)
    return [name for name in ("loss_weights", *options.loss_columns) if name in there]


def _column_names(dataset: Any) -> List[str]:
    names, first = getattr(dataset, "column_names", None), None
    if names is not None:
        return list(names)
    if hasattr(dataset, "__len__") and len(dataset):
        first = dataset[0]
    elif type(dataset).__module__.startswith("datasets."):  # streamed; can be begun again
        first = next(iter(dataset), None)
    return list(first) if isinstance(first, dict) else []


def naming_columns(stock):
    """``_model_forward_parameter_names``: ``train_on_responses_only`` drops columns that it does not name."""

    @functools.wraps(stock)
    def _model_forward_parameter_names(model):
        options = trainer_options(model)
        taken = () if options is None else ("loss_weights", *options.loss_columns)
        return stock(model).union(taken)

    return _model_forward_parameter_names


def preparing_columns(stock):
    """``SFTTrainer._prepare_dataset``: columns of the loss survive tokenizing, truncating and packing.

    Packing takes only the columns that it knows, so here it comes after the stock preparation.
    """

    @functools.wraps(stock)
    def _prepare_dataset(self, dataset, processing_class, args, packing, *rest, **more):
        model = vars(self).get("model", vars(self).get("_unsloth_model_ref"))
        options = (
            LossOptions(loss_columns = tuple(_asked[1:])) if model is None else trainer_options(model)
        )
        names = _columns_of_the_loss(options, dataset)
        most = args.max_length or getattr(args, "max_seq_length", None)
        if not names or (packing and not most):
            return stock(self, dataset, processing_class, args, packing, *rest, **more)
        strategy = getattr(args, "packing_strategy", "bfd")
        length = args.max_length
        try:
            if packing and strategy != "bfd":  # those keep what is beyond the length
                args.max_length = 1 << 30
            done = stock(self, dataset, processing_class, args, False, *rest, **more)
        finally:
            args.max_length = length
        done = _with_columns(done, dataset, names)
        keep_end = getattr(args, "truncation_mode", "keep_start") == "keep_end"
        done = done.map(
            _values_of_tokens, fn_kwargs = {"names": names, "most": most, "keep_end": keep_end}
        )
        if packing:
            from trl.data_utils import pack_dataset

            columns = _column_names(done)
            there = [name for name in _PACKED if name in columns]
            done = pack_dataset(done.select_columns([*there, *names]), most, strategy)
        return done

    return _prepare_dataset


# Columns of a value a token, as TRL and Unsloth pack them.
_PACKED = (
    "input_ids",
    "attention_mask",
    "labels",
    "completion_mask",
    "assistant_masks",
    "token_type_ids",
)


def _with_columns(done: Any, dataset: Any, names: List[str]) -> Any:
    """``done`` with the columns of ``dataset`` that its tokenizing has dropped."""
    there = _column_names(done)
    for name in [name for name in names if name not in there]:
        if not hasattr(done, "__len__") or len(done) != len(dataset):
            raise ValueError(
                f"preparing this data set drops its column {name!r}, and rows with it; tokenize it first "
                "(input_ids, labels and that column)."
            )
        done = done.add_column(name, list(dataset[name]))
    return done


def _values_of_tokens(example: dict, names: List[str], most: Optional[int], keep_end: bool) -> dict:
    """Columns of the loss as a value a token, cut where the tokens were."""
    length = len(example["input_ids"])
    found = {}
    for name in names:
        value = example[name]
        if not isinstance(value, list):
            value = [value] * length
        elif length == most and len(value) > length:
            value = value[-length:] if keep_end else value[:length]
        _check_length(name, len(value), length)
        found[name] = value
    return found


def _check_length(name: str, values: int, length: int) -> None:
    if values != length:
        raise ValueError(
            f"a row has {length} tokens and {values} values of {name!r}; give one number a "
            "row, or one value a token of input_ids."
        )


class ColumnCollator:
    """A collator whose batches keep columns of the loss: a number a row, or a value a token."""

    def __init__(self, collator: Callable, names: List[str]):
        self.collator, self.names = collator, names

    def __call__(self, examples: List[dict]) -> dict:
        plain = [{k: v for k, v in e.items() if k not in self.names} for e in examples]
        lengths = [len(example["input_ids"]) for example in examples]
        batch = self.collator(plain)
        for name in self.names:
            if name not in batch:
                rows = [self._row(name, e[name], n) for e, n in zip(examples, lengths)]
                batch[name] = _lay_out([row[_kept(self.collator)] for row in rows], batch)
        return batch

    def _row(self, name: str, value: Any, length: int) -> torch.Tensor:
        try:
            row = torch.as_tensor(value)
            known = name != "loss_weights" or bool(row.isfinite().all())
        except (TypeError, ValueError, RuntimeError):  # None, or text
            known = False
        if not known:
            raise ValueError(
                f"a row's {name!r} is {_fault(value)}; give finite numbers, and one to every row (1.0 where "
                "data sets are joined of which some have none)."
            )
        row = row.float() if row.is_floating_point() or name == "loss_weights" else row
        if row.dim() == 0:
            return row.expand(length)
        _check_length(name, row.shape[0], length)
        return row


def _fault(value: Any) -> str:
    """What is no finite number in a row's column, and where; the column in short, where that is not seen."""
    value = value.tolist() if hasattr(value, "tolist") else value
    for place, each in enumerate(value if isinstance(value, list) else ()):
        number = isinstance(each, float) and isfinite(each)
        if not number and not isinstance(each, (int, list)):
            return f"{reprlib.repr(each)} at its token {place}"
    return reprlib.repr(value)


def _kept(collator: Callable) -> slice:
    """The part of a row that TRL 1.0's collator keeps; others' rows are cut before."""
    mode, most = getattr(collator, "truncation_mode", None), getattr(collator, "max_length", None)
    if mode is None or most is None or getattr(collator, "padding_free", False):
        return slice(None)
    return slice(-most, None) if mode == "keep_end" else slice(most)


def _lay_out(rows: List[torch.Tensor], batch: dict) -> torch.Tensor:
    """Rows where the collator has put their tokens; zeros where it has padded."""
    count, width = batch["labels"].shape
    if count == 1 and len(rows) > 1:  # free of padding: one row behind the other
        rows = [torch.cat(rows)]
    dtype = functools.reduce(torch.promote_types, (row.dtype for row in rows))  # 1 beside 0.5
    whole = rows[0].new_zeros((count, width, *rows[0].shape[1:]), dtype = dtype)
    mask = batch.get("attention_mask")
    for number, row in enumerate(rows):
        start = 0 if mask is None or mask.dim() != 2 else int(mask[number].argmax())
        whole[number, start : start + row.shape[0]] = row
    return whole


def warn_of_dropped_weights(trainer: Any, inputs: Any) -> None:
    """Once a trainer, where its data have weights, and its model, which could take them, no options."""
    if "_loss_weights_asked" in vars(trainer):
        return
    trainer._loss_weights_asked = True
    if "loss_weights" not in inputs:
        given = (getattr(trainer, name, None) for name in ("model", "train_dataset"))
        _warn_of_unused_weights(*given)


def warn_where_a_trainer_is_made(trainer: Any, model: Any, dataset: Any) -> None:
    """The same, as early as it can be known: preparing the data may drop the column before the first step."""
    if _warn_of_unused_weights(model, dataset):
        trainer._loss_weights_asked = True


def _warn_of_unused_weights(model: Any, dataset: Any) -> bool:
    names = getattr(dataset, "column_names", None) or ()
    unused = "loss_weights" in names and trainer_options(model) is None
    if not unused or model_taking_options(model) is None:
        return False
    warnings.warn(
        "Unsloth: the data set's column loss_weights is not used, as the model has no loss options. Call "
        'set_loss_options(model, class_weight_mean = "weights") of unsloth.fused_loss before the trainer is '
        "made; where it is made already, make it again.",
        stacklevel = 4,  # who makes the trainer
    )
    return True
