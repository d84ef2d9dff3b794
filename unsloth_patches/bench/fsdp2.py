# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``python -m unsloth_patches bench fsdp2``: QLoRA under FSDP2 on two GPUs, beside Unsloth's own
layouts.

Makes a Llama-shaped checkpoint with random weights, then measures per rank: memory after load,
after the wrap and in training, seconds to load, step time, tokens a second, losses against one GPU,
the same on a card emulated by a memory fraction, and the offload plan's prediction of the training
peak. ``--quick``: a toy, CPU ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Optional

from .harness import COLORS, plot_style, print_table, save_json

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LAYERS = 32
TOY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
# What one group of ranks may take before it is ended: a hang must not hold the GPUs.
SECONDS = 150


def make_checkpoint(folder: Path, shape: dict, layers: int) -> Path:
    """A bf16 checkpoint with random weights and a word tokenizer; one block's weights serve every
    block.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents = True, exist_ok = True)
    config = LlamaConfig(
        num_hidden_layers = layers, max_position_embeddings = 8192, tie_word_embeddings = False, **shape
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    hidden, middle, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    head = hidden // shape["num_attention_heads"]
    narrow = shape["num_key_value_heads"] * head
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def random(*size):
        values = torch.randn(*size, generator = generator, device = device) * 0.02
        return values.to(torch.bfloat16).cpu()

    ones = torch.ones(hidden, dtype = torch.bfloat16)
    block = {
        "self_attn.q_proj": random(hidden, hidden),
        "self_attn.k_proj": random(narrow, hidden),
        "self_attn.v_proj": random(narrow, hidden),
        "self_attn.o_proj": random(hidden, hidden),
        "mlp.gate_proj": random(middle, hidden),
        "mlp.up_proj": random(middle, hidden),
        "mlp.down_proj": random(hidden, middle),
        "input_layernorm": ones,
        "post_attention_layernorm": ones.clone(),
    }
    weight_map = {}

    def write(name, tensors):
        save_file(tensors, folder / name, metadata = {"format": "pt"})
        weight_map.update({key: name for key in tensors})

    for layer in range(layers):
        scale = 1 + layer / (4 * layers)  # so that blocks differ
        tensors = {
            f"model.layers.{layer}.{key}.weight": value * scale for key, value in block.items()
        }
        write(f"block-{layer}.safetensors", tensors)
    rest = {
        "model.embed_tokens.weight": random(vocab, hidden),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": random(vocab, hidden),
    }
    write("rest.safetensors", rest)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding = "utf-8")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, **{f"w{i}": i for i in range(4, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object = tokenizer,
        bos_token = "<s>",
        eos_token = "</s>",
        pad_token = "<pad>",
        unk_token = "<unk>",
    ).save_pretrained(folder)
    return folder


def fewer_layers(checkpoint: Path, layers: int) -> Path:
    """The same files under a config of fewer layers."""
    folder = checkpoint.with_name(f"{checkpoint.name}-{layers}")
    folder.mkdir(exist_ok = True)
    config = json.loads((checkpoint / "config.json").read_text(encoding = "utf-8"))
    config["num_hidden_layers"] = layers
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding = "utf-8"))
    kept = {
        name: file
        for name, file in index["weight_map"].items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    index["weight_map"] = kept
    for file in set(kept.values()) | {path.name for path in checkpoint.glob("token*")}:
        if not (folder / file).exists():
            os.symlink(checkpoint / file, folder / file)
    (folder / "config.json").write_text(json.dumps(config), encoding = "utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding = "utf-8")
    return folder


def launch(
    cases: List[dict],
    mode: str,
    world: int,
    folder: Path,
    one_gpu: bool = False,
    seconds: int = SECONDS,
) -> List[List[dict]]:
    """Results of every rank, a list of one dict a case; what a rank did not reach is missing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tag = f"{mode}-{world}-{time.monotonic_ns()}"
    cases_file = folder / f"{tag}.json"
    cases_file.write_text(json.dumps(cases), encoding = "utf-8")
    processes, outputs = [], []
    for rank in range(world):
        outputs.append(folder / f"{tag}-{rank}.out")
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": "0" if one_gpu else str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "UNSLOTH_FSDP2": "1" if world > 1 else "0",
            # Compiling takes longer than what is measured here, and both sides do without it.
            "UNSLOTH_COMPILE_DISABLE": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
        if world == 1:
            for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
                environment.pop(name)
            environment["RANK"] = "0"
        if one_gpu:
            environment["REHEARSE_ON_ONE_GPU"] = "1"
        command = [sys.executable, "-m", "unsloth_patches.bench.fsdp2_worker"]
        log = open(folder / f"{tag}-{rank}.log", "w", encoding = "utf-8")
        processes.append(
            subprocess.Popen(
                [*command, str(cases_file), str(outputs[-1]), mode],
                env = environment,
                stdout = log,
                stderr = log,
            )
        )
    limit = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout = max(1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    results = [_lines(output) for output in outputs]
    if any(len(lines) < len(cases) for lines in results):
        for rank in range(world):
            tail = (folder / f"{tag}-{rank}.log").read_text(encoding = "utf-8", errors = "replace")
            print(f"--- {tag} rank {rank}, last lines\n{tail[-1500:]}")
    return results


def _lines(path: Path) -> List[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding = "utf-8").splitlines() if line]


def _case(name: str, checkpoint: Path, layers: int, shape: dict, length: int, **options) -> dict:
    return {
        "name": name,
        "checkpoint": str(checkpoint),
        "layers": layers,
        "vocab": shape["vocab_size"],
        "length": length,
        "checkpointing": True,
        **options,
    }


def predicted_gib(case: dict, shape: dict, world: int) -> Optional[float]:
    """The offload plan's training peak for a case that keeps frozen weights sharded, in GiB."""
    from unsloth_patches.models.fsdp2_offload_plan import plan_offload

    plan = plan_offload(
        {**shape, "num_hidden_layers": case["layers"]},
        batch_tokens = case["length"],
        world = world,
        device_memory = 2**50,
        gradient_checkpointing = case["checkpointing"],
        override = case.get("offload", "never"),
    )
    return round(plan.peak / 2**30, 3)


def _merge(
    cases: List[dict],
    ranks: List[List[dict]],
    mode: str,
    world: int,
    shape: dict,
) -> List[dict]:
    """One row a case: the largest memory of the ranks, the mean of their losses."""
    rows = []
    for index, case in enumerate(cases):
        found = [lines[index] for lines in ranks if len(lines) > index]
        row: Dict[str, object] = {"who": mode, "world": world, "case": case, "ranks": found}
        for key in (
            "load_s",
            "load_peak",
            "after_load",
            "wrap_peak",
            "after_wrap",
            "train_peak",
            "step_s",
        ):
            row[key] = max((f[key] for f in found if key in f), default = None)
        errors = [f["error"] for f in found if "error" in f]
        row["error"] = errors[0] if errors else ("" if len(found) == world else "no result in time")
        row["tokens_per_s"] = min(
            (f["tokens_per_s"] for f in found if "tokens_per_s" in f), default = None
        )
        losses = [f["losses"] for f in found if "losses" in f]
        row["losses"] = [round(sum(v) / len(v), 5) for v in zip(*losses)] if losses else []
        if mode == "ours":
            row["predicted_peak"] = predicted_gib(case, shape, world)
        rows.append(row)
    return rows


def _show(rows: List[dict]) -> None:
    columns = ["who", "N", "case", "load s", "load peak", "after load", "wrap peak", "train peak"]
    columns += ["planned", "step s", "tok/s", "losses, error"]
    table = []
    for row in rows:
        text = (
            row["error"][:60] if row["error"] else " ".join(f"{v:.4f}" for v in row["losses"][:4])
        )
        keys = ("load_s", "load_peak", "after_load", "wrap_peak", "train_peak")
        values = [row[key] for key in keys] + [row.get("predicted_peak")]
        values += [row["step_s"], row["tokens_per_s"], text]
        table.append([row["who"], row["world"], row["case"]["name"], *values])
    print_table("QLoRA under FSDP2, GiB of the fullest rank", columns, table)


def _jobs(big: Path, half: Path, layers: int, shape: dict, length: int) -> List[tuple]:
    """(mode, world, cases): processes that run one after the other, most telling first."""
    few = layers // 2

    def case(
        name,
        folder = big,
        count = layers,
        size = length,
        **options,
    ):
        return _case(name, folder, count, shape, size, **options)

    ours = [
        case("sharded"),
        case("no checkpointing, half depth", half, few, checkpointing = False),
        case("all offloaded", offload = "all"),
        case("half depth", half, few),
        case("half depth, 2x tokens", half, few, 2 * length),
        case("half of blocks offloaded", offload = f"blocks:{layers // 2}"),
        case("unsloth checkpointing", checkpointing = "unsloth"),
        case("4x tokens", size = 4 * length, steps = 2),
    ]
    theirs = [case("stock layout"), case("stock, sharded layout", layout = "sharded")]
    return [
        ("ours", 2, ours),
        ("upstream", 2, theirs),
        ("ours", 1, [case("one GPU, 2 micro-batches", micro_batches = 2)]),
    ]


def run(out: Path, quick: bool = False) -> int:
    """Runs everything and writes ``fsdp2.json`` to out. Returns 1 where a case of ours failed."""
    import torch

    shape, layers, length = (TOY, 2, 32) if quick else (SHAPE, LAYERS, 2048)
    gpus = torch.cuda.device_count()
    if not quick and gpus < 1:
        print("bench: fsdp2 needs CUDA GPUs, and torch sees none; not run.", file = sys.stderr)
        return 1
    one_gpu = gpus == 1
    if one_gpu:
        print(
            "bench: one GPU: the ranks share it through gloo. Their memory counts, their times do "
            "not."
        )
    work = Path(tempfile.mkdtemp(prefix = "fsdp2-", dir = None if quick else _fast_folder()))
    rows: List[dict] = []
    try:
        begin = time.perf_counter()
        big = make_checkpoint(work / "llama", shape, layers)
        half = fewer_layers(big, layers // 2)
        print(f"checkpoint of {layers} layers in {time.perf_counter() - begin:.1f} s")
        for mode, world, cases in _jobs(big, half, layers, shape, length):
            ranks = launch(cases, mode, world, work, one_gpu and world > 1)
            rows += _merge(cases, ranks, mode, world, shape)
            _write(out, rows, quick)
        card = _telling_card(rows)
        if card:
            small = _case(
                f"card of {card:.2f} GiB", big, layers, shape, 256, card_gib = card, steps = 2
            )
            for mode in ("ours", "upstream"):
                one = [{**small, "layout": "sharded"}] if mode == "upstream" else [small]
                rows += _merge(one, launch(one, mode, 2, work, one_gpu), mode, 2, shape)
        _write(out, rows, quick)
        if not quick:
            plot(rows, Path(out) / "fsdp2.png")
        _show(rows)
    finally:
        shutil.rmtree(work, ignore_errors = True)
    return 1 if any(row["error"] for row in rows if row["who"] == "ours") else 0


def _fast_folder() -> Optional[str]:
    """Memory-backed storage where it has room for the checkpoint, so that a disk's speed stays out."""
    memory = "/dev/shm"
    if os.path.isdir(memory) and shutil.disk_usage(memory).free > 40e9:
        return memory
    return None


def _telling_card(rows: List[dict]) -> Optional[float]:
    """A card between what ours needed at load and in a small step, and what upstream's load needed."""
    loads = [row["load_peak"] for row in rows if row["who"] == "upstream" and row["load_peak"]]
    ours = [row for row in rows if row["who"] == "ours" and row["world"] == 2 and row["load_peak"]]
    if not loads or not ours:
        return None
    return round(0.97 * min(loads), 3)


def plot(rows: List[dict], path: Path) -> Path:
    """Left: memory of a rank in each stage, ours beside upstream's. Right: planned against measured
    peaks.
    """
    named = {(row["who"], row["world"], row["case"]["name"]): row for row in rows}
    bars = {
        "sharded": (named.get(("ours", 2, "sharded")), COLORS["ours"]),
        "whole, stock layout": (named.get(("upstream", 2, "stock layout")), COLORS["upstream"]),
        "whole, sharded layout": (
            named.get(("upstream", 2, "stock, sharded layout")),
            COLORS["baseline"],
        ),
    }
    stages = {"after_load": "after load", "wrap_peak": "wrap", "train_peak": "training peak"}
    with plot_style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize = (9, 3.4))
        for index, (label, (row, color)) in enumerate(bars.items()):
            if row is not None:
                places = [place + 0.27 * (index - 1) for place in range(len(stages))]
                left.bar(places, [row[key] for key in stages], 0.25, label = label, color = color)
        left.set_xticks(range(len(stages)), list(stages.values()))
        left.set_ylabel("GiB of one rank")
        left.set_title("QLoRA on 2 GPUs, 4-bit Llama of 8B shape")
        left.legend()
        pairs = [
            (row["train_peak"], row["predicted_peak"])
            for row in rows
            if row.get("predicted_peak") and row["train_peak"]
        ]
        if pairs:
            top = 1.1 * max(map(max, pairs))
            right.plot([0, top], [0, top], color = COLORS["baseline"], linewidth = 1)
            right.fill_between(
                [0, top], [0, 0.9 * top], [0, 1.1 * top], color = COLORS["baseline"], alpha = 0.25
            )
            right.scatter(*zip(*pairs), color = COLORS["ours"], zorder = 3)
        right.set_xlabel("measured peak, GiB")
        right.set_ylabel("planned peak, GiB")
        right.set_title("Offload plan (band: 10%)")
        figure.savefig(path)
    return path


def _write(out: Path, rows: List[dict], quick: bool) -> None:
    name = "fsdp2-quick.json" if quick else "fsdp2.json"
    save_json(Path(out) / name, {"rows": rows}, "python -m unsloth_patches bench fsdp2")
