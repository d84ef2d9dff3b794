# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Token accuracy and entropy in SFTTrainer's log, beside those of transformers' own logits."""

import sys

import pytest
import torch
from backend import GPU, require
from loss_trainer import checkpoint, reference_rows, train  # noqa: F401

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)
EXACT = 5e-2 if GPU else 1e-4


def expected(rows):
    """(entropy, accuracy) over the labelled tokens of some rows."""
    entropy = hits = count = 0
    for logits, labels in rows:
        keep = labels != -100
        log_p = logits[keep].log_softmax(1)
        entropy += -(log_p.exp() * log_p).sum().item()
        hits += (log_p.argmax(1) == labels[keep]).sum().item()
        count += int(keep.sum())
    return entropy / count, hits / count


def own_loss(logits, labels):
    return 2 * torch.nn.functional.cross_entropy(logits, labels, reduction = "none")


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("options", [{"z_loss": 0.01}, {"loss_fn": own_loss}])
def test_metrics_are_those_of_the_logits(checkpoint, accumulated, options):  # noqa: F811
    """Of each step's labelled tokens; options set afterwards leave them on, and the loss is the same."""
    from unsloth.fused_loss import set_loss_options
    from unsloth.loss_metrics import log_token_metrics

    def prepare(model):
        log_token_metrics(model)
        set_loss_options(model, **options)

    _, trainer = train(checkpoint, prepare, gradient_accumulation_steps = accumulated)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    rows = reference_rows(checkpoint)
    for step, entry in enumerate(logged):
        part = rows[step * accumulated : (step + 1) * accumulated]
        if not any((labels != -100).any() for _, labels in part):
            assert "entropy" not in entry
            continue
        entropy, accuracy = expected(part)
        assert entry["entropy"] == pytest.approx(entropy, abs = EXACT)
        assert entry["mean_token_accuracy"] == pytest.approx(accuracy, abs = EXACT)
    plain, _ = train(
        checkpoint,
        lambda model: set_loss_options(model, **options),
        gradient_accumulation_steps = accumulated,
    )
    assert [entry["loss"] for entry in logged] == pytest.approx(plain, abs = 1e-6)


def test_compute_metrics_gets_token_ids_without_logits(checkpoint):  # noqa: F811
    """The argmax of transformers' own logits where the next token has a label; early stopping sees them."""
    import numpy as np
    from transformers import EarlyStoppingCallback
    from unsloth.loss_metrics import log_token_metrics

    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        keep = prediction.label_ids[:, 1:] != -100
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"hits": float(hits[keep].mean())}

    _, trainer = train(checkpoint, lambda model: log_token_metrics(model, token_ids = True))
    trainer.compute_metrics = compute_metrics
    found = trainer.evaluate()
    rows = reference_rows(checkpoint)[:2]
    for row, (logits, labels) in enumerate(rows):
        ids = logits.argmax(1).masked_fill(labels == -100, -100)
        same = seen[0].predictions[row, :-1] == ids.numpy()
        assert same.mean() > 0.9 if GPU else same.all()  # bfloat16 ties
    assert seen[0].predictions.dtype == np.int64 and seen[0].predictions.shape == (2, 12)
    _, accuracy = expected(rows)
    assert found["eval_hits"] == pytest.approx(accuracy, abs = EXACT)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1]["eval_mean_token_accuracy"] == pytest.approx(accuracy, abs = EXACT)
    # The metric does not get better with learning_rate = 1e-9, so training stops after two evaluations.
    trainer.add_callback(EarlyStoppingCallback(1))
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = False, "eval_hits"
    trainer.args.greater_is_better = True
    trainer.train()
    assert trainer.state.global_step == 2


def test_metrics_are_read_once_and_apart_for_training():
    """Reading starts again; a model whose loss is not ours is refused."""
    from unsloth.cross_entropy_spec import RowLoss
    from unsloth.loss_metrics import TokenMetrics, log_token_metrics

    metrics = TokenMetrics()
    logits, labels = torch.eye(16)[:3] * 50, torch.tensor([0, 1, 5])
    metrics(logits, labels, RowLoss(), None, True)
    metrics(logits, torch.tensor([0, 1, 2]), RowLoss(), None, False)
    assert metrics.read(True)["mean_token_accuracy"] == pytest.approx(2 / 3)
    assert metrics.read(True) == {}
    assert metrics.read(False)["mean_token_accuracy"] == 1.0
    metrics(logits, labels, RowLoss(), None, True)
    two_ranks = metrics.read(True, lambda sums: torch.cat((sums, sums * 0)))
    assert two_ranks["mean_token_accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match = "not computed in chunks"):
        log_token_metrics(torch.nn.Linear(2, 2))


def test_without_trl_transformers_trainer_logs_them(monkeypatch):
    """TRL is no requirement of Unsloth's models."""
    import transformers
    from unsloth import loss_metrics

    class Trainer(transformers.Trainer):
        def prediction_step(self, *arguments):
            pass

    monkeypatch.setattr(transformers, "Trainer", Trainer)
    monkeypatch.setitem(sys.modules, "trl", None)
    loss_metrics._install()
    assert Trainer.prediction_step._predicts_token_ids
