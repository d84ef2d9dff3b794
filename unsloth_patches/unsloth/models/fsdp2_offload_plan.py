# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""CPU offload under FSDP2, decided from the memory that is there: the least that fits.

    job = Training(world = 8, tokens = 4096)
    plan = plan_offload(config, job, device_memory = 80 * 2**30)
    print(plan.table())

The count (``fsdp2_memory_count.py``) is for QLoRA: a frozen 4-bit base sharded over the ranks,
trainable LoRA factors with Adam. If its peak exceeds the usable memory, frozen weights move to host
memory one decoder block after the other, evenly spaced so that the copies of one hide behind the
computation of the others. Trainable parameters stay on the device: no optimizer step and no
collective ever runs on the CPU.

``UNSLOTH_FSDP2_OFFLOAD`` = auto | never | blocks:K | all overrides the decision, not the count.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple

from .fsdp2_memory_count import (
    FRAGMENTATION,
    GIB,
    Training,
    largest_phase,
    sharded_phases,
    usable_device_memory,
    usable_host_memory,
)
from .fsdp2_model_shape import read_shape

__all__ = ["OffloadPlan", "evenly_spaced", "offload_override", "plan_offload"]

OFFLOAD_ENV = "UNSLOTH_FSDP2_OFFLOAD"
# Share of the host's free memory that offloaded shards may take.
HOST_SHARE = 0.8


@dataclass(frozen = True)
class OffloadPlan:
    """What was counted, per rank in bytes, and what was decided.

    phase: the one of a training step that holds most; lines: (what, bytes) on the device then,
    whose sum is ``peak``, the predicted torch.cuda.max_memory_allocated(); ``needed`` adds the
    allocator's loss to it. blocks: decoder blocks whose frozen weights move to host memory; tables:
    the embedding's and the head's shards too. notes: what is short, and what the count leaves out
    or assumes.
    """

    fits: bool
    blocks: Tuple[int, ...]
    tables: bool
    phase: str
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
    notes: Tuple[str, ...] = ()

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
        where = f"on {self.world} ranks" if self.world > 1 else "on one GPU"
        return f"{'fits' if self.fits else 'does NOT fit'} {where}: {moved} ({self.mode})"

    def table(self) -> str:
        """The count and the decision, one line each, in GiB."""
        rows = [
            *self.lines,
            (f"peak, {self.phase}", self.peak),
            ("with allocator loss", self.needed),
            ("usable" + (" on the smallest rank" if self.world > 1 else ""), self.usable),
        ]
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
            f"Out of memory although the offload plan predicted a peak of {self.peak / GIB:.2f} GiB of "
            f"{self.usable / GIB:.2f} GiB usable; {measured / GIB:.2f} GiB were in use at most, "
            f"{(measured - self.peak) / GIB:+.2f} GiB against the prediction. Counted:\n{self.table()}\n"
            f"Set {OFFLOAD_ENV}=blocks:K (K of {self.layers}) or {OFFLOAD_ENV}=all to offload more, or "
            "train on fewer tokens a step."
        )


def offload_override(value: Optional[str] = None) -> Tuple[str, int]:
    """(mode, K) of ``value`` or of the environment: ("auto" | "never" | "all" | "blocks", K).

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
    """``count`` of ``total`` indices, as far apart as they can be. The first block is the last to
    go: nothing computes before it that could hide its copy.
    """
    return tuple(sorted(total - 1 - (index * total) // count for index in range(count)))


def _spread(on_host: Tuple[int, ...], count: int, total: int) -> Tuple[int, ...]:
    """``count`` of ``total`` blocks, those in host memory among them, the others evenly spaced."""
    rest = [block for block in range(total) if block not in on_host]
    more = evenly_spaced(count - len(on_host), len(rest))
    return tuple(sorted([*on_host, *(rest[index] for index in more)]))


def _ladder(mode: str, wanted: int, layers: int) -> List[Tuple[int, bool]]:
    """(blocks, tables) to try, cheapest first. wanted: blocks:K, or what is on the host already."""
    if mode == "all":
        return [(layers, True)]
    if mode in ("blocks", "never"):
        return [(wanted, False)]
    return [(count, False) for count in range(layers + 1)] + [(layers, True)]


def plan_offload(
    model_or_config: Any,
    job: Training,
    mesh: Any = None,
    *,
    local_world: Optional[int] = None,
    device_memory: Optional[int] = None,
    host_memory: Optional[int] = None,
    on_host: Tuple[int, ...] = (),
    override: Optional[str] = None,
) -> OffloadPlan:
    """The least offload with which QLoRA under FSDP2 fits, or the count that shows that none does.

    model_or_config: see ``read_shape``. job: what is trained, on how many ranks.
    mesh: DeviceMesh whose ranks' usable memory is measured where device_memory is not stated; then
        this is collective over the mesh.
    device_memory: bytes that training may use on each GPU.
    host_memory: bytes of one host for all its ``local_world`` ranks; None: not limited.
    on_host: blocks that were loaded into host memory; they stay there. host_memory is what is free
        beside them.
    override: like UNSLOTH_FSDP2_OFFLOAD, in its place.

    Returns an OffloadPlan; ``plan.fits`` is False where the whole ladder was not enough. Raises
    ValueError for values that cannot be counted.
    """
    shape = read_shape(model_or_config)
    mode, wanted = offload_override(override)
    if device_memory is None:
        device_memory = usable_device_memory(mesh)
        host_memory = usable_host_memory(mesh) if host_memory is None else host_memory
    local_world = min(job.world, 8) if local_world is None else local_world
    for name, value in (("local_world", local_world), ("device_memory", device_memory)):
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"memory plan: {name} = {value!r} has to be a positive whole number.")
    if job.world == 1 and mode in ("all", "blocks"):
        raise ValueError(f"{OFFLOAD_ENV}: FSDP2 offload needs at least 2 ranks, and this is 1.")
    if wanted > shape.layers:
        raise ValueError(f"{OFFLOAD_ENV}=blocks:{wanted}: the model has {shape.layers} blocks.")
    host_usable = 0
    if host_memory is not None:
        held = sharded_phases(shape, job, len(on_host))[1] * local_world
        host_usable = int(HOST_SHARE * (host_memory + held))
    rungs = _ladder(mode if job.world > 1 else "never", max(wanted, len(on_host)), shape.layers)
    for blocks, tables in rungs:
        if blocks < len(on_host):
            continue
        phases, host = sharded_phases(shape, job, blocks, tables)
        phase, lines, peak = largest_phase(phases)
        needed = math.ceil(peak * (1 + FRAGMENTATION))
        host_needed = host * local_world
        host_fits = host_memory is None or host_needed <= host_usable
        fits = needed <= device_memory and host_fits
        if fits:
            break
    notes = list(shape.notes)
    if not host_fits:
        notes.append(f"the host's memory is short by {(host_needed - host_usable) / GIB:.2f} GiB")
    if needed > device_memory:
        notes.append(f"the device is short by {(needed - device_memory) / GIB:.2f} GiB")
    return OffloadPlan(
        fits = fits,
        blocks = _spread(on_host, blocks, shape.layers),
        tables = tables,
        phase = phase,
        lines = tuple(lines),
        peak = peak,
        needed = needed,
        usable = device_memory,
        host_needed = host_needed,
        host_usable = host_usable,
        local_world = local_world,
        world = job.world,
        mode = mode,
        layers = shape.layers,
        notes = tuple(notes),
    )
