# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Bytes that QLoRA training holds on one GPU, counted from a model's sizes, and what there is.

The peak is the largest of these phases, each a sum of what lives then:

- "wrap": the frozen shards and the adapter, which is sharded only then;
- "gather of the tables": embedding and head are gathered at the start of the forward, from a flat
  buffer that lives until they are copied out of it, so they count twice for that moment;
- "loss": every block's kept activations, and a chunk of the logits;
- "first block's backward": the deepest stack of activations (checkpoints) and one whole block;
- "last block's backward": one whole block and all gradients.

What a block saves is read off Unsloth's training path: the block input, both normed inputs and the
residual between them, queries and the attention's output, keys and values repeated for every query
head (how SDPA takes them where its kernel has no grouped attention), gate and up projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from .fsdp2_model_shape import LINEARS, LlamaShape

__all__ = [
    "Training",
    "largest_phase",
    "sharded_phases",
    "usable_device_memory",
    "usable_host_memory",
    "weight_bytes",
    "whole_model_phases",
]

GIB = 2**30
Line = Tuple[str, int]
Phases = Dict[str, List[Line]]

# Recomputing a checkpointed block gathers it as a forward does: the flat buffer of one block, the
# block itself and the buffer of the one behind it. Without recomputation the first is freed early.
GATHERED_BLOCKS, GATHERED_BLOCKS_PLAIN = 3, 2
# cuBLAS keeps one workspace a thread (forward and backward): 32 MiB each on compute capability 9.0,
# 8 MiB or less elsewhere.
WORKSPACES = 2 * 32 * 2**20
# A chunk of logits in the compute dtype, whose gradient is written over it.
LOGIT_CHUNK_BYTES = 256 * 2**20
# Unsloth's offloading checkpointing keeps two buffers of a block input for good. In a backward as
# many inputs as this are on the device: the buffers, the last block's, and those whose copies are on
# their way. Measured on an H200, not read off.
UNSLOTH_BUFFERS, UNSLOTH_KEPT_INPUTS = 2, 8
ADAM_BYTES = 8
# The caching allocator cannot use every byte of what it holds.
FRAGMENTATION = 1 / 16
LORA_TARGETS = LINEARS


@dataclass(frozen = True)
class Training:
    """What is trained, beside the model.

    world: ranks that share the frozen weights. tokens: of one micro-batch on one rank.
    checkpointing: True, False or "unsloth" (block inputs go to host memory). itemsize: bytes of the
    compute dtype. accumulates: several micro-batches a step, so the gradients of earlier ones are
    there in every backward. Raises ValueError for values that cannot be counted.
    """

    world: int
    tokens: int
    lora_rank: int = 16
    lora_targets: Tuple[str, ...] = LORA_TARGETS
    double_quant: bool = True
    checkpointing: Union[bool, str] = True
    itemsize: int = 2
    accumulates: bool = False

    def __post_init__(self):
        for name in ("world", "tokens", "lora_rank", "itemsize"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(
                    f"memory plan: {name} = {value!r} has to be a positive whole number."
                )
        unknown = [name for name in self.lora_targets if name not in LORA_TARGETS]
        if unknown:
            raise ValueError(
                f"memory plan: lora_targets names {unknown[0]!r}; known: {', '.join(LORA_TARGETS)}."
            )
        if self.checkpointing not in (True, False, "unsloth"):
            raise ValueError(
                f"memory plan: checkpointing = {self.checkpointing!r}: choose True, False or 'unsloth'."
            )


@dataclass(frozen = True)
class _Sizes:
    """Bytes of one rank's parts."""

    block: int  # gathered: packed weights, scales, norms, LoRA factors in the compute dtype
    block_shard: int
    table: int
    table_shard: int
    lora: int  # trainable numbers, whole
    scratch: int


def weight_bytes(parameters: int, double_quant: bool) -> int:
    """Packed nibbles and scales: one absmax per 64 weights, float32, or a byte with a float32 per
    256.
    """
    absmax = parameters / 64 * (1 + 4 / 256) if double_quant else parameters / 64 * 4
    return math.ceil(parameters / 2 + absmax)


def _sizes(shape: LlamaShape, job: Training) -> _Sizes:
    frozen = weight_bytes(shape.block_parameters, job.double_quant)
    frozen += 2 * shape.hidden * job.itemsize
    factors = job.lora_rank * sum(sum(shape.linears[name]) for name in job.lora_targets)
    table = (shape.vocab * (1 if shape.tied else 2) + 1) * shape.hidden * job.itemsize
    return _Sizes(
        block = frozen + factors * job.itemsize,
        block_shard = -(-frozen // job.world),
        table = table,
        table_shard = -(-table // job.world),
        lora = shape.layers * factors,
        scratch = job.itemsize * max(rows * columns for rows, columns in shape.linears.values()),
    )


def _saved_elements(shape: LlamaShape) -> int:
    """Numbers a token that one block keeps for its backward."""
    return 4 * shape.hidden + 4 * shape.attention + 2 * shape.intermediate


def _activations(shape: LlamaShape, job: Training) -> Dict[str, int]:
    """Bytes of activations in every phase that has some."""
    row = job.tokens * job.itemsize
    saved = _saved_elements(shape)
    # Gradient of the block's output, and what the MLP computes its own into.
    backward = shape.hidden + shape.intermediate
    if job.checkpointing:
        few = job.checkpointing == "unsloth"
        inputs = (min(shape.layers, UNSLOTH_KEPT_INPUTS) if few else shape.layers) * shape.hidden
        kept, last = inputs, shape.hidden
    else:
        kept, last = (shape.layers - 1) * saved, 0
    # The last norm's input and output, the loss's gradient of it, and the rows of a chunk.
    logits = min(job.tokens * shape.vocab * job.itemsize, LOGIT_CHUNK_BYTES)
    at_loss = kept + (0 if job.checkpointing else saved) + 4 * shape.hidden
    return {
        "loss": row * at_loss + logits,
        "first block's backward": row * (kept + saved + backward),
        "last block's backward": row * (last + saved + backward),
    }


def _checkpoint_buffers(shape: LlamaShape, job: Training) -> int:
    buffers = min(UNSLOTH_BUFFERS, shape.layers) if job.checkpointing == "unsloth" else 0
    return buffers * job.tokens * shape.hidden * job.itemsize


def sharded_phases(
    shape: LlamaShape,
    job: Training,
    blocks: int = 0,
    tables: bool = False,
) -> Tuple[Phases, int]:
    """({phase: lines}, host bytes) of a rank whose frozen weights are sharded.

    blocks, tables: how many blocks' shards, and whether the tables', are in host memory instead.
    """
    size, gathers = _sizes(shape, job), job.world > 1
    in_flight = GATHERED_BLOCKS if job.checkpointing else GATHERED_BLOCKS_PLAIN
    in_flight = min(in_flight, shape.layers) if gathers else 0
    resting = [
        ("frozen 4-bit blocks, shard", (shape.layers - blocks) * size.block_shard),
        ("frozen embedding and head, shard", 0 if tables else size.table_shard),
        ("LoRA and Adam, float32", -(-size.lora * (4 + ADAM_BYTES) // job.world)),
        ("dequantized weight and workspaces", size.scratch + WORKSPACES),
    ]
    if blocks:
        # An offloaded unit's shard is on the device from the copy until its gather is done.
        resting.append(("offloaded shards on their way", size.block_shard))
    gradients = ("LoRA gradients", -(-size.lora * 4 // job.world))
    table = ("gathered embedding and head", size.table if gathers else 0)
    early = [gradients] if job.accumulates else []
    phases = {
        "gather of the tables": [
            *resting,
            *early,
            ("embedding and head, gathered and flat", 2 * size.table if gathers else 0),
            ("offloaded tables on their way", size.table_shard if tables else 0),
            ("first gathered block", min(2, in_flight) * size.block),
            ("buffers of offloaded checkpoints", _checkpoint_buffers(shape, job)),
        ],
    }
    for phase, activations in _activations(shape, job).items():
        phases[phase] = [
            *resting,
            *([gradients] if phase == "last block's backward" else early),
            table,
            ("gathered blocks in flight", in_flight * size.block),
            ("activations" if phase != "loss" else "activations and logits", activations),
        ]
    # Before the first step: the adapter is whole until the wrap.
    loaded = [*resting[:2], ("LoRA before the wrap, float32", size.lora * 4)]
    phases["wrap"] = [*loaded, ("one weight in 16 bits", size.scratch)]
    return phases, blocks * size.block_shard + (size.table_shard if tables else 0)


def whole_model_phases(shape: LlamaShape, job: Training) -> Phases:
    """{phase: lines} of a rank that holds the whole 4-bit model and gathers the adapter only: the
    layout that native FSDP2 takes where the model fits.
    """
    alone = replace(job, world = 1)
    size = _sizes(shape, alone)
    # Sharded masters and Adam; the adapter itself and its gradient whole, in float32.
    adapter = -(-size.lora * (4 + ADAM_BYTES) // job.world) + size.lora * 8
    resting = [
        ("frozen 4-bit blocks, whole", shape.layers * size.block_shard),
        ("frozen embedding and head, whole", size.table),
        ("LoRA, gradients and Adam, float32", adapter),
        ("dequantized weight and workspaces", size.scratch + WORKSPACES),
    ]
    return {
        phase: [*resting, ("activations", activations)]
        for phase, activations in _activations(shape, alone).items()
    }


def largest_phase(phases: Phases) -> Tuple[str, List[Line], int]:
    """(name, lines, bytes) of the phase that holds most."""
    sums = {phase: sum(size for _, size in lines) for phase, lines in phases.items()}
    name = max(sums, key = sums.get)
    return name, phases[name], sums[name]


# --- what is there --------------------------------------------------------------------------------

_UNKNOWN = 2**62


def usable_device_memory(
    mesh: Any = None,
    reserve: int = 0,
    fresh: bool = False,
) -> int:
    """Bytes of this GPU that training may fill: free now (after the context, NCCL and other
    processes) plus what torch holds already, under the process's memory fraction; the minimum over
    ``mesh``'s ranks.

    reserve: bytes of the free memory that something else will take. fresh: what torch has allocated
    belongs to something else too, as before a model is loaded.

    Raises RuntimeError without a GPU: state ``device_memory`` instead.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("memory plan: no CUDA device to measure; pass device_memory in bytes.")
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    usable = max(free - reserve, 0) + torch.cuda.memory_reserved(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if fraction is not None:
        usable = min(usable, int(total * fraction(device)))
    if fresh:
        usable = max(usable - torch.cuda.memory_allocated(device), 0)
    return _smallest(usable, mesh)


def _smallest(value: int, mesh: Any) -> int:
    """The minimum of ``value`` over the ranks of ``mesh``, so that all ranks decide alike."""
    if mesh is None:
        return value
    import torch
    import torch.distributed as dist

    smallest = torch.tensor([value], dtype = torch.int64, device = mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(smallest, op = dist.ReduceOp.MIN, group = mesh.get_group(dim))
    return int(smallest.item())


def usable_host_memory(mesh: Any = None) -> Optional[int]:
    """Bytes of host memory that are free for new allocations, under the cgroup's limit; the minimum
    over ``mesh``'s ranks. None if no rank can tell."""
    smallest = _smallest(min([*_free_on_host(), _UNKNOWN]), mesh)
    return None if smallest == _UNKNOWN else max(smallest, 0)


def _free_on_host() -> List[int]:
    """What the kernel and the cgroup leave free, in bytes; empty where neither can be read."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding = "utf-8").splitlines():
            if line.startswith("MemAvailable"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding = "utf-8").strip()
        if limit.isdigit():
            used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding = "utf-8"))
            for line in Path("/sys/fs/cgroup/memory.stat").read_text(encoding = "utf-8").splitlines():
                if line.startswith("inactive_file "):
                    used -= int(line.split()[1])  # cached files, which the kernel gives back
            found.append(int(limit) - used)
    except OSError:
        pass  # no such file on this system; what was read so far stands
    return found
