# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A model's loss options in transformers' and TRL's trainers: counted, honoured in evaluation, or refused.

Put in with the first `set_loss_options`; a trainer whose model has no options runs as it did.
"""

import contextlib
import functools
import warnings
from typing import Any, Callable, Iterable, List, Optional

import torch

from .loss_calls import calls
from .loss_options import LossOptions, model_taking_options

__all__ = ["install_in_trainers"]


# Columns that a loss has been asked to take, of any model: TRL prepares its data before it has one.
_asked = ["loss_weights"]


def install_in_trainers(columns: Iterable[str] = ()) -> None:
    from transformers import Trainer

    _asked.extend(name for name in columns if name not in _asked)

    _wrap(Trainer, "get_batch_samples", counting_weights)
    _wrap(Trainer, "evaluation_loop", refusing_other_losses)
    _wrap(Trainer, "prediction_step", weighing_evaluation)
    _wrap(Trainer, "_get_dataloader", keeping_columns)
    with contextlib.suppress(ImportError):
        from unsloth_zoo import dataset_utils
        _wrap(dataset_utils, "_model_forward_parameter_names", naming_columns)
    try:
        from trl import SFTTrainer
    except ImportError:
        return
    owner = next((kind for kind in SFTTrainer.__mro__ if "_prepare_dataset" in vars(kind)), None)
    if owner is not None:
        _wrap(owner, "_prepare_dataset", preparing_columns)
    # Unsloth's own SFTTrainer stands over TRL's, whose loss it may leave as it is.
    owner = next(kind for kind in SFTTrainer.__mro__ if "compute_loss" in vars(kind))
    if owner is not Trainer:
        _wrap(owner, "compute_loss", sft_loss_with_options)


def _wrap(owner: Any, name: str, decorator: Callable) -> None:
    method = vars(owner).get(name)
    if method is not None and not getattr(method, "_honours_loss_options", False):
        wrapped = decorator(method)
        wrapped._honours_loss_options = True
        setattr(owner, name, wrapped)


def trainer_options(model: Any) -> Optional[LossOptions]:
    """The options set for a trainer's model, or None."""
    inner = model_taking_options(model)
    return None if inner is None else vars(inner).get("_unsloth_loss_options")


def counting_weights(stock):
    """``Trainer.get_batch_samples``: each batch is told what the weights of the whole step's labels sum to.

    Labels of ``ignore_index`` are -100 from here on: that is what everybody counts by.
    """

    @functools.wraps(stock)
    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        options = trainer_options(self.model)
        if options is None:
            return stock(self, epoch_iterator, *args, **kwargs)
        refuse_other_losses(self)
        batches = (_without_ignored(batch, options) for batch in epoch_iterator)
        batches, n_items = stock(self, batches, *args, **kwargs)
        if n_items is not None and any(_is_weighted(batch, options) for batch in batches):
            total = sum(_sum_of_weights(batch, options) for batch in batches)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                device = self.accelerator.device
                total = self.accelerator.gather(total.reshape(1).to(device)).sum()
            for batch in batches:
                batch["weight_items"] = total.item()
        return batches, n_items

    return get_batch_samples


def weighing_evaluation(stock):
    """``Trainer.prediction_step``: it counts a batch's labels for its loss; their weights, too."""

    @functools.wraps(stock)
    def prediction_step(self, model, inputs, *args, **kwargs):
        options = trainer_options(self.model)
        if options is not None:
            inputs = _without_ignored(inputs, options)
        if (
            options is not None
            and inputs.get("labels") is not None
            and _is_weighted(inputs, options)
        ):
            inputs = {**inputs, "weight_items": _sum_of_weights(inputs, options).item()}
        return stock(self, model, inputs, *args, **kwargs)

    return prediction_step


def _without_ignored(batch, options: LossOptions):
    """The batch, or one like it in which labels of the options' ``ignore_index`` are -100."""
    if options.ignore_index == -100:
        return batch
    masked = {
        name: batch[name].masked_fill(batch[name] == options.ignore_index, -100)
        for name in ("labels", "shift_labels")
        if isinstance(batch.get(name), torch.Tensor)
    }
    return {**batch, **masked}


def _is_weighted(batch, options: LossOptions) -> bool:
    weighted = options.class_weight is not None or "loss_weights" in batch
    return weighted and options.class_weight_mean == "weights"


def _sum_of_weights(batch, options: LossOptions) -> torch.Tensor:
    """Of the labels that a batch is scored against."""
    shifted = batch.get("shift_labels")
    labels = batch["labels"] if shifted is None else shifted
    weights = batch.get("loss_weights")
    if shifted is None:
        lengths = batch.get("packed_seq_lengths")
        if lengths is not None:  # a sequence's first token is nobody's next one
            labels = labels.clone()
            starts = torch.as_tensor(lengths).cumsum(0)[:-1].to(labels.device)
            labels.view(-1)[starts] = -100
        labels = labels[..., 1:]
        weights = None if weights is None else weights[..., 1:]
    keep = (labels != -100) & (labels != options.ignore_index)
    values = keep.double()
    if options.class_weight is not None:
        table = options.class_weight.to(labels.device, torch.float64)
        values = values * table[labels.clamp(0, table.shape[0] - 1)]
    return (values if weights is None else values * weights).sum()


def warn_of_dropped_weights(trainer: Any, inputs: Any) -> None:
    """Once a trainer, where its data have weights, and its model, which could take them, no options."""
    if "_loss_weights_asked" in vars(trainer):
        return
    trainer._loss_weights_asked = True
    names = getattr(getattr(trainer, "train_dataset", None), "column_names", None) or ()
    dropped = "loss_weights" in names and "loss_weights" not in inputs
    if dropped and trainer_options(trainer.model) is None and model_taking_options(trainer.model):
        warnings.warn(
            "Unsloth: the data set's column loss_weights is not used. Before the trainer is made, call "
            'set_loss_options(model, class_weight_mean = "weights") of unsloth.fused_loss.',
            stacklevel = 2,
        )


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
                f"a row's {name!r} is {value!r:.80}; give finite numbers, and one to every row (1.0 where "
                "data sets are joined of which some have none)."
            )
        row = row.float() if row.is_floating_point() or name == "loss_weights" else row
        if row.dim() == 0:
            return row.expand(length)
        _check_length(name, row.shape[0], length)
        return row


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


def refuse_other_losses(trainer: Any) -> None:
    """NotImplementedError for a trainer that computes a loss of its own (DPO, ORPO, KTO, GRPO)."""
    for kind in type(trainer).__mro__:
        name = _name_in_trl(kind)
        if name and name not in _ALIKE and "compute_loss" in vars(kind):
            raise NotImplementedError(
                f"{name} computes a loss of its own, which the options of set_loss_options do not reach; "
                "remove them with set_loss_options(model, reset = True)."
            )
    # After them: GRPO's has a string there.
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise NotImplementedError(
            "compute_loss_func computes a loss of its own, which the options of set_loss_options do not "
            "reach; give this loss as their loss_fn, which holds no logits, or remove them with "
            "set_loss_options(model, reset = True)."
        )


def _name_in_trl(kind: type) -> str:
    """The name of TRL's trainer, or of the one that Unsloth has written its own from; '' of others.

    On a GPU that one stands in TRL's place, in a module of its own name: UnslothDPOTrainer."""
    if kind.__module__.partition(".")[0] == "trl":
        return kind.__name__
    name = kind.__name__.lstrip("_")
    written = name.startswith("Unsloth") and kind.__module__.rpartition(".")[2] == name
    return name.removeprefix("Unsloth") if written else ""


# Trainers of TRL whose loss is the model's.
_ALIKE = ("SFTTrainer", "_BaseTrainer", "BaseTrainer")


def refusing_other_losses(stock):
    @functools.wraps(stock)
    def evaluation_loop(self, *args, **kwargs):
        if trainer_options(self.model) is not None:
            refuse_other_losses(self)
        return stock(self, *args, **kwargs)

    return evaluation_loop


def sft_loss_with_options(stock):
    """``SFTTrainer.compute_loss``: where TRL takes its loss past the model's, the model's is computed.

    TRL evaluates, and trains with ``loss_type = "dft"``, on log-probabilities of its own. Its metrics
    stay; evaluation costs a second forward then.
    """

    @functools.wraps(stock)
    def compute_loss(self, model, inputs, *args, **kwargs):
        if trainer_options(model) is None:
            return stock(self, model, inputs, *args, **kwargs)
        kind = str(getattr(self.args, "loss_type", None) or "nll").rpartition(".")[2].lower()
        if kind != "nll":
            raise NotImplementedError(
                f'SFTConfig(loss_type = "{kind}") computes a loss of its own, which the options of '
                "set_loss_options do not reach; remove them with set_loss_options(model, reset = True), "
                "or give this loss as their loss_fn."
            )
        given = dict(inputs)
        before = _computed()
        result = stock(self, model, inputs, *args, **kwargs)
        if _computed() > before:
            return result
        loss = model(**{**given, "use_cache": False}).loss
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    return compute_loss


def _computed() -> int:
    return sum(count for name, count in calls().items() if not name.startswith("stock"))
