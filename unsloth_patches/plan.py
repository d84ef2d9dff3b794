# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``python -m unsloth_patches plan``: would QLoRA on this model train on these GPUs, and with what
offload?

Computed from a config and the stated memory; no GPU, no weights and no Unsloth are needed.

The command's options, in this order:

    --model PATH          config.json or a folder that holds one (required without --table)
    --gpus N              ranks that share the frozen weights (required without --table)
    --memory GIB          memory of one GPU in GiB, as it reports it; default 79, an 80 GB card
    --tokens N            tokens of one micro-batch on one GPU, default 4096
    --rank N              LoRA rank, default 16, on all seven linears of a block
    --checkpointing KIND  unsloth | on | off, default unsloth
    --host GIB            memory of one host in GiB, default: not limited
    --gpus-per-host N     ranks of one host, default 8
    --offload MODE        auto | never | blocks:K | all, default auto
    --sweep               one line for each power of two up to N GPUs instead of one full table
    --table               Markdown for Llama-3.1 70B and 405B (or --model) on 2 to 64 (--gpus) GPUs

The exit code is 0 where it fits (with --sweep: on N GPUs; with --table always), else 1; 2 for a
value that cannot be counted, or a model that is no decoder. Where it does not fit, each single option
is named with which it would. What the count leaves out of a model is said in a last line. The memory
of step graphs (one GPU only) is not counted.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, List, Optional

GIB = 2**30
# CUDA's context, cuBLAS and NCCL: what a card of N GiB does not give to tensors. Stated, not
# measured.
RESERVED_GIB = 2.0
CARD_GIB = 79.0
LARGEST = 64
LARGEST_CARD_GIB = 4096
# What step graphs may take beside gradient checkpointing: docs/step_graphs.md.
STEP_GRAPHS = (
    "Not counted: step graphs, which run on one GPU only, take up to 256 MiB plus 15% of the peak more "
    "(UNSLOTH_STEP_GRAPHS=0: none)."
)
_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256}
# Of the published configs.
LLAMAS = {
    "Llama-3.1-70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama-3.1-405B": {
        **_LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
}
CHECKPOINTING = {"unsloth": "unsloth", "on": True, "off": False}


@dataclass(frozen = True)
class _Job:
    """What is trained and on what, as the command's options say it."""

    memory: float
    tokens: int
    rank: int
    checkpointing: str
    host: Optional[float]
    gpus_per_host: int
    offload: str

    def check(self) -> None:
        """Here and not in plan_offload, which knows none of the command's options."""
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(
                f"--checkpointing {self.checkpointing}: choose {', '.join(CHECKPOINTING)}."
            )
        if not RESERVED_GIB < self.memory < math.inf:
            raise ValueError(
                f"--memory {self.memory}: state a GPU's memory in GiB, more than the {RESERVED_GIB} "
                "GiB kept for CUDA."
            )
        _check_count("--tokens", self.tokens)
        _check_count("--rank", self.rank)
        _check_count("--gpus-per-host", self.gpus_per_host)
        if self.host is not None and not 0 <= self.host < math.inf:
            raise ValueError(f"--host {self.host}: state a host's memory in GiB, or leave it out.")

    def training(self, gpus: int) -> Any:
        from .unsloth.models.fsdp2_memory_count import Training
        kept = CHECKPOINTING[self.checkpointing]
        return Training(gpus, self.tokens, self.rank, checkpointing = kept)

    def on(self, source: Any, gpus: int) -> Any:
        """plan_offload's plan for a model on so many GPUs."""
        from .unsloth.models.fsdp2_offload_plan import plan_offload
        return plan_offload(
            source,
            self.training(gpus),
            local_world = min(gpus, self.gpus_per_host),
            device_memory = int((self.memory - RESERVED_GIB) * GIB),
            host_memory = None if self.host is None else int(self.host * GIB),
            override = self.offload,
        )

    def whole_gib(self, source: Any, gpus: int) -> float:
        """GiB that a GPU needs with the whole 4-bit model on every one."""
        from .unsloth.models import fsdp2_memory_count as count
        from .unsloth.models.fsdp2_model_shape import read_shape

        phases = count.whole_model_phases(read_shape(source), self.training(gpus))
        return count.largest_phase(phases)[2] * (1 + count.FRAGMENTATION) / GIB


def _check_count(option: str, value: Optional[int]) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{option} {value}: state a whole number that is at least 1.")


def plan(
    model: Optional[Path] = None,
    gpus: Optional[int] = None,
    memory: float = CARD_GIB,
    tokens: int = 4096,
    rank: int = 16,
    checkpointing: str = "unsloth",
    host: Optional[float] = None,
    gpus_per_host: int = 8,
    offload: str = "auto",
    sweep: bool = False,
    table: bool = False,
) -> int:
    """Prints the plan; see the module's docstring for arguments and the returned exit code."""
    job = _Job(memory, tokens, rank, checkpointing, host, gpus_per_host, offload)
    try:
        if not table and (model is None or gpus is None):
            raise ValueError("plan: state --model and --gpus, or ask for --table.")
        _check_count("--gpus", gpus)
        job.check()
        if table:
            return _table(job, model, LARGEST if gpus is None else gpus)
        plans = [job.on(model, count) for count in (_powers_of_two(gpus) if sweep else [gpus])]
        notes = _left_out(model) if sweep else []  # a single plan's table ends with them
    except ValueError as error:
        print(_of_options(str(error)), file = sys.stderr)
        return 2
    if sweep:
        print_sweep(plans, memory, tokens)
    else:
        print(plans[0].table())
    if not plans[-1].fits:
        print(*_remedies(job, model, gpus), sep = "\n")
    print(*[_label(), *[STEP_GRAPHS] * (gpus == 1), *notes], sep = "\n")
    return 0 if plans[-1].fits else 1


def _remedies(job: _Job, source: Any, gpus: int) -> List[str]:
    """Every option that makes it fit when it alone is changed, with the value that does."""

    def fits(count: int = gpus, **changes: Any) -> bool:
        return replace(job, **changes).on(source, count).fits

    found = []
    if job.offload != "auto" and fits(offload = "auto"):
        found.append("--offload auto (in a training: UNSLOTH_FSDP2_OFFLOAD=auto)")
    if job.checkpointing != "unsloth" and fits(checkpointing = "unsloth"):
        found.append("--checkpointing unsloth")
    if fits(tokens = 1):
        most = _first(1, job.tokens, lambda tokens: not fits(tokens = tokens)) - 1
        found.append(f"--tokens {most} (shorter rows, or fewer in a micro-batch)")
    more = [count for count in _powers_of_two(LARGEST) if count > gpus and fits(count)]
    if more:
        why = ": offload to host memory needs two at least" if gpus == 1 else ""
        found.append(f"--gpus {more[0]} (more GPUs{why})")
    if job.host is not None and fits(host = None):
        found.append(f"--host {_least_host(job, source, gpus)} (GiB of one host)")
    if fits(memory = LARGEST_CARD_GIB):
        least = _first(int(job.memory), LARGEST_CARD_GIB, lambda size: fits(memory = size))
        found.append(f"--memory {least} (GiB of one GPU)")
    if not found:
        return ["No single option makes it fit: change several, or take a smaller model."]
    return [
        "It would fit with any one of these, all else as it is:",
        *(f"  {one}" for one in found),
    ]


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number above ``low`` for which it holds, as it does for ``high``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _least_host(job: _Job, source: Any, gpus: int) -> int:
    from .unsloth.models.fsdp2_offload_plan import HOST_SHARE
    needed = replace(job, host = None).on(source, gpus).host_needed
    return math.ceil(needed / HOST_SHARE / GIB)


def _table(job: _Job, model: Optional[Path], gpus: int) -> int:
    sources = LLAMAS if model is None else {str(model): model}
    found = [(name, job.on(sources[name], n)) for name in sources for n in _powers_of_two(gpus)]
    wholes = [job.whole_gib(sources[name], plan.world) for name, plan in found]
    notes = [] if model is None else _left_out(model)
    print_table(found, wholes, job.memory, job.tokens)
    print(*notes, sep = "\n", end = "\n" if notes else "")
    return 0


def _left_out(model: Path) -> List[str]:
    """What the count leaves out of this model or assumes of it, a line each."""
    from .unsloth.models.fsdp2_model_shape import read_shape
    return list(read_shape(model).notes)


def _of_options(message: str) -> str:
    """The count's messages name a variable; who runs the command gave options."""
    from .unsloth.models.fsdp2_offload_plan import OFFLOAD_ENV
    return message.replace("memory plan: ", "plan: ").replace(OFFLOAD_ENV, "--offload")


def _label() -> str:
    return f"Computed, not measured; {RESERVED_GIB} GiB of each GPU are kept for CUDA and NCCL."


def _powers_of_two(largest: int) -> List[int]:
    counts = [1 << power for power in range(1, largest.bit_length()) if 1 << power < largest]
    return [*counts, largest]


def _cells(p: Any) -> List[str]:
    """What both tables show of a plan: GiB needed, of weights in it, of one host, the decision.

    Needed, and not the peak: with the allocator's loss, as in a single plan's last line, it is what
    the decision is made by.
    """
    sizes = [f"{size / GIB:.1f}" for size in (p.needed, p.after_load, p.host_needed)]
    decision = p.decision().partition(": ")[2].removesuffix(f" ({p.mode})")
    return [*sizes, decision if p.fits else f"does not fit: {'; '.join(p.notes)}"]


def print_sweep(plans: list, memory: float, tokens: int) -> None:
    """A Markdown table, one line a plan."""
    print(
        f"| GPUs of {memory:g} GiB | with allocator loss, GiB | weights of it | host GiB of one host "
        f"| decision at {tokens} tokens |"
    )
    print("| ---: | ---: | ---: | ---: | --- |")
    for p in plans:
        print(f"| {p.world} | {' | '.join(_cells(p))} |")


def print_table(found: list, wholes: list, memory: float, tokens: int) -> None:
    """A Markdown table over models and numbers of GPUs, its label below."""
    print(
        f"| model | GPUs of {memory:g} GiB | whole model on each, GiB | sharded, GiB | weights of it "
        "| host GiB of one host | decision |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for (name, p), whole in zip(found, wholes):
        fits = "" if whole * GIB <= p.usable else " (too much)"
        print(f"| {name} | {p.world} | {whole:.1f}{fits} | {' | '.join(_cells(p))} |")
    print(f"\nTokens of a micro-batch: {tokens}. {_label()}")
