# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A model's loss options in transformers' and TRL's trainers: counted, honoured in evaluation, or refused.

Put in with the first `set_loss_options`, and the check of what a trainer is given before; a trainer whose
model has no options runs as it did.
"""

import contextlib
import functools
from typing import Any, Callable, Iterable

import torch

from .cross_entropy_spec import finite_number
from .loss_calls import calls
from .loss_columns import (
    ask_for,
    keeping_columns,
    naming_columns,
    preparing_columns,
    warn_where_a_trainer_is_made,
)
from .loss_options import LossOptions, model_taking_options, trainer_options

__all__ = ["check_smoothing_factor", "check_what_trainers_are_given", "install_in_trainers"]


def install_in_trainers(columns: Iterable[str] = ()) -> None:
    from transformers import Trainer

    ask_for(columns)
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


def check_what_trainers_are_given() -> None:
    """From now on SFTTrainer says when it is made what its model's loss cannot take, or will not."""
    # TRL's modules load lazily, and fail as RuntimeError.
    with contextlib.suppress(ImportError, RuntimeError):
        from trl import SFTTrainer
        owner = next(kind for kind in SFTTrainer.__mro__ if "__init__" in vars(kind))
        _wrap(owner, "__init__", checking_what_is_given)


def checking_what_is_given(stock):
    """``SFTTrainer.__init__``: a model that takes loss options, the data and the arguments beside it."""

    @functools.wraps(stock)
    def __init__(self, *args, **kwargs):
        # As TRL and transformers have them; a signature of (*args, **kwargs) stands before theirs.
        given = {**dict(zip(("model", "args", "data_collator", "train_dataset"), args)), **kwargs}
        model = given.get("model")
        if model_taking_options(model) is not None:
            check_smoothing_factor(getattr(given.get("args"), "label_smoothing_factor", 0.0))
            warn_where_a_trainer_is_made(self, model, given.get("train_dataset"))
        stock(self, *args, **kwargs)

    return __init__


def check_smoothing_factor(value: Any) -> float:
    """A trainer's ``label_smoothing_factor``, by the name that its user gave it."""
    factor = finite_number("SFTConfig", "label_smoothing_factor", value)
    if not 0.0 <= factor <= 1.0:
        raise ValueError(
            f"SFTConfig: label_smoothing_factor must be between 0 and 1, got {value}; 0.1 is usual."
        )
    return factor


def _wrap(owner: Any, name: str, decorator: Callable) -> None:
    method = vars(owner).get(name)
    if method is not None and not getattr(method, "_honours_loss_options", False):
        wrapped = decorator(method)
        wrapped._honours_loss_options = True
        setattr(owner, name, wrapped)


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
