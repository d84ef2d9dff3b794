# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Model shapes and training settings at which the offload plan's peak is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List

__all__ = ["CELLS", "SHAPES", "TOY", "planned_peak", "planner_cases", "whole_frozen"]

LLAMA = {"num_key_value_heads": 8, "tied": False}
SHAPES = {
    "8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "1B": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "vocab_size": 128256,
        "tied": True,
    },
    "3B": {
        **LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "vocab_size": 128256,
    },
    "70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "vocab_size": 32000,
    },
}
SHAPES["8B-128k"] = SHAPES["8B-128k-whole"] = {**SHAPES["8B"], "vocab_size": 128256}
TOY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tied": False,
}

# (shape, layers, options of a case); the layers are what the shape's checkpoint is cut to. The widest
# last: Unsloth keeps a buffer of the largest weight as long as the process lives.
CELLS = [
    ("1B", 16, {"length": 2048}),
    ("1B", 16, {"length": 2048, "batch": 4}),
    ("1B", 16, {"length": 4096, "checkpointing": False}),
    ("3B", 14, {"length": 4096, "batch": 2, "checkpointing": "unsloth"}),
    ("3B", 14, {"length": 2048, "offload": "blocks:5"}),
    ("3B", 14, {"length": 2048, "rank": 64, "micro_batches": 2}),
    ("8B-128k", 8, {"length": 4096, "batch": 4}),
    ("8B-128k", 8, {"length": 8192, "checkpointing": "unsloth"}),
    ("8B-128k-whole", 32, {"length": 2048}),
    ("8B-128k-whole", 32, {"length": 4096, "batch": 2, "offload": "blocks:16"}),
    ("70B", 4, {"length": 2048, "checkpointing": False}),
    ("70B", 4, {"length": 4096, "offload": "blocks:2"}),
]


def _config(case: dict) -> dict:
    shape = case["shape"]
    tied = shape["tied"]
    return {**shape, "num_hidden_layers": case["layers"], "tie_word_embeddings": tied}


def planned_peak(case: dict, world: int) -> float:
    """The offload plan's training peak for a case that keeps frozen weights sharded, in GiB."""
    from unsloth_patches.unsloth.models.fsdp2_memory_count import Training
    from unsloth_patches.unsloth.models.fsdp2_offload_plan import plan_offload

    job = Training(
        world = world,
        tokens = case["length"] * case.get("batch", 1),
        lora_rank = case.get("rank", 16),
        checkpointing = case.get("checkpointing", True),
        accumulates = case.get("micro_batches", 1) > 1,
    )
    offload = case.get("offload", "never")
    plan = plan_offload(_config(case), job, device_memory = 2**50, override = offload)
    return round(plan.peak / 2**30, 3)


def whole_frozen(shape: dict, layers: int) -> int:
    """Bytes of the frozen weights of a model, 4-bit blocks and 16-bit embedding and head."""
    from unsloth_patches.unsloth.models.fsdp2_memory_count import weight_bytes
    from unsloth_patches.unsloth.models.fsdp2_model_shape import read_shape

    sizes = read_shape(_config({"shape": shape, "layers": layers}))
    tables = sizes.parameters - layers * (sizes.block_parameters + 2 * sizes.hidden)
    return layers * weight_bytes(sizes.block_parameters, True) + 2 * tables


def planner_cases(checkpoints: Dict[str, Path], cells: list = CELLS) -> List[dict]:
    """The cells as cases of ``fsdp2_worker``. checkpoints: shape's name -> folder, of its layers."""
    cases = []
    for name, layers, options in cells:
        told = ", ".join(f"{key} {value}" for key, value in options.items())
        case = {"name": f"{name}, {layers} layers, {told}", "checkpoint": str(checkpoints[name])}
        shape = {**SHAPES, "toy": TOY}[name]
        cases.append({**case, "shape": shape, "layers": layers, "steps": 3, **options})
    return cases
