# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A 4-bit model under native FSDP2 of which no rank ever holds more than its shard."""

import glob
import os
import shutil
import sys

from backend import require

require("gloo")
import pytest
from fsdp2_ranks import (  # noqa: F401
    HIDDEN,
    VOCAB,
    assert_sharded,
    checkpoints,
    load,
    load_whole,
    losses,
    run_ranks,
)


def _compare_bytes(folder):
    """Names of tensors whose gathered bytes differ from a whole load, and what this rank holds."""
    import torch
    from unsloth.models.fsdp2_native import native_fsdp2_unsharded, shard_model

    model = load(folder)
    held = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    whole = load_whole(folder)
    model = shard_model(model)
    local = {name: p.to_local().numel() for name, p in model.named_parameters()}
    different = []
    with native_fsdp2_unsharded(model):
        for name, reference in whole.named_parameters():
            mine = model.get_parameter(name)
            pairs = [(mine.data.reshape(-1), reference.data.reshape(-1))]
            if reference.dtype == torch.uint8:
                a, b = mine.quant_state, reference.quant_state
                pairs += [(a.absmax, b.absmax), (a.code, b.code)]
                assert (a.shape, a.dtype, a.blocksize) == (b.shape, b.dtype, b.blocksize)
                if b.state2 is not None:
                    pairs += [(a.offset, b.offset), (a.state2.absmax, b.state2.absmax)]
                    pairs += [(a.state2.code, b.state2.code)]
            if not all(torch.equal(x, y) for x, y in pairs):
                different.append(name)
    full = {name: p.numel() for name, p in whole.named_parameters()}
    return different, held, local, full


@pytest.mark.parametrize(
    "kind, world",
    [("bf16", 3), ("fp16", 2), ("packed", 2), ("packed", 3), ("single", 2), ("tied", 2)],
)
def test_gathered_bytes_equal_a_whole_load(checkpoints, kind, world):
    """Packed bytes, absmax, nested absmax, offset, embedding and head are bit-identical once
    gathered, from 16-bit files and from pre-quantized ones, and no rank held more than its rows.
    """
    for _, (different, held, local, full) in run_ranks(_compare_bytes, world, checkpoints(kind)):
        assert different == []
        packed = [name for name in full if "_proj" in name]
        padding = len(packed) * 8192  # at most one row of 16,384 weights too many in each
        assert held <= sum(full[name] for name in packed) / world + padding
        for name in set(full) - set(packed):
            assert local[name] <= -(-full[name] // world) + HIDDEN, name


def _read_bytes(folder):
    import unsloth.models.fsdp2_sharded_4bit as loading

    seen, original = [], loading.fill_sharded

    def spy(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[0]

    loading.fill_sharded = spy
    load(folder)
    files = sum(os.path.getsize(path) for path in glob.glob(folder + "/*.safetensors"))
    return seen[0], files - 2 * 2 * VOCAB * HIDDEN  # without embedding and head


def test_each_rank_reads_its_slices_only(checkpoints):
    """The bytes read add up to one checkpoint over the ranks, plus the matrix rows cut in two."""
    found = [result for _, result in run_ranks(_read_bytes, 2, checkpoints("bf16"))]
    weights = found[0][1]
    total = sum(read for read, *_ in found)
    assert 0.9 * weights < total < 1.1 * weights
    assert all(read < 0.8 * weights for read, *_ in found)


@pytest.mark.parametrize("kind, checkpointing", [("bf16", False), ("packed", True)])
def test_losses_equal_one_device(checkpoints, kind, checkpointing):
    """Two ranks train with the losses of one device that sees both micro-batches, bit for bit."""
    folder = checkpoints(kind)
    ((_, single),) = run_ranks(losses, 1, folder, 1, checkpointing)
    ranks = [result for _, result in run_ranks(losses, 2, folder, 2, checkpointing)]
    assert single[0] != single[2]
    assert [[a[0], b[0]] for a, b in zip(*ranks)] == single


def _calls_of_gathers(folder):
    """Calls, Python's and C's, that gathering and freeing a block takes: sharded, and Unsloth's
    own.
    """
    from unsloth import FastLanguageModel
    from unsloth.models.fsdp2_native import shard_model

    counts = []
    for sharded, layout in (("1", "auto"), ("0", "sharded")):
        os.environ.update(UNSLOTH_FSDP2_SHARDED_LOAD = sharded, UNSLOTH_FSDP2_LAYOUT = layout)
        model = FastLanguageModel.get_peft_model(load(folder), r = 8, random_state = 1)
        (unit, *_) = shard_model(model)._unsloth_fsdp2_units
        seen = []
        for count in (False, False, True):
            sys.setprofile((lambda _, event, __: seen.append(event)) if count else None)
            unit.unshard()
            unit.reshard()
            sys.setprofile(None)
        counts.append(sum(event in ("call", "c_call") for event in seen))
    return counts


def test_a_gather_costs_the_host_what_stock_does(checkpoints):
    """Scales travel with the bytes, and the host does no more than for bytes alone (2% for
    counting).
    """
    for _, (ours, stock) in run_ranks(_calls_of_gathers, 2, checkpoints("packed")):
        assert stock > 500 and ours <= 1.02 * stock


def _float16_model(folder, world):
    """A float16 4-bit model with LoRA, sharded with world > 1. By transformers' loader, since
    Unsloth's CPU backend turns float16 into bfloat16.
    """
    import contextlib

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from unsloth.models.fsdp2_native import FSDP2Config, shard_model
    from unsloth.models.fsdp2_sharded_4bit import sharded_4bit_loading
    from unsloth.models.fsdp2_sharded_params import get_shard

    quantization = BitsAndBytesConfig(
        load_in_4bit = True,
        bnb_4bit_quant_type = "nf4",
        bnb_4bit_use_double_quant = True,
        bnb_4bit_compute_dtype = torch.float16,
    )
    with sharded_4bit_loading() if world > 1 else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config = quantization,
            dtype = torch.float16,
            device_map = {"": "cpu"},
        )
    torch.manual_seed(1)
    lora = LoraConfig(r = 8, lora_alpha = 8, target_modules = ["q_proj", "up_proj", "down_proj"])
    model = get_peft_model(model, lora)
    if world > 1:
        assert_sharded(model)
        states = [get_shard(m).state for m in model.modules() if get_shard(m) is not None]
        assert {state.dtype for state in states} == {torch.float16}
        model = shard_model(model, FSDP2Config(param_dtype = torch.float16))
    return model


def _float16_steps(folder, world):
    """Losses and step outcomes of float16 training with a loss scaler whose first scale overflows."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model = _float16_model(folder, world)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr = 2e-3, foreach = False)
    scaler_class = ShardedGradScaler if world > 1 else torch.amp.GradScaler
    # A rank's loss is not divided by the ranks: its gradients overflow that much earlier.
    scaler = scaler_class(device = "cpu", init_scale = 2.0**30 / world, growth_interval = 1000)
    ids = torch.randint(4, VOCAB, (2, 24), generator = torch.Generator().manual_seed(3))
    rows = [dist.get_rank()] if world > 1 else [0, 1]
    history = []
    for _ in range(24):
        total = 0.0
        for row in rows:
            loss = model(input_ids = ids[[row]], labels = ids[[row]]).loss
            scaler.scale(loss / len(rows)).backward()
            total += loss.item() / len(rows)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append((total, scaler.get_scale()))
    return history


def test_float16_trains_as_on_one_device(checkpoints):
    """Without bfloat16 (T4) the weights are gathered and computed in float16; with a loss scaler
    the ranks skip the same steps and end at the loss of one device.
    """
    ((_, single),) = run_ranks(_float16_steps, 1, checkpoints("fp16"), 1)
    a, b = [result for _, result in run_ranks(_float16_steps, 2, checkpoints("fp16"), 2)]
    assert [scale for _, scale in a] == [scale for _, scale in b]
    assert a[0][1] < 2.0**29 and a[-1][1] == a[-2][1], "the first steps overflow, the last do not"
    losses = [(x + y) / 2 for (x, _), (y, _) in zip(a, b)]
    assert losses[-1] < single[0][0] - 0.02
    assert losses[0] == pytest.approx(single[0][0], rel = 1e-3)
    assert losses[-1] == pytest.approx(single[-1][0], abs = 0.05)


def _train(folder, output, steps, resume, accumulate):
    """SFTTrainer on this rank; the adapter's tensors at the end on rank 0, and the log."""
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel
    from unsloth.fsdp2_launch import install_native_fsdp2_trainer_init

    install_native_fsdp2_trainer_init()  # `import unsloth` does it where a launcher set the variables
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert_sharded(model)
    model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 8, random_state = 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (16, 24), generator = generator).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 24] * 16, "labels": ids})
    arguments = SFTConfig(
        output_dir = output,
        per_device_train_batch_size = 1,
        gradient_accumulation_steps = accumulate,
        max_steps = steps,
        save_steps = 2,
        save_strategy = "steps",
        logging_steps = 1,
        learning_rate = 1e-3,
        lr_scheduler_type = "constant",
        max_grad_norm = 0.3,
        optim = "adamw_torch",
        use_cpu = True,
        bf16 = True,
        report_to = [],
        seed = 3,
        max_length = 24,
        dataset_kwargs = {"skip_prepare_dataset": True},
        disable_tqdm = True,
    )
    trainer = SFTTrainer(
        model = model, processing_class = tokenizer, train_dataset = data, args = arguments
    )
    trainer.train(resume_from_checkpoint = f"{output}/checkpoint-2" if resume else None)
    log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    saved = load_file(f"{output}/checkpoint-{steps}/adapter_model.safetensors")
    return log, {name: value.float().numpy() for name, value in saved.items()}


def test_trainer_saves_and_resumes(checkpoints, tmp_path):
    """SFTTrainer with accumulation and clipping under UNSLOTH_FSDP2=1: training resumed from its
    checkpoint ends in the weights of training that was not interrupted.
    """
    import numpy

    folder, output = checkpoints("bf16"), str(tmp_path / "out")
    ((_, (log, straight)), _) = run_ranks(_train, 2, folder, output, 4, False, 2)
    assert len(log) == 4
    assert all(value.size and numpy.isfinite(value).all() for value in straight.values())
    ((_, (_, resumed)), _) = run_ranks(_train, 2, folder, output, 4, True, 2)
    assert straight.keys() == resumed.keys()
    for name in straight:
        numpy.testing.assert_array_equal(straight[name], resumed[name], err_msg = name)


def _forward_too_early(folder):
    import torch
    model = load(folder)
    model(input_ids = torch.tensor([[5, 6]]))


def test_forward_before_the_wrap_is_refused(checkpoints):
    """A model of shards that is not wrapped raises instead of computing with a part of its weights."""
    for error, _ in run_ranks(_forward_too_early, 2, checkpoints("packed"), check = False):
        assert "before it is wrapped" in error


def _wrap_with(folder, options):
    from peft import LoraConfig, get_peft_model
    from unsloth.models.fsdp2_native import shard_model

    model = load(folder)
    config = LoraConfig(r = 4, target_modules = ["q_proj"], task_type = "CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, value in options.items():
        setattr(model.peft_config["default"], name, value)
    shard_model(model)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}],
)
def test_adapters_that_read_whole_weights_are_refused(checkpoints, options):
    """DoRA, PiSSA and LoftQ need the whole base weight, which no rank has."""
    for error, _ in run_ranks(_wrap_with, 2, checkpoints("packed"), options, check = False):
        assert "reads whole base weights" in error and next(iter(options)) in error


def _refusals(folder):
    """What shard_model and the load's context say to wraps, meshes and places that cannot be."""
    from types import SimpleNamespace

    import torch
    from bitsandbytes.nn import Linear4bit
    from torch.distributed.device_mesh import init_device_mesh
    from unsloth.models import fsdp2_qlora
    from unsloth.models import fsdp2_sharded_4bit as loading
    from unsloth.models.fsdp2_native import FSDP2Config, shard_model
    from unsloth.models.fsdp2_sharded_wrap import _install

    model, said = load(folder), []

    def refused(function, *arguments):
        try:
            function(*arguments)
        except (RuntimeError, ValueError) as error:
            said.append(str(error))

    weight = next(p for p in model.parameters() if p.dtype == torch.uint8)
    refused(shard_model, model, FSDP2Config(shard_placement_fn = lambda _: None))
    refused(shard_model, model, FSDP2Config(ignored_params = {weight}))
    refused(shard_model, model, FSDP2Config(mesh = init_device_mesh("cpu", (1, 2))))
    model.added = Linear4bit(64, 64)
    refused(shard_model, model, FSDP2Config())
    del model.added
    for shape in ((2, 1), (1, 1, 2)):
        refused(loading.sharded_4bit_loading(init_device_mesh("cpu", shape)).__enter__)
    mesh = init_device_mesh("cpu", (2,))
    refused(loading._single_device, {"a": 0, "b": "cpu"}, mesh)
    settings = SimpleNamespace(quantization_config = SimpleNamespace(load_in_4bit = True))
    step = loading._sharded_step(None, mesh)
    refused(step, model, {"a": 1}, [], SimpleNamespace(hf_quantizer = settings))
    refused(_install, torch.nn.Linear(1, 1), {(0, "weight"): None})
    known, fsdp2_qlora.patch_fsdp2_params4bit = (
        fsdp2_qlora.patch_fsdp2_params4bit,
        lambda: (False, "it is too old"),
    )
    refused(shard_model, model, FSDP2Config())
    fsdp2_qlora.patch_fsdp2_params4bit = known
    find, loading.loading_step = loading.loading_step, lambda: None
    refused(loading.sharded_4bit_loading(mesh).__enter__)
    loading.loading_step = find
    shard_model(model)  # none of them has changed anything
    return said


def test_what_cannot_be_wrapped_or_placed_is_refused(checkpoints):
    """Each refusal names what is in the way, and the model can be wrapped afterwards."""
    words = ["cut on rows", "ignored_params names", "loaded over the ranks", "'added'"]
    words += ["shards over one rank", "not 3 dimensions", "device_map places", "got a state_dict"]
    words += ["in no FSDP2 unit. Wrap the module", "4-bit weights: it is too old"]
    words += ["needs transformers 5; upgrade"]
    for _, said in run_ranks(_refusals, 2, checkpoints("packed")):
        assert len(said) == len(words)
        assert all(word in text for word, text in zip(words, said))


def test_a_load_after_one_that_raised_is_the_outermost_again():
    """Else it would be taken for a loader's own call, and its ranks would not decide together."""
    import unsloth  # noqa: F401
    from unsloth.models.fsdp2_sharded_4bit import outermost_loader

    with pytest.raises(KeyError), outermost_loader() as first:
        with outermost_loader() as second:
            raise KeyError("in the load")
    with outermost_loader() as third:
        assert (first, second, third) == (True, False, True)


def test_tensors_that_cannot_be_sharded_are_named():
    """A 4-bit weight of no Linear4bit, bytes without their scales; a model without embeddings."""
    from types import SimpleNamespace

    import torch
    import unsloth  # noqa: F401
    from bitsandbytes.nn import Params4bit
    from unsloth.models import fsdp2_sharded_load as loading

    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.weight = Params4bit(torch.empty(4, 4, device = "meta"), requires_grad = False)
    with pytest.raises(ValueError, match = "'experts.weight' is a 4-bit weight of a Module; only"):
        loading._find_jobs(model, {"experts.weight": None}, None, None, [])
    reader = SimpleNamespace(shape = lambda key: (2, 2), itemsize = lambda key: 1)
    weight = SimpleNamespace(format = SimpleNamespace(shape = (2, 2)), described = None)
    job = SimpleNamespace(key = "a.weight", parameter = torch.empty(2, 2), weight = weight)
    with pytest.raises(ValueError, match = "'a.weight' holds bytes, but no a.weight.quant_state"):
        loading._check_stored(job, reader)
    assert loading._table_ids(torch.nn.Linear(1, 1)) == set()


def _break_then_load(folder, broken):
    """Rank 1 reads from a folder of its own whose checkpoint is damaged."""
    return load(broken if os.environ["RANK"] == "1" else folder) is not None


@pytest.mark.parametrize("kind, damage", [("packed", "missing"), ("bf16", "shape")])
def test_a_failing_rank_fails_all_with_its_reason(checkpoints, tmp_path, kind, damage):
    """One rank's damaged file ends the load on every rank, with that rank's reason and without a
    hang.
    """
    folder, broken = checkpoints(kind), str(tmp_path / "broken")
    run_ranks(_copy_damaged, 1, folder, broken, damage)
    for error, _ in run_ranks(_break_then_load, 2, folder, broken, check = False):
        assert "rank 1:" in error and "layers.1.mlp.up_proj.weight" in error


def _copy_damaged(folder, broken, damage):
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, broken)
    for path in glob.glob(broken + "/*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if "layers.1.mlp.up_proj.weight" in n]:
            if damage == "missing":
                del tensors[name]
            else:
                tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, path, metadata = {"format": "pt"})


def _read_error(folder):
    """Rank 1 fails while it reads, after all names and shapes were found right."""
    from unsloth.models.fsdp2_shard_reader import ShardReader

    if os.environ["RANK"] == "1":
        original = ShardReader.rows

        def rows(self, key, start, stop):
            if "layers.1.self_attn.k_proj" in key:
                raise OSError("the disk is gone")
            return original(self, key, start, stop)

        ShardReader.rows = rows
    return load(folder) is not None


def _memory_error(folder):
    """Rank 1 has no memory left to quantize one of its weights."""
    from unsloth.models import fsdp2_sharded_params as params

    if os.environ["RANK"] == "1":
        original, calls = params.bnb_functional.quantize_4bit, []

        def quantize_4bit(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise MemoryError("there is none left")
            return original(*args, **kwargs)

        params.bnb_functional.quantize_4bit = quantize_4bit
    return load(folder) is not None


@pytest.mark.parametrize(
    "failing, kind, words",
    [
        (_read_error, "bf16", "OSError: the disk is gone"),
        (_read_error, "packed", "OSError: the disk is gone"),
        (_memory_error, "bf16", "MemoryError: there is none left"),
    ],
)
def test_an_error_in_the_middle_fails_all(checkpoints, failing, kind, words):
    """A rank that fails still takes part in the collectives of the others, which then fail too."""
    for error, _ in run_ranks(failing, 2, checkpoints(kind), check = False):
        assert f"rank 1: {words}" in error


def _reads_until_failure(folder):
    """What this rank was told, and what it had read by then; rank 1 fails at the second weight."""
    from transformers import PreTrainedModel
    from unsloth.models import fsdp2_sharded_load as loading
    from unsloth.models.fsdp2_shard_reader import ShardReader
    from unsloth.models.fsdp2_sharded_4bit import _mesh

    loading.BYTES_BETWEEN_CHECKS = 0
    keys, original = [], ShardReader.rows

    def rows(self, key, start, stop):
        keys.append(key)
        if os.environ["RANK"] == "1" and len(keys) == 2:
            raise OSError("the disk is gone")
        return original(self, key, start, stop)

    ShardReader.rows = rows
    loading.READERS = 1  # so that the second read is the second weight's
    step = vars(PreTrainedModel)["_load_pretrained_model"]
    try:
        load(folder)
    except loading.ShardedLoadError as error:
        told, reads = str(error), len(keys)
    assert vars(PreTrainedModel)["_load_pretrained_model"] is step and _mesh.get() is None
    assert_sharded(load(folder))  # nothing of the failed load stands in the way of another
    return told, reads


def test_ranks_stop_reading_soon_after_one_failed(checkpoints):
    """The others do not read the rest of a large model before they hear of a failure; then a load
    works again.
    """
    for _, (told, reads) in run_ranks(_reads_until_failure, 2, checkpoints("bf16")):
        assert "rank 1: OSError: the disk is gone" in told and 2 <= reads <= 4


def _killed_while_loading(folder):
    import signal

    from unsloth.models.fsdp2_shard_reader import ShardReader

    if os.environ["RANK"] == "1":
        ShardReader.rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    load(folder)


def test_a_killed_rank_ends_the_others(checkpoints):
    """A rank that dies while it loads ends all within a minute, and those left say what happened."""
    ranks = run_ranks(_killed_while_loading, 2, checkpoints("bf16"), check = False, seconds = 60)
    assert "ShardedLoadError" in ranks[0][0] and "lost a rank" in ranks[0][0]
    assert "exit code -9" in ranks[1][0]


def _hsdp(folder):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from unsloth.models.fsdp2_native import FSDP2Config, shard_model
    from unsloth.models.fsdp2_sharded_4bit import sharded_4bit_loading

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names = ("replicate", "shard"))
    with sharded_4bit_loading(mesh):
        model = load(folder)
    whole = load_whole(folder)
    model = shard_model(model, FSDP2Config(mesh = mesh))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return torch.equal(model(input_ids = ids).logits, whole(input_ids = ids).logits)


def test_hsdp_mesh(checkpoints):
    """A (replicate, shard) mesh loads and wraps over its shard dimension."""
    assert all(same for _, same in run_ranks(_hsdp, 4, checkpoints("packed")))


def _load_that_is_not_sharded(folder, variable):
    """Whole packed bytes on this rank, and what was printed; no variable: as with transformers 4."""
    import contextlib
    import io

    import torch
    import unsloth.models.fsdp2_sharded_4bit as loading

    if variable:
        os.environ[variable[0]] = variable[1]
    else:
        loading.loading_step = lambda: None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        model = load(folder)
    held = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    whole = load_whole(folder)
    full = sum(p.numel() for p in whole.parameters() if p.dtype == torch.uint8)
    return held == full > 0, said.getvalue()


@pytest.mark.parametrize("variable", [(), ("UNSLOTH_FSDP2_LAYOUT", "fit")])
def test_what_is_not_sharded_is_loaded_whole(checkpoints, variable):
    """UNSLOTH_FSDP2_SHARDED_LOAD=1 where the layout wants whole weights, or transformers is too old
    to shard them: the load succeeds. Stock's own sharding would refuse 4-bit weights.
    """
    for _, (whole, said) in run_ranks(_load_that_is_not_sharded, 2, checkpoints("bf16"), variable):
        assert whole
        assert ("every rank loads the whole 4-bit model" in said) == (not variable)


def _offloaded(folder):
    import torch
    from unsloth.models.fsdp2_native import FSDP2Config, shard_model

    model = load(folder)
    assert_sharded(model)
    model = shard_model(model, FSDP2Config(cpu_offload = True))
    whole = load_whole(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return torch.equal(model(input_ids = ids).logits, whole(input_ids = ids).logits)


def test_cpu_offload_policy(checkpoints):
    """FSDP2Config(cpu_offload = True) keeps the sharded weights in host memory and computes the
    same.
    """
    assert all(same for _, same in run_ranks(_offloaded, 2, checkpoints("packed")))


def test_a_load_is_of_4_bits_unless_it_asks_for_another_kind():
    """Unsloth's default, also where a loader hands its arguments on."""
    import unsloth  # noqa: F401
    from unsloth.models.fsdp2_sharded_4bit import loads_4bit

    def named(
        name,
        load_in_4bit = True,
        **kwargs,
    ):
        pass

    def handing_on(*args, **kwargs):
        pass

    for loader in (named, handing_on):
        assert loads_4bit(loader, ("m",), {})
        assert not loads_4bit(loader, ("m",), {"load_in_4bit": False})
        for other in ("load_in_8bit", "load_in_16bit", "full_finetuning"):
            assert not loads_4bit(loader, ("m",), {other: True})
