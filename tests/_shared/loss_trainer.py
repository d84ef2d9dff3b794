# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A tiny Llama trained by SFTTrainer for a few steps, and what transformers' own logits say of it."""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from backend import GPU
from torch.utils.data import SequentialSampler

_ORDER = "train_sampling_strategy"


def has_order():
    from transformers import TrainingArguments
    return _ORDER in TrainingArguments.__dataclass_fields__


def counts_first_labels():
    """Older transformers count a label on a row's first token, which nothing predicts; Unsloth's GPU path does not."""
    import inspect

    import transformers.trainer

    return not GPU and "_loss_shifts_labels" not in inspect.getsource(transformers.trainer)


def in_order(trainer):
    """The trainer, which takes its rows as they come; with transformers 5, ``sequential`` says so."""
    if not has_order():
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def sequential():
    """The argument of SFTConfig for that, where there is one."""
    return {_ORDER: "sequential"} if has_order() else {}


def default_data_collator(rows):
    from transformers import default_data_collator

    batch = default_data_collator(rows)
    if counts_first_labels():  # as old as those are the TRLs that ask for it in evaluation
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


@pytest.fixture(scope = "module")
def checkpoint(tmp_path_factory):
    """A two-layer Llama with random weights and a word tokenizer."""
    if not GPU and importlib.util.find_spec("unsloth_zoo.cpu") is None:
        pytest.skip("this Unsloth has no CPU backend, so it trains on GPUs alone")
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
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object = tokenizer, model_input_names = names, **special
    ).save_pretrained(folder)
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
    collator = default_data_collator,
    **config,
):
    """Losses of SFTTrainer, one row a micro-batch, and the trainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(checkpoint)
    if GPU:  # where FastLanguageModel trains adapters; new ones leave the losses as they are
        from unsloth import FastLanguageModel
        model = FastLanguageModel.get_peft_model(model, r = 4, target_modules = ["q_proj", "v_proj"])
    prepare(model)
    rows = rows or rows_of_tokens()
    accumulated = config.setdefault("gradient_accumulation_steps", 1)
    config.setdefault("remove_unused_columns", False)
    settings = SFTConfig(
        output_dir = os.path.join(checkpoint, "out"),
        per_device_train_batch_size = 1,
        per_device_eval_batch_size = 1,
        max_steps = len(rows) // accumulated,
        logging_steps = 1,
        learning_rate = 1e-9,
        report_to = "none",
        save_strategy = "no",
        max_length = 32,
        dataset_kwargs = {"skip_prepare_dataset": True},
        **sequential(),
        bf16 = GPU,
        **config,
    )
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = Dataset.from_list(rows),
        eval_dataset = Dataset.from_list(rows[:2]),
        args = settings,
        data_collator = collator,
    )
    in_order(trainer).train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def reference_rows(checkpoint):
    """transformers' own logits [11, 64] and the labels they are scored against, row by row."""
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
        found.append((logits, labels))
    return found


def label_counts():
    """How many labels transformers counts in each row, by which a step's loss is divided."""
    first = int(not counts_first_labels())
    return [sum(label != -100 for label in row["labels"][first:]) for row in rows_of_tokens()]


def reference_losses(checkpoint, **options):
    """Cross entropy of those logits for each row, in order; 0 for a row without labels."""
    losses = []
    for (logits, labels), count in zip(reference_rows(checkpoint), label_counts()):
        summed = F.cross_entropy(logits, labels, reduction = "sum", **options)
        losses.append(summed.item() / max(count, 1))
    return losses
