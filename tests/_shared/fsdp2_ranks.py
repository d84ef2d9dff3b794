# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Ranks of a process group (gloo on the CPU), forked by a test, and the tiny Llama that they train.

Forked from a process that has imported Unsloth and done nothing else with torch: a fork after a
backward or beside other threads could hang, so that such a process skips.
"""

import importlib
import multiprocessing
import os
import pathlib
import queue
import socket
import time
import traceback

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

SECONDS = 150
# 192 x 448 and 96 x 192 weights: no shard boundary falls on a row of the matrix.
HIDDEN, VOCAB = 192, 256
_ALONE = "run this file in a process of its own"

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


def _skip_where_a_fork_may_hang():
    """A fork copies one thread: a child waits for ever for OpenMP's others. A jemalloc thread does
    no harm.
    """
    try:
        tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
        names = [pathlib.Path(task).read_text(encoding = "utf-8") for task in tasks]
    except OSError:
        return  # no such files on this system
    threads = [name for name in names if not name.startswith("jemalloc")]
    if len(threads) > 1:
        pytest.skip(f"this process has {len(threads)} threads, so no ranks are forked: {_ALONE}")


def _rank_main(function, rank, world, port, results, finished, arguments):
    try:
        import torch

        torch.set_num_threads(1)
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in launch.items()})
        os.environ.update(MASTER_ADDR = "127.0.0.1", MASTER_PORT = str(port))
        if world > 1:
            os.environ["UNSLOTH_FSDP2"] = os.environ["UNSLOTH_FSDP2_SHARDED_LOAD"] = "1"
        results.put((rank, None, function(*arguments)))
        finished.wait(10)  # rank 0 has the store, in which others may still look
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
    seconds = SECONDS,
):
    """[(error, result) of every rank] of function(*arguments) in ``world`` forked ranks; fails
    where one has none after ``seconds``.
    """
    _import_once()
    _skip_where_a_fork_may_hang()
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    finished = fork.Event()
    shared = (world, port, results, finished, arguments)
    processes = [
        fork.Process(target = _rank_main, args = (function, rank, *shared)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found, end = {}, time.monotonic() + seconds
    try:
        while len(found) < world:
            try:
                rank, error, result = results.get(timeout = 1)
                found[rank] = (error, result)
            except queue.Empty:
                for rank in set(range(world)) - set(found):
                    if processes[rank].exitcode is not None:  # killed: the others end without it
                        found[rank] = (f"ended with exit code {processes[rank].exitcode}", None)
                if time.monotonic() > end:
                    raise
    except queue.Empty:
        missing = sorted(set(range(world)) - set(found))
        pytest.fail(f"ranks {missing} still hang after {seconds} s: {found}")
    finally:
        finished.set()
        for process in processes:
            process.join(timeout = 5)
            if process.is_alive():
                process.kill()
                process.join()
        results.close()
        results.join_thread()  # its thread would stand in the way of the next fork
    errors = [error for error, _ in found.values() if error]
    if any("autograd's threading in combination with fork" in error for error in errors):
        pytest.skip(f"this process has run a backward, after which no fork can: {_ALONE}")
    if check:
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


def load(folder, **options):
    """The 4-bit model in ``folder``: sharded on a rank of several, else whole."""
    import torch
    from unsloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        folder, max_seq_length = 64, load_in_4bit = True, dtype = torch.bfloat16, **options
    )[0]


def load_whole(folder):
    os.environ["UNSLOTH_FSDP2"] = "0"
    try:
        return load(folder)
    finally:
        os.environ["UNSLOTH_FSDP2"] = "1"


def assert_sharded(model):
    """Every 4-bit weight of the model is this rank's shard: a whole load must not pass for one."""
    from bitsandbytes.nn import Linear4bit
    from unsloth.models.fsdp2_sharded_params import get_shard

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers and all(get_shard(module) is not None for module in layers)


def losses(folder, world, checkpointing):
    """Per-rank losses of three steps; with world 1 the two micro-batches run one after the other."""
    import torch
    import torch.distributed as dist
    from unsloth import FastLanguageModel

    model = load(folder)
    torch.manual_seed(1)
    model = FastLanguageModel.get_peft_model(
        model, r = 8, lora_alpha = 8, use_gradient_checkpointing = checkpointing, random_state = 1
    )
    generator = torch.Generator().manual_seed(5)
    for _, parameter in model.named_parameters():
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
        step = [model(input_ids = ids[[row]], labels = ids[[row]]).loss for row in rows]
        (sum(step) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([loss.item() for loss in step])
    return history
