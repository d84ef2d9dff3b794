# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A model that is sharded over its ranks trains alike with what the plan moves to host memory."""

import os
import re
import types

from backend import require

require("gloo")
import pytest
from fsdp2_ranks import checkpoints, load, losses, run_ranks  # noqa: F401
from llama_shapes import GIB, LLAMA_8B


def test_an_unforeseen_out_of_memory_compares():
    """The step's out-of-memory error names the predicted and the measured bytes."""
    import torch
    import unsloth  # noqa: F401
    from unsloth.models.fsdp2_memory_count import Training
    from unsloth.models.fsdp2_offload_apply import explaining
    from unsloth.models.fsdp2_offload_plan import plan_offload

    plan = plan_offload(LLAMA_8B, Training(world = 2, tokens = 64), device_memory = 80 * GIB)

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match = "predicted a peak") as caught:
        explaining(step, plan)()
    assert f"{plan.peak / GIB:.2f} GiB" in str(caught.value) and plan.table() in str(caught.value)


def test_a_set_up_that_raises_leaves_nothing_behind():
    """The tokens of one Trainer's micro-batch are there during its set-up only, also where it raises."""
    from unsloth.models import fsdp2_offload_apply as applied

    seen = []

    def stock(trainer, **_):
        seen.append((applied._batch_tokens.get(), applied._accumulates.get()))
        raise OSError("the set-up failed")

    arguments = types.SimpleNamespace(
        max_length = 8, per_device_train_batch_size = 3, gradient_accumulation_steps = 2
    )
    with pytest.raises(OSError, match = "the set-up failed"):
        applied.explain_out_of_memory(stock)(None, training_args = arguments)
    assert seen == [(24, True)]
    assert applied._batch_tokens.get() is None and applied._accumulates.get() is False


def test_what_does_not_fit_is_refused_unless_asked_for(monkeypatch, capsys):
    """A training that does not fit offloaded either raises with the count; ``all`` runs it all the same,
    and ``never`` does not plan.
    """
    import torch
    from unsloth.models import fsdp2_offload_apply as applied
    from unsloth.models.fsdp2_memory_count import Training
    from unsloth.models.fsdp2_offload_plan import plan_offload

    model, moved = torch.nn.Linear(1, 1), []
    model.__dict__["_unsloth_fsdp2_mesh"] = types.SimpleNamespace(device_type = "cuda")
    model.__dict__["_unsloth_fsdp2_units"] = [model] * 32
    weight = types.SimpleNamespace(sharded_param = types.SimpleNamespace(quant_state = None))
    job = Training(world = 2, tokens = 64)
    monkeypatch.setattr(applied, "fsdp_params", lambda _: [weight])
    monkeypatch.setattr(applied, "_plan", lambda *_: plan_offload(LLAMA_8B, job, device_memory = GIB))
    monkeypatch.setattr(applied, "offload_blocks", lambda *arguments: moved.append(arguments[1:]))
    monkeypatch.delenv("UNSLOTH_FSDP2_OFFLOAD", raising = False)
    with pytest.raises(RuntimeError, match = "does not fit, with all frozen weights") as refused:
        applied.offload_sharded_model(model)
    assert "the device is short by" in str(refused.value) and not moved
    monkeypatch.setenv("UNSLOTH_FSDP2_OFFLOAD", "never")
    assert applied.offload_sharded_model(model) is None and not moved
    monkeypatch.setenv("UNSLOTH_FSDP2_OFFLOAD", "auto")
    with monkeypatch.context() as patch:  # nothing of it can be counted
        patch.setattr(applied, "_plan", lambda model, mesh: applied._lora(model))
        assert applied.offload_sharded_model(model) is None and not moved
    assert "no offload plan for this model: the model has no LoRA" in capsys.readouterr().out
    assert applied._fewest_at_load(model, None, 32) == 0
    monkeypatch.setenv("UNSLOTH_FSDP2_OFFLOAD", "all")
    plan = applied.offload_sharded_model(model)
    assert not plan.fits and moved == [(tuple(range(32)), True)]


def _offloaded_losses(folder, offload):
    """Losses of three steps; per unit, the devices on which FSDP2 keeps frozen and trainable shards;
    of every gather of a unit, whether its copy had begun before.
    """
    os.environ["UNSLOTH_FSDP2_OFFLOAD"] = offload
    import unsloth.models.fsdp2_native as native
    from unsloth.models.fsdp2_gather import HostBlock

    begun, take = [], HostBlock.take

    def taken(block, shard, device):
        if id(shard) == block._ids[0]:
            begun.append(bool(block._copied))
        return take(block, shard, device)

    HostBlock.take = taken

    units = []
    original = native.shard_model

    def keep(model, config = None):
        units.append(original(model, config))
        return units[-1]

    native.shard_model = keep
    history = losses(folder, 2, True)
    flags = []
    for unit in units[0]._unsloth_fsdp2_units:
        found = {True: set(), False: set()}
        for p in unit._get_fsdp_state()._fsdp_param_group.fsdp_params:
            if p.sharded_param.dim() == 1:
                assert not p.offload_to_cpu  # a norm: its copy would cost more than it holds
                continue
            found[p.sharded_param.requires_grad].add(p.offload_to_cpu)
        flags.append((found[False], found[True]))
    return history, flags, begun


def test_offloaded_blocks_train_alike(checkpoints):
    """Offloading one block or all changes no bit of the losses, moves frozen shards only, and only
    those.
    """
    folder = checkpoints("packed")
    stay = run_ranks(_offloaded_losses, 2, folder, "never")
    one = run_ranks(_offloaded_losses, 2, folder, "blocks:1")
    every = run_ranks(_offloaded_losses, 2, folder, "all")
    for (_, (a, *_)), (_, (b, flags, begun)), (_, (c, all_flags, _)) in zip(stay, one, every):
        assert a == b == c
        assert flags == [({False}, {False}), ({True}, {False})]
        assert begun.count(True) == 2  # in every forward but the first
        assert all_flags == [({True}, {False})] * 2


def _hosted_at_load(folder):
    """Of every 4-bit layer after a load under blocks:1: (block, on the host?, elements, shares?)."""
    os.environ["UNSLOTH_FSDP2_OFFLOAD"] = "blocks:1"
    from unsloth.models.fsdp2_sharded_params import get_shard

    found = []
    for name, module in load(folder).named_modules():
        shard = get_shard(module)
        if shard is not None:
            block = int(re.search(r"layers\.(\d+)\.", name)[1])
            scales = shard.state.absmax.data_ptr() == shard.absmax.data_ptr()
            found.append((block, shard.on_host, module.weight.numel(), scales))
    return found


def test_offloaded_blocks_are_loaded_into_host_memory(checkpoints):
    """The shards of a block that will be offloaded go to the host as they are read: no layer keeps
    bytes or scales of them on the device.
    """
    for _, found in run_ranks(_hosted_at_load, 2, checkpoints("bf16")):
        assert len(found) == 14
        for block, on_host, numel, scales in found:
            assert on_host == (block == 1) and scales
            assert (numel == 0) == on_host


def test_checkpointing_is_what_unsloth_or_the_blocks_say():
    """Unsloth's flag wins, on whichever module it stands; without one, transformers' own decides."""
    import torch
    import unsloth  # noqa: F401
    from unsloth.models.fsdp2_offload_apply import _checkpointing

    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert _checkpointing(model) is False
    model[0].gradient_checkpointing = True
    assert _checkpointing(model) is True
    for flag, read in (("unsloth", "unsloth"), (False, False), (True, True), ("true", True)):
        model[0]._unsloth_gradient_checkpointing = flag
        assert _checkpointing(model) == read


def test_more_blocks_than_there_are_and_a_model_without_an_adapter_are_named(monkeypatch):
    """Of a load into host memory and of a plan."""
    import torch
    import unsloth  # noqa: F401
    from unsloth.models import fsdp2_native
    from unsloth.models import fsdp2_offload_apply as applied

    model, mesh = torch.nn.Linear(1, 1), types.SimpleNamespace(device_type = "cpu")
    monkeypatch.setattr(fsdp2_native, "find_shard_units", lambda model: ["first", "second"])
    for value, units in (("auto", []), ("blocks:1", ["second"]), ("all", ["first", "second"])):
        monkeypatch.setenv("UNSLOTH_FSDP2_OFFLOAD", value)
        assert applied.blocks_to_load_on_host(model, mesh) == units
    monkeypatch.setenv("UNSLOTH_FSDP2_OFFLOAD", "blocks:3")
    with pytest.raises(ValueError, match = "blocks:3: the model has 2 blocks"):
        applied.blocks_to_load_on_host(model, mesh)
    with pytest.raises(ValueError, match = "no LoRA adapter"):
        applied._lora(model)
    with pytest.raises(ValueError, match = "0 FSDP2 units; shard it block by block"):
        applied.offload_blocks(model, ())
    model._unsloth_fsdp2_units = ["first", "second"]
    with pytest.raises(ValueError, match = r"blocks \(1, 2\) of a model with 2 FSDP2 units"):
        applied.offload_blocks(model, (1, 2))
