# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The sharded load and its training on two GPUs, with NCCL; skipped elsewhere.

Run as a script this file is one rank: ``test_fsdp2_two_gpus.py CASE CHECKPOINT RESULT``.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, LENGTH = 3, 48
# (dtype, gradient checkpointing, mesh)
TRAININGS = {
    "bfloat16": ("bfloat16", False, None),
    "bfloat16, checkpointing": ("bfloat16", True, None),
    "bfloat16, Unsloth's checkpointing": ("bfloat16", "unsloth", None),
    "float16, checkpointing": ("float16", True, None),
    "bfloat16, HSDP mesh": ("bfloat16", True, (1, 2)),
}


needs_two_gpus = pytest.mark.skipif(
    "not __import__('torch').cuda.is_available() or __import__('torch').cuda.device_count() < 2",
    reason = "needs two GPUs",
)


@pytest.fixture(scope = "module")
def toy(tmp_path_factory):
    from unsloth_patches.bench.fsdp2_cells import TOY
    from unsloth_patches.bench.fsdp2_checkpoint import make_checkpoint
    return make_checkpoint(tmp_path_factory.mktemp("toy"), TOY, 2)


def _run(case, folder, results, ranks):
    """(seconds, finished process, [what every rank wrote])"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, case, str(folder), str(results)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "UNSLOTH_FSDP2": "1" if ranks > 1 else "0",
        "UNSLOTH_FSDP2_SHARDED_LOAD": "1",
        "UNSLOTH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    begin = time.monotonic()
    done = subprocess.run(
        command,
        env = {**os.environ, **variables},
        cwd = results,
        timeout = 240,
        capture_output = True,
        text = True,
        encoding = "utf-8",
    )
    found = [json.loads(path.read_text()) for path in sorted(results.glob("rank-*.json"))]
    return time.monotonic() - begin, done, found


@needs_two_gpus
def test_trainings_equal_one_gpu(toy, tmp_path):
    """dtypes, checkpointing and an HSDP mesh: each one's losses are one GPU's of the same batch."""
    found = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        _, done, found[ranks] = _run("train", toy, tmp_path / str(ranks), ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in TRAININGS:
        (single,) = (rank[name] for rank in found[1])
        pairs = list(zip(*(rank[name] for rank in found[2])))
        worst = max(abs(sum(pair) / 2 - one) for pair, one in zip(pairs, single))
        print(f"{name}: losses {single}, at most {worst:.1e} from one GPU's")
        assert single[-1] < single[0] and worst <= 2e-3 * single[0], name


@needs_two_gpus
def test_an_out_of_memory_tells_predicted_and_measured_bytes(toy, tmp_path):
    """SFTTrainer's step on a card that is full, after a step and an evaluation that went well."""
    _, done, found = _run("out of memory", toy, tmp_path, 2)
    # A rank that is out of memory ends, and the launcher the others, which wait for it.
    assert done.returncode != 0 and found, done.stderr[-3000:]
    for message, evaluated in found:
        assert (
            evaluated > 0 and "predicted a peak of" in message and message.count("GiB") > 2
        ), message


@needs_two_gpus
def test_param_init_fn_fills_a_meta_model(toy, tmp_path):
    """One's own fully_shard, then model.apply(param_init_fn): a whole load's logits, bit for bit."""
    _, done, found = _run("param init", toy, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert found == [True, True]


@needs_two_gpus
@pytest.mark.parametrize("case", ["read error", "killed"])
def test_a_rank_that_fails_while_loading_ends_all(toy, tmp_path, case):
    """Within a minute, imports included; of an error every rank tells the reason."""
    seconds, done, _ = _run(case, toy, tmp_path, 2)
    assert done.returncode != 0 and seconds < 60, seconds
    if case == "read error":
        assert done.stderr.count("rank 1: OSError: the disk is gone") >= 2, done.stderr[-3000:]


def _train(folder):
    return {name: _losses(folder, *options) for name, options in TRAININGS.items()}


def _losses(folder, dtype, checkpointing, mesh):
    import torch
    import torch.distributed as dist
    from unsloth import FastLanguageModel

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dtype = getattr(torch, dtype)
    model = _wrapped(folder, dtype, checkpointing, mesh if world > 1 else None)
    FastLanguageModel.for_training(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr = 2e-3, foreach = False)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 500, (2, 1, LENGTH), generator = generator).cuda()
    rows = [ids[rank]] if world > 1 else list(ids)
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for tokens in rows:
            with torch.autocast("cuda", dtype = dtype):
                loss = model(input_ids = tokens, labels = tokens).loss / len(rows)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    if world > 1:
        dist.barrier()
    return losses


def _wrapped(folder, dtype, checkpointing, mesh):
    import contextlib

    from torch.distributed.device_mesh import init_device_mesh
    from unsloth import FastLanguageModel
    from unsloth.models.fsdp2_native import FSDP2Config, shard_model
    from unsloth.models.fsdp2_sharded_4bit import sharded_4bit_loading

    if mesh is not None:
        mesh = init_device_mesh("cuda", mesh, mesh_dim_names = ("replicate", "shard"))
    with sharded_4bit_loading(mesh) if mesh is not None else contextlib.nullcontext():
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length = LENGTH, load_in_4bit = True, dtype = dtype
        )
    model = FastLanguageModel.get_peft_model(
        model, r = 8, lora_alpha = 8, random_state = 1, use_gradient_checkpointing = checkpointing
    )
    if int(os.environ["WORLD_SIZE"]) == 1:
        return model
    return shard_model(model, FSDP2Config(mesh = mesh))


def _param_init(folder):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from unsloth.models.fsdp2_param_init import param_init_fn

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    quantization = BitsAndBytesConfig(
        load_in_4bit = True,
        bnb_4bit_quant_type = "nf4",
        bnb_4bit_use_double_quant = True,
        bnb_4bit_compute_dtype = torch.bfloat16,
    )
    whole = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config = quantization,
        dtype = torch.bfloat16,
        device_map = {"": torch.cuda.current_device()},
    )
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype = torch.bfloat16)
    model = replace_with_bnb_linear(model, ["lm_head"], quantization_config = quantization) or model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    init = param_init_fn(model, sorted(map(str, Path(folder).glob("*.safetensors"))), mesh)
    for block in model.model.layers:
        fully_shard(block, mesh = mesh)
    fully_shard(model, mesh = mesh)
    model.apply(init)
    model.model.rotary_emb = whole.model.rotary_emb
    ids = torch.tensor([[5, 6, 7, 8]]).cuda()
    with torch.no_grad():
        return torch.equal(model(input_ids = ids).logits, whole(input_ids = ids).logits)


def _out_of_memory(folder):
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    class Fill(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **_):
            if state.global_step == 1:
                torch.cuda.empty_cache()
                total = torch.cuda.get_device_properties(0).total_memory
                used = torch.cuda.memory_reserved()
                torch.cuda.set_per_process_memory_fraction(max(used / total, 1e-5))

    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length = 4096, load_in_4bit = True, dtype = torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(model, r = 8, random_state = 1)
    rows = Dataset.from_list([{"text": " ".join(f"w{4 + i % 400}" for i in range(4000))}] * 8)
    settings = SFTConfig(
        output_dir = "out",
        max_steps = 3,
        per_device_train_batch_size = 1,
        bf16 = True,
        report_to = [],
        max_length = 4096,
        save_strategy = "no",
        eval_strategy = "steps",
        eval_steps = 1,
        per_device_eval_batch_size = 1,
    )
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = rows,
        args = settings,
        eval_dataset = rows.select(range(2)),
        callbacks = [Fill()],
    )
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        return [str(error), losses[0] if losses else 0.0]
    return ["no error", 0.0]


def _failing_load(folder, killed):
    import signal

    from unsloth import FastLanguageModel
    from unsloth.models.fsdp2_shard_reader import ShardReader

    stock = ShardReader.rows

    def rows(self, key, start, stop):
        if os.environ["RANK"] == "1" and "layers.1.self_attn.k_proj" in key:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is gone")
        return stock(self, key, start, stop)

    ShardReader.rows = rows
    FastLanguageModel.from_pretrained(folder, max_seq_length = LENGTH, load_in_4bit = True)


def main():
    case, folder, results = sys.argv[1:4]
    import torch
    import torch.distributed as dist

    import unsloth_patches  # noqa: F401  isort: skip  (before unsloth)
    import unsloth  # noqa: F401  isort: skip

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if int(os.environ["WORLD_SIZE"]) > 1 and case != "out of memory":
        dist.init_process_group("nccl")
    if case == "train":
        found = _train(folder)
    elif case == "param init":
        found = _param_init(folder)
    elif case == "out of memory":
        found = _out_of_memory(folder)
    else:
        found = _failing_load(folder, case == "killed")
    Path(results, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(1 if case == "out of memory" else 0)


if __name__ == "__main__":
    main()
