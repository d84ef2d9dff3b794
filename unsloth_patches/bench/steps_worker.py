# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""One process of `bench steps`: load a checkpoint in 4 bits and train LoRA on short sequences of many
lengths with SFTTrainer, by one way of batching after another.

    python -m unsloth_patches.bench.steps_worker job.json [file descriptor of the line to it]
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from . import harness
from .train_turns import Turns
from .train_worker import RANK, Gpu, _patches, _trainable, replay_summary, restore

PROFILED, PROFILED_FORM = 3, "graphs"  # steps of which the GPU's own time is taken
PATHS = {"default": {}, "padded": {"padding_free": False}, "packing": {"packing": True}}


def sequences(rows: int, median: int, longest: int, vocab_size: int):
    """Random tokens; lengths log-normal around the median, 32 to longest."""
    import torch
    from datasets import Dataset

    make = torch.Generator().manual_seed(1)
    lengths = (torch.randn(rows, generator = make) * 0.8 + math.log(median)).exp().long()
    lengths = lengths.clamp(min(32, longest), longest).tolist()
    words = torch.randint(4, min(vocab_size, 4096), (256,), generator = make)
    ids = [words[torch.randint(0, 256, (n,), generator = make)].tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids})


def load(job: dict):
    """(model with LoRA on all linears, tokenizer)"""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["checkpoint"], max_seq_length = job["longest"], load_in_4bit = True
    )
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    model = FastLanguageModel.get_peft_model(
        model,
        r = RANK,
        lora_alpha = RANK,
        lora_dropout = 0,
        target_modules = names.split(),
        use_gradient_checkpointing = "unsloth",
        random_state = 3407,
    )
    return model, tokenizer


def settings(job: dict, case: dict) -> dict:
    """TrainingArguments of so many steps."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": job["scratch"],
        "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "max_steps": case["steps"],
        "learning_rate": 2e-4,
        "warmup_steps": min(5, case["steps"]),
        "logging_steps": 1,
        "optim": "adamw_8bit" if gpu else "adamw_torch",
        "bf16": gpu,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
    }


def trainer_for(model, tokenizer, job: dict, case: dict, callback):
    """SFTTrainer over so many steps; packing gets more rows, since a packed one holds several."""
    from trl import SFTConfig, SFTTrainer

    batch, accumulated, steps = case["batch"], job["accumulation"], case["steps"]
    path = case["path"]
    rows = sequences(
        batch * accumulated * steps * (6 if path == "packing" else 1),
        case["median"],
        job["longest"],
        model.config.vocab_size,
    )
    chosen = {**settings(job, case), **PATHS[path]}
    if path == "packing":
        chosen["per_device_train_batch_size"] = 1
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = rows,
        args = SFTConfig(max_length = job["longest"], dataset_num_proc = 1, **chosen),
        callbacks = [callback],
    )
    collate, trainer.rows_tokens = trainer.data_collator, []

    def counted(examples):
        trainer.rows_tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted
    return trainer


def step_tokens(trainer) -> list:
    """Tokens of each step, without padding; as TRL logs them where its batches were not counted."""
    if not hasattr(trainer, "rows_tokens"):
        sums = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
        return [b - a for a, b in zip([0, *sums], sums)]
    each, counts = trainer.args.gradient_accumulation_steps, trainer.rows_tokens
    return [sum(counts[n : n + each]) for n in range(0, trainer.state.global_step * each, each)]


def _busy_seconds(profile) -> float:
    """Seconds in which any kernel or copy ran on the GPU."""
    from torch.autograd import DeviceType

    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
    )
    busy, end = 0, 0
    for start, stop in spans:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e9


def busy_share(model, tokenizer, job: dict, case: dict, gpu: Gpu) -> dict:
    """The GPU's own time for a token, from a profile of few steps. Its waits for the host and the
    profiler's cost to the host are no part of it, so tokens over it are what no host can exceed."""
    import torch
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gpu.drain()
            if state.global_step == case["steps"] - PROFILED:
                profile.start()

        def on_train_end(self, args, state, control, **kwargs):
            gpu.drain()
            profile.stop()

    profile = torch.profiler.profile(activities = [torch.profiler.ProfilerActivity.CUDA])
    trainer = trainer_for(model, tokenizer, job, case, Profile())
    trainer.train()
    tokens = sum(step_tokens(trainer)[-PROFILED:])
    return {"busy_seconds": _busy_seconds(profile), "tokens": tokens, "steps": PROFILED}


def train(make, model, tokenizer, job: dict, case: dict, gpu: Gpu, turns: Turns) -> dict:
    """Losses, seconds of each step (the GPU's work included), tokens of each, peak memory."""
    from transformers import TrainerCallback

    ends, began, steps = [[]], [], case["steps"]

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            began.append(time.time())

        def on_step_end(self, args, state, control, **kwargs):
            gpu.drain()
            ends[-1].append(time.time())
            gpu.step_done(model)
            if state.global_step % job["stretch"] == 0 and state.global_step < steps:
                turns.wait()
                ends.append([])

    trainer = make(model, tokenizer, job, case, Clock())
    gpu.reset_peak()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logged],
        "rewards": [entry["reward"] for entry in logged if "reward" in entry],  # GRPO's
        "stretches": [[b - a for a, b in zip(part, part[1:])] for part in ends],
        "first_step": ends[0][0] - began[0],
        **gpu.memory(),
        "tokens": step_tokens(trainer),
        "graphs": replay_summary(model),
    }


@contextmanager
def patches_that_run() -> Iterator[list]:
    """Gives the names of patches whose functions run in the block, without what an import or a graph ran
    before. [] below Python 3.12, which has no sys.monitoring."""
    from unsloth_patches import registry, unsloth

    names: list = []
    if sys.version_info < (3, 12):
        yield names
        return
    home = os.path.dirname(unsloth.__file__) + os.sep
    watch, ran = sys.monitoring, set()

    def started(code, offset):
        if code.co_filename.startswith(home):
            ran.add(code.co_filename[len(home) :])
        return watch.DISABLE  # that code once

    watch.use_tool_id(watch.PROFILER_ID, "bench")
    watch.register_callback(watch.PROFILER_ID, watch.events.PY_START, started)
    watch.set_events(watch.PROFILER_ID, watch.events.PY_START)
    try:
        yield names
    finally:
        watch.set_events(watch.PROFILER_ID, 0)
        watch.free_tool_id(watch.PROFILER_ID)
    names += [patch.name for patch in registry.PATCHES if ran.intersection(patch.modules)]


def acting(make, model, tokenizer, job: dict, case: dict) -> list:
    """Names of the patches whose functions run in a step that is neither replayed nor compiled."""
    import torch
    from transformers import TrainerCallback

    torch.compiler.set_stance("force_eager")
    os.environ["UNSLOTH_STEP_GRAPHS"] = "0"
    trainer = make(model, tokenizer, job, {**case, "steps": 1}, TrainerCallback())
    with patches_that_run() as names:
        trainer.train()
    return names


def run(job: dict, turns: Turns, load, trainer_for) -> dict:
    """Everything one process measures. Turns: to load, and each stretch of each case.

    load, trainer_for: as those above.
    """
    import unsloth  # noqa: F401  (first, as Unsloth wants it)

    turns.wait()
    gpu = Gpu()
    model, tokenizer = load(job)
    adapters = {name: p.detach().clone() for name, p in _trainable(model)}
    found = {"form": job["form"], "cases": {}, "environment": harness.environment(job["command"])}
    for name, case in job["cases"].items():
        restore(model, adapters)
        turns.wait(found)
        found["cases"][name] = train(trainer_for, model, tokenizer, job, case, gpu, turns)
        found.update(_patches())
    if job["form"] == "patched" and job.get("acting"):
        case = next(iter(job["cases"].values()))
        found["acting"] = acting(trainer_for, model, tokenizer, job, case)
    profiled = job["cases"] if gpu.cuda and job["form"] == PROFILED_FORM else {}
    for name, case in profiled.items():  # last: a profiler may leave traces
        turns.wait(found)
        case = {**case, "steps": 2 * PROFILED}
        found["cases"][name]["busy"] = busy_share(model, tokenizer, job, case, gpu)
    return found


def main(load = load, trainer_for = trainer_for) -> None:
    described = json.loads(Path(sys.argv[1]).read_text(encoding = "utf-8"))
    line = Turns(int(sys.argv[2]) if len(sys.argv) > 2 else None)
    line.wait(run(described, line, load, trainer_for))
    os._exit(0)  # nothing that a library does at exit may change the result


if __name__ == "__main__":
    main()
