# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Fewer and shorter kernels in a decoder block."""

from __future__ import annotations

from typing import Tuple

from .entries import Patch, Target

PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "checkpoint-shared-graph",
        title = "Compile a checkpointed block once for both of its runs",
        targets = (
            Target(
                attribute = "unsloth.models._block_compile:_wrap",
                replacement = "models.checkpoint_shared_graph:share_graph_between_checkpoint_runs",
                signature = ("cls", "compile_options", "*"),
                uses = ("torch.compile", "cls.forward"),
            ),
        ),
        modules = ("models/checkpoint_shared_graph.py", "models/compile_wrapping.py"),
        tests = {"tests/test_checkpoint_shared_graph.py": "interpreter"},
        shared = ("llama_blocks.py",),
        requires = ("test-backends",),
    ),
    Patch(
        name = "checkpoint-recompute",
        title = "Leave out the down projection where a checkpointed block is recomputed",
        targets = (
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_MLP",
                replacement = "kernels.lora_mlp_recompute:with_recompute_variant",
                # 2026.10.9, .7
                fingerprints = frozenset({"dd30ee9b11bdbcbc", "c23a99c78e2f62b1"}),
            ),
            Target(
                attribute = "unsloth.kernels.fast_lora:apply_lora_mlp_swiglu",
                replacement = "kernels.lora_mlp_recompute:skip_down_proj_in_recompute",
                fingerprints = frozenset({"4a7fb6cce038f12d"}),
            ),
            Target(
                attribute = "unsloth.models.llama:LlamaDecoderLayer_fast_forward",
                replacement = "models.checkpoint_recompute:skip_down_proj_where_unread",
                fingerprints = frozenset({"5282151279fcd9ae"}),
            ),
        ),
        modules = ("kernels/lora_mlp_recompute.py", "models/checkpoint_recompute.py"),
        tests = {"tests/test_checkpoint_recompute.py": "interpreter"},
        requires = ("test-backends", "checkpoint-shared-graph"),
        since = "2026.10.7",
    ),
    Patch(
        name = "lora-products",
        title = "Add LoRA's part before the large product, and share the products of Q, K and V",
        targets = (
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_QKV",
                replacement = "kernels.lora_functions:share_products_of_QKV",
                fingerprints = frozenset({"a055294701a0831d"}),
            ),
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_W",
                replacement = "kernels.lora_functions:add_lora_before_product",
                fingerprints = frozenset({"1c29b35a96a040cf"}),
            ),
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_MLP",
                replacement = "kernels.lora_functions:share_products_of_MLP",
                fingerprints = frozenset({"dd30ee9b11bdbcbc"}),
            ),
        ),
        modules = ("kernels/lora_products.py", "kernels/lora_functions.py"),
        tests = {"tests/test_lora_products.py": "interpreter"},
        requires = ("test-backends", "checkpoint-shared-graph", "checkpoint-recompute"),
        since = "2026.10.8",
    ),
    Patch(
        name = "compiled-swiglu-backward",
        title = "Reuse the gradient's buffer in the compiled SwiGLU backward",
        targets = (
            Target(
                attribute = "unsloth.kernels.swiglu:swiglu_DWf_DW_dfg_kernel",
                replacement = "kernels.swiglu_backward:backward_in_place_when_traced",
                fingerprints = frozenset({"c63ff827627e9084"}),
            ),
        ),
        modules = ("kernels/swiglu_backward.py",),
        tests = {"tests/test_swiglu_backward.py": "interpreter"},
        requires = ("test-backends",),
    ),
)
