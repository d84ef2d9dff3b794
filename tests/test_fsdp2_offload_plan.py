# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The offload plan counts what training needs and offloads the least; the offloaded model trains
alike.
"""

import dataclasses
import json

import pytest
from test_fsdp2_sharded_4bit import _load, _losses, checkpoints, run_ranks  # noqa: F401

GIB = 2**30
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture
def planner(monkeypatch):
    import unsloth  # noqa: F401
    from unsloth.models import fsdp2_offload_plan

    monkeypatch.delenv("UNSLOTH_PATCHES_OFFLOAD", raising = False)
    return fsdp2_offload_plan


def test_parameters_are_those_of_the_published_models(planner):
    """The shape that is read from a config has Meta's parameter counts."""
    assert planner.read_shape(LLAMA_8B).parameters == 8_030_261_248
    assert planner.read_shape(LLAMA_405B).parameters == 405_853_388_800


def test_config_from_a_file_an_object_and_a_nested_dict(planner, tmp_path):
    """A folder, a config.json, a transformers config and a config with text_config read alike."""
    from transformers import LlamaConfig

    shape = planner.read_shape(LLAMA_8B)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding = "utf-8")
    sources = [
        tmp_path,
        str(tmp_path / "config.json"),
        LlamaConfig(**LLAMA_8B),
        {"text_config": LLAMA_8B},
    ]
    assert all(planner.read_shape(source) == shape for source in sources)


def test_the_ladder_takes_the_first_rung_that_fits(planner):
    """Less memory never means fewer offloaded blocks; the plan fits as counted, and one block less
    would not.
    """
    previous = -1
    for memory in range(60, 10, -2):
        plan = planner.plan_offload(
            LLAMA_405B, world = 16, batch_tokens = 1024, device_memory = memory * GIB
        )
        assert len(plan.blocks) >= previous
        previous = len(plan.blocks)
        if not plan.fits:
            break
        assert plan.needed <= plan.usable
        if plan.blocks and not plan.tables:
            fewer = len(plan.blocks) - 1
            override = f"blocks:{fewer}" if fewer else "never"
            less = planner.plan_offload(
                LLAMA_405B,
                world = 16,
                batch_tokens = 1024,
                device_memory = memory * GIB,
                override = override,
            )
            assert not less.fits
    assert previous == 126 and not plan.fits and "short by" in plan.table()


def test_the_table_adds_up(planner):
    """The lines' sum is the peak, every line is printed, and offloading moves exactly the shards."""
    arguments = dict(world = 8, batch_tokens = 4096, device_memory = 80 * GIB)
    plan = planner.plan_offload(LLAMA_405B, override = "never", **arguments)
    assert sum(size for _, size in plan.lines) == plan.peak < plan.needed
    assert all(what in plan.table() for what, _ in plan.lines)
    moved = planner.plan_offload(LLAMA_405B, override = "all", **arguments)
    assert moved.after_load == 0 and moved.host_needed == plan.after_load * 8
    assert moved.peak < plan.peak


def test_more_of_anything_needs_more(planner):
    """Tokens, LoRA rank and no checkpointing raise the count; ranks lower it."""

    def peak(**changes):
        arguments = dict(world = 2, batch_tokens = 4096, device_memory = 80 * GIB)
        return planner.plan_offload(config, **{**arguments, **changes}).peak

    config = {**LLAMA_8B, "vocab_size": 32000}
    base = peak()
    assert peak(batch_tokens = 8192) > base
    assert peak(lora_rank = 64) > base
    assert peak(gradient_checkpointing = False) > base
    assert peak(double_quant = False) > base
    assert peak(accumulates = True) > base
    assert peak(world = 4) < base


def test_the_peak_is_at_the_gather_of_large_tables(planner):
    """A large vocabulary and few tokens: the moment in which embedding and head are gathered holds
    most, twice their bytes; with more tokens a backward does.
    """
    arguments = dict(world = 2, device_memory = 80 * GIB)
    few = planner.plan_offload(LLAMA_8B, batch_tokens = 512, **arguments)
    assert few.moment == "gather of the tables"
    assert dict(few.lines)["embedding and head, gathered and flat"] >= 2 * 2 * 128256 * 4096 * 2
    many = planner.plan_offload(LLAMA_8B, batch_tokens = 65536, **arguments)
    assert many.moment == "first block's backward" and many.peak > few.peak


def test_host_memory_limits_the_offload(planner):
    """What does not fit the host's memory is no plan, and the table says by how much."""
    plan = planner.plan_offload(
        LLAMA_405B, world = 8, batch_tokens = 1024, device_memory = 34 * GIB, host_memory = 64 * GIB
    )
    assert not plan.fits and "host's memory is short" in plan.table()
    enough = planner.plan_offload(
        LLAMA_405B, world = 8, batch_tokens = 1024, device_memory = 34 * GIB, host_memory = 512 * GIB
    )
    assert enough.fits and 0 < enough.host_needed <= enough.host_usable


def test_shards_larger_than_the_device_fit_with_offload(planner):
    """Offloaded shards never pass through the device, so a rank's shard may be larger than its GPU."""
    arguments = dict(world = 2, batch_tokens = 1024, device_memory = 78 * GIB)
    plan = planner.plan_offload(LLAMA_405B, **arguments)
    never = planner.plan_offload(LLAMA_405B, override = "never", **arguments)
    assert never.after_load > 78 * GIB and not never.fits
    assert plan.fits and plan.after_load < 78 * GIB and plan.needed <= plan.usable
    assert plan.host_needed + 2 * plan.after_load == pytest.approx(2 * never.after_load)


def test_blocks_on_the_host_stay_there(planner):
    """What was loaded into host memory counts as offloaded, and further blocks are spread over the
    rest.
    """
    arguments = dict(world = 2, batch_tokens = 1024, device_memory = 78 * GIB)
    assert planner.plan_offload(LLAMA_8B, on_host = (5, 9), **arguments).blocks == (5, 9)
    plan = planner.plan_offload(LLAMA_405B, on_host = (3, 125), **arguments)
    assert plan.fits and {3, 125} < set(plan.blocks)
    assert len(plan.blocks) == len(planner.plan_offload(LLAMA_405B, **arguments).blocks)
    # What is there already is not asked for twice.
    held = plan.host_needed
    free = int(held / planner.HOST_SHARE) - 2 * GIB
    assert not planner.plan_offload(LLAMA_405B, host_memory = free, **arguments).fits
    there = planner.plan_offload(LLAMA_405B, host_memory = free, on_host = (3, 125), **arguments)
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
        ({"world": 0}, "world = 0"),
        ({"batch_tokens": -1}, "batch_tokens = -1"),
        ({"device_memory": 1.5}, "device_memory = 1.5"),
        ({"lora_targets": ("up",)}, "'up'"),
        ({"override": "some"}, "'some'"),
        ({"override": "blocks:0"}, "'blocks:0'"),
        ({"override": "blocks:33"}, "32 blocks"),
    ],
)
def test_bad_values_are_named(planner, changes, words):
    """Every value that cannot be counted raises an error that names it."""
    arguments = dict(world = 2, batch_tokens = 64, device_memory = GIB)
    with pytest.raises(ValueError, match = words):
        planner.plan_offload(LLAMA_8B, **{**arguments, **changes})


def test_models_it_does_not_know_are_refused(planner):
    """A mixture of experts or a config without sizes is an error, not a wrong count."""
    with pytest.raises(ValueError, match = "num_local_experts"):
        planner.read_shape({**LLAMA_8B, "num_local_experts": 8})
    with pytest.raises(ValueError, match = "hidden_size"):
        planner.read_shape({"vocab_size": 5})
    with pytest.raises(ValueError, match = "no config at"):
        planner.read_shape("/nowhere/at/all")


def test_the_environment_overrides(planner, monkeypatch):
    """UNSLOTH_PATCHES_OFFLOAD decides where no override is passed."""
    arguments = dict(world = 2, batch_tokens = 64, device_memory = 80 * GIB)
    monkeypatch.setenv("UNSLOTH_PATCHES_OFFLOAD", "blocks:4")
    assert len(planner.plan_offload(LLAMA_8B, **arguments).blocks) == 4
    assert planner.plan_offload(LLAMA_8B, override = "all", **arguments).tables


def test_an_unforeseen_out_of_memory_compares(planner):
    """The step's out-of-memory error names the predicted and the measured bytes."""
    import torch
    from unsloth.models.fsdp2_offload_apply import explaining

    plan = planner.plan_offload(LLAMA_8B, world = 2, batch_tokens = 64, device_memory = 80 * GIB)

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match = "predicted a peak") as caught:
        explaining(step, plan)()
    assert f"{plan.peak / GIB:.2f} GiB" in str(caught.value) and plan.table() in str(caught.value)
    assert dataclasses.is_dataclass(plan)


def _offloaded_losses(folder, offload):
    """Losses of three steps and, per unit, the devices on which FSDP2 keeps frozen and trainable
    shards.
    """
    import os

    os.environ["UNSLOTH_PATCHES_OFFLOAD"] = offload
    import unsloth.models.fsdp2_native as native

    units = []
    original = native.shard_model

    def keep(model, config = None):
        units.append(original(model, config))
        return units[-1]

    native.shard_model = keep
    history = _losses(folder, 2, True)
    flags = []
    for unit in units[0]._unsloth_fsdp2_units:
        found = {True: set(), False: set()}
        for p in unit._get_fsdp_state()._fsdp_param_group.fsdp_params:
            found[p.sharded_param.requires_grad].add(p.offload_to_cpu)
        flags.append((found[False], found[True]))
    return history, flags


def test_offloaded_blocks_train_alike(checkpoints):  # noqa: F811
    """Offloading one block or all changes no bit of the losses, moves frozen shards only, and only
    those.
    """
    folder = checkpoints("packed")
    stay = run_ranks(_offloaded_losses, 2, folder, "never")
    one = run_ranks(_offloaded_losses, 2, folder, "blocks:1")
    every = run_ranks(_offloaded_losses, 2, folder, "all")
    for (_, (a, _)), (_, (b, flags)), (_, (c, all_flags)) in zip(stay, one, every):
        assert a == b == c
        assert flags == [({False}, {False}), ({True}, {False})]
        assert all_flags == [({True}, {False})] * 2


def test_usable_memory_is_free_and_under_the_fraction(planner, monkeypatch):
    """Free memory plus what torch holds, under the memory fraction, less a reserve; before a load
    also less what is allocated for something else.
    """
    import torch
    from unsloth.models.fsdp2_usable_memory import usable_device_memory

    seen = {"free": 40 * GIB, "reserved": 10 * GIB, "allocated": 4 * GIB, "fraction": 1.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (seen["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: seen["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: seen["allocated"])
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda _: seen["fraction"], raising = False
    )
    assert usable_device_memory() == 50 * GIB
    assert usable_device_memory(reserve = GIB) == 49 * GIB
    assert usable_device_memory(fresh = True) == 46 * GIB
    seen["fraction"] = 0.25
    assert usable_device_memory() == 20 * GIB
    assert usable_device_memory(fresh = True) == 16 * GIB


def _smallest_host(_):
    """usable_host_memory over two ranks of which one sees half a GiB."""
    import os

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from unsloth.models import fsdp2_usable_memory as memory

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    alone = memory.usable_host_memory()
    memory._free_on_host = lambda: [GIB // 2] if os.environ["RANK"] == "1" else [GIB]
    smallest = memory.usable_host_memory(mesh)
    memory._free_on_host = lambda: []
    return alone, smallest, memory.usable_host_memory(mesh)


def test_ranks_agree_on_the_smallest_memory():
    """Every rank plans with the memory of the rank that has least; unknown stays unknown."""
    for _, (alone, smallest, unknown) in run_ranks(_smallest_host, 2, None):
        assert alone is None or alone > 0
        assert smallest == GIB // 2 and unknown is None


def _hosted_at_load(folder):
    """Of every 4-bit layer after a load under blocks:1: (block, on the host?, elements, shares?)."""
    import os
    import re

    os.environ["UNSLOTH_PATCHES_OFFLOAD"] = "blocks:1"
    from unsloth.models.fsdp2_sharded_params import shard_of

    found = []
    for name, module in _load(folder)[0].named_modules():
        shard = shard_of(module)
        if shard is not None:
            block = int(re.search(r"layers\.(\d+)\.", name)[1])
            scales = shard.state.absmax.data_ptr() == shard.absmax.data_ptr()
            found.append((block, shard.on_host, module.weight.numel(), scales))
    return found


def test_offloaded_blocks_are_loaded_into_host_memory(checkpoints):  # noqa: F811
    """The shards of a block that will be offloaded go to the host as they are read: no layer keeps
    bytes or scales of them on the device.
    """
    for _, found in run_ranks(_hosted_at_load, 2, checkpoints("bf16")):
        assert len(found) == 14
        for block, on_host, numel, scales in found:
            assert on_host == (block == 1) and scales
            assert (numel == 0) == on_host
