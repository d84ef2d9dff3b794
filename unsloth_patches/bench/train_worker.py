# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""One process of `bench train`: load a checkpoint, train it with SFTTrainer (QLoRA, mostly), once for
each share of ignored labels, and send what was measured to the process that started it.

    python -m unsloth_patches.bench.train_worker job.json [file descriptor of the line to it]
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from . import harness
from .train_profile import LOSS_RANGE, breakdown
from .train_turns import Turns

RANK = 16
LEARNING_RATE = 2e-4
LR_WARMUP_STEPS = 5
FIRST_STEPS = 3  # of a run that compiles everything, before anything is timed
WORDS = 256  # that the synthetic language uses, so that its frequencies are learned within a run
PROFILE_AFTER = 2  # steps of a profiled run that are not profiled


def dataset(rows: int, length: int, vocab_size: int, ignored: float):
    """Sequences of a random language in which each word has four successors.

    ignored: share of each sequence, from its start on, whose labels are -100, as a prompt's are.
    """
    import torch
    from datasets import Dataset

    make = torch.Generator().manual_seed(1)
    words = torch.randint(4, vocab_size, (WORDS,), generator = make)
    successors = torch.randint(0, WORDS, (WORDS, 4), generator = make)
    state = torch.randint(0, WORDS, (rows,), generator = make)
    columns = []
    for choice in torch.randint(0, 4, (length, rows), generator = make):
        state = successors[state, choice]
        columns.append(words[state])
    tokens = torch.stack(columns, 1)
    labels = tokens.clone()
    labels[:, : int(length * ignored)] = -100
    parts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return Dataset.from_dict({name: part.tolist() for name, part in parts.items()})


class Gpu:
    """The CUDA calls that are needed; nothing and zeros on a machine without a GPU.

    Between two replays a graph's pool holds memory that no tensor has: nobody else can use it, and the
    allocator's peak leaves it out. So it is added to the peak of every step that captured nothing.
    """

    def __init__(self):
        import torch
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self._captures, self._pools, self._peak, self._reserved = 0, 0, 0, 0

    def drain(self) -> None:
        if self.cuda:
            self.cuda.synchronize()

    def reset_peak(self) -> None:
        self._peak, self._reserved = 0, 0
        if self.cuda:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()

    def step_done(self, model) -> None:
        """Take the step's peak into the run's."""
        if not self.cuda:
            return
        peak, captures = self.cuda.max_memory_allocated(), replay_summary(model).get("captures", 0)
        self._reserved = max(self._reserved, self.cuda.max_memory_reserved())
        self.cuda.reset_peak_memory_stats()
        if captures == self._captures:
            peak += self._pools
        else:  # a capture's own work is allocated, in what the pools hold from now on
            self._captures, self._pools = captures, self._held_by_pools()
        self._peak = max(self._peak, peak)

    def _held_by_pools(self) -> int:
        private = [s for s in self.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
        return sum(segment["total_size"] - segment["allocated_size"] for segment in private)

    def memory(self) -> dict:
        """MiB since `reset_peak`, at most: what steps took, and what was reserved for the process."""
        return {"peak_mib": self._peak / 2**20, "reserved_mib": self._reserved / 2**20}


def replay_summary(model) -> dict:
    """What was replayed by step graphs; {} without them."""
    try:
        from unsloth.models.step_graphs import summary
    except ImportError:
        return {}
    return summary(model)


def load(job: dict):
    """(model, tokenizer): in 4 bits with LoRA of rank 16 on all linears, unless job["options"] say
    load_in_4bit = False, full_finetuning = True (no LoRA then) or a ``checkpoint_skip_layers``.
    """
    from unsloth import FastLanguageModel

    options = job.get("options", {})
    full = options.get("full_finetuning", False)
    skip = {key: options[key] for key in ("checkpoint_skip_layers",) if key in options}
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["checkpoint"],
        max_seq_length = job["length"],
        load_in_4bit = options.get("load_in_4bit", not full),
        full_finetuning = full,
        use_gradient_checkpointing = "unsloth",
    )
    if full:  # Unsloth's CPU backend would add LoRA all the same
        return model, tokenizer
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = FastLanguageModel.get_peft_model(
        model,
        r = RANK,
        lora_alpha = RANK,
        lora_dropout = 0,
        target_modules = list(layers),
        use_gradient_checkpointing = "unsloth",
        random_state = 3407,
        **skip,  # no argument of the CPU backend's
    )
    return model, tokenizer


def _trainable(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def restore(model, start: dict) -> None:
    """The trained weights as they were at the start, so that every share trains from the same point."""
    import torch
    with torch.no_grad():
        for name, parameter in _trainable(model):
            parameter.copy_(start[name])
            parameter.grad = None


def trainer_for(model, tokenizer, job: dict, rows, steps: int, callback):
    """SFTTrainer over the first ``steps`` batches of rows."""
    import torch
    from transformers import default_data_collator
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir = job["scratch"],
        per_device_train_batch_size = job["batch"],
        gradient_accumulation_steps = 1,
        max_steps = steps,
        learning_rate = LEARNING_RATE,
        warmup_steps = min(LR_WARMUP_STEPS, steps),
        logging_steps = 1,
        optim = "adamw_torch",
        bf16 = torch.cuda.is_available(),
        report_to = "none",
        save_strategy = "no",
        seed = 0,
        max_length = job["length"],
        dataset_num_proc = 1,
        disable_tqdm = True,
        remove_unused_columns = False,
    )
    return SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = rows.select(range(job["batch"] * steps)),
        args = settings,
        data_collator = default_data_collator,
        callbacks = [callback],
    )


def stretches(model, gpu: Gpu, turns: Turns, length: int, steps: int):
    """A callback that gives the turn away after every ``length`` steps, and what it measures: a list
    of the moments at which steps were done for each stretch between."""
    from transformers import TrainerCallback

    ends = [[]]

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gpu.drain()
            ends[-1].append(time.time())
            gpu.step_done(model)
            if state.global_step % length == 0 and state.global_step < steps:
                turns.wait()
                ends.append([])

    return Clock(), ends


def train(model, tokenizer, job: dict, rows, steps: int, gpu: Gpu, turns: Turns) -> dict:
    """Losses, the moments at which steps were done (the GPU's work included), and peak memory."""
    callback, ends = stretches(model, gpu, turns, job["stretch"], steps)
    trainer = trainer_for(model, tokenizer, job, rows, steps, callback)
    gpu.reset_peak()
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        # A stretch's first step is not timed: it begins with the end of the wait.
        "stretches": [[b - a for a, b in zip(part, part[1:])] for part in ends],
        "first_step_end": ends[0][0],
        **gpu.memory(),
        "graphs": replay_summary(model),
    }


@contextmanager
def _marked_loss():
    """The fused loss inside a named range, in every module that calls it by name."""
    from torch.profiler import record_function

    name = "unsloth_fused_ce_loss"
    holders = [m for m in list(sys.modules.values()) if callable(getattr(m, name, None))]
    originals = [(module, getattr(module, name)) for module in holders]

    def marked(loss):
        def call(*args, **kwargs):
            with record_function(LOSS_RANGE):
                return loss(*args, **kwargs)

        return call

    try:
        for module, loss in originals:
            setattr(module, name, marked(loss))
        yield
    finally:
        for module, loss in originals:
            setattr(module, name, loss)


def profile(model, tokenizer, job: dict, rows, gpu: Gpu, turns: Turns) -> dict:
    """GPU milliseconds of a step by kind; see train_profile. The turn is over after the steps."""
    import torch
    from transformers import TrainerCallback

    steps = job["profile_steps"]
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities = activities, record_shapes = True)

    class Window(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == PROFILE_AFTER:
                gpu.drain()
                profiler.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == PROFILE_AFTER + steps:
                gpu.drain()
                profiler.stop()

    with _marked_loss():
        count = PROFILE_AFTER + steps
        trainer_for(model, tokenizer, job, rows, count, Window()).train()
    turns.wait()
    trace = Path(job["scratch"]) / "trace.json"
    profiler.export_chrome_trace(str(trace))
    return breakdown(json.loads(trace.read_text(encoding = "utf-8"))["traceEvents"], steps)


def _patches() -> dict:
    from unsloth_patches import status

    states = {row.name: row.state for row in status()}
    calls = {}
    if states.get("loss-options") == "applied":
        from unsloth_patches.unsloth.fused_loss import calls as count
        calls = count()
    return {"states": states, "loss_calls": calls}


def run(job: dict, turns: Turns) -> dict:
    """Everything that one process measures. job: see `train.job_for`.

    Turns: to load and compile (both processes at once), each stretch of steps, the profile.
    """
    import unsloth  # noqa: F401  (first, as Unsloth wants it)

    imported = time.time()
    turns.wait()
    started = time.time()
    gpu = Gpu()
    model, tokenizer = load(job)
    gpu.drain()
    loaded = time.time()
    rows = {
        name: dataset(job["batch"] * steps, job["length"], model.config.vocab_size, ignored)
        for name, (ignored, steps) in job["shares"].items()
    }
    # On the host: of a full fine-tuning they are a model.
    start = {name: p.detach().to("cpu", copy = True) for name, p in _trainable(model)}
    profiled = rows[job["profiled"]]
    first = train(model, tokenizer, {**job, "stretch": 10**9}, profiled, FIRST_STEPS, gpu, turns)
    seconds = {
        "to_import": imported - job["started"],
        "to_load": loaded - started,
        "to_first_step": first["first_step_end"] - loaded,
    }
    found = {
        "form": job["form"],
        "environment": harness.environment(job["command"]),
        "seconds": {**seconds, "in_all": sum(seconds.values())},
        "shares": {},
    }
    for name, (_, steps) in job["shares"].items():
        restore(model, start)
        turns.wait(found)
        found["shares"][name] = train(model, tokenizer, job, rows[name], steps, gpu, turns)
        found.update(_patches())
        print(f"{name} ignored, last loss {found['shares'][name]['losses'][-1]:.4f}", flush = True)
    turns.wait(found)
    restore(model, start)
    if gpu.cuda:
        found["profile"] = profile(model, tokenizer, job, profiled, gpu, turns)
    else:
        turns.wait()  # a turn without work: there is nothing to profile
    return found


if __name__ == "__main__":
    described = json.loads(Path(sys.argv[1]).read_text(encoding = "utf-8"))
    line = Turns(int(sys.argv[2]) if len(sys.argv) > 2 else None)
    measured = run(described, line)
    print(json.dumps(measured["seconds"]), flush = True)
    line.wait(measured)
    os._exit(0)  # nothing that a library does at exit may change the result
