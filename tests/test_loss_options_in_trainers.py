# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Loss options before a model has them: their values, their columns of a batch, trainers that ignore them."""

from types import SimpleNamespace

import pytest
import torch
from backend import require

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"smoothing": 0.1}, TypeError, "'label_smoothing' is what it is called"),
        ({"temperature": 0.1}, TypeError, "no option 'temperature'"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[64\]"),
        ({"class_weight": [-1.0] * 64}, ValueError, "not negative"),
        ({"class_weight": [float("nan")] * 64}, ValueError, "finite"),
        ({"class_weight": [0] * 64}, ValueError, "a weight that is not 0"),
        ({"label_smoothing": 2.0}, ValueError, "between 0 and 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss must not be negative"),
        ({"z_loss": "much"}, ValueError, "z_loss must be a finite number"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"class_weight_mean": "sum"}, ValueError, '"weights" or "labels"'),
        ({"chunk_rows": 0}, ValueError, "positive number of rows"),
        ({"logits_dtype": torch.float16}, ValueError, "torch.float32 or left out"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function"),
        ({"loss_columns": ("a",)}, ValueError, "are for a loss_fn"),
        (
            {"loss_fn": torch.nn.functional.cross_entropy, "z_loss": 0.1},
            ValueError,
            "which loss_fn replaces",
        ),
    ],
)
def test_options_are_checked_by_name(options, error, words):
    """When they are set, not in the first step."""
    from unsloth.loss_options import checked_options
    with pytest.raises(error, match = words):
        checked_options("set_loss_options", 64, options)


@pytest.mark.parametrize("padding_free", [False, True])
def test_columns_of_the_loss_are_collated_with_their_tokens(padding_free):
    """A number a row or a value a token, padded or one behind the other, by TRL's own collator."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from unsloth.loss_in_trainers import ColumnCollator

    stock = DataCollatorForLanguageModeling(pad_token_id = 0, padding_free = padding_free)
    collator = ColumnCollator(stock, ["loss_weights", "ids"])
    rows = [
        {"input_ids": [5, 6, 7], "loss_weights": 2, "ids": [[1, 2], [3, 4], [5, 6]]},
        {"input_ids": [8, 9], "loss_weights": [0.5, 0.25], "ids": [[7, 8], [9, 10]]},
    ]
    batch = collator(rows)
    assert batch["ids"].shape == (*batch["labels"].shape, 2) and batch["ids"].dtype == torch.int64
    if padding_free:
        assert batch["loss_weights"].tolist() == [[2.0, 2.0, 2.0, 0.5, 0.25]]
    else:
        assert batch["loss_weights"].tolist() == [[2.0, 2.0, 2.0], [0.5, 0.25, 0.0]]
        assert batch["ids"][1].tolist() == [[7, 8], [9, 10], [0, 0]]
    rows[0]["loss_weights"] = [1.0]
    with pytest.raises(ValueError, match = "3 tokens and 1 values of 'loss_weights'"):
        collator(rows)


def test_a_trainer_with_a_loss_of_its_own_is_named():
    """TRL's other trainers, Unsloth's over them, and compute_loss_func; a trainer of the user's is not."""
    from unsloth import loss_in_trainers

    class DPOTrainer:
        __module__ = "trl.trainer.dpo_trainer"

        def compute_loss(self):
            pass

    class UnslothDPOTrainer(DPOTrainer):
        pass

    class MyTrainer:
        def compute_loss(self):
            pass

    loss_in_trainers.refuse_other_losses(MyTrainer())
    with pytest.raises(NotImplementedError, match = "DPOTrainer computes a loss of its own"):
        loss_in_trainers.refuse_other_losses(UnslothDPOTrainer())
    with pytest.raises(NotImplementedError, match = "compute_loss_func computes a loss of its own"):
        loss_in_trainers.refuse_other_losses(SimpleNamespace(compute_loss_func = print))


def test_the_weights_of_a_step_are_those_of_the_labels_that_are_scored():
    """Shifted, packed (no label crosses from one sequence into the next), of classes and of tokens."""
    from unsloth.loss_in_trainers import _sum_of_weights
    from unsloth.loss_options import LossOptions

    labels = torch.tensor([[1, 2, 3, -100, 5, 6]])
    each = torch.tensor([[0.5, 1.0, 2.0, 4.0, 8.0, 16.0]])
    table = torch.arange(7.0)
    options = LossOptions(class_weight = table, ignore_index = 3)
    batch = {"labels": labels, "loss_weights": each}
    assert _sum_of_weights(batch, options).item() == 2 * 1.0 + 5 * 8.0 + 6 * 16.0
    packed = {**batch, "packed_seq_lengths": torch.tensor([4, 2])}
    assert _sum_of_weights(packed, options).item() == 2 * 1.0 + 6 * 16.0
    shifted = {"labels": labels, "shift_labels": labels, "loss_weights": each}
    assert _sum_of_weights(shifted, LossOptions()).item() == 0.5 + 1.0 + 2.0 + 8.0 + 16.0
