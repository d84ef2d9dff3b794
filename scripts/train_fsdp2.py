# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""QLoRA on two or more GPUs: Unsloth, FSDP2 and TRL's SFTTrainer.

    UNSLOTH_FSDP2=1 torchrun --nproc-per-node 2 scripts/train_fsdp2.py \\
        --model meta-llama/Llama-3.1-8B-Instruct --data chats.jsonl

chats.jsonl: one {"text": ...} or {"messages": [...]} a line; messages need a model whose tokenizer
has a chat template, or --template with the name of one of Unsloth's. Several tool calls in a message
need --template llama-3.1, 3.2 or 3.3 and --parallel-tool-calls join or split. Model, data and template
are checked before the model is loaded: every row with messages is rendered once. Where the whole
4-bit model does not fit a GPU, each rank loads its shard only (UNSLOTH_FSDP2_SHARDED_LOAD=auto|1|0),
and what does not fit even so moves to host memory (UNSLOTH_FSDP2_OFFLOAD=auto|never|blocks:K|all);
both decisions are printed. Two T4 (16 GB each, no bfloat16) need no other options: the dtype is
float16 there. Without GPUs it runs on CPU ranks (gloo), for tests of a toy.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import unsloth_patches  # isort: skip  (before unsloth)
import unsloth  # noqa: F401  isort: skip
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from trl.data_utils import is_conversational
from unsloth import FastLanguageModel

from unsloth_patches.demo.checks import DemoError as WrongArgument
from unsloth_patches.demo.checks import check_model


def parse_arguments():
    parser = argparse.ArgumentParser(
        description = __doc__, formatter_class = argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", required = True, help = "checkpoint folder or Hub name of a Llama-like model"
    )
    parser.add_argument("--data", required = True, help = "JSON lines with text or messages")
    parser.add_argument(
        "--template", metavar = "NAME", help = "chat template of Unsloth; default: the tokenizer's own"
    )
    parser.add_argument(
        "--parallel-tool-calls",
        choices = ("error", "split", "join"),
        default = "error",
        help = "several calls in a message: refused, a turn each, or all in one turn",
    )
    parser.add_argument(
        "--output", default = "outputs", help = "folder for checkpoints and the adapter"
    )
    parser.add_argument("--length", type = int, default = 2048, help = "tokens of a sequence")
    parser.add_argument(
        "--batch", type = int, default = 1, help = "sequences of a micro-batch on one GPU"
    )
    parser.add_argument("--accumulate", type = int, default = 4, help = "micro-batches of a step")
    parser.add_argument("--steps", type = int, default = 60)
    parser.add_argument("--save-steps", type = int, default = 30)
    parser.add_argument("--rank", type = int, default = 16, help = "LoRA rank")
    parser.add_argument("--learning-rate", type = float, default = 2e-4)
    parser.add_argument(
        "--resume", action = "store_true", help = "go on from the last checkpoint in --output"
    )
    parser.add_argument("--merged", help = "folder for the merged 16-bit model; default: not saved")
    return parser.parse_args()


def compute_dtype():
    """bfloat16 where the GPU (or the CPU) has it, float16 on a T4."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        return torch.float16
    return torch.bfloat16


def training_settings(options, dtype):
    return SFTConfig(
        output_dir = options.output,
        max_length = options.length,
        per_device_train_batch_size = options.batch,
        gradient_accumulation_steps = options.accumulate,
        max_steps = options.steps,
        save_steps = options.save_steps,
        learning_rate = options.learning_rate,
        lr_scheduler_type = "cosine",
        warmup_steps = min(5, options.steps // 10),
        optim = "adamw_torch",
        max_grad_norm = 1.0,
        logging_steps = 1,
        fp16 = dtype == torch.float16,
        bf16 = dtype == torch.bfloat16,
        use_cpu = not torch.cuda.is_available(),
        report_to = [],
        seed = 3407,
    )


def check_model_name(model):
    """Raise WrongArgument for a model that is neither here nor on the Hub."""
    folder = Path(model)
    # A Hub name is owner/name; everything else can only be a folder.
    if not folder.exists() and model.count("/") == 1 and model[0] not in "./~":
        check_hub_name(model)
    elif not is_adapter(folder):
        check_model(folder)


def is_adapter(folder):
    """An adapter to train on: Unsloth loads it with its base model."""
    return (folder / "adapter_config.json").is_file()


def check_hub_name(name):
    from transformers.utils import cached_file
    try:
        cached_file(loaded_name(name), "config.json")
    except OSError as error:
        if "does not appear to have a file" in str(error):  # an adapter's repository has none
            return
        raise WrongArgument(
            f"--model {name}: there is no such folder here, and the Hub does not give it: "
            f"{str(error).strip().splitlines()[0]} Name a checkpoint's folder, or a model that you "
            "can download."
        ) from None


def load_data(data):
    """The rows of --data. Raise WrongArgument where there are none that SFTTrainer can train on."""
    try:
        rows = load_dataset("json", data_files = data, split = "train")
    except Exception as error:
        reason = str(error.__cause__ or error) or type(error).__name__
        raise WrongArgument(
            f"--data {data} cannot be read ({reason.strip()}). Name a file of JSON lines."
        ) from None
    if not {"text", "messages", "prompt"} & set(rows.column_names) or not len(rows):
        raise WrongArgument(
            f"--data {data}: {len(rows)} rows with {', '.join(rows.column_names)}. Write one JSON object a "
            'line, with "text" or "messages".'
        )
    return rows


def check_template_options(options):
    """Raise WrongArgument for a template that Unsloth does not have, or a mode without a template."""
    from unsloth.chat_templates import CHAT_TEMPLATES

    mode, name = options.parallel_tool_calls, options.template
    if name is None and mode != "error":
        raise WrongArgument(
            f"--parallel-tool-calls {mode} needs a template that has it. Add --template llama-3.1, "
            "llama-3.2 or llama-3.3, whichever the model is."
        )
    if name is not None and name not in CHAT_TEMPLATES:
        raise WrongArgument(
            f"--template {name} is unknown. Name one of {', '.join(CHAT_TEMPLATES)}."
        )


def check_conversations(options, rows):
    """Raise WrongArgument for the first row that the tokenizer of the training cannot render."""
    tokenizer = read_tokenizer(options.model)
    if tokenizer is None:
        return
    try:
        tokenizer = with_template(tokenizer, options)
    except Exception as error:
        raise WrongArgument(f"--template {options.template}: {first_line(error)}") from None
    if not tokenizer.chat_template:
        raise WrongArgument(
            f"--model {options.model}: its tokenizer has no chat template, and --data has messages. "
            "Name a model that has one (an instruct model) or a template with --template, put a "
            'chat_template.jinja into its folder, or write lines with "text".'
        )
    for number, row in enumerate(rows):
        try:
            render(tokenizer, row)
        except Exception as error:
            raise WrongArgument(
                f"--data {options.data}, row {number} (rows count from 0) cannot be rendered: "
                f"{first_line(error)} {row_remedy(options, row)}"
            ) from None


def read_tokenizer(model):
    """The tokenizer that will be loaded; None where an adapter leaves it to its base model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(loaded_name(model))
    except Exception as error:
        if os.path.isdir(model) and not is_adapter(Path(model)):
            raise WrongArgument(
                f"--model {model}: its tokenizer cannot be read ({error})."
            ) from None
        return None
    try:  # what the patch tool-call-reload does at the load, where it is in
        from unsloth.tool_calls.reload import restore
    except ImportError:
        return tokenizer
    restore(tokenizer)
    return tokenizer


def with_template(tokenizer, options):
    """The tokenizer with the template that was asked for."""
    if options.template is None:
        return tokenizer
    from unsloth.chat_templates import get_chat_template

    # Stock Unsloth, where the patch is left out, knows no such keyword.
    mode = options.parallel_tool_calls
    extra = {} if mode == "error" else {"parallel_tool_calls": mode}
    return get_chat_template(tokenizer, options.template, **extra)


def render(tokenizer, row):
    """A row as the trainer renders it. It drops keys that Arrow filled with None."""
    given = row["messages"] if "prompt" not in row else [*row["prompt"], *row["completion"]]
    if not given:
        raise ValueError("it has no messages.")
    messages = [{key: value for key, value in m.items() if value is not None} for m in given]
    tools = row.get("tools")
    tokenizer.apply_chat_template(
        messages,
        tools = json.loads(tools) if isinstance(tools, str) else tools,
        tokenize = False,
        **(row.get("chat_template_kwargs") or {}),
    )


def row_remedy(options, row):
    several = any(len(message.get("tool_calls") or ()) > 1 for message in row.get("messages") or ())
    if several and options.parallel_tool_calls == "error":
        name = options.template or "llama-3.1 (or llama-3.2, llama-3.3)"
        return (
            "A message of it has several tool calls: of a Llama 3 model, train on them with --template "
            f"{name} --parallel-tool-calls join (or split), or write one call a message."
        )
    return "Mend or remove the row, or choose another template with --template."


def first_line(error):
    """An error's first line, ended like a sentence."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def loaded_name(model):
    """What FastLanguageModel loads for a Hub name: often a copy that is quantized already."""
    table = sys.modules.get("unsloth.models.loader_utils")  # Unsloth's CPU backend has none
    if table is None or os.path.isdir(model):
        return model
    return table.get_model_name(model, load_in_4bit = True) or model


def stop(error):
    """Every rank finds the same error; the first of a host tells it."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(60)  # torchrun ends all as soon as one ends, which has to be the one that tells
    print(f"train_fsdp2: {error}", file = sys.stderr, flush = True)
    sys.exit(2)


def main():
    options = parse_arguments()
    try:  # before the model is loaded, which takes minutes
        check_template_options(options)
        check_model_name(options.model)
        rows = load_data(options.data)
        if is_conversational(rows[0]):
            check_conversations(options, rows)
    except WrongArgument as error:
        stop(error)
    dtype = compute_dtype()
    # The load decides by the tokens of a micro-batch, which only the training settings say.
    os.environ.setdefault("UNSLOTH_FSDP2_BATCH_TOKENS", str(options.batch * options.length))
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length = options.length, load_in_4bit = True, dtype = dtype
    )
    tokenizer = with_template(tokenizer, options)
    model = FastLanguageModel.get_peft_model(
        model, r = options.rank, lora_alpha = options.rank, use_gradient_checkpointing = "unsloth"
    )
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = rows,
        args = training_settings(options, dtype),
    )
    trainer.train(resume_from_checkpoint = options.resume or None)
    adapter = os.path.join(options.output, "adapter")
    trainer.save_model(adapter)
    if options.merged:  # every rank takes part: the weights are gathered one after the other
        trainer.model.save_pretrained_merged(options.merged, tokenizer, save_method = "merged_16bit")
    if trainer.is_world_process_zero():
        states = {
            row.name: row.state for row in unsloth_patches.status() if row.name.startswith("fsdp2")
        }
        print(f"adapter saved in {adapter}; {states}")


if __name__ == "__main__":
    main()
