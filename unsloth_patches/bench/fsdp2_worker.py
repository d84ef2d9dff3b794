# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""One rank of ``bench fsdp2``: load, wrap and train every case of a JSON list, and write what was
measured.

    RANK=0 WORLD_SIZE=2 ... python -m unsloth_patches.bench.fsdp2_worker cases.json result.json
    ours|upstream

Ranks that share one GPU (REHEARSE_ON_ONE_GPU=1) talk through gloo: their memory is their own and
counts, their times do not.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from typing import Dict, Optional, Tuple

STEPS = 4
WARMUP = 1  # steps of a case that its time leaves out
GATHER_ROUNDS = 5
# Trainings of cases with "turn", and the bytes that each holds: they stay loaded, so that steps of several
# kinds can take turns.
KEPT: Dict[str, Tuple[_Training, int]] = {}


def _gib(count: Optional[float]) -> Optional[float]:
    return None if count is None else round(count / 2**30, 4)


class Memory:
    """Peak of torch's allocator on this rank since the last ``reset``, less the ``kept`` bytes of other
    trainings; None without a GPU, where torch counts nothing.
    """

    def __init__(
        self,
        torch,
        kept: int = 0,
    ):
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.kept = kept

    def reset(self) -> None:
        if self.cuda:
            self.cuda.synchronize()
            self.cuda.reset_peak_memory_stats()

    def peak(self) -> Optional[int]:
        if not self.cuda:
            return None
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - self.kept

    def now(self) -> Optional[int]:
        return self.cuda.memory_allocated() - self.kept if self.cuda else None


def _environment(case: dict, mode: str) -> None:
    layout = case.get("layout", "auto")
    os.environ["UNSLOTH_FSDP2_LAYOUT"] = layout
    whole = case.get("whole") or mode == "upstream" or os.environ["WORLD_SIZE"] == "1"
    os.environ["UNSLOTH_FSDP2_SHARDED_LOAD"] = case.get("load", "0" if whole else "1")
    os.environ["UNSLOTH_FSDP2_OFFLOAD"] = case.get("offload", "never")


def _fraction(torch, gib) -> None:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            1.0 if not gib else min(gib * 2**30 / total, 1.0)
        )


def run_case(case: dict, mode: str) -> dict:
    """Measurements of one case; an error is one of them."""
    import torch
    import torch.distributed as dist

    found = {"stage": "load"}
    try:
        _environment(case, mode)
        _fraction(torch, case.get("card_gib"))
        _measure(case, found)
    except torch.OutOfMemoryError as error:
        found["error"] = f"out of memory: {str(error)[:160]}"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error)[:600]}"
    found["host_peak"] = _gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if "error" in found and dist.is_initialized():
        found["last"] = (
            True  # the other ranks may wait in a collective: nothing can follow in this process
        )
    return found


def _load(case: dict, found: dict, memory: Memory):
    import torch
    from unsloth import FastLanguageModel

    memory.reset()
    begin = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        case["checkpoint"], max_seq_length = case["length"], load_in_4bit = True, dtype = torch.bfloat16
    )
    found.update(load_s = round(time.perf_counter() - begin, 2), load_peak = _gib(memory.peak()))
    found.update(after_load = _gib(memory.now()), stage = "wrap", shards = _shards(model))
    if os.environ["UNSLOTH_FSDP2_SHARDED_LOAD"] == "1" and not found["shards"]:
        raise RuntimeError("a sharded load was asked for, and this is a whole one")
    return FastLanguageModel.get_peft_model(
        model,
        r = case.get("rank", 16),
        lora_alpha = 16,
        random_state = 1,
        use_gradient_checkpointing = case.get("checkpointing", True),
    )


def _shards(model) -> int:
    """4-bit weights of which this rank holds a shard only; 0 in a stock process."""
    sharding = sys.modules.get("unsloth_patches.unsloth.models.fsdp2_sharded_params")
    if sharding is None:
        return 0
    return sum(sharding.get_shard(module) is not None for module in model.modules())


def _wrap(model, found: dict, memory: Memory):
    memory.reset()
    begin = time.perf_counter()
    if int(os.environ["WORLD_SIZE"]) > 1:
        from torch.distributed.fsdp import FSDPModule
        from unsloth.models.fsdp2_native import shard_model

        model = shard_model(model)
        for unit in model.modules():
            if isinstance(unit, FSDPModule) and os.environ.get("REHEARSE_ON_ONE_GPU"):
                unit.set_force_sum_reduction_for_comms(True)  # gloo knows no average
    found.update(wrap_peak = _gib(memory.peak()), after_wrap = _gib(memory.now()), stage = "train")
    found["wrap_s"] = round(time.perf_counter() - begin, 2)
    plan = model.__dict__.get("_fsdp2_offload_plan")
    if plan is not None:
        found.update(offloaded_blocks = len(plan.blocks), planned_peak = _gib(plan.peak))
    return model


def _measure(case: dict, found: dict) -> None:
    """Load, wrap and train one case. In a function of its own, so that nothing of it outlives the
    case, unless it will have another turn.
    """
    import torch

    training, _ = KEPT.get(case["name"], (None, 0))
    if training is not None:
        training.run(case, found)
        return
    if not case.get("turn"):
        KEPT.clear()
        gc.collect()
    memory = Memory(torch, kept = sum(held for _, held in KEPT.values()))
    before = memory.now()
    training = _Training(case, found, memory)
    memory.reset()
    training.run(case, found)
    found["train_peak"] = _gib(memory.peak())
    _time_gathers(training.model, found, torch)
    if case.get("turn"):
        KEPT[case["name"]] = training, (memory.now() or 0) - (before or 0)
    found["stage"] = "done"


class _Training:
    """A loaded, wrapped model with its optimizer and one batch for every step."""

    def __init__(self, case: dict, found: dict, memory: Memory):
        import torch
        from unsloth import FastLanguageModel

        world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        self.model = _wrap(_load(case, found, memory), found, memory)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr = 1e-4, foreach = False
        )
        FastLanguageModel.for_training(self.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(0)
        batch, micro_batches = case.get("batch", 1), case.get("micro_batches", 1)
        size = (micro_batches * world, batch, case["length"])
        ids = torch.randint(10, case["shape"]["vocab_size"], size, generator = generator)
        ids = ids.to(self.device)
        self.tokens = ids.numel()
        self.inputs = [ids[index * world + rank] for index in range(micro_batches)]

    def step(self) -> float:
        """The loss of one optimizer step."""
        import torch

        total = 0.0
        for tokens in self.inputs:
            with torch.autocast(self.device, dtype = torch.bfloat16):
                loss = self.model(input_ids = tokens, labels = tokens).loss / len(self.inputs)
            loss.backward()
            total += loss.item()
            del loss  # as the Trainer does: its graph would hold memory through the next forward
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def run(self, case: dict, found: dict) -> None:
        import torch

        losses, seconds = [], []
        for _ in range(case.get("steps", STEPS)):
            begin = time.perf_counter()
            losses.append(self.step())
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        timed = sorted(seconds[min(case.get("warmup", WARMUP), len(seconds) - 1) :])
        middle = timed[len(timed) // 2]
        found.update(
            step_s = round(middle, 4),
            steps_s = [round(value, 4) for value in seconds],
            tokens_per_s = round(self.tokens / middle, 1),
            losses = [round(value, 5) for value in losses],
        )


def _time_gathers(model, found: dict, torch) -> None:
    """Milliseconds that gathering and freeing one block takes the host, and with the GPU's part."""
    units = getattr(model, "_unsloth_fsdp2_units", None)
    if not units:
        return
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    hosts, wholes = [], []
    for _ in range(GATHER_ROUNDS):
        wait()
        begin = time.perf_counter()
        for unit in units:
            unit.unshard()
            unit.reshard()
        hosts.append(time.perf_counter() - begin)
        wait()
        wholes.append(time.perf_counter() - begin)
    scale = 1e3 / len(units)
    found.update(
        gather_host_ms = round(scale * sorted(hosts)[GATHER_ROUNDS // 2], 3),
        gather_ms = round(scale * sorted(wholes)[GATHER_ROUNDS // 2], 3),
    )


def _wait_for_turn(index: int) -> None:
    turn = os.environ.get("BENCH_TURN")
    while turn and not os.path.exists(f"{turn}-{index}"):
        time.sleep(0.05)


def main() -> None:
    cases_file, result_file, mode = sys.argv[1:4]
    with open(cases_file, encoding = "utf-8") as handle:
        cases = json.load(handle)
    import torch
    import unsloth  # noqa: F401

    if int(os.environ["WORLD_SIZE"]) > 1:
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        gloo = os.environ.get("REHEARSE_ON_ONE_GPU") or not torch.cuda.is_available()
        dist.init_process_group("gloo" if gloo else "nccl")
        # NCCL starts with the first collective: of a sharded load that is in the load, else in the wrap.
        dist.all_reduce(torch.zeros(1, device = "cpu" if gloo else "cuda"))
    with open(result_file, "w", encoding = "utf-8") as out:
        for index, case in enumerate(cases):
            _wait_for_turn(index)
            found = run_case(case, mode)
            out.write(json.dumps({"case": case, **found}) + "\n")
            out.flush()
            if found.get("last"):
                break
    os._exit(0)  # after a failure in a collective an ordinary exit could wait for it


if __name__ == "__main__":
    main()
