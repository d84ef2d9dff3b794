# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A meta 4-bit model, wrapped by its caller: each rank fills in its slices of the checkpoint."""

import glob

from backend import require

require("gloo")
import pytest
from fsdp2_ranks import checkpoints, load_whole, run_ranks  # noqa: F401


def _own_fully_shard(folder):
    """Bytes that differ after fully_shard on a meta model and param_init_fn, against a whole load."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from unsloth.models.fsdp2_param_init import param_init_fn

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = load_whole(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit = True,
        bnb_4bit_quant_type = "nf4",
        bnb_4bit_use_double_quant = True,
        bnb_4bit_compute_dtype = torch.bfloat16,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype = torch.bfloat16
        )
    model = replace_with_bnb_linear(model, ["lm_head"], quantization_config = quantization) or model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    init = param_init_fn(model, sorted(glob.glob(folder + "/*.safetensors")), mesh)
    for block in model.model.layers:
        fully_shard(block, mesh = mesh)
    fully_shard(model, mesh = mesh)
    model.apply(init)
    model.model.rotary_emb = whole.model.rotary_emb
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = whole(input_ids = ids).logits
        found = [model(input_ids = ids).logits for _ in range(3)]  # later gathers reuse the first's
    return all(torch.equal(logits, expected) for logits in found)


def test_param_init_fn_fills_a_meta_model(checkpoints):
    """fully_shard on a meta model, then model.apply(param_init_fn): the logits of a whole load, bit
    for bit.
    """
    assert all(same for _, same in run_ranks(_own_fully_shard, 3, checkpoints("bf16")))


def _read_from_quantized_files(folder, rows, columns, world, nested):
    """Names of the parts of a weight of bitsandbytes' own that its ranks do not read as they are."""
    from types import SimpleNamespace

    import torch
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import save_file
    from unsloth.models.fsdp2_shard_reader import ShardReader, StoredWeight

    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype = torch.bfloat16)
    packed, state = quantize_4bit(weight, compress_statistics = nested, quant_type = "nf4")
    parts = {f"w.{name}": part for name, part in state.as_dict(packed = True).items()}
    save_file({"w": packed, **parts}, folder + "/model.safetensors")
    module = Linear4bit(columns, rows, bias = False)
    shards, read = [], 0
    for rank in range(world):
        mesh = SimpleNamespace(
            ndim = 1, size = lambda axis: world, get_local_rank = lambda axis, rank = rank: rank
        )
        reader = ShardReader([folder + "/model.safetensors"])
        device = torch.device("cpu")
        shards.append(StoredWeight(module, "w", reader, mesh, device, weight.dtype).load())
        read += reader.read_bytes
    found = {
        "packed": (torch.cat([shard.packed.view(-1) for shard in shards]), packed.view(-1)),
        "absmax": (torch.cat([shard.absmax.view(-1) for shard in shards]), state.absmax),
    }
    if nested:
        outer = torch.cat([shard.nested.view(-1) for shard in shards])
        found["nested"] = (outer, state.state2.absmax)
    assert read == sum(whole.nbytes for _, whole in found.values())
    if nested:
        found["offset"] = (shards[0].state.offset, state.offset)
    return [
        name
        for name, (mine, whole) in found.items()
        if not torch.equal(mine.view(-1)[: whole.numel()], whole.view(-1))
    ]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    "rows, columns, world", [(5, 77, 1), (448, 192, 3), (129, 257, 2), (64, 256, 1)]
)
def test_quantized_files_are_read_to_their_last_number(tmp_path, rows, columns, world, nested):
    """Bytes, scales and the scales' own, where the last byte, block or block of blocks is not full."""
    ((_, wrong),) = run_ranks(
        _read_from_quantized_files, 1, str(tmp_path), rows, columns, world, nested
    )
    assert wrong == []


def _meta_model(folder, meta):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta" if meta else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def _refused(folder, meta, files):
    from torch.distributed.device_mesh import init_device_mesh
    from unsloth.models.fsdp2_param_init import param_init_fn

    mesh = init_device_mesh("cpu", (2,))
    param_init_fn(_meta_model(folder, meta), sorted(glob.glob(f"{folder}/{files}")), mesh)


@pytest.mark.parametrize(
    "meta, files, words",
    [
        (False, "*.safetensors", "is on cpu; build the model"),
        (True, "model-00001-of*.safetensors", "the files have no tensor"),
        (True, "*.json", "config.json"),
        (True, "*.bin", "none"),
    ],
)
def test_what_cannot_be_filled_is_named(checkpoints, meta, files, words):
    """A parameter that is not on meta, or not in the files, and files that are no safetensors."""
    for error, _ in run_ranks(_refused, 2, checkpoints("bf16"), meta, files, check = False):
        assert "ValueError" in error and words in error


def test_a_torch_that_cannot_shard_bytes_is_named(monkeypatch):
    """Before anything of the model was changed."""
    import unsloth  # noqa: F401
    from unsloth.models import fsdp2_qlora
    from unsloth.models.fsdp2_param_init import param_init_fn

    monkeypatch.setattr(fsdp2_qlora, "patch_fsdp2_params4bit", lambda: (False, "it is too old"))
    with pytest.raises(RuntimeError, match = "cannot shard 4-bit weights: it is too old"):
        param_init_fn(None, [], None)


def test_a_weight_that_cannot_be_read_is_an_error_after_the_collective():
    """The other ranks quantize with this one: it takes part before it raises."""
    from types import SimpleNamespace

    import unsloth  # noqa: F401
    from unsloth.models.fsdp2_shard_reader import StoredWeight

    def read():
        raise OSError("the disk is gone")

    parts = []
    weight = SimpleNamespace(described = None, read = read, quantize = parts.append)
    with pytest.raises(OSError, match = "the disk is gone"):
        StoredWeight.load(weight)
    assert parts == [None]


def test_a_bitsandbytes_that_is_broken_costs_no_import(monkeypatch):
    """No model is 4-bit then."""
    import importlib.util
    import sys

    import torch
    import unsloth  # noqa: F401
    from unsloth.models import fsdp2_sharded_params

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    name, file = "unsloth.models._without_bitsandbytes", fsdp2_sharded_params.__file__
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.bnb_functional.QuantState is object
    assert not isinstance(torch.nn.Linear(1, 1), module.Linear4bit)


def _gathered_states():
    """What the QuantState reads after gathers into the same and into other storages."""
    import torch
    from unsloth.models import fsdp2_sharded_params as params
    from unsloth.models.fsdp2_gather import HostBlock

    layout = params.RowLayout(numel = 3 * 16384 + 640, world = 1, rank = 0, blocksize = 64)
    shape = torch.Size((layout.numel // 64, 64))
    quantized = params.WeightFormat(shape, torch.bfloat16, nested = False)
    weights = torch.randn(layout.numel, dtype = torch.bfloat16)
    shard = params.quantize_rows(weights, layout, quantized, torch.device("cpu"), None)
    state = shard.state
    first, other = (torch.full((4, 256), value) for value in (1.0, 2.0))
    savable = [bool(state.as_dict(packed = True))]
    HostBlock([shard], pin = False)
    own = shard.host._buffer[-shard.absmax.nbytes :].view(torch.float32)
    savable.append(state.absmax.data_ptr() == own.data_ptr() and torch.equal(state.absmax, own))
    shard.set_gathered((first,))
    savable.append(bool(state.as_dict(packed = True)))
    seen = [state.absmax.unique().item()]
    once, state._unsloth_nf4_plan = state.absmax, "of an address"
    shard.set_gathered((first,))
    seen += [state.absmax is once, state._unsloth_nf4_plan]
    shard.set_gathered((other,))
    seen += [state.absmax.unique().item(), state.absmax.numel() == layout.blocks]
    other.untyped_storage().resize_(0)
    return [*seen, *savable, bool(state.as_dict(packed = True))]


def test_scales_are_read_from_where_they_were_gathered():
    """A gather into the same storage keeps the views and voids what was cached by address; one into
    another storage is seen. There are none to save before the first, and after the last was freed.
    """
    ((_, found),) = run_ranks(_gathered_states, 1)
    assert found == [1.0, True, None, 2.0, True, False, True, True, False]


def _refused_files(folder):
    """What the errors say of quantized files that this reader does not know."""
    from types import SimpleNamespace

    import torch
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import save_file
    from unsloth.models.fsdp2_shard_reader import ShardReader, StoredWeight

    mesh = SimpleNamespace(ndim = 1, size = lambda axis: 2, get_local_rank = lambda axis: 0)
    weight, said = torch.randn(512, 512, dtype = torch.bfloat16), []
    packed, state = quantize_4bit(weight, compress_statistics = True, quant_type = "nf4")
    for change in ("shape", "nested", "dtype"):
        rows = 511 if change == "shape" else 512
        state.state2.blocksize = 128 if change == "nested" else 256
        stored = packed.to(torch.int16) if change == "dtype" else packed
        parts = {f"w.{name}": part for name, part in state.as_dict(packed = True).items()}
        save_file({"w": stored, **parts}, f"{folder}/{change}.safetensors")
        reader = ShardReader([f"{folder}/{change}.safetensors"])
        module = Linear4bit(512, rows, bias = False)
        try:
            StoredWeight(module, "w", reader, mesh, torch.device("cpu"), weight.dtype).load()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_quantized_files_of_another_kind_are_named(tmp_path):
    """Another shape, another nested blocksize, and bytes in a dtype that is not read."""
    ((_, said),) = run_ranks(_refused_files, 1, str(tmp_path))
    words = [
        "the model expects torch.Size([511, 512])",
        "nested blocksize 128",
        "'w' is stored as I16",
    ]
    assert [word in text for word, text in zip(words, said)] == [True] * 3, said
