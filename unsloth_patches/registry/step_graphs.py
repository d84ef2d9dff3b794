# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Decoder blocks as CUDA graphs."""

from __future__ import annotations

from typing import Tuple

from .entries import Patch, Target

PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "step-graphs-blocks",
        title = "Run decoder blocks forward and backward by hand, some rows or with inputs on the host",
        targets = (),
        modules = ("models/step_graphs_blocks.py",),
        shared = ("graph_tape.py", "hand_blocks.py"),
        tests = {"tests/test_step_graphs_blocks.py": "interpreter"},
        requires = ("test-backends",),
    ),
    Patch(
        name = "step-graphs-capture",
        title = "Capture a stack of decoder blocks, forward and backward, in CUDA graphs that share memory",
        targets = (),
        modules = (
            "models/step_graphs_buckets.py",
            "models/step_graphs_capture.py",
            "models/step_graphs_pool.py",
            "models/step_graphs_state.py",
        ),
        shared = ("replay_walk.py", "replayed_models.py"),
        tests = {
            "tests/test_step_graphs_capture.py": "interpreter",
            "tests/test_step_graphs_state.py": "interpreter",
        },
        requires = ("step-graphs-blocks",),
    ),
    Patch(
        name = "step-graphs",
        title = "Replay decoder blocks as CUDA graphs where short sequences leave the GPU waiting",
        targets = (
            Target(
                attribute = "unsloth.models.llama:LlamaModel_fast_forward",
                replacement = "models.step_graphs:replay_decoder_blocks",
                fingerprints = frozenset({"75c7a10bdf12f04f"}),
            ),
            Target(
                attribute = "unsloth.utils.padding_choice:decide_auto_padding_free",
                replacement = "models.step_graphs:choose_padding_free",
                signature = (
                    "model",
                    "config",
                    "train_dataset",
                    "processing_class",
                    "formatting_func",
                ),
            ),
        ),
        modules = (
            "models/step_graphs.py",
            "models/step_graphs_stack.py",
        ),
        tests = {"tests/test_step_graphs.py": "interpreter"},
        requires = ("step-graphs-capture",),
        since = "2026.10.9",
    ),
)
