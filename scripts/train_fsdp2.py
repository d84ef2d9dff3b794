# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""QLoRA on two or more GPUs: Unsloth, FSDP2 and TRL's SFTTrainer.

    UNSLOTH_FSDP2=1 torchrun --nproc-per-node 2 scripts/train_fsdp2.py \\
        --model meta-llama/Llama-3.1-8B --data chats.jsonl

chats.jsonl: one {"text": ...} or {"messages": [...]} a line. Where the whole 4-bit model does not
fit a GPU, each rank loads its shard only (UNSLOTH_FSDP2_SHARDED_LOAD=auto|1|0), and what does not
fit even so moves to host memory (UNSLOTH_PATCHES_OFFLOAD=auto|never|blocks:K|all); both decisions
are printed. Two T4 (16 GB each, no bfloat16) need no other options: the dtype is float16 there. Without
GPUs it runs on CPU ranks (gloo), for tests of a toy.
"""

import argparse
import os

import unsloth_patches  # isort: skip  (before unsloth)
import unsloth  # noqa: F401  isort: skip
import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel


def parse_arguments():
    parser = argparse.ArgumentParser(
        description = __doc__, formatter_class = argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", required = True, help = "checkpoint folder or Hub name of a Llama-like model"
    )
    parser.add_argument("--data", required = True, help = "JSON lines with text or messages")
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


def main():
    options = parse_arguments()
    dtype = compute_dtype()
    # The load decides by the tokens of a micro-batch, which only the training settings say.
    os.environ.setdefault("UNSLOTH_FSDP2_BATCH_TOKENS", str(options.batch * options.length))
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length = options.length, load_in_4bit = True, dtype = dtype
    )
    model = FastLanguageModel.get_peft_model(
        model, r = options.rank, lora_alpha = options.rank, use_gradient_checkpointing = "unsloth"
    )
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = load_dataset("json", data_files = options.data, split = "train"),
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
