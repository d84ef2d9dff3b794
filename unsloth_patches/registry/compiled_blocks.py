# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Compiled blocks: fewer recompilations, a cache, strict mode and a report."""

from __future__ import annotations

from typing import Tuple

from .entries import Patch, Target

PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "compile-lora-scales",
        title = "Compile a block once for all its LoRA scales",
        targets = (
            Target(
                attribute = "unsloth.kernels.utils:get_lora_parameters",
                replacement = "kernels.lora_scale_inputs:scales_from_graph_inputs",
                import_after = "from .nvfp4 import NVFP4QuantState, nvfp4_dequantize, nvfp4_linear",
                # 2026.10.9, .8
                fingerprints = frozenset({"a6b2704a01310d5d", "c7924cdcd011d0f1"}),
            ),
            # No fingerprint: the function is called as it is.
            Target(
                attribute = "unsloth.models.llama:_legacy_block_compile",
                replacement = "models.compile_lora_scales:share_graph_between_lora_scales",
                import_after = "from ._utils import embedding_applies_scale",
                signature = ("model",),
                names = (
                    "unsloth.models._block_compile:_MARK",
                    "unsloth.models._block_compile:_layers",
                ),
            ),
        ),
        modules = ("kernels/lora_scale_inputs.py", "models/compile_lora_scales.py"),
        tests = {"tests/test_compile_lora_scales.py": "interpreter"},
        requires = ("test-backends",),
        since = "2026.10.8",
    ),
    Patch(
        name = "compile-rope-tables",
        title = "Keep a block's graphs when a batch is as long as a head is wide",
        targets = (
            Target(
                attribute = "unsloth.models._block_compile:_mark_seq_dynamic",
                replacement = "models.compile_rope_tables:without_rope_tables",
                import_after = "beside",
                signature = ("seq_len", "obj"),
            ),
        ),
        modules = ("models/compile_rope_tables.py",),
        tests = {"tests/test_compile_rope_tables.py": "interpreter"},
        requires = ("test-backends",),
        since = "2026.10.8",  # older ones compile no block that has tables by position
    ),
    Patch(
        name = "packed-attention",
        title = "Compile a block once for all packed rows",
        targets = (
            Target(
                attribute = "unsloth.utils.packing:get_packed_info_from_kwargs",
                replacement = "utils.packed_attention:prepared_packed_rows",
                signature = ("kwargs", "device", "position_ids=None"),
            ),
            Target(
                attribute = "unsloth.utils.attention_dispatch:_run_attention",
                replacement = "utils.packed_attention:attend_to_packed_rows",
                fingerprints = frozenset({"63208249b6f37a45"}),
            ),
            # No fingerprint: the function is called as it is.
            Target(
                attribute = "unsloth.models.llama:FastLlamaModel.patch_peft_model",
                replacement = "utils.packed_attention:compile_packed_rows",
                signature = ("model", "*"),
                names = (
                    "unsloth.models._block_compile:_MARK",
                    "unsloth.models._block_compile:_layers",
                ),
            ),
        ),
        modules = ("utils/packed_attention.py",),
        tests = {"tests/test_packed_attention.py": "interpreter"},
        requires = ("test-backends",),
        since = "2026.10.9",
    ),
    Patch(
        name = "compile-workers",
        title = "Start Inductor's compile workers while the model loads",
        targets = (
            # No fingerprints: the functions are called as they are.
            Target(
                attribute = "unsloth.models.loader:FastLanguageModel.from_pretrained",
                replacement = "models.compile_workers:start_compile_workers_early",
                signature = ("*", "fast_inference"),
            ),
            Target(
                attribute = "unsloth.models.loader:FastModel.from_pretrained",
                replacement = "models.compile_workers:start_compile_workers_early",
                signature = ("*", "fast_inference"),
            ),
        ),
        modules = ("models/compile_workers.py",),
        tests = {"tests/test_compile_workers.py": "interpreter"},
        requires = ("test-backends",),
    ),
    Patch(
        name = "compile-cache-files",
        title = "Keep compiled code in files that nobody else can have written",
        targets = (),
        modules = ("models/compile_cache_files.py", "models/compile_cache_triton.py"),
        tests = {"tests/test_compile_cache_files.py": "cpu"},
        requires = ("test-backends",),
    ),
    Patch(
        name = "compile-cache",
        title = "Keep compiled blocks in a folder for the next run's first step",
        targets = (
            Target(
                attribute = "unsloth.models._block_compile:patch_block_compile",
                replacement = "models.compile_cache:load_compile_cache_first",
                import_after = "beside",
                signature = ("model",),
            ),
        ),
        modules = ("models/compile_cache.py",),
        tests = {"tests/test_compile_cache.py": "cpu"},
        requires = ("compile-cache-files",),
    ),
    Patch(
        name = "compile-events",
        title = "Record what torch.compile did, with the reason of every break and recompilation",
        targets = (),
        modules = ("models/compile_events.py", "models/compile_failures.py"),
        tests = {"tests/test_compile_events.py": "interpreter"},
        shared = ("toy_blocks.py",),
        requires = ("test-backends",),
    ),
    Patch(
        name = "compile-strict",
        title = "Enforce full graphs where they are asked for",
        targets = (
            Target(
                attribute = "unsloth.models._block_compile:_wrap",
                replacement = "models.compile_modes:enforce_full_graphs",
                signature = ("cls", "*"),
                uses = ("torch.compile", "cls.forward", "forward._unsloth_block_original"),
            ),
        ),
        modules = ("models/compile_modes.py",),
        tests = {"tests/test_compile_strict.py": "interpreter"},
        requires = ("compile-events", "checkpoint-shared-graph"),
    ),
    Patch(
        name = "compile-strict-trainer",
        title = "Stop a training before its first update where strict mode does not hold",
        targets = (
            Target(
                attribute = "unsloth.trainer:_backwards_compatible_trainer",
                replacement = "models.compile_strict:require_full_graphs",
                signature = ("trainer_class", "config_class"),
            ),
        ),
        modules = ("models/compile_strict.py",),
        tests = {"tests/test_compile_strict_trainer.py": "interpreter"},
        requires = ("compile-strict",),
    ),
    Patch(
        name = "compile-report",
        title = "Sum up what was compiled, what was not and why",
        targets = (),
        modules = ("models/compile_report.py", "models/compile_table.py"),
        tests = {"tests/test_compile_report.py": "interpreter"},
        requires = ("compile-strict-trainer",),
    ),
    Patch(
        name = "compile-report-trainer",
        title = "Print and save the compile report at the end of an SFTTrainer's training",
        targets = (
            Target(
                attribute = "unsloth.trainer:_backwards_compatible_trainer",
                replacement = "models.compile_callback:report_compilation",
                signature = ("trainer_class", "config_class"),
            ),
        ),
        modules = ("models/compile_callback.py",),
        tests = {"tests/test_compile_report_trainer.py": "interpreter"},
        requires = ("compile-report",),
    ),
)
