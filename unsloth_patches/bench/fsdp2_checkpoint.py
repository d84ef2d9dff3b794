# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Checkpoints of Llama's or Qwen3's shape with random weights: benchmarks need no network."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional, Sequence, Tuple

__all__ = ["fast_folder", "make_checkpoint", "make_checkpoints", "save_word_tokenizer"]


def make_checkpoint(
    folder: Path,
    shape: dict,
    layers: int,
    tied: bool = False,
) -> Path:
    """A bf16 checkpoint with random weights and a word tokenizer; one block's weights serve every
    block. shape: a config's sizes, "kind" (Llama or Qwen3) among them. tied: the head is the embedding;
    a shape may say it too.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents = True, exist_ok = True)
    shape = dict(shape)
    tied, kind = shape.pop("tied", tied), shape.pop("kind", "Llama")
    config = getattr(transformers, f"{kind}Config")(
        num_hidden_layers = layers, max_position_embeddings = 8192, tie_word_embeddings = tied, **shape
    )
    config.architectures, config.dtype = [f"{kind}ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    hidden, middle, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    head = shape.get("head_dim", hidden // shape["num_attention_heads"])
    wide, narrow = (shape[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def random(*size):
        values = torch.randn(*size, generator = generator, device = device) * 0.02
        return values.to(torch.bfloat16).cpu()

    def ones(size):
        return torch.ones(size, dtype = torch.bfloat16)

    block = {
        "self_attn.q_proj": random(wide, hidden),
        "self_attn.k_proj": random(narrow, hidden),
        "self_attn.v_proj": random(narrow, hidden),
        "self_attn.o_proj": random(hidden, wide),
        "mlp.gate_proj": random(middle, hidden),
        "mlp.up_proj": random(middle, hidden),
        "mlp.down_proj": random(hidden, middle),
        "input_layernorm": ones(hidden),
        "post_attention_layernorm": ones(hidden),
    }
    if kind == "Qwen3":
        block.update({"self_attn.q_norm": ones(head), "self_attn.k_norm": ones(head)})
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
        "model.norm.weight": ones(hidden),
    }
    if not tied:
        rest["lm_head.weight"] = random(vocab, hidden)
    write("rest.safetensors", rest)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding = "utf-8")
    save_word_tokenizer(folder, vocab)
    return folder


def save_word_tokenizer(
    folder: Path,
    vocab: int,
    special: Sequence[str] = (),
) -> None:
    """A tokenizer of so many words into a checkpoint's folder; special tokens are numbered from 4 on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *special]
    names += [f"w{i}" for i in range(len(names), vocab)]
    words = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object = tokenizer,
        bos_token = "<s>",
        eos_token = "</s>",
        pad_token = "<pad>",
        unk_token = "<unk>",
        additional_special_tokens = list(special),
    ).save_pretrained(folder)


def make_checkpoints(wanted: Sequence[Tuple[Path, dict, int]]) -> None:
    """make_checkpoint of every (folder, shape, layers), side by side."""
    # Imported here first: transformers imports its names lazily, and threads in that get in each
    # other's way.
    from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: F401
    with ThreadPoolExecutor(max_workers = max(1, len(wanted))) as pool:
        list(pool.map(lambda one: make_checkpoint(*one), wanted))


def fast_folder() -> Optional[str]:
    """Memory-backed storage where it has room for the checkpoint, so that a disk's speed stays out."""
    memory = "/dev/shm"
    if os.path.isdir(memory) and shutil.disk_usage(memory).free > 40e9:
        return memory
    return None
