# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Loading in 4 bits, LoRA and TRL's SFTTrainer on responses only: the ordinary Unsloth recipe."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

from .checks import DemoError
from .data import Conversation
from .model import SPECIAL_TOKENS

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INSTRUCTION = "<|start_header_id|>user<|end_header_id|>\n\n"
RESPONSE = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@dataclass(frozen = True)
class Recipe:
    """What differs between a model that starts from random weights and a trained checkpoint."""

    steps: int
    batch_size: int
    learning_rate: float
    lora_alpha: int
    max_seq_length: int
    max_new_tokens: int
    from_scratch: bool


SCRATCH = Recipe(
    steps = 600,
    batch_size = 32,
    learning_rate = 6e-3,  # of the embeddings
    lora_alpha = 64,
    max_seq_length = 512,
    max_new_tokens = 64,  # its tokenizer needs about 14 for a call
    from_scratch = True,
)
MUON_LEARNING_RATE = 0.006
CHECKPOINT = Recipe(
    steps = 60,
    batch_size = 4,
    learning_rate = 2e-4,
    lora_alpha = 64,
    max_seq_length = 2048,
    max_new_tokens = 192,
    from_scratch = False,
)


def load(folder: Path, recipe: Recipe):
    """The checkpoint in 4 bits, its tokenizer with the llama-3.1 template, LoRA of rank 64.

    A tokenizer that lacks Llama's special tokens gets them, and the embeddings are then trained
    too.
    """
    import torch
    from unsloth import FastLanguageModel, get_chat_template
    from unsloth.tool_calls import add_stop_tokens

    # Without a GPU the small model trains in float32: the same on every CPU. None lets Unsloth
    # choose.
    dtype = torch.float32 if _in_float32(recipe) else None
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name = str(folder),
            max_seq_length = recipe.max_seq_length,
            dtype = dtype,
            load_in_4bit = True,
            use_gradient_checkpointing = False if recipe.from_scratch else "unsloth",
        )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DemoError(f"{folder} does not load: {reason[0]}") from error
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    tokenizer = get_chat_template(tokenizer, "llama-3.1", parallel_tool_calls = "join")
    add_stop_tokens(model, tokenizer)
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in PROJECTIONS if name in modules]
    if recipe.from_scratch or missing:
        targets += ["lm_head", "embed_tokens"]
    model = FastLanguageModel.get_peft_model(
        model,
        r = 64,
        target_modules = targets,
        lora_alpha = recipe.lora_alpha,
        lora_dropout = 0,
        bias = "none",
        use_gradient_checkpointing = False if recipe.from_scratch else "unsloth",
        random_state = 3407,
    )
    return model, tokenizer


def _in_float32(recipe: Recipe) -> bool:
    import torch
    return recipe.from_scratch and not torch.cuda.is_available()


def texts(conversations: Sequence[Conversation], tokenizer) -> List[str]:
    """Conversations as the chat template renders them."""
    return [
        tokenizer.apply_chat_template(c["messages"], tools = c["tools"], tokenize = False)
        for c in conversations
    ]


def bucket(
    conversations: Sequence[Conversation],
    batch_size: int,
    seed: int,
    window: int = 8,
) -> List[Conversation]:
    """The conversations in an order in which batches hold ones of similar length, in random order.

    They are sorted by the words of their messages (the tools add little to any), and only within
    ``window`` batches: sorting all of them would fill whole batches with one tool's calls alone.
    """
    rng = random.Random(seed)
    ordered: List[Conversation] = []
    for start in range(0, len(conversations), window * batch_size):
        group = sorted(
            conversations[start : start + window * batch_size],
            key = lambda conversation: len(str(conversation["messages"]).split()),
        )
        batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        rng.shuffle(batches)
        ordered += [conversation for batch in batches for conversation in batch]
    return ordered


def _in_order(config: type) -> Dict[str, str]:
    """The setting for rows in the data set's order; transformers before 5 has none."""
    name = "train_sampling_strategy"
    return {name: "sequential"} if name in config.__dataclass_fields__ else {}


def make_trainer(
    model,
    tokenizer,
    conversations: Sequence[Conversation],
    out: Path,
    recipe: Recipe,
    seed: int,
    on_step: Callable[[int, float], None],
):
    """TRL's SFTTrainer on the conversations' texts, with only the assistant's turns in the loss.

    on_step: called after each optimizer step as ``on_step(step, loss)``.
    """
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth.chat_templates import train_on_responses_only

    from .muon import for_lora

    class Report(TrainerCallback):
        def on_log(
            self,
            args,
            state,
            control,
            logs = None,
            **kwargs,
        ):
            if logs and "loss" in logs:
                on_step(state.global_step, float(logs["loss"]))

    disable_progress_bars()
    rows = texts(bucket(conversations, recipe.batch_size, seed), tokenizer)
    bos = tokenizer.bos_token
    if bos:
        # The trainer's tokenizer adds it again where it has a rule for that.
        adds = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
        rows = [row.removeprefix(bos) if adds else row for row in rows]
    trained = [p for p in model.parameters() if p.requires_grad]
    dtypes = [p.dtype for p in trained]
    optimizer = None
    if recipe.from_scratch:
        optimizer = for_lora(model, MUON_LEARNING_RATE, recipe.learning_rate)
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = Dataset.from_dict({"text": rows}),
        args = SFTConfig(
            output_dir = str(out),
            dataset_text_field = "text",
            max_length = recipe.max_seq_length,
            per_device_train_batch_size = recipe.batch_size,
            gradient_accumulation_steps = 1,  # Unsloth's default is 2 on a GPU and 1 without
            max_steps = recipe.steps,
            learning_rate = recipe.learning_rate,
            lr_scheduler_type = "cosine",
            warmup_steps = max(1, recipe.steps // 20),
            adam_beta2 = 0.99,
            weight_decay = 0.0,
            optim = "adamw_torch" if recipe.from_scratch else "adamw_8bit",
            bf16 = False if _in_float32(recipe) else None,
            # TRL turns it on: a quarter of the small model's step.
            **({"gradient_checkpointing": False} if recipe.from_scratch else {}),
            logging_steps = 1,
            **_in_order(SFTConfig),  # the order is bucket()'s
            save_strategy = "no",
            report_to = "none",
            disable_tqdm = True,
            seed = seed,
        ),
        callbacks = [Report()],
        optimizers = (optimizer, None),
    )
    if not _in_order(SFTConfig):
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    # TRL has cast the 4-bit model's adapter to bfloat16, where small updates are lost: keep
    # Unsloth's choice.
    for parameter, dtype in zip(trained, dtypes):
        parameter.data = parameter.data.to(dtype)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return train_on_responses_only(trainer, instruction_part = INSTRUCTION, response_part = RESPONSE)


@contextlib.contextmanager
def stop_on_interrupt(trainer) -> Iterator[Dict[str, bool]]:
    """Within it the first Ctrl-C ends training after the step that is running; a second one raises.

    Yields a dict whose "stopped" says whether that happened. A step that is cut short would leave
    some weights updated and others not.
    """
    from transformers import TrainerCallback

    state = {"stopped": False}

    class Stop(TrainerCallback):
        def on_step_end(self, args, trainer_state, control, **kwargs):
            if state["stopped"]:
                control.should_training_stop = True

    def handle(signum: int, frame: Any) -> None:
        if state["stopped"]:
            raise KeyboardInterrupt
        state["stopped"] = True

    trainer.add_callback(Stop())
    if threading.current_thread() is not threading.main_thread():
        yield state  # signals reach the main thread alone
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, previous)
