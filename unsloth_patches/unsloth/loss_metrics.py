# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Token accuracy and entropy in a trainer's log, from the loss's own chunks: logits are never held."""

import functools
from dataclasses import replace
from typing import Any, Dict, List, Optional

import torch

from .cross_entropy_spec import RowLoss
from .kernels.log_probs_kernel import log_prob_rows
from .loss_in_trainers import install_in_trainers
from .loss_options import PLAIN, model_taking_options, trainer_options

__all__ = ["TokenMetrics", "log_token_metrics"]


class TokenMetrics:
    """Sums over labelled tokens since they were last read: entropy in nats, and hits of the top class.

    They stay on their device until then, so that a step waits for nothing. Training and evaluation are
    apart. token_ids: evaluation hands the most likely tokens to ``compute_metrics``.
    """

    def __init__(self, token_ids: bool = False):
        self.token_ids = token_ids
        self._sums: Dict[bool, torch.Tensor] = {}
        self._top1: Optional[List[torch.Tensor]] = None

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        spec: RowLoss,
        bias: Optional[torch.Tensor],
        training: bool,
    ) -> None:
        """Adds a chunk: raw logits [rows, vocab] in a padded buffer, and a label for each row."""
        values, top1 = log_prob_rows(logits, labels, spec, 1.0, bias)
        part = torch.stack((values[2].sum().double(), (top1 == labels).sum().double()))
        part = torch.cat((part, part.new_full((1,), labels.shape[0])))
        self._sums[training] = part + self._sums.get(training, 0.0)
        if self._top1 is not None:
            self._top1.append(top1)

    def collect(self) -> None:
        """The most likely tokens are kept from now on, until `collected`."""
        self._top1 = []

    def collected(self, labels: torch.Tensor) -> torch.Tensor:
        """The most likely next token at each position [batch, length] that is scored; -100 elsewhere.

        labels: shifted already; their rows were seen since `collect`, in order.
        """
        chunks, self._top1 = self._top1, None
        ids, keep = torch.full_like(labels, -100), labels != -100
        ids[keep] = torch.cat(chunks).to(ids) if chunks else ids[keep]
        return ids

    def read(
        self,
        training: bool,
        gather = None,
    ) -> Dict[str, float]:
        """{entropy, mean_token_accuracy} as TRL names them, and from 0 again; gather: over the ranks."""
        sums = self._sums.pop(training, None)
        if gather is not None:
            sums = gather(
                (torch.zeros(3, dtype = torch.float64) if sums is None else sums).reshape(1, 3)
            ).sum(0)
        if sums is None or sums[2] == 0:
            return {}
        entropy, hits, count = sums.tolist()
        return {"entropy": entropy / count, "mean_token_accuracy": hits / count}


def log_token_metrics(model: Any, token_ids: bool = False) -> TokenMetrics:
    """The trainer of ``model`` logs ``entropy`` and ``mean_token_accuracy`` of the labelled tokens.

    For models of FastLanguageModel, whose loss holds no logits; ValueError for others. The logits of
    each chunk are read once more for it. Options set before and after stay.
    token_ids: in evaluation ``compute_metrics`` gets, as its predictions, the most likely next token at
        each position whose next token has a label, -100 elsewhere: what
        ``preprocess_logits_for_metrics`` would make of logits by argmax. No logits are held.
    """
    inner = model_taking_options(model)
    if inner is None:
        raise ValueError(
            f"log_token_metrics: the loss of {type(model).__name__} is not computed in chunks; its "
            "trainer has the logits."
        )
    options = getattr(inner, "_unsloth_loss_options", None) or PLAIN
    if not isinstance(options.observe, TokenMetrics):
        options = replace(options, observe = TokenMetrics())
        inner._unsloth_loss_options = options
    options.observe.token_ids = token_ids
    _install()
    return options.observe


def _install() -> None:
    from transformers import Trainer

    install_in_trainers()
    if not getattr(Trainer.log, "_tells_token_metrics", False):
        Trainer.log = _telling_token_metrics(Trainer.log)
    kinds = [Trainer]
    try:
        from trl import SFTTrainer
    except ImportError:
        pass
    else:
        kinds = [kind for kind in SFTTrainer.__mro__ if "prediction_step" in vars(kind)]
    for kind in kinds:
        if not getattr(kind.prediction_step, "_predicts_token_ids", False):
            kind.prediction_step = _predicting_token_ids(kind.prediction_step)


def _metrics_of(model: Any) -> Optional[TokenMetrics]:
    metrics = getattr(trainer_options(model), "observe", None)
    return metrics if isinstance(metrics, TokenMetrics) else None


def _predicting_token_ids(stock):
    @functools.wraps(stock)
    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        metrics = _metrics_of(self.model)
        labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
        wanted = metrics is not None and metrics.token_ids and not prediction_loss_only
        if not wanted or metrics._top1 is not None or (labels is None and shifted is None):
            return stock(self, model, inputs, prediction_loss_only, *args, **kwargs)
        ignored = trainer_options(self.model).ignore_index
        metrics.collect()
        loss = stock(self, model, inputs, True, *args, **kwargs)[0]
        if shifted is None:
            shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value = -100)
        ids = metrics.collected(shifted.masked_fill(shifted == ignored, -100))
        return loss, ids, shifted if labels is None else labels

    prediction_step._predicts_token_ids = True
    return prediction_step


def _telling_token_metrics(stock):
    @functools.wraps(stock)
    def log(self, logs, *args, **kwargs):
        metrics = _metrics_of(self.model)
        training = "loss" in logs
        if metrics is not None and (training or "eval_loss" in logs):
            gather = _gather(self) if self.args.world_size > 1 else None
            found = metrics.read(training, gather)
            prefix = "" if training else "eval_"
            logs = {**{prefix + name: value for name, value in found.items()}, **logs}
        return stock(self, logs, *args, **kwargs)

    log._tells_token_metrics = True
    return log


def _gather(trainer):
    device = trainer.accelerator.device
    return lambda sums: trainer.accelerator.gather(sums.to(device))
