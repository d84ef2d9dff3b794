# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""QLoRA SFT of a Llama-3.2-1B-shaped model, stock and patched: loss curve, tokens a second, memory.

Random weights and a synthetic language (every token has four successors), half the labels ignored.
Each form trains in a process of its own, on the same data in the same order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import harness

FORMS = ("stock", "patched")
PATCH = "linear-loss"


def run(out: Path, quick: bool = False) -> int:
    """Trains both forms, compares, and writes ``loss_training_<gpu>.json`` and ``.png`` under out."""
    if not harness.gpu_available("the training comparison") and not quick:
        return 2
    with tempfile.TemporaryDirectory() as folder:
        results = {form: _train_apart(form, Path(folder), quick) for form in FORMS}
    stock, patched = (results[form] for form in FORMS)
    differences = [abs(a - b) / abs(a) for a, b in zip(stock["losses"], patched["losses"])]
    payload = {"forms": results, "relative_difference": differences, "largest": max(differences)}
    name = f"loss_training_{_slug()}"
    harness.save_json(
        Path(out) / f"{name}.json", payload, "python -m unsloth_patches bench loss-training"
    )
    rows = [
        [
            form,
            f"{r['losses'][0]:.4f}",
            f"{r['losses'][-1]:.4f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['peak_mib']:.0f}",
        ]
        for form, r in results.items()
    ]
    columns = ["form", "first loss", "last loss", "tokens/s", "peak MiB"]
    harness.print_table(
        f"{len(differences)} steps; losses differ by at most {max(differences):.1e}", columns, rows
    )
    print(f"calls of the patched loss: {patched['calls']}")
    try:
        plot(payload, Path(out) / f"{name}.png")
    except ImportError:
        print("bench loss-training: no matplotlib here; the figures are in the JSON file.")
    return 0


def _slug() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    from .loss import _gpu_slug

    return _gpu_slug(torch.cuda.get_device_name())


def _train_apart(form: str, folder: Path, quick: bool) -> dict:
    result = folder / f"{form}.json"
    environment = dict(os.environ)
    if form == "stock":
        environment["UNSLOTH_PATCHES_DISABLE"] = "all"
    arguments = [str(folder), str(result), "quick" if quick else "full"]
    subprocess.run([sys.executable, "-m", __name__, *arguments], env = environment, check = True)
    return json.loads(result.read_text(encoding = "utf-8"))


# ------------------------------------------------------------------------------- one process


def _checkpoint(folder: Path, quick: bool) -> str:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = folder / "model"
    if path.exists():
        return str(path)
    shape = {
        "vocab_size": 512 if quick else 128256,
        "hidden_size": 64 if quick else 2048,
        "intermediate_size": 128 if quick else 8192,
        "num_hidden_layers": 2 if quick else 16,
        "num_attention_heads": 4 if quick else 32,
        "num_key_value_heads": 2 if quick else 8,
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape,
        tie_word_embeddings = True,
        rope_theta = 500000.0,
        bos_token_id = 0,
        eos_token_id = 1,
        pad_token_id = 2,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, shape["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object = tokenizer, **special).save_pretrained(path)
    return str(path)


def _dataset(rows: int, length: int, vocab_size: int):
    import torch
    from datasets import Dataset

    make = torch.Generator().manual_seed(1)
    states = 2000
    successors = torch.randint(3, vocab_size, (states, 4), generator = make)
    state = torch.randint(0, states, (rows,), generator = make)
    tokens = []
    for choice in torch.randint(0, 4, (length, rows), generator = make):
        token = successors[state, choice]
        tokens.append(token)
        state = token % states
    tokens = torch.stack(tokens, 1)
    labels = tokens.clone()
    labels[:, : length // 2] = -100
    ones = torch.ones_like(tokens)
    columns = {"input_ids": tokens, "attention_mask": ones, "labels": labels}
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def _child(folder: Path, result: Path, quick: bool) -> None:
    from unsloth import FastLanguageModel  # first, as Unsloth wants it

    import torch
    from transformers import TrainerCallback, default_data_collator
    from trl import SFTConfig, SFTTrainer

    steps, batch, length = (4, 2, 64) if quick else (60, 4, 2048)
    accumulation = 2
    model, tokenizer = FastLanguageModel.from_pretrained(
        _checkpoint(folder, quick), max_seq_length = length, load_in_4bit = torch.cuda.is_available()
    )
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = FastLanguageModel.get_peft_model(
        model,
        r = 16,
        lora_alpha = 16,
        lora_dropout = 0,
        target_modules = list(layers),
        use_gradient_checkpointing = "unsloth",
        random_state = 3407,
    )
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    settings = SFTConfig(
        output_dir = str(folder / "out"),
        per_device_train_batch_size = batch,
        gradient_accumulation_steps = accumulation,
        max_steps = steps,
        learning_rate = 2e-4,
        warmup_steps = min(5, steps),
        logging_steps = 1,
        optim = "adamw_torch",
        bf16 = torch.cuda.is_available(),
        report_to = "none",
        save_strategy = "no",
        seed = 0,
        max_length = length,
        dataset_num_proc = 1,
        remove_unused_columns = False,
    )
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = _dataset(batch * steps, length, model.config.vocab_size),
        args = settings,
        data_collator = default_data_collator,
        callbacks = [Clock()],
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = harness.summarize([b - a for a, b in zip(ends[steps // 4 :], ends[steps // 4 + 1 :])])
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_seconds": seconds,
        "tokens_per_second": batch * length * accumulation / seconds["median"],
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
        "calls": _calls(),
    }
    result.write_text(json.dumps(found), encoding = "utf-8")


def _calls() -> dict:
    from unsloth_patches import status

    state = {row.name: row.state for row in status()}[PATCH]
    if state != "applied":
        return {}
    from unsloth_patches.fused_loss import calls

    return calls()


def plot(payload: dict, path: Path) -> None:
    """Draws a results file's figures."""
    with harness.plot_style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize = (10, 3.6))
        for form, color, style in (("stock", "upstream", "-"), ("patched", "ours", "--")):
            result = payload["forms"][form]
            label = f"{form}: {result['peak_mib']:.0f} MiB"
            left.plot(result["losses"], style, color = harness.COLORS[color], label = label)
        left.set_title("QLoRA SFT, Llama-3.2-1B shape: loss")
        left.set_xlabel("step")
        left.legend()
        right.semilogy(
            [max(d, 1e-9) for d in payload["relative_difference"]], color = harness.COLORS["ours"]
        )
        right.axhline(1e-3, color = "black", lw = 0.8, ls = ":")
        right.set_title("Relative difference of the loss (bound 1e-3)")
        right.set_xlabel("step")
        figure.savefig(path)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "quick")
