# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``python -m unsloth_patches plan``: would QLoRA on this model train on these GPUs, and with what
offload?

Computed from a config and the stated memory; no GPU, no weights and no Unsloth are needed.

The command's options, in this order:

    --model PATH          config.json or a folder that holds one (required)
    --gpus N              ranks that share the frozen weights (required)
    --memory GIB          memory of one GPU in GiB (required)
    --tokens N            tokens of one micro-batch on one GPU, default 4096
    --rank N              LoRA rank, default 16, on all seven linears of a block
    --checkpointing KIND  unsloth | on | off, default unsloth
    --host GIB            memory of one host in GiB, default: not limited
    --gpus-per-host N     ranks of one host, default 8
    --offload MODE        auto | never | blocks:K | all, default auto
    --sweep               one line for each power of two up to N GPUs instead of one full table

The exit code is 0 where it fits (with --sweep: on N GPUs), else 1; 2 for a value that cannot be
counted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List, Optional

GIB = 2**30
# CUDA's context, cuBLAS and NCCL: what a card of N GiB does not give to tensors. Stated, not
# measured.
RESERVED_GIB = 2.0
CHECKPOINTING = {"unsloth": "unsloth", "on": True, "off": False}


def plan(
    model: Path,
    gpus: int,
    memory: float,
    tokens: int = 4096,
    rank: int = 16,
    checkpointing: str = "unsloth",
    host: Optional[float] = None,
    gpus_per_host: int = 8,
    offload: str = "auto",
    sweep: bool = False,
) -> int:
    """Prints the plan; see the module's docstring for arguments and the returned exit code."""
    from .models.fsdp2_offload_plan import plan_offload

    try:
        if checkpointing not in CHECKPOINTING:
            raise ValueError(f"--checkpointing {checkpointing}: choose {', '.join(CHECKPOINTING)}.")
        if memory <= RESERVED_GIB:
            raise ValueError(
                f"--memory {memory}: a GPU needs more than the {RESERVED_GIB} GiB kept for CUDA."
            )
        counts = _powers_of_two(gpus) if sweep else [gpus]
        plans = [
            plan_offload(
                model,
                batch_tokens = tokens,
                world = count,
                local_world = min(count, gpus_per_host),
                device_memory = int((memory - RESERVED_GIB) * GIB),
                host_memory = None if host is None else int(host * GIB),
                lora_rank = rank,
                gradient_checkpointing = CHECKPOINTING[checkpointing],
                override = offload,
            )
            for count in counts
        ]
    except ValueError as error:
        print(error, file = sys.stderr)
        return 2
    if sweep:
        print_sweep(plans, memory, tokens)
    else:
        print(plans[0].table())
    print(f"Computed, not measured; {RESERVED_GIB} GiB of each GPU are kept for CUDA and NCCL.")
    return 0 if plans[-1].fits else 1


def _powers_of_two(largest: int) -> List[int]:
    if largest < 1:
        raise ValueError(f"--gpus {largest}: has to be at least 1.")
    counts = [1 << power for power in range(1, largest.bit_length()) if 1 << power < largest]
    return [*counts, largest]


def print_sweep(plans: list, memory: float, tokens: int) -> None:
    """A Markdown table, one line a plan."""
    print(
        f"| GPUs of {memory:g} GiB | frozen shard GiB | peak GiB | host GiB | decision at {tokens} tokens |"
    )
    print("| ---: | ---: | ---: | ---: | --- |")
    for p in plans:
        if not p.fits:
            print(f"| {p.world} | | | | does not fit: {'; '.join(p.notes)} |")
            continue
        sizes = " | ".join(f"{size / GIB:.1f}" for size in (p.after_load, p.peak, p.host_needed))
        print(f"| {p.world} | {sizes} | {p.decision().partition(': ')[2]} |")
