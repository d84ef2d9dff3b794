# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The offload plan moves the least to host memory with which a training fits, as counted."""

import pytest
from llama_shapes import GIB, LLAMA_8B, LLAMA_405B


@pytest.fixture
def planner(monkeypatch):
    import unsloth  # noqa: F401
    from unsloth.models import fsdp2_offload_plan

    monkeypatch.delenv("UNSLOTH_FSDP2_OFFLOAD", raising = False)
    return fsdp2_offload_plan


def make_plan(config, **given):
    """The plan of a config; Training's fields and plan_offload's arguments by name."""
    from unsloth.models.fsdp2_memory_count import Training
    from unsloth.models.fsdp2_offload_plan import plan_offload

    fields = set(Training.__dataclass_fields__) & set(given)
    job = Training(**{name: given.pop(name) for name in fields})
    return plan_offload(config, job, **given)


def test_the_ladder_takes_the_first_rung_that_fits(planner):
    """Less memory never means fewer offloaded blocks; the plan fits as counted, and one block less
    would not.
    """
    previous = -1
    for memory in range(60, 10, -2):
        plan = make_plan(LLAMA_405B, world = 16, tokens = 1024, device_memory = memory * GIB)
        assert len(plan.blocks) >= previous
        previous = len(plan.blocks)
        if not plan.fits:
            break
        assert plan.needed <= plan.usable
        if plan.blocks and not plan.tables:
            fewer = len(plan.blocks) - 1
            override = f"blocks:{fewer}" if fewer else "never"
            less = make_plan(
                LLAMA_405B,
                world = 16,
                tokens = 1024,
                device_memory = memory * GIB,
                override = override,
            )
            assert not less.fits
    assert previous == 126 and not plan.fits and "short by" in plan.table()


def test_the_table_adds_up(planner):
    """The lines' sum is the peak, every line is printed, and offloading moves exactly the shards."""
    arguments = dict(world = 8, tokens = 4096, device_memory = 80 * GIB)
    plan = make_plan(LLAMA_405B, override = "never", **arguments)
    assert sum(size for _, size in plan.lines) == plan.peak < plan.needed
    assert all(what in plan.table() for what, _ in plan.lines)
    moved = make_plan(LLAMA_405B, override = "all", **arguments)
    assert moved.after_load == 0 and moved.host_needed == plan.after_load * 8
    assert moved.peak < plan.peak


def test_more_of_anything_needs_more(planner):
    """Tokens, LoRA rank and no checkpointing raise the count; ranks lower it."""

    def peak(**changes):
        arguments = dict(world = 2, tokens = 4096, device_memory = 80 * GIB)
        return make_plan(config, **{**arguments, **changes}).peak

    config = {**LLAMA_8B, "vocab_size": 32000}
    base = peak()
    assert peak(tokens = 8192) > base
    assert peak(lora_rank = 64) > base
    assert peak(checkpointing = False) > base
    assert peak(double_quant = False) > base
    assert peak(accumulates = True) > base
    assert peak(world = 4) < base


def test_the_peak_is_at_the_gather_of_large_tables(planner):
    """A large vocabulary and few tokens: the phase in which embedding and head are gathered holds
    most, twice their bytes; with more tokens a backward does.
    """
    arguments = dict(world = 2, device_memory = 80 * GIB)
    few = make_plan(LLAMA_8B, tokens = 512, **arguments)
    assert few.phase == "gather of the tables"
    assert dict(few.lines)["embedding and head, gathered and flat"] >= 2 * 2 * 128256 * 4096 * 2
    many = make_plan(LLAMA_8B, tokens = 65536, **arguments)
    assert many.phase == "first block's backward" and many.peak > few.peak


def test_host_memory_limits_the_offload(planner):
    """What does not fit the host's memory is no plan, and the table says by how much."""
    plan = make_plan(LLAMA_405B, world = 8, tokens = 1024, device_memory = 34 * GIB, host_memory = 64 * GIB)
    assert not plan.fits and "host's memory is short" in plan.table()
    enough = make_plan(
        LLAMA_405B, world = 8, tokens = 1024, device_memory = 34 * GIB, host_memory = 512 * GIB
    )
    assert enough.fits and 0 < enough.host_needed <= enough.host_usable


def test_shards_larger_than_the_device_fit_with_offload(planner):
    """Offloaded shards never pass through the device, so a rank's shard may be larger than its GPU."""
    arguments = dict(world = 2, tokens = 1024, device_memory = 78 * GIB)
    plan = make_plan(LLAMA_405B, **arguments)
    never = make_plan(LLAMA_405B, override = "never", **arguments)
    assert never.after_load > 78 * GIB and not never.fits
    assert plan.fits and plan.after_load < 78 * GIB and plan.needed <= plan.usable
    assert plan.host_needed + 2 * plan.after_load == pytest.approx(2 * never.after_load)


def test_blocks_on_the_host_stay_there(planner):
    """What was loaded into host memory counts as offloaded, and further blocks are spread over the
    rest.
    """
    arguments = dict(world = 2, tokens = 1024, device_memory = 78 * GIB)
    assert make_plan(LLAMA_8B, on_host = (5,), override = "never", **arguments).blocks == (5,)
    assert make_plan(LLAMA_8B, on_host = (5, 9), **arguments).blocks == (5, 9)
    plan = make_plan(LLAMA_405B, on_host = (3, 125), **arguments)
    assert plan.fits and {3, 125} < set(plan.blocks)
    assert len(plan.blocks) == len(make_plan(LLAMA_405B, **arguments).blocks)
    # What is there already is not asked for twice.
    held = plan.host_needed
    free = int(held / planner.HOST_SHARE) - 2 * GIB
    assert not make_plan(LLAMA_405B, host_memory = free, **arguments).fits
    there = make_plan(LLAMA_405B, host_memory = free, on_host = (3, 125), **arguments)
    assert there.fits and there.blocks == plan.blocks


@pytest.mark.parametrize("count, total", [(0, 5), (1, 5), (2, 6), (3, 7), (5, 5)])
def test_blocks_are_spread_evenly(planner, count, total):
    """As many blocks as asked for, gaps that differ by one at most, and the first block last."""
    blocks = planner.evenly_spaced(count, total)
    assert len(blocks) == count and all(0 <= block < total for block in blocks)
    gaps = [b - a for a, b in zip(blocks, blocks[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert count == total or 0 not in blocks


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device_memory": 1.5}, "device_memory = 1.5"),
        ({"local_world": 0}, "local_world = 0"),
        ({"world": 1, "override": "all"}, "at least 2 ranks"),
        ({"override": "some"}, "'some'"),
        ({"override": "blocks:0"}, "'blocks:0'"),
        ({"override": "blocks:33"}, "32 blocks"),
    ],
)
def test_bad_values_are_named(planner, changes, words):
    """Every value that cannot be counted raises an error that names it."""
    arguments = dict(world = 2, tokens = 64, device_memory = GIB)
    with pytest.raises(ValueError, match = words):
        make_plan(LLAMA_8B, **{**arguments, **changes})


def test_the_environment_overrides(planner, monkeypatch):
    """UNSLOTH_FSDP2_OFFLOAD decides where no override is passed."""
    arguments = dict(world = 2, tokens = 64, device_memory = 80 * GIB)
    monkeypatch.setenv("UNSLOTH_FSDP2_OFFLOAD", "blocks:4")
    assert len(make_plan(LLAMA_8B, **arguments).blocks) == 4
    assert make_plan(LLAMA_8B, override = "all", **arguments).tables


def test_an_out_of_memory_is_compared_in_gib(planner):
    """What was in use, what was usable and the difference, to the hundredth."""
    plan = make_plan(LLAMA_8B, world = 2, tokens = 64, device_memory = 80 * GIB)
    text = plan.explain_out_of_memory(int(plan.peak + 1.25 * GIB))
    used = f"{plan.peak / GIB + 1.25:.2f} GiB were in use at most, +1.25 GiB against the prediction"
    assert f"{plan.usable / GIB:.2f} GiB usable; {used}" in text
