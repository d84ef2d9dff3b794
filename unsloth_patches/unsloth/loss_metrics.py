# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Token accuracy and entropy in a trainer's log, from the loss's own chunks: logits are never held."""

import functools
from dataclasses import replace
from typing import Any, Dict, Optional

import torch

from .kernels.cross_entropy_spec import RowLoss
from .kernels.log_probs_kernel import log_prob_rows
from .loss_options import PLAIN, model_taking_options

__all__ = ["TokenMetrics", "log_token_metrics"]


class TokenMetrics:
    """Sums over labelled tokens since they were last read: entropy in nats, and hits of the top class.

    They stay on their device until then, so that a step waits for nothing. Training and evaluation are
    apart.
    """

    def __init__(self):
        self._sums: Dict[bool, torch.Tensor] = {}

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

    def read(
        self,
        training: bool,
        gather = None,
    ) -> Dict[str, float]:
        """{entropy, mean_token_accuracy} as TRL names them, and from 0 again; gather: over the ranks."""
        sums = self._sums.pop(training, None)
        if gather is not None:
            sums = gather((torch.zeros(3) if sums is None else sums).reshape(1, 3)).sum(0)
        if sums is None or sums[2] == 0:
            return {}
        entropy, hits, count = sums.tolist()
        return {"entropy": entropy / count, "mean_token_accuracy": hits / count}


def log_token_metrics(model: Any) -> TokenMetrics:
    """The trainer of ``model`` logs ``entropy`` and ``mean_token_accuracy`` of the labelled tokens.

    For models of FastLanguageModel, whose loss holds no logits; ValueError for others. The logits of
    each chunk are read once more for it. Options set before and after stay.
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
    _install()
    return options.observe


def _install() -> None:
    from transformers import Trainer
    if not getattr(Trainer.log, "_tells_token_metrics", False):
        Trainer.log = _telling_token_metrics(Trainer.log)


def _telling_token_metrics(stock):
    @functools.wraps(stock)
    def log(self, logs, *args, **kwargs):
        inner = model_taking_options(self.model)
        options = None if inner is None else vars(inner).get("_unsloth_loss_options")
        metrics = getattr(options, "observe", None)
        training = "loss" in logs
        if isinstance(metrics, TokenMetrics) and (training or "eval_loss" in logs):
            gather = _gather(self) if self.args.world_size > 1 else None
            found = metrics.read(training, gather)
            prefix = "" if training else "eval_"
            logs = {**{prefix + name: value for name, value in found.items()}, **logs}
        return stock(self, logs, *args, **kwargs)

    log._tells_token_metrics = True
    return log


def _gather(trainer):
    device = trainer.accelerator.device
    return lambda sums: trainer.accelerator.gather(sums.float().to(device))
