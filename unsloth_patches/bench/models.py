# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The models that whole steps are measured on, by `bench train`, `bench steps` and `bench compile`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Optional


@dataclass(frozen = True)
class Model:
    """A model of this shape with random weights, the batch that it is trained on, and what a user asks
    Unsloth for: QLoRA, unless ``options`` says otherwise (see `train_worker.load`).
    """

    title: str
    shape: Dict[str, Any]
    layers: int
    tied: bool
    batch: int = 4
    length: int = 2048
    options: Dict[str, Any] = field(default_factory = dict)


_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MODELS = {
    "llama-8b-8-layers": Model("Llama-3.1-8B shape, 8 of its layers", _8B, layers = 8, tied = False),
    "llama-8b": Model("Llama-3.1-8B shape", _8B, layers = 32, tied = False),
    "llama-1b": Model(
        "Llama-3.2-1B shape",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        layers = 16,
        tied = True,
    ),
    "qwen3-4b-12-layers": Model(
        "Qwen3-4B shape, 12 of its layers",
        {
            "kind": "Qwen3",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        layers = 12,
        tied = True,
    ),
}
# Of `bench train` alone.
_1B = MODELS["llama-1b"]
TRAINED_OTHERWISE = {
    f"llama-1b-{name}": replace(_1B, title = f"{_1B.title}, {way}", options = options)
    for name, way, options in (
        ("skip", "checkpoint_skip_layers = 'auto'", {"checkpoint_skip_layers": "auto"}),
        ("lora", "16-bit LoRA", {"load_in_4bit": False}),
        ("full", "all weights trained", {"full_finetuning": True}),
    )
}
TOY = Model(
    "a toy of two layers",
    {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    layers = 2,
    tied = True,
    batch = 2,
    length = 64,
)


def start(
    bench: str, models: Dict[str, Model], model: Optional[str], quick: bool
) -> Dict[str, Model]:
    """The models to train: all, the one named, or a toy where it is quick or there is no GPU; {} if there
    is none of that name."""
    if model is not None and model not in models:
        print(f"bench {bench}: no model {model!r}; there are: {', '.join(models)}", file = sys.stderr)
        return {}
    import torch

    if not torch.cuda.is_available() and not quick:
        print(
            f"bench {bench}: torch sees no CUDA GPU; comparing the losses of a toy on the CPU only.",
            flush = True,
        )
        quick = True
    return {"toy": TOY} if quick else {model: models[model]} if model else models
