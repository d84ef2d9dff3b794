# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A model's loss options in transformers' and TRL's trainers: counted, honoured in evaluation, or refused.

Put in with the first `set_loss_options`; a trainer whose model has no options runs as it did.
"""

import functools
from typing import Any, Callable, List, Optional

import torch

from .kernels.loss_calls import calls
from .loss_options import LossOptions, model_taking_options

__all__ = ["install_in_trainers"]


def install_in_trainers() -> None:
    from transformers import Trainer

    _wrap(Trainer, "get_batch_samples", counting_weights)
    _wrap(Trainer, "evaluation_loop", refusing_other_losses)
    _wrap(Trainer, "_get_dataloader", keeping_columns)
    try:
        from trl import SFTTrainer
    except ImportError:
        return
    # Unsloth's own SFTTrainer stands over TRL's, whose loss it may leave as it is.
    owner = next(kind for kind in SFTTrainer.__mro__ if "compute_loss" in vars(kind))
    if owner is not Trainer:
        _wrap(owner, "compute_loss", sft_loss_with_options)


def _wrap(owner: type, name: str, decorator: Callable) -> None:
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
    """``Trainer.get_batch_samples``: each batch is told what the weights of the whole step's labels sum to."""

    @functools.wraps(stock)
    def get_batch_samples(self, *args, **kwargs):
        batches, n_items = stock(self, *args, **kwargs)
        options = trainer_options(self.model)
        if options is None:
            return batches, n_items
        refuse_other_losses(self)
        weighted = options.class_weight is not None or any("loss_weights" in b for b in batches)
        if n_items is not None and weighted and options.class_weight_mean == "weights":
            total = sum(_sum_of_weights(batch, options) for batch in batches)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                device = self.accelerator.device
                total = self.accelerator.gather(total.reshape(1).float().to(device)).sum()
            for batch in batches:
                batch["weight_items"] = total.item()
        return batches, n_items

    return get_batch_samples


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


def keeping_columns(stock):
    """``Trainer._get_dataloader``: columns of the loss pass the trainer's selection and its collator."""

    @functools.wraps(stock)
    def _get_dataloader(self, dataset, *args, **kwargs):
        options = trainer_options(self.model)
        there = getattr(dataset, "column_names", None) or ()
        wanted = () if options is None else ("loss_weights", *options.loss_columns)
        names = [name for name in wanted if name in there]
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
                batch[name] = _lay_out(rows, batch)
        return batch

    def _row(self, name: str, value: Any, length: int) -> torch.Tensor:
        row = torch.as_tensor(value)
        row = row.float() if row.is_floating_point() or name == "loss_weights" else row
        if row.dim() == 0:
            return row.expand(length)
        if row.shape[0] != length:
            raise ValueError(
                f"a row has {length} tokens and {row.shape[0]} values of {name!r}; give one number a "
                "row, or one value a token of input_ids."
            )
        return row


def _lay_out(rows: List[torch.Tensor], batch: dict) -> torch.Tensor:
    """Rows where the collator has put their tokens; zeros where it has padded."""
    count, width = batch["labels"].shape
    if count == 1 and len(rows) > 1:  # free of padding: one row behind the other
        rows = [torch.cat(rows)]
    whole = rows[0].new_zeros((count, width, *rows[0].shape[1:]))
    mask = batch.get("attention_mask")
    for number, row in enumerate(rows):
        start = 0 if mask is None or mask.dim() != 2 else int(mask[number].argmax())
        whole[number, start : start + row.shape[0]] = row
    return whole


def refuse_other_losses(trainer: Any) -> None:
    """NotImplementedError for a trainer that computes a loss of its own (DPO, ORPO, KTO, GRPO)."""
    for kind in type(trainer).__mro__:
        own = kind.__module__.partition(".")[0] == "trl" and kind.__name__ not in _ALIKE
        if own and "compute_loss" in vars(kind):
            raise NotImplementedError(
                f"{kind.__name__} computes a loss of its own, which the options of set_loss_options do "
                "not reach; remove them with set_loss_options(model, reset = True)."
            )
    # After them: GRPO's has a string there.
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise NotImplementedError(
            "compute_loss_func computes a loss of its own, which the options of set_loss_options do not "
            "reach; give this loss as their loss_fn, which holds no logits, or remove them with "
            "set_loss_options(model, reset = True)."
        )


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
