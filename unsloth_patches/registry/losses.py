# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Cross entropy: kernels, the product with the head, options, and where models and trainers get them."""

from __future__ import annotations

from typing import Tuple

from .entries import Patch, Target

# unsloth_zoo's unsloth_fused_ce_loss of 2026.10.9 to .6: the same loss in all.
ZOO_FUSED_LOSS = frozenset(
    "f90bc40b4e42a1c5 2f6ef353c3b8c337 0cd37c91e1fc3d12 bfeca6162b0c40c0".split()
)

PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "cross-entropy-kernel",
        title = "Add a cross entropy kernel that turns logits into their gradients in place",
        targets = (),
        modules = (
            "kernels/cross_entropy_kernel.py",
            "kernels/cross_entropy_rows.py",
            "cross_entropy_spec.py",
            "kernels/cross_entropy_torch.py",
        ),
        tests = {"tests/test_cross_entropy_kernel.py": "interpreter"},
        requires = ("test-backends",),
    ),
    Patch(
        name = "cross-entropy-options",
        title = "Give fast_cross_entropy_loss the options of nn.CrossEntropyLoss",
        targets = (
            Target(
                attribute = "unsloth.kernels.cross_entropy_loss:fast_cross_entropy_loss",
                replacement = "kernels.dense_cross_entropy:with_cross_entropy_options",
                fingerprints = frozenset(["b4d8f61f843d5e8b"]),
            ),
        ),
        modules = (
            "kernels/dense_cross_entropy.py",
            "loss_calls.py",
            "kernels/second_derivative.py",
        ),
        tests = {"tests/test_cross_entropy_options.py": "interpreter"},
        requires = ("cross-entropy-kernel",),
    ),
    Patch(
        name = "loss-chunking",
        title = "Hold the logits of a loss a few thousand rows at a time",
        targets = (),
        modules = ("kernels/loss_chunk_size.py", "kernels/loss_chunking.py"),
        tests = {"tests/test_loss_chunk_size.py": "cpu"},
        requires = ("cross-entropy-kernel",),
    ),
    Patch(
        name = "linear-custom-loss",
        title = "Compute any loss that treats tokens by themselves without holding the logits",
        targets = (),
        modules = ("kernels/linear_custom_loss.py",),
        tests = {"tests/test_linear_custom_loss.py": "cpu"},
        shared = ("loss_problems.py",),
        requires = ("cross-entropy-options", "loss-chunking"),
    ),
    Patch(
        name = "linear-cross-entropy",
        title = "Compute everything nn.CrossEntropyLoss has without holding the logits",
        targets = (),
        modules = (
            "kernels/linear_cross_entropy.py",
            "kernels/loss_validation.py",
        ),
        tests = {
            "tests/test_cross_entropy_parity.py": "interpreter",
            "tests/test_linear_cross_entropy.py": "cpu",
        },
        requires = ("linear-custom-loss",),
    ),
    Patch(
        name = "fused-cross-entropy",
        title = "Compute the fused loss in fewer matrix products and less memory",
        targets = (
            Target(
                attribute = "unsloth.models._utils:unsloth_fused_ce_loss",
                replacement = "fused_cross_entropy:on_linear_cross_entropy",
                fingerprints = ZOO_FUSED_LOSS,
                imported = True,
            ),
        ),
        modules = ("fused_cross_entropy.py",),
        tests = {
            "tests/test_cross_entropy_peers.py": "interpreter",
            "tests/test_fused_cross_entropy.py": "interpreter",
        },
        requires = ("linear-cross-entropy",),
    ),
    Patch(
        name = "linear-log-probs",
        title = "Compute log-probabilities, entropy and top-1 of tokens without holding the logits",
        targets = (),
        modules = (
            "kernels/linear_log_probs.py",
            "kernels/linear_loss.py",
            "kernels/log_probs_kernel.py",
        ),
        tests = {
            "tests/test_linear_log_probs.py": "interpreter",
            "tests/test_linear_loss_distributed.py": "gloo",
        },
        requires = ("linear-cross-entropy",),
    ),
    Patch(
        name = "trainer-loss-options",
        title = "Check the options of a loss, and carry them through trainers and their evaluation",
        targets = (),
        modules = ("loss_columns.py", "loss_in_trainers.py", "loss_options.py"),
        tests = {"tests/test_loss_options_in_trainers.py": "cpu"},
        requires = ("linear-cross-entropy",),
    ),
    Patch(
        name = "loss-options",
        title = "Let class weights, z-loss and label smoothing of a model reach its fused loss",
        targets = (
            Target(
                attribute = "unsloth.kernels.cross_entropy_loss:fast_cross_entropy_loss",
                replacement = "fused_loss:dense_loss_with_model_options",
                signature = ("logits", "labels", "*"),
            ),
            Target(
                attribute = "unsloth.models._utils:unsloth_fused_ce_loss",
                replacement = "fused_loss:fused_loss_with_model_options",
                signature = (
                    "trainer",
                    "hidden_states",
                    "lm_head_weight",
                    "lm_head_bias",
                    "labels",
                    "*",
                    "shift_labels",
                ),
                imported = True,
            ),
            Target(
                attribute = "unsloth.models._utils:_unsloth_pre_compute_loss",
                replacement = "fused_loss:label_smoothing_in_the_model",
                signature = ("self", "model", "inputs", "*"),
            ),
            Target(
                attribute = "unsloth.models.llama:CausalLM_fast_forward",
                replacement = "fused_loss:forward_factory_with_loss_options",
                signature = ("fast_forward_inference",),
                uses = ("unsloth_fused_ce_loss", "fast_cross_entropy_loss"),
            ),
            Target(
                attribute = "unsloth.models.mistral:MistralForCausalLM_fast_forward",
                replacement = "fused_loss:forward_with_loss_options",
                signature = ("self", "*", "labels"),
                uses = ("unsloth_fused_ce_loss", "fast_cross_entropy_loss"),
            ),
        ),
        modules = ("fused_loss.py",),
        tests = {"tests/test_loss_options.py": "interpreter"},
        shared = ("loss_trainer.py",),
        requires = ("fused-cross-entropy", "trainer-loss-options"),
    ),
    Patch(
        name = "cpu-loss-options",
        title = "Give the CPU backend's loss the options of the fused loss",
        targets = (
            # 2026.10.7 has no CPU backend.
            Target(
                attribute = "unsloth_zoo.cpu.ops:chunked_linear_cross_entropy",
                replacement = "fused_loss_cpu:cpu_loss_on_linear_cross_entropy",
                fingerprints = frozenset(["442c690b45f50d65"]),
                wired_in = "unsloth/_cpu_init.py",
                optional = True,
            ),
            Target(
                attribute = "unsloth_zoo.cpu.loader:patch_chunked_causal_lm_loss",
                replacement = "fused_loss_cpu:cpu_forward_with_loss_options",
                wired_in = "unsloth/_cpu_init.py",
                optional = True,
                signature = ("model",),
                imported = True,
            ),
        ),
        modules = ("fused_loss_cpu.py",),
        tests = {
            "tests/test_loss_options_sft.py": "cpu",
            "tests/test_loss_options_distributed.py": "gloo",
        },
        wraps_later = ("transformers.trainer:Trainer.compute_loss",),
        requires = ("loss-options",),
    ),
    Patch(
        name = "fast-model-loss",
        title = "Give FastModel's models the fused loss in fewer products, and its options",
        targets = (
            Target(
                attribute = "unsloth_zoo.loss_utils:unsloth_fused_ce_loss",
                replacement = "fused_loss_models:loss_of_compiled_forwards",
                fingerprints = ZOO_FUSED_LOSS,
                wired_in = "unsloth/models/_utils.py",
                imported = True,
            ),
            Target(
                attribute = "unsloth_zoo.fused_losses.forward_adapter:unsloth_fused_ce_loss",
                replacement = "fused_loss_models:loss_of_compiled_forwards",
                fingerprints = ZOO_FUSED_LOSS,
                wired_in = "unsloth/models/_utils.py",
                optional = True,
                imported = True,
            ),
            Target(
                attribute = "unsloth.models.vision:post_patch_loss_function",
                replacement = "fused_loss_models:loaded_models_take_options",
                signature = ("model",),
                imported = True,
            ),
        ),
        modules = ("fused_loss_models.py",),
        tests = {"tests/test_fused_loss_models.py": "interpreter"},
        requires = ("loss-options",),
    ),
    Patch(
        name = "loss-metrics",
        title = "Log token accuracy and entropy of a training that holds no logits",
        targets = (),
        modules = ("loss_metrics.py",),
        tests = {"tests/test_loss_metrics.py": "cpu"},
        requires = ("linear-log-probs", "cpu-loss-options"),
    ),
)
