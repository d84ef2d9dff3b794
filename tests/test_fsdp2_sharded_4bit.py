# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""A 4-bit model under native FSDP2 of which no rank ever holds more than its shard.

Every test forks its ranks (gloo on the CPU) from this process, which has imported Unsloth and done
nothing else with torch: a fork after a backward or a parallel region would hang.
"""

import glob
import importlib
import multiprocessing
import os
import queue
import shutil
import socket
import traceback

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

SECONDS = 150
HIDDEN, VOCAB = (
    192,
    256,
)  # 192 x 448 and 96 x 192 weights: no shard boundary falls on a row of the matrix


IMPORTED = (
    "unsloth",  # first
    "unsloth.models.fsdp2_native",
    "bitsandbytes",
    "datasets",
    "peft.tuners.lora.bnb",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)


def _import_once():
    """What every rank needs, imported before the fork rather than in each of them."""
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def _rank_main(function, rank, world, port, results, arguments):
    try:
        import torch

        torch.set_num_threads(1)
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in launch.items()})
        os.environ.update(MASTER_ADDR = "127.0.0.1", MASTER_PORT = str(port))
        if world > 1:
            os.environ["UNSLOTH_FSDP2"] = os.environ["UNSLOTH_FSDP2_SHARDED_LOAD"] = "1"
        results.put((rank, None, function(*arguments)))
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)


def run_ranks(
    function,
    world,
    *arguments,
    check = True,
):
    """[(error, result) of every rank] of function(*arguments) in `world` forked ranks; fails past
    SECONDS.
    """
    _import_once()
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        fork.Process(target = _rank_main, args = (function, rank, world, port, results, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < world:
            rank, error, result = results.get(timeout = SECONDS)
            found[rank] = (error, result)
    except queue.Empty:
        pytest.fail(
            f"ranks {sorted(set(range(world)) - set(found))} still hang after {SECONDS} s: {found}"
        )
    finally:
        for process in processes:
            process.join(timeout = 5)
            if process.is_alive():
                process.kill()
    if check:
        errors = [error for error, _ in found.values() if error]
        assert not errors, "\n".join(errors)
    return [found[rank] for rank in range(world)]


def _make_checkpoint(folder, kind):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size = HIDDEN,
        intermediate_size = 448,
        num_hidden_layers = 2,
        num_attention_heads = 4,
        num_key_value_heads = 2,
        vocab_size = VOCAB,
        max_position_embeddings = 128,
        bos_token_id = 1,
        eos_token_id = 2,
        pad_token_id = 3,
        tie_word_embeddings = kind == "tied",
    )
    model = LlamaForCausalLM(config).to(torch.float16 if kind == "fp16" else torch.bfloat16)
    model.save_pretrained(folder, max_shard_size = "200KB" if kind == "bf16" else "5GB")
    if kind in ("packed", "single"):
        # "single": without nested quantization of the absmax.
        quantization = BitsAndBytesConfig(
            load_in_4bit = True,
            bnb_4bit_quant_type = "nf4",
            bnb_4bit_use_double_quant = kind == "packed",
            bnb_4bit_compute_dtype = torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config = quantization, dtype = torch.bfloat16, device_map = {"": "cpu"}
        )
        model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object = tokenizer,
        bos_token = "<s>",
        eos_token = "</s>",
        pad_token = "<pad>",
        unk_token = "<unk>",
    ).save_pretrained(folder)
    return True


@pytest.fixture(scope = "module")
def checkpoints(tmp_path_factory):
    """kind -> folder of a tiny Llama checkpoint; made on demand in a process of its own."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = str(tmp_path_factory.mktemp(kind))
            run_ranks(_make_checkpoint, 1, folder, kind)
            made[kind] = folder
        return made[kind]

    return get


def _load(folder, **options):
    import torch
    from unsloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        folder, max_seq_length = 64, load_in_4bit = True, dtype = torch.bfloat16, **options
    )


def assert_sharded(model):
    """Every 4-bit weight of the model is this rank's shard: a whole load must not pass for one."""
    from bitsandbytes.nn import Linear4bit
    from unsloth.models.fsdp2_sharded_params import shard_of

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and all(shard_of(module) is not None for module in layers)


def _load_whole(folder):
    os.environ["UNSLOTH_FSDP2"] = "0"
    try:
        return _load(folder)[0]
    finally:
        os.environ["UNSLOTH_FSDP2"] = "1"


def _compare_bytes(folder):
    """Names of tensors whose gathered bytes differ from a whole load, and what this rank holds."""
    import torch
    from unsloth.models.fsdp2_native import native_fsdp2_unsharded, shard_model

    model = _load(folder)[0]
    held = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    whole = _load_whole(folder)
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
    import unsloth.models.fsdp2_sharded_4bit as wiring

    seen, original = {}, wiring.fill_sharded

    def spy(*args, **kwargs):
        seen.update(original(*args, **kwargs))
        return seen

    wiring.fill_sharded = spy
    _load(folder)
    files = sum(os.path.getsize(path) for path in glob.glob(folder + "/*.safetensors"))
    return seen["read_bytes"], files - 2 * 2 * VOCAB * HIDDEN  # without embedding and head


def test_each_rank_reads_its_slices_only(checkpoints):
    """The bytes read add up to one checkpoint over the ranks, plus the matrix rows cut in two."""
    found = [result for _, result in run_ranks(_read_bytes, 2, checkpoints("bf16"))]
    weights = found[0][1]
    total = sum(read for read, *_ in found)
    assert 0.9 * weights < total < 1.1 * weights
    assert all(read < 0.8 * weights for read, *_ in found)


def _losses(folder, world, checkpointing):
    """Per-rank losses of three steps; with world 1 the two micro-batches run one after the other."""
    import torch
    import torch.distributed as dist
    from unsloth import FastLanguageModel

    model = _load(folder)[0]
    torch.manual_seed(1)
    model = FastLanguageModel.get_peft_model(
        model, r = 8, lora_alpha = 8, use_gradient_checkpointing = checkpointing, random_state = 1
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # B is zero at first: a gradient of A would not be tested
            parameter.data.copy_(torch.randn(parameter.shape, generator = generator) * 0.02)
    if world > 1:
        from unsloth.models.fsdp2_native import FSDP2Config, shard_model

        assert_sharded(model)
        model = shard_model(model, FSDP2Config(param_dtype = "storage"))
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr = 1e-3, foreach = False
    )
    ids = torch.randint(4, VOCAB, (2, 24), generator = torch.Generator().manual_seed(3))
    rows = [dist.get_rank()] if world > 1 else [0, 1]
    history = []
    for _ in range(3):
        losses = [model(input_ids = ids[[row]], labels = ids[[row]]).loss for row in rows]
        (sum(losses) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([loss.item() for loss in losses])
    return history


@pytest.mark.parametrize("kind, checkpointing", [("bf16", False), ("packed", True)])
def test_losses_equal_one_device(checkpoints, kind, checkpointing):
    """Two ranks train with the losses of one device that sees both micro-batches, bit for bit."""
    folder = checkpoints(kind)
    ((_, single),) = run_ranks(_losses, 1, folder, 1, checkpointing)
    ranks = [result for _, result in run_ranks(_losses, 2, folder, 2, checkpointing)]
    assert single[0] != single[2]
    assert [[a[0], b[0]] for a, b in zip(*ranks)] == single


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
    from unsloth.models.fsdp2_sharded_params import shard_of

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
        states = [shard_of(m).state for m in model.modules() if shard_of(m) is not None]
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
    """Without bfloat16 (T4) the weights are gathered and computed in float16; with a loss scaler the
    ranks skip the same steps and end at the loss of one device.
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
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel
    from unsloth.fsdp2_launch import install_native_fsdp2_trainer_init

    install_native_fsdp2_trainer_init()  # `import unsloth` does it where a launcher set the variables
    model, tokenizer = _load(folder)
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


def _gathered_for_save(folder):
    import torch
    from unsloth.models.fsdp2_native import native_full_state_dict, shard_model
    from unsloth.models.fsdp2_save import fsdp2_gathered

    whole = _load_whole(folder)
    model = shard_model(_load(folder)[0])
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


def _forward_too_early(folder):
    import torch

    model = _load(folder)[0]
    model(input_ids = torch.tensor([[5, 6]]))


def test_forward_before_the_wrap_is_refused(checkpoints):
    """A model of shards that is not wrapped raises instead of computing with a part of its weights."""
    for error, _ in run_ranks(_forward_too_early, 2, checkpoints("packed"), check = False):
        assert "before it is wrapped" in error


def _wrap_with(folder, options):
    from peft import LoraConfig, get_peft_model
    from unsloth.models.fsdp2_native import shard_model

    model = _load(folder)[0]
    config = LoraConfig(r = 4, target_modules = ["q_proj"], task_type = "CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, value in options.items():
        setattr(model.peft_config["default"], name, value)
    shard_model(model)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_read_whole_weights_are_refused(checkpoints, options):
    """DoRA and PiSSA need the whole base weight, which no rank has."""
    for error, _ in run_ranks(_wrap_with, 2, checkpoints("packed"), options, check = False):
        assert "reads whole base weights" in error and next(iter(options)) in error


def _break_then_load(folder, broken):
    """Rank 1 reads from a folder of its own whose checkpoint is damaged."""
    return _load(broken if os.environ["RANK"] == "1" else folder)[0] is not None


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
    from unsloth.models.fsdp2_checkpoint import Checkpoint

    if os.environ["RANK"] == "1":
        original = Checkpoint.rows

        def rows(self, key, start, stop):
            if "layers.1.self_attn.k_proj" in key:
                raise OSError("the disk is gone")
            return original(self, key, start, stop)

        Checkpoint.rows = rows
    return _load(folder)[0] is not None


@pytest.mark.parametrize("kind", ["bf16", "packed"])
def test_a_read_error_in_the_middle_fails_all(checkpoints, kind):
    """A rank whose read fails still takes part in the collectives of the others, which then fail
    too.
    """
    for error, _ in run_ranks(_read_error, 2, checkpoints(kind), check = False):
        assert "rank 1: OSError: the disk is gone" in error


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
    whole = _load_whole(folder)
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
        return torch.equal(model(input_ids = ids).logits, whole(input_ids = ids).logits)


def test_param_init_fn_fills_a_meta_model(checkpoints):
    """fully_shard on a meta model, then model.apply(param_init_fn): the logits of a whole load, bit
    for bit.
    """
    assert all(same for _, same in run_ranks(_own_fully_shard, 3, checkpoints("bf16")))


def _hsdp(folder):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from unsloth.models.fsdp2_native import FSDP2Config, shard_model
    from unsloth.models.fsdp2_sharded_4bit import sharded_4bit_loading

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names = ("replicate", "shard"))
    with sharded_4bit_loading(mesh):
        model = _load(folder)[0]
    whole = _load_whole(folder)
    model = shard_model(model, FSDP2Config(mesh = mesh))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return torch.equal(model(input_ids = ids).logits, whole(input_ids = ids).logits)


def test_hsdp_mesh(checkpoints):
    """A (replicate, shard) mesh loads and wraps over its shard dimension."""
    assert all(same for _, same in run_ranks(_hsdp, 4, checkpoints("packed")))


def _offloaded(folder):
    import torch
    from unsloth.models.fsdp2_native import FSDP2Config, shard_model

    model = _load(folder)[0]
    assert_sharded(model)
    model = shard_model(model, FSDP2Config(cpu_offload = True))
    whole = _load_whole(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return torch.equal(model(input_ids = ids).logits, whole(input_ids = ids).logits)


def test_cpu_offload_policy(checkpoints):
    """FSDP2Config(cpu_offload = True) keeps the sharded weights in host memory and computes the
    same.
    """
    assert all(same for _, same in run_ranks(_offloaded, 2, checkpoints("packed")))


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
    from unsloth.models.fsdp2_sharded_params import shard_of

    del os.environ["UNSLOTH_FSDP2_SHARDED_LOAD"]
    choice._usable = lambda: usable[int(os.environ["RANK"])]
    if group:
        dist.init_process_group("gloo")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        models = [_load(folder, **options)[0] for _ in range(2)]
    lines = [line for line in said.getvalue().splitlines() if "4-bit load under FSDP2" in line]
    sharded = [any(shard_of(m) is not None for m in model.modules()) for model in models]
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
