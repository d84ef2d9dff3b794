# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""QLoRA on several GPUs by FSDP2."""

from __future__ import annotations

from typing import Tuple

from .entries import Patch, Target

PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "fsdp2-param-init",
        title = "Fill a meta 4-bit model that FSDP2 has sharded, each rank from its slices",
        targets = (),
        modules = (
            "models/fsdp2_gather.py",
            "models/fsdp2_param_init.py",
            "models/fsdp2_shard_reader.py",
            "models/fsdp2_sharded_params.py",
        ),
        tests = {"tests/test_fsdp2_param_init.py": "gloo"},
        shared = ("fsdp2_ranks.py",),
        requires = ("test-backends",),
        since = "2026.10.9",
    ),
    Patch(
        name = "fsdp2-sharded-4bit",
        title = "Load 4-bit weights under native FSDP2 as one shard a rank",
        targets = (
            Target(
                attribute = "unsloth.models.fsdp2_load:sharded_load_env",
                replacement = "models.fsdp2_sharded_4bit:shard_4bit_loads",
                signature = ("loader",),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_load:begin_shard",
                replacement = "models.fsdp2_sharded_wrap:take_4bit_shards",
                fingerprints = frozenset({"36852de07d4541e7"}),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_load:finish_shard",
                replacement = "models.fsdp2_sharded_wrap:install_4bit_shards",
                signature = ("model", "pending"),
            ),
            Target(
                attribute = "unsloth._cpu_init:FastLanguageModel.from_pretrained",
                replacement = "fsdp2_cpu_load:shard_cpu_loads",
                import_after = "beside",
            ),
        ),
        modules = (
            "fsdp2_cpu_load.py",
            "models/fsdp2_sharded_4bit.py",
            "models/fsdp2_sharded_load.py",
            "models/fsdp2_sharded_wrap.py",
        ),
        tests = {"tests/test_fsdp2_sharded_4bit.py": "gloo"},
        requires = ("fsdp2-param-init",),
        since = "2026.10.9",
    ),
    Patch(
        name = "fsdp2-sharded-save",
        title = "Save whole 4-bit weights of a model that FSDP2 loaded as shards",
        targets = (
            Target(
                attribute = "unsloth.models.fsdp2_save:_gather_full",
                replacement = "models.fsdp2_sharded_save:gather_with_scales",
                signature = ("param", "DTensor"),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_save:fsdp2_gathered",
                replacement = "models.fsdp2_sharded_save:restore_sharded_states",
                signature = ("model", "*", "offload_4bit"),
                uses = ("_gather_full",),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_native:native_full_state_dict",
                replacement = "models.fsdp2_sharded_save:gather_4bit_on_host",
                signature = ("model", "trainable_only=False", "cpu_offload=True"),
                names = ("unsloth.models.fsdp2_save:fsdp2_gathered",),
            ),
        ),
        modules = ("models/fsdp2_sharded_save.py",),
        tests = {"tests/test_fsdp2_sharded_save.py": "gloo"},
        requires = ("fsdp2-sharded-4bit",),
        since = "2026.10.9",
    ),
    Patch(
        name = "fsdp2-load-choice",
        title = "Shard a 4-bit load under native FSDP2 exactly where the whole model does not fit",
        targets = (
            Target(
                attribute = "unsloth.models.fsdp2_load:sharded_load_env",
                replacement = "models.fsdp2_load_choice:shard_where_whole_does_not_fit",
                signature = ("loader",),
            ),
        ),
        modules = (
            "models/fsdp2_load_choice.py",
            "models/fsdp2_memory_count.py",
            "models/fsdp2_model_shape.py",
        ),
        tests = {
            "tests/test_fsdp2_load_choice.py": "gloo",
            "tests/test_fsdp2_memory_count.py": "cpu",
        },
        shared = ("llama_shapes.py",),
        requires = ("fsdp2-sharded-4bit",),
        since = "2026.10.9",
    ),
    Patch(
        name = "fsdp2-offload-plan",
        title = "Plan the least CPU offload with which QLoRA under FSDP2 fits",
        targets = (),
        modules = ("models/fsdp2_offload_plan.py",),
        tests = {"tests/test_fsdp2_offload_plan.py": "cpu"},
        requires = ("fsdp2-load-choice",),
        since = "2026.10.9",
    ),
    Patch(
        name = "fsdp2-offload-apply",
        title = "Offload frozen weights under native FSDP2 by what fits",
        targets = (
            Target(
                attribute = "unsloth.models.fsdp2_native:shard_model",
                replacement = "models.fsdp2_offload_apply:offload_what_does_not_fit",
                signature = ("model", "config=None"),
                names = ("find_shard_units",),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_native:native_fsdp2_trainer_setup",
                replacement = "models.fsdp2_offload_apply:explain_out_of_memory",
                signature = ("trainer=None", "*", "phase", "training_args"),
            ),
        ),
        modules = ("models/fsdp2_offload_apply.py",),
        tests = {"tests/test_fsdp2_offload_apply.py": "gloo"},
        requires = ("fsdp2-offload-plan", "fsdp2-sharded-save"),
        since = "2026.10.9",
    ),
)
