# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""CPU offload under FSDP2, decided from the memory that is there: count first, then offload the
least.

    plan = plan_offload(config, world = 8, batch_tokens = 4096, device_memory = 80 * 2**30)
    print(plan.table())

The count (`fsdp2_memory_count.py`) is for QLoRA: a frozen 4-bit base sharded over `world` ranks,
trainable LoRA factors with Adam. If its peak exceeds the usable memory, frozen weights move to host
memory one decoder block after the other, evenly spaced so that the copies of one hide behind the
computation of the others. Trainable parameters stay on the device: no optimizer step and no
collective ever runs on the CPU.

`UNSLOTH_PATCHES_OFFLOAD` = auto | never | blocks:K | all overrides the decision, not the count.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple, Union

from .fsdp2_memory_count import (
    FRAGMENTATION,
    GIB,
    LORA_TARGETS,
    Training,
    count_moments,
    largest,
)
from .fsdp2_model_shape import LlamaShape, read_shape
from .fsdp2_usable_memory import usable_device_memory, usable_host_memory

__all__ = ["LlamaShape", "OffloadPlan", "offload_override", "plan_offload", "read_shape"]

OFFLOAD_ENV = "UNSLOTH_PATCHES_OFFLOAD"
# Share of the host's free memory that offloaded shards may take.
HOST_SHARE = 0.8


@dataclass(frozen = True)
class OffloadPlan:
    """What was counted, per rank in bytes, and what was decided.

    moment: of a training step, the one that holds most; lines: (what, bytes) on the device then,
    whose sum is `peak`. blocks: decoder blocks whose frozen
    weights move to host memory; tables: the embedding and head shards too. `peak` is the predicted
    torch.cuda.max_memory_allocated() of training; `needed` adds the allocator's loss to it.
    """

    fits: bool
    blocks: Tuple[int, ...]
    tables: bool
    moment: str
    lines: Tuple[Tuple[str, int], ...]
    peak: int
    needed: int
    usable: int
    host_needed: int
    host_usable: int
    local_world: int
    world: int
    mode: str
    layers: int
    notes: Tuple[str, ...] = field(default = ())

    @property
    def after_load(self) -> int:
        """Bytes of the frozen shards on one rank's device with this plan."""
        return sum(size for what, size in self.lines if what.startswith("frozen"))

    def decision(self) -> str:
        count = len(self.blocks)
        if not self.blocks and not self.tables:
            moved = "nothing is offloaded"
        elif count == self.layers:
            moved = "all blocks are offloaded" + (", embedding and head too" if self.tables else "")
        else:
            moved = f"{count} of {self.layers} blocks are offloaded"
        verdict = "fits" if self.fits else "does NOT fit"
        return f"{verdict} on {self.world} ranks: {moved} ({self.mode})"

    def table(self) -> str:
        """The count and the decision, one line each, in GiB."""
        rows = [
            *self.lines,
            (f"peak, {self.moment}", self.peak),
            ("with allocator loss", self.needed),
        ]
        rows += [("usable on the smallest rank", self.usable)]
        if self.host_needed:
            rows.append((f"host memory, {self.local_world} ranks of one host", self.host_needed))
        if self.host_needed and self.host_usable:
            rows.append(("usable host memory", self.host_usable))
        width = max(len(what) for what, _ in rows)
        text = [f"{what:<{width}}  {size / GIB:9.3f} GiB" for what, size in rows]
        return "\n".join([*text, self.decision(), *self.notes])

    def explain_out_of_memory(self, measured: int) -> str:
        """Text for an out-of-memory that this plan did not foresee. measured: peak bytes so far."""
        return (
            f"Out of memory although the offload plan predicted a peak of {self.peak / GIB:.2f} "
            "GiB of "
            f"{self.usable / GIB:.2f} GiB usable; {measured / GIB:.2f} GiB were in use at most, "
            f"{(measured - self.peak) / GIB:+.2f} GiB against the prediction. "
            f"Counted:\n{self.table()}\n"
            f"Set {OFFLOAD_ENV}=blocks:K (K of {self.layers}) or {OFFLOAD_ENV}=all to offload "
            "more, or "
            "train on fewer tokens a step."
        )


def offload_override(value: Optional[str] = None) -> Tuple[str, int]:
    """(mode, K) of `value` or of the environment: ("auto" | "never" | "all" | "blocks", K).

    Raises ValueError for anything else.
    """
    text = (os.environ.get(OFFLOAD_ENV, "") if value is None else value).strip().lower() or "auto"
    if text in ("auto", "never", "all"):
        return text, 0
    name, _, number = text.partition(":")
    if name == "blocks" and number.isdigit() and int(number) > 0:
        return "blocks", int(number)
    raise ValueError(f"{OFFLOAD_ENV}={text!r}: choose auto, never, blocks:K with K > 0, or all.")


def evenly_spaced(count: int, total: int) -> Tuple[int, ...]:
    """`count` of `total` indices, as far apart as they can be; the first block is the last to go,
    because nothing computes before it that could hide its copy."""
    return (
        tuple(sorted({total - 1 - (index * total) // count for index in range(count)}))
        if count
        else ()
    )


def _spread(on_host: Tuple[int, ...], count: int, total: int) -> Tuple[int, ...]:
    """`count` of `total` blocks, those in host memory among them, the others evenly spaced."""
    rest = [block for block in range(total) if block not in on_host]
    more = evenly_spaced(count - len(on_host), len(rest))
    return tuple(sorted([*on_host, *(rest[index] for index in more)]))


def _ladder(mode: str, wanted: int, layers: int) -> List[Tuple[int, bool]]:
    """(blocks, tables) to try, cheapest first."""
    if mode == "never":
        return [(0, False)]
    if mode == "all":
        return [(layers, True)]
    if mode == "blocks":
        return [(wanted, False)]
    return [(count, False) for count in range(layers + 1)] + [(layers, True)]


def plan_offload(
    model_or_config: Any,
    mesh: Any = None,
    *,
    batch_tokens: int,
    world: Optional[int] = None,
    local_world: Optional[int] = None,
    device_memory: Optional[int] = None,
    host_memory: Optional[int] = None,
    lora_rank: int = 16,
    lora_targets: Tuple[str, ...] = LORA_TARGETS,
    double_quant: bool = True,
    gradient_checkpointing: Union[bool, str] = True,
    itemsize: int = 2,
    accumulates: bool = False,
    on_host: Tuple[int, ...] = (),
    override: Optional[str] = None,
) -> OffloadPlan:
    """The least offload with which QLoRA under FSDP2 fits, or the count that shows that none does.

    model_or_config: see `read_shape`.
    mesh: DeviceMesh; gives `world` (its shard dimension, the last) and, where device_memory is not
        stated, the ranks whose usable memory is measured: then this is collective over the mesh.
    batch_tokens: tokens of one micro-batch on one rank.
    device_memory: bytes that training may use on each GPU.
    host_memory: bytes of one host for all its `local_world` ranks; None: not limited.
    gradient_checkpointing: True, False or "unsloth" (block inputs go to host memory).
    itemsize: bytes of the compute dtype. accumulates: several micro-batches a step, so gradients of
        the earlier ones are there in every backward.
    on_host: blocks that were loaded into host memory; they stay there. host_memory is what is free
        beside them.
    override: like UNSLOTH_PATCHES_OFFLOAD, in its place.

    Returns an OffloadPlan; `plan.fits` is False where the whole ladder was not enough. Raises
    ValueError for values that cannot be counted.
    """
    shape = read_shape(model_or_config)
    mode, wanted = offload_override(override)
    if mesh is not None and world is None:
        world = mesh.size(mesh.ndim - 1)
    if device_memory is None:
        device_memory = usable_device_memory(mesh)
        host_memory = usable_host_memory(mesh) if host_memory is None else host_memory
    world = 1 if world is None else world
    local_world = min(world, 8) if local_world is None else local_world
    _check(
        shape,
        world,
        local_world,
        batch_tokens,
        device_memory,
        lora_rank,
        lora_targets,
        mode,
        wanted,
    )
    if gradient_checkpointing not in (True, False, "unsloth"):
        raise ValueError(
            f"plan_offload: gradient_checkpointing = {gradient_checkpointing!r}: choose True, "
            "False or 'unsloth'."
        )
    if world == 1 and mode in ("all", "blocks"):
        raise ValueError(f"{OFFLOAD_ENV}: FSDP2 offload needs at least 2 ranks, and this is 1.")
    job = Training(
        world,
        batch_tokens,
        lora_rank,
        tuple(lora_targets),
        double_quant,
        gradient_checkpointing,
        itemsize,
        accumulates,
    )
    rungs = _ladder(mode if world > 1 else "never", max(wanted, len(on_host)), shape.layers)
    host_usable = 0
    if host_memory is not None:
        there = count_moments(shape, job, len(on_host), False)[1] * local_world
        host_usable = int(HOST_SHARE * (host_memory + there))
    for blocks, tables in rungs:
        if blocks < len(on_host):
            continue
        moments, host = count_moments(shape, job, blocks, tables)
        moment, lines, peak = largest(moments)
        needed = math.ceil(peak * (1 + FRAGMENTATION))
        host_needed = host * local_world
        host_fits = host_memory is None or host_needed <= host_usable
        fits = needed <= device_memory and host_fits
        if fits:
            break
    notes = []
    if not host_fits:
        notes.append(f"the host's memory is short by {(host_needed - host_usable) / GIB:.2f} GiB")
    if needed > device_memory:
        notes.append(f"the device is short by {(needed - device_memory) / GIB:.2f} GiB")
    return OffloadPlan(
        fits = fits,
        blocks = _spread(on_host, blocks, shape.layers),
        tables = tables,
        moment = moment,
        lines = tuple(lines),
        peak = peak,
        needed = needed,
        usable = device_memory,
        host_needed = host_needed,
        host_usable = host_usable,
        local_world = local_world,
        world = world,
        mode = mode,
        layers = shape.layers,
        notes = tuple(notes),
    )


def _check(
    shape: LlamaShape,
    world: int,
    local_world: int,
    tokens: int,
    device_memory: int,
    rank: int,
    targets: Tuple[str, ...],
    mode: str,
    wanted: int,
) -> None:
    numbers = {
        "world": world,
        "local_world": local_world,
        "batch_tokens": tokens,
        "device_memory": device_memory,
        "lora_rank": rank,
    }
    for name, value in numbers.items():
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"plan_offload: {name} = {value!r} has to be a positive whole number.")
    unknown = [name for name in targets if name not in shape.linears]
    if unknown:
        raise ValueError(
            f"plan_offload: lora_targets names {unknown[0]!r}; known: {', '.join(shape.linears)}."
        )
    if mode == "blocks" and wanted > shape.layers:
        raise ValueError(f"{OFFLOAD_ENV}=blocks:{wanted}: the model has {shape.layers} blocks.")
