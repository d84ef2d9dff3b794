# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""SFTTrainer on the losses, with their options."""

import os

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, GPU, require

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)

# `calls` counts the loss that the backend has; a GPU's model computes in bfloat16.
COUNTED, EXACT = ("fused", 5e-2) if GPU else ("cpu", 2e-4)


@pytest.fixture(scope = "module")
def checkpoint(tmp_path_factory):
    """A two-layer Llama with random weights and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size = 64,
        hidden_size = 64,
        intermediate_size = 64,
        num_hidden_layers = 2,
        num_attention_heads = 4,
        num_key_value_heads = 2,
        # Logits large enough that every option moves the loss far more than rounding does.
        initializer_range = 0.3,
        pad_token_id = 2,
        bos_token_id = 0,
        eos_token_id = 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object = tokenizer, **special).save_pretrained(folder)
    return folder


def load(checkpoint):
    from unsloth import FastLanguageModel

    # Only now, as loading patches the trainers.
    return FastLanguageModel.from_pretrained(
        checkpoint,
        max_seq_length = 32,
        load_in_4bit = False,
        dtype = torch.bfloat16 if GPU else torch.float32,
    )


def rows_of_tokens():
    make = torch.Generator().manual_seed(0)
    rows = []
    for row in range(4):
        tokens = torch.randint(3, 64, (12,), generator = make).tolist()
        ignored = 12 if row == 3 else 3 * row
        rows.append({"input_ids": tokens, "labels": [-100] * ignored + tokens[ignored:]})
    return rows


def train(
    checkpoint,
    prepare = lambda model: None,
    rows = None,
    **config,
):
    """First losses of SFTTrainer, one row a step, and the model."""
    from datasets import Dataset
    from transformers import default_data_collator
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(checkpoint)
    if GPU:  # where FastLanguageModel trains adapters; new ones leave the losses as they are
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(model, r = 4, target_modules = ["q_proj", "v_proj"])
    prepare(model)
    rows = rows or rows_of_tokens()
    settings = SFTConfig(
        output_dir = os.path.join(checkpoint, "out"),
        per_device_train_batch_size = 1,
        gradient_accumulation_steps = 1,
        max_steps = len(rows),
        logging_steps = 1,
        learning_rate = 1e-9,
        report_to = "none",
        save_strategy = "no",
        max_length = 32,
        remove_unused_columns = False,
        dataset_kwargs = {"skip_prepare_dataset": True},
        train_sampling_strategy = "sequential",
        bf16 = GPU,
        **config,
    )
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = Dataset.from_list(rows),
        args = settings,
        data_collator = default_data_collator,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def reference_losses(checkpoint, **options):
    """Cross entropy of transformers' own logits for each row, in order."""
    from transformers import LlamaForCausalLM

    # Unsloth's rotary embedding, which transformers' own model uses too by now, lives on the GPU.
    # In training's dtype: a bfloat16 model's loss of 6.87 is 0.07 off the float32 model's.
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype = dtype).to(device)
    found = []
    for row in rows_of_tokens():
        tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(input_ids = tokens.to(device)).logits[0, :-1].cpu().float()
        count = (labels != -100).sum()
        found.append(
            F.cross_entropy(
                logits, labels, reduction = "sum" if not count else "mean", **options
            ).item()
        )
    return found


def test_sft_trainer_trains_on_our_loss(checkpoint):
    """Losses are right, a batch without labels trains on with loss 0, and the counter proves use."""
    from unsloth.fused_loss import calls

    before = calls().get(COUNTED, 0)
    found, model = train(checkpoint)
    assert calls().get(COUNTED, 0) - before == 4
    assert found == pytest.approx(reference_losses(checkpoint), abs = EXACT)
    assert found[3] == 0.0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_label_smoothing_factor_reaches_the_chunked_loss(checkpoint):
    """SFTConfig(label_smoothing_factor) smooths without asking the model for logits."""
    from unsloth.fused_loss import calls

    before = calls().get(COUNTED, 0)
    found, _ = train(checkpoint, label_smoothing_factor = 0.5)
    assert calls().get(COUNTED, 0) - before == 4
    assert abs(found[1] - reference_losses(checkpoint)[1]) > 5 * EXACT
    assert found == pytest.approx(reference_losses(checkpoint, label_smoothing = 0.5), abs = EXACT)


def test_class_weights_through_sft_trainer(checkpoint):
    """set_loss_options gives every step its class weights; the sum is over the number of labels."""
    from unsloth.fused_loss import set_loss_options

    weight = torch.linspace(0.0, 2.0, 64)
    found, _ = train(checkpoint, lambda model: set_loss_options(model, class_weight = weight))
    sums = reference_losses(checkpoint, weight = weight)
    # transformers divides by the number of labels, torch's mean by their weights' sum.
    for loss, mean, row in zip(found, sums, rows_of_tokens()):
        labels = torch.tensor(
            [label for label in row["labels"][1:] if label != -100], dtype = torch.long
        )
        scale = (weight[labels].sum() / len(labels)).item() if len(labels) else 0.0
        assert loss == pytest.approx(mean * scale, abs = EXACT)
    plain = reference_losses(checkpoint)
    assert all(abs(loss / other - 1) > 4e-2 for loss, other in zip(found[:3], plain))


def test_model_arguments_that_stock_drops_are_honoured(checkpoint):
    """label_smoothing, ignore_index and shift_labels in a plain call of the model."""
    model, _ = load(checkpoint)
    row = rows_of_tokens()[1]
    tokens = torch.tensor([row["input_ids"]], device = DEVICE)
    labels = torch.tensor([row["labels"]], device = DEVICE)
    shifted = F.pad(labels[:, 1:], (0, 1), value = -100)
    with torch.no_grad():
        logits = model(input_ids = tokens).logits[0].float()
        smoothed = model(input_ids = tokens, labels = labels, label_smoothing = 0.5).loss
        renamed = model(
            input_ids = tokens, labels = labels.masked_fill(labels == -100, 5), ignore_index = 5
        ).loss
        moved = model(input_ids = tokens, shift_labels = shifted, label_smoothing = 0.5).loss
    expected = F.cross_entropy(logits, shifted[0], label_smoothing = 0.5).item()
    assert abs(expected - F.cross_entropy(logits, shifted[0]).item()) > 5 * EXACT
    assert smoothed.item() == pytest.approx(expected, abs = EXACT)
    assert moved.item() == pytest.approx(expected, abs = EXACT)
    other = shifted[0].masked_fill(shifted[0] == 5, -100)
    assert renamed.item() == pytest.approx(F.cross_entropy(logits, other).item(), abs = EXACT)


def test_set_loss_options_names_what_is_wrong(checkpoint):
    """Unknown options, wrong shapes and models with another loss."""
    from unsloth.fused_loss import set_loss_options

    model, _ = load(checkpoint)
    with pytest.raises(TypeError, match = "no option 'smoothing'"):
        set_loss_options(model, smoothing = 0.1)
    with pytest.raises(ValueError, match = r"class_weight must be \[64\]"):
        set_loss_options(model, class_weight = torch.ones(3))
    with pytest.raises(ValueError, match = "FastLanguageModel"):
        set_loss_options(torch.nn.Linear(2, 2), label_smoothing = 0.1)


def test_the_trainer_is_given_back_only_where_our_wrap_lies_on_top(monkeypatch):
    """Undo leaves a Trainer.compute_loss that somebody else has wrapped by now."""
    from transformers import Trainer
    from unsloth import fused_loss_cpu

    def stock(self, model, inputs):
        return None

    for wrapped in (False, True):
        monkeypatch.setattr(fused_loss_cpu, "_trainer_wrap", None)
        monkeypatch.setattr(Trainer, "compute_loss", stock)
        fused_loss_cpu.smooth_in_the_model()
        ours = Trainer.compute_loss
        assert ours is not stock
        if wrapped:
            Trainer.compute_loss = lambda *args: ours(*args)
        before = Trainer.compute_loss
        fused_loss_cpu.leave_the_trainer()
        assert Trainer.compute_loss is (before if wrapped else stock)
        fused_loss_cpu.leave_the_trainer()
        assert Trainer.compute_loss is (before if wrapped else stock)


@pytest.mark.parametrize(
    "name",
    [
        "fused_cross_entropy:on_linear_cross_entropy",
        "fused_loss_cpu:cpu_loss_on_linear_cross_entropy",
        "fused_loss_cpu:cpu_forward_with_loss_options",
    ],
)
def test_a_loss_of_an_unknown_zoo_stays_stock_and_drops_no_option(monkeypatch, name):
    """unsloth_zoo is released apart from Unsloth: one that we do not know must not break an import."""
    import importlib
    from unsloth import fused_cross_entropy

    module, _, decorator = name.partition(":")
    decorator = getattr(importlib.import_module(f"unsloth.{module}"), decorator)

    def newer(hidden, something_new):
        return ("stock", hidden, something_new)

    monkeypatch.setattr(fused_cross_entropy, "_IN_UNSLOTH", False)
    with pytest.raises(NotImplementedError, match = "something_new"):
        decorator(newer)
    monkeypatch.setattr(fused_cross_entropy, "_IN_UNSLOTH", True)
    with pytest.warns(UserWarning, match = "something_new"):
        kept = decorator(newer)
    assert kept(1, something_new = 2) == ("stock", 1, 2)
    with pytest.raises(NotImplementedError, match = "z_loss cannot be honoured"):
        kept(1, 2, z_loss = 0.1)
