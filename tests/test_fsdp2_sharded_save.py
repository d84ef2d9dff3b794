# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Saves of a model of sharded 4-bit weights see whole weights with whole quantization states."""

import os

from backend import require

require("gloo")
from fsdp2_ranks import checkpoints, load, load_whole, run_ranks  # noqa: F401


def _gathered_for_save(folder):
    import torch
    from unsloth.models.fsdp2_native import native_full_state_dict, shard_model
    from unsloth.models.fsdp2_save import fsdp2_gathered

    whole = load_whole(folder)
    model = shard_model(load(folder))
    problems = []
    before = {
        name: p.quant_state for name, p in model.named_parameters() if hasattr(p, "quant_state")
    }
    with fsdp2_gathered(model) as writer:
        if writer:
            for name, reference in whole.named_parameters():
                mine = model.get_parameter(name)
                if not torch.equal(mine.data.view(-1), reference.data.view(-1)):
                    problems.append(name)
                if reference.dtype == torch.uint8:
                    old = reference.quant_state.as_dict(packed = True)
                    new = mine.quant_state.as_dict(packed = True)
                    if not all(torch.equal(new[key], old[key]) for key in old):
                        problems.append(f"{name} state")
    after = {
        name: p.quant_state for name, p in model.named_parameters() if hasattr(p, "quant_state")
    }
    restored = before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    trainable = native_full_state_dict(model, trainable_only = True)
    if any(value.dtype == torch.uint8 for value in trainable.values()):
        problems.append("frozen weights among the trainable ones")
    full, expected = native_full_state_dict(model), whole.state_dict()
    if full or os.environ["RANK"] == "0":
        problems += sorted(set(full) ^ set(expected))
        for name in set(full) & set(expected):
            if not torch.equal(full[name].view(-1), expected[name].view(-1)):
                problems.append(f"{name} in the full state dict")
    try:
        native_full_state_dict(model, cpu_offload = False)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return problems, restored, len(before), refused


def test_save_sees_whole_weights(checkpoints):
    """Inside the saves' gather rank 0 has the weights and QuantStates of a whole load; afterwards
    every rank has its shard back. The full state dict has the keys and bytes of a whole load's.
    """
    for _, (problems, restored, count, refused) in run_ranks(
        _gathered_for_save, 2, checkpoints("bf16")
    ):
        assert problems == []
        assert restored and count == 14
        assert "cpu_offload" in refused


def _save_that_raises(folder):
    from unsloth.models.fsdp2_native import shard_model
    from unsloth.models.fsdp2_save import fsdp2_gathered

    model = shard_model(load(folder))
    before = {name: getattr(p, "quant_state", None) for name, p in model.named_parameters()}
    try:
        with fsdp2_gathered(model):
            raise OSError("the disk is full")
    except OSError:
        pass
    after = {name: getattr(p, "quant_state", None) for name, p in model.named_parameters()}
    restored = all(before[name] is after[name] for name in before)
    with fsdp2_gathered(model) as writer:  # and it can be saved again
        states = [getattr(p, "quant_state", None) for p in model.parameters()]
        whole = [s.absmax.numel() * s.blocksize >= s.shape.numel() for s in states if s is not None]
    return restored, writer, whole


def test_a_save_that_raises_gives_the_shards_back(checkpoints):
    """After an error inside the saves' gather every weight has its sharded state, and a save works."""
    found = [result for _, result in run_ranks(_save_that_raises, 2, checkpoints("packed"))]
    assert all(restored for restored, *_ in found)
    assert [len(whole) for _, writer, whole in found if writer] == [14]
    assert all(all(whole) for _, writer, whole in found if writer)
