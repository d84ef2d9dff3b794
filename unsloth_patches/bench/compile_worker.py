# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""One process of `bench compile`: load a checkpoint in 4 bits, take QLoRA steps, write what it saw.

python -m unsloth_patches.bench.compile_worker job.json result.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

WAIT_S = 1800


def batch(rows: int, length: int, vocab_size: int, seed: int) -> Dict[str, Any]:
    """Random tokens with the labels of the first half ignored, as a prompt's are."""
    import torch

    make = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, vocab_size, (rows, length), generator = make)
    labels = tokens.clone()
    labels[:, : length // 2] = -100
    parts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: part.to(device) for name, part in parts.items()}


class Steps:
    """Optimizer steps of a model, timed until their work is done."""

    def __init__(self, model, job: dict, gpu):
        import torch

        self.model, self.job, self.gpu = model, job, gpu
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr = 1e-4
        )
        self.taken = 0

    def __call__(self, length: int) -> Dict[str, float]:
        """{seconds, loss} of one step on a batch of this length."""
        given = batch(self.job["batch"], length, self.model.config.vocab_size, self.taken)
        self.taken += 1
        self.gpu.drain()
        begin = time.perf_counter()
        loss = self.model(**given).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none = True)
        self.gpu.drain()
        seconds = time.perf_counter() - begin
        self.gpu.step_done(self.model)
        return {"seconds": seconds, "loss": float(loss.detach())}


def at_length(steps: Steps, length: int, gpu, rounds: int) -> dict:
    """Milliseconds of each timed step and the peak over them, above what was held before."""
    import torch

    steps(length)  # whatever compiles for this length
    gpu.reset_peak()
    held = torch.cuda.memory_allocated() if gpu.cuda else 0
    ms = [steps(length)["seconds"] * 1e3 for _ in range(rounds)]
    found: Dict[str, Any] = {"ms": ms}
    if gpu.cuda:
        found.update(gpu.memory())
        found["above_weights_mib"] = found["peak_mib"] - held / 2**20
    return found


def told(events) -> dict:
    """What CompileEvents saw, as numbers and reasons."""
    return {
        "graphs": events.graphs,
        "breaks": events.break_count,
        "break_places": sorted({f"{b.place}: {b.reason}" for b in events.breaks}),
        "recompilations": len(events.recompilations),
        "recompile_reasons": [c.recompile_reason for c in events.recompilations],
        "compilations": len(events.compilations),
        "compile_seconds": events.seconds(),
        "cached_seconds": events.seconds(cached = True),
    }


def found_in_caches() -> Dict[str, int]:
    """What PyTorch's caches had: forward and backward pairs (autograd), and Inductor's graphs."""
    from torch._dynamo.utils import counters

    kinds = (("aot_autograd", "autograd_cache"), ("inductor", "fxgraph_cache"))
    ends = ("hit", "miss", "bypass")
    return {
        f"{name} {end}": counters[kind][f"{name}_{end}"] for kind, name in kinds for end in ends
    }


def stages() -> Dict[str, float]:
    """PyTorch's own account of its seconds in the compiler: each stage holds those inside it."""
    from torch._dynamo.utils import compilation_time_metrics

    found = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}
    return {name: round(seconds, 2) for name, seconds in found.items() if seconds >= 0.1}


def _use_cache(folder: str, action: str) -> float:
    """Seconds that loading or saving the compile cache took."""
    from unsloth.models import compile_cache

    begin = time.perf_counter()
    getattr(compile_cache, f"{action}_compile_cache")(folder)
    return time.perf_counter() - begin


def _wait_for(path: str) -> None:
    """Until the file is there. Raises TimeoutError, should whoever makes it be gone."""
    end = time.monotonic() + WAIT_S
    while not Path(path).exists():
        if time.monotonic() > end:
            raise TimeoutError(f"bench compile: {path} did not appear in {WAIT_S} s")
        time.sleep(0.05)


def run(job: dict) -> dict:
    """Everything that one process measures. job: see `compile.Worker`."""
    begin = time.perf_counter()
    import unsloth  # noqa: F401  (first, as Unsloth wants it)
    from torch._inductor import async_compile

    from unsloth_patches.unsloth.models.compile_events import CompileEvents

    from .train_worker import Gpu, load

    gpu, seconds = Gpu(), {"import": time.perf_counter() - begin}
    events = CompileEvents()
    events.start()
    Path(job["ready"]).touch()
    _wait_for(job["go"])  # only one process loads and measures at a time
    loading = time.perf_counter()
    # The step with the longest sequence must not outgrow what the model was made for.
    model, _ = load({**job, "length": max(job["lengths"])})
    model.train()
    seconds["load"] = time.perf_counter() - loading
    if job["cache"]:  # to save, too: what Triton compiles is noted from here on
        seconds["load_cache"] = _use_cache(job["cache_folder"], "load")
    steps = Steps(model, job, gpu)
    first = [steps(job["length"]) for _ in range(3)]
    seconds["first_step"], seconds["second_step"] = first[0]["seconds"], first[1]["seconds"]
    in_compiler = stages()
    lengths = {n: at_length(steps, n, gpu, job["rounds"]) for n in job["lengths"]}
    events.stop()
    if job["cache"] == "save":
        seconds["save_cache"] = _use_cache(job["cache_folder"], "save")
    uncompiled = {}
    if job["uncompiled"]:
        os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"  # upstream reads it at every call of a block
        uncompiled = {n: at_length(steps, n, gpu, job["rounds"]) for n in job["lengths"]}
    return {
        "variant": job["variant"],
        "phase": job["phase"],
        "seconds": seconds,
        "losses": [entry["loss"] for entry in first],
        "stages": in_compiler,
        "caches": found_in_caches(),
        "all_lengths": told(events),
        "lengths": lengths,
        "uncompiled": uncompiled,
        "blocks": _blocks(model),
        # Unsloth confines Inductor to one where a container pins the GPU by NVIDIA_VISIBLE_DEVICES.
        "compile_threads": async_compile.get_compile_threads(),
    }


def _blocks(model) -> List[str]:
    """The classes that are compiled as blocks, with the modes of their layers."""
    found = {}
    for module in model.modules():
        if getattr(type(module).forward, "_unsloth_block_compiled", False):
            mode = module.__dict__.get("_unsloth_block_mode")
            found[f"{type(module).__name__} mode {mode}"] = True
    return sorted(found)


if __name__ == "__main__":
    described, written = map(Path, sys.argv[1:3])
    result = run(json.loads(described.read_text(encoding = "utf-8")))
    written.write_text(json.dumps(result), encoding = "utf-8")
