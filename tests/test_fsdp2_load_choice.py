# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""An undecided 4-bit load under native FSDP2 is sharded exactly where the whole model does not fit."""

import os

from backend import require

require("gloo")
import pytest
from fsdp2_ranks import checkpoints, load, run_ranks  # noqa: F401

GIB = 2**30


def test_variables_decide_the_load(checkpoints, monkeypatch):
    """UNSLOTH_FSDP2_SHARDED_LOAD decides, auto without it; whoever asks for replicated weights gets
    them; without native FSDP2 nothing is sharded; another value is an error that names it.
    """
    from unsloth.models.fsdp2_load_choice import sharded_load_mode

    monkeypatch.setenv("UNSLOTH_FSDP2", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("UNSLOTH_FSDP2_SHARDED_LOAD", raising = False)
    assert sharded_load_mode() == "auto"
    for value, mode in [("1", "1"), ("0", "0"), ("off", "0"), ("auto", "auto")]:
        monkeypatch.setenv("UNSLOTH_FSDP2_SHARDED_LOAD", value)
        assert sharded_load_mode() == mode
    for name, value in [("LAYOUT", "fit"), ("REPLICATE_FROZEN", "1"), ("SHARD_FROZEN", "0")]:
        with monkeypatch.context() as patch:
            patch.setenv(f"UNSLOTH_FSDP2_{name}", value)
            assert sharded_load_mode() == "0"
    monkeypatch.setenv("UNSLOTH_FSDP2_SHARDED_LOAD", "maybe")
    with pytest.raises(ValueError, match = "'maybe'"):
        sharded_load_mode()
    monkeypatch.setenv("UNSLOTH_FSDP2", "0")
    assert sharded_load_mode() == "0"


def _auto_load(folder, usable, group, options):
    """Whether an undecided load was sharded, and what it printed. usable: bytes of each rank."""
    import contextlib
    import io

    import torch.distributed as dist
    from unsloth.models import fsdp2_load_choice as choice
    from unsloth.models.fsdp2_sharded_params import get_shard

    del os.environ["UNSLOTH_FSDP2_SHARDED_LOAD"]
    choice._usable = lambda: usable[int(os.environ["RANK"])]
    if group:
        dist.init_process_group("gloo")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        models = [load(folder, **options) for _ in range(2)]
    lines = [line for line in said.getvalue().splitlines() if "4-bit load under FSDP2" in line]
    sharded = [any(get_shard(m) is not None for m in model.modules()) for model in models]
    return sharded, lines, dist.is_initialized()


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("usable, sharded", [((2**40, 2**40), False), ((2**40, 2**20), True)])
def test_auto_shards_where_the_whole_model_does_not_fit(checkpoints, usable, sharded, group):
    """Without the variable every rank decides alike from the smallest memory, says so once a load,
    and makes no process group where the model stays whole.
    """
    found = run_ranks(_auto_load, 2, checkpoints("packed"), usable, group, {})
    for rank, (_, (loads, lines, initialized)) in enumerate(found):
        assert loads == [sharded, sharded]
        assert initialized == (group or sharded)
        assert len(lines) == (2 if rank == 0 else 0)
    line = found[0][1][1][0]
    assert "GiB are usable on rank" in line and "planned to need" in line
    assert ("sharded over 2 ranks" in line) == sharded
    assert "rank 1 (" in line if sharded else "rank 0 (" in line


def _auto_unknown(folder):
    """An undecided load of a config that cannot be counted on rank 1."""
    from unsloth.models import fsdp2_load_choice as choice

    if os.environ["RANK"] == "1":

        def fail(given):
            raise ValueError("a mixture of experts is not counted here")

        choice._shape = fail
    return _auto_load(folder, (2**20, 2**20), False, {})


def test_auto_leaves_what_it_cannot_count(checkpoints):
    """A model whose size is not known on some rank is loaded as without the patch, with the reason."""
    found = run_ranks(_auto_unknown, 2, checkpoints("packed"))
    assert all(loads == [False, False] for _, (loads, *_) in found)
    assert "rank 1: ValueError: a mixture of experts" in found[0][1][1][0]


def _smallest_host(_):
    """usable_host_memory over two ranks of which one sees half a GiB."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from unsloth.models import fsdp2_memory_count as memory

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
