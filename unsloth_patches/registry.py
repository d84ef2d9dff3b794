# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The one catalogue of patches: what each replaces, with what, and how it is tested.

Everything else reads it: the import hooks (``hooks.py``), the command line, and
``scripts/patches.py``, which writes the git form from the same entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, FrozenSet, Tuple

SUPPORTED_UPSTREAM = ("2026.10.7", "2026.10.9")


@dataclass(frozen = True)
class Target:
    """One attribute of Unsloth (or unsloth_zoo) and what replaces it.

    attribute: ``"package.module:name"``, on the leaf module that defines the name.
    replacement: ``"path.below.unsloth:decorator"``, a function ``stock -> new object``. In the fork it stands
        as ``@decorator`` above the definition, or as ``name = decorator(name)`` after an import or assignment.
    fingerprints: accepted AST hashes of the stock function; empty where the replacement checks
        the stock object itself (a table of templates has no AST).
    wired_in: the fork's file that is edited; by default the file of ``attribute``'s module. Needed for
        names of unsloth_zoo, which a patch to Unsloth cannot edit.
    import_after: the line of that file that the decorator's import follows; by default its sorted place.
    optional: a supported release lacks the module or the name; the rest of the patch holds without it.
    """

    attribute: str
    replacement: str
    fingerprints: FrozenSet[str] = frozenset()
    wired_in: str = ""
    optional: bool = False
    import_after: str = ""

    @property
    def module(self) -> str:
        return self.attribute.partition(":")[0]

    @property
    def name(self) -> str:
        return self.attribute.partition(":")[2]


@dataclass(frozen = True)
class Patch:
    """A focused change that is one pull request in the git form.

    modules: files it adds, relative to ``unsloth_patches/unsloth/`` here and to ``unsloth/`` in the fork.
    tests: test file -> backend it needs, ``"cpu"`` (Unsloth's CPU backend) or ``"interpreter"``
        (GPU code paths, Triton kernels in the interpreter) or ``"gloo"`` (the CPU backend, in a process
        that does nothing but fork ranks: a fork after a backward pass would hang).
    shared: files of ``tests/_shared/`` that it brings for its tests and those of the patches that require it.
    requires: names of patches that have to be in before this one; they stand earlier in ``PATCHES``.
    since: the oldest release that has what it builds on; with an older one it is skipped.
    """

    name: str
    title: str
    targets: Tuple[Target, ...]
    modules: Tuple[str, ...] = ()
    tests: Dict[str, str] = field(default_factory = dict)
    shared: Tuple[str, ...] = ()
    requires: Tuple[str, ...] = ()
    since: str = ""


PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "test-backends",
        title = "Let a test file say which backend of Unsloth it needs",
        targets = (),
        shared = ("backend.py",),
        tests = {"tests/test_shared_backend.py": "cpu"},
    ),
    Patch(
        name = "llama-chat-templates",
        title = "Render Llama 3.1, 3.2 and 3.3 chat templates as Meta publishes them",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:CHAT_TEMPLATES",
                replacement = "llama_chat_templates:published_llama_templates",
            ),
            Target(
                attribute = "unsloth.chat_templates:get_chat_template",
                replacement = "llama_chat_templates:announce_published_llama_templates",
            ),
        ),
        modules = ("llama_chat_templates.py",),
        tests = {"tests/test_chat_template.py": "cpu"},
        shared = ("llama_chat.py",),
    ),
    Patch(
        name = "tool-call-parser",
        title = "Read the tool calls that Llama 3.x models write, and stop at their end",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:train_on_responses_only",
                # No fingerprint: stock wraps unsloth_zoo's function; the decorator checks the signature.
                replacement = "tool_calls.stop_tokens:stop_at_end_of_turn",
            ),
        ),
        modules = (
            "tool_calls/__init__.py",
            "tool_calls/errors.py",
            "tool_calls/parser.py",
            "tool_calls/schemas.py",
            "tool_calls/stop_tokens.py",
        ),
        tests = {
            "tests/test_tool_call_parser.py": "cpu",
            "tests/test_tool_call_stop_tokens.py": "cpu",
        },
        requires = ("llama-chat-templates",),
    ),
    Patch(
        name = "tool-call-stream",
        title = "Read tool calls while a reply is being generated",
        targets = (),
        modules = ("tool_calls/stream.py",),
        tests = {"tests/test_tool_call_stream.py": "cpu"},
        requires = ("tool-call-parser",),
    ),
    Patch(
        name = "tool-call-datasets",
        title = "Read tool calls of every usual format in standardize_sharegpt",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:standardize_data_formats",
                replacement = "tool_calls.datasets:standardize_tool_calls",
            ),
            Target(
                attribute = "unsloth.chat_templates:standardize_sharegpt",
                replacement = "tool_calls.datasets:standardize_tool_calls",
            ),
            # unsloth.standardize_sharegpt without a GPU; 2026.10.7 has no CPU backend.
            Target(
                attribute = "unsloth._cpu_init:standardize_data_formats",
                replacement = "tool_calls.datasets:standardize_tool_calls",
                optional = True,
                import_after = "import os",
            ),
        ),
        modules = ("tool_calls/calls.py", "tool_calls/datasets.py", "tool_calls/reading.py"),
        tests = {
            "tests/test_tool_call_datasets.py": "cpu",
            "tests/test_tool_call_reading.py": "cpu",
        },
        shared = ("conversation_formats.py",),
        requires = ("llama-chat-templates", "tool-call-parser"),
    ),
    Patch(
        name = "tool-call-checks",
        title = "Check conversations with tool calls before a Llama 3.x template renders them",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:get_chat_template",
                replacement = "tool_calls.checks:check_tool_calls",
                # 2026.10.9, .7
                fingerprints = frozenset(["6964c9950024548e", "a2da57caf2ff94fa"]),
            ),
        ),
        modules = ("tool_calls/checks.py", "tool_calls/messages.py", "tool_calls/results.py"),
        tests = {"tests/test_tool_call_checks.py": "cpu"},
        requires = ("llama-chat-templates", "tool-call-datasets"),
    ),
    Patch(
        name = "parallel-tool-calls",
        title = "Render several tool calls in one message of Llama 3.x",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:get_chat_template",
                replacement = "tool_calls.parallel:render_parallel_tool_calls",
            ),
        ),
        modules = ("tool_calls/parallel.py", "tool_calls/templates.py"),
        tests = {
            "tests/test_parallel_tool_calls.py": "cpu",
            "tests/test_tool_call_round_trip.py": "cpu",
        },
        requires = ("tool-call-stream", "tool-call-checks"),
    ),
    Patch(
        name = "tool-call-masking",
        title = "Train on every call of the last response where each has a turn of its own",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:train_on_responses_only",
                replacement = "tool_calls.masking:keep_every_call_of_last_response",
            ),
        ),
        modules = ("tool_calls/masking.py",),
        tests = {"tests/test_tool_call_masking.py": "cpu"},
        requires = ("tool-call-parser", "parallel-tool-calls"),
    ),
    Patch(
        name = "assistant-masks",
        title = "Mark what the assistant writes in Llama 3.x templates, for assistant_only_loss",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:get_chat_template",
                replacement = "tool_calls.assistant_masks:mark_assistant_turns",
            ),
        ),
        modules = ("tool_calls/assistant_masks.py",),
        tests = {"tests/test_tool_call_assistant_masks.py": "cpu"},
        requires = ("parallel-tool-calls",),
    ),
    Patch(
        name = "tool-call-ollama",
        title = "Render tool calls in Llama 3.x's Ollama modelfile as the chat template does",
        targets = (
            Target(
                attribute = "unsloth.ollama_template_mappers:OLLAMA_TEMPLATES",
                replacement = "tool_calls.ollama:render_tool_calls_in_modelfiles",
            ),
            Target(
                attribute = "unsloth.chat_templates:get_chat_template",
                replacement = "tool_calls.ollama:choose_modelfile_by_mode",
            ),
        ),
        modules = ("tool_calls/ollama.py",),
        tests = {"tests/test_tool_call_ollama.py": "cpu"},
        # The last two decorate get_chat_template, too.
        requires = ("llama-chat-templates", "parallel-tool-calls", "assistant-masks"),
    ),
    Patch(
        name = "nf4-dequantize",
        title = "Dequantize every bitsandbytes 4-bit weight in one Triton launch",
        targets = (
            Target(
                attribute = "unsloth.kernels.utils:fast_dequantize",
                replacement = "kernels.nf4_dequantize:replace_fast_dequantize",
                fingerprints = frozenset(
                    # One definition per device branch, and the outermost one that is live: 2026.10.9, .7
                    "1454833d36486569 317cbc886535aa9f 6362d349d6e3df04 d01b9c70a43e6aa4 "
                    "1929688413cf077a 5996de1656b594d5 a796198c099dfb75 dd96aa49b3577ea4".split()
                ),
                import_after = "from .nvfp4 import NVFP4QuantState, nvfp4_dequantize, nvfp4_linear",
            ),
        ),
        modules = (
            "kernels/nf4_decode.py",
            "kernels/nf4_dequantize.py",
            "kernels/nf4_dequantize_kernel.py",
            "kernels/nf4_launch.py",
            "kernels/nf4_operator.py",
            "kernels/nf4_plan.py",
            "kernels/nf4_quant_state.py",
        ),
        tests = {"tests/test_nf4_dequantize.py": "interpreter"},
    ),
    Patch(
        name = "linear-loss",
        title = "Compute the loss from the head without the logits, with everything nn.CrossEntropyLoss has",
        targets = (
            Target(
                attribute = "unsloth.kernels.cross_entropy_loss:fast_cross_entropy_loss",
                replacement = "fused_loss:replace_fast_cross_entropy_loss",
                fingerprints = frozenset(["b4d8f61f843d5e8b"]),
            ),
            Target(
                attribute = "unsloth.models._utils:unsloth_fused_ce_loss",
                replacement = "fused_loss:replace_unsloth_fused_ce_loss",
                # Defined in unsloth_zoo: 2026.10.9, .7
                fingerprints = frozenset(["f90bc40b4e42a1c5", "0cd37c91e1fc3d12"]),
            ),
            Target(
                attribute = "unsloth.models._utils:_unsloth_pre_compute_loss",
                replacement = "fused_loss:replace_unsloth_pre_compute_loss",
                fingerprints = frozenset(["05294ddb7f2090b2"]),
            ),
            Target(
                attribute = "unsloth.models.llama:CausalLM_fast_forward",
                replacement = "fused_loss:replace_CausalLM_fast_forward",
                # 2026.10.9, .7
                fingerprints = frozenset(["ac27fd88bb3571f3", "ef8af568e4292650"]),
            ),
            Target(
                attribute = "unsloth.models.mistral:MistralForCausalLM_fast_forward",
                replacement = "fused_loss:replace_MistralForCausalLM_fast_forward",
                fingerprints = frozenset(["30e41e06b2a4262d"]),
            ),
            # 2026.10.7 has no CPU backend.
            Target(
                attribute = "unsloth_zoo.cpu.ops:chunked_linear_cross_entropy",
                replacement = "fused_loss_cpu:replace_chunked_linear_cross_entropy",
                fingerprints = frozenset(["442c690b45f50d65"]),
                wired_in = "unsloth/_cpu_init.py",
                optional = True,
            ),
            Target(
                attribute = "unsloth_zoo.cpu.loader:patch_chunked_causal_lm_loss",
                replacement = "fused_loss_cpu:replace_patch_chunked_causal_lm_loss",
                fingerprints = frozenset(["e47d01b3f480695a"]),
                wired_in = "unsloth/_cpu_init.py",
                optional = True,
            ),
        ),
        modules = (
            "fused_loss.py",
            "fused_loss_cpu.py",
            "loss_options.py",
            "kernels/chunk_rows.py",
            "kernels/cross_entropy_kernel.py",
            "kernels/cross_entropy_rows.py",
            "kernels/cross_entropy_torch.py",
            "kernels/dense_cross_entropy.py",
            "kernels/linear_checks.py",
            "kernels/linear_chunks.py",
            "kernels/linear_cross_entropy.py",
            "kernels/linear_log_probs.py",
            "kernels/linear_loss.py",
            "kernels/log_probs_kernel.py",
        ),
        tests = {
            "tests/test_linear_loss.py": "cpu",
            "tests/test_linear_loss_distributed.py": "gloo",
            "tests/test_cross_entropy_parity.py": "interpreter",
        },
    ),
    Patch(
        name = "checkpoint-recompute",
        title = "Run a checkpointed block by one graph, and leave out its down projection in the recompute",
        targets = (
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_MLP",
                replacement = "kernels.lora_mlp_unread:replace_LoRA_MLP",
                # 2026.10.9, .7
                fingerprints = frozenset({"dd30ee9b11bdbcbc", "c23a99c78e2f62b1"}),
            ),
            Target(
                attribute = "unsloth.kernels.fast_lora:apply_lora_mlp_swiglu",
                replacement = "kernels.lora_mlp_unread:replace_apply_lora_mlp_swiglu",
                fingerprints = frozenset({"4a7fb6cce038f12d"}),
            ),
            Target(
                attribute = "unsloth.models.llama:LlamaDecoderLayer_fast_forward",
                replacement = "models.checkpoint_recompute:replace_LlamaDecoderLayer_fast_forward",
                fingerprints = frozenset({"5282151279fcd9ae"}),
            ),
            Target(
                attribute = "unsloth.models._block_compile:_wrap",
                replacement = "models.checkpoint_recompute:replace_wrap",
                # 2026.10.9, .7
                fingerprints = frozenset({"dbf509ead6fcfe32", "1a15d9c39b96959f"}),
            ),
        ),
        modules = (
            "kernels/lora_mlp_unread.py",
            "models/checkpoint_one_graph.py",
            "models/checkpoint_recompute.py",
        ),
        tests = {"tests/test_checkpoint_recompute.py": "interpreter"},
    ),
    Patch(
        name = "lora-products",
        title = "Add LoRA's part before the large product, and share the products of Q, K and V",
        targets = (
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_QKV",
                replacement = "kernels.lora_functions:replace_LoRA_QKV",
                fingerprints = frozenset({"a055294701a0831d"}),
            ),
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_W",
                replacement = "kernels.lora_functions:replace_LoRA_W",
                fingerprints = frozenset({"1c29b35a96a040cf"}),
            ),
            Target(
                attribute = "unsloth.kernels.fast_lora:LoRA_MLP",
                replacement = "kernels.lora_functions:replace_LoRA_MLP",
                fingerprints = frozenset({"dd30ee9b11bdbcbc"}),
            ),
        ),
        modules = ("kernels/lora_products.py", "kernels/lora_functions.py"),
        tests = {"tests/test_lora_products.py": "interpreter"},
        requires = ("checkpoint-recompute",),
        since = "2026.10.9",
    ),
    Patch(
        name = "fsdp2-sharded-4bit",
        title = "Load 4-bit weights under native FSDP2 as one shard a rank",
        targets = (
            Target(
                attribute = "unsloth.models.fsdp2_load:sharded_load_env",
                replacement = "models.fsdp2_sharded_4bit:replace_sharded_load_env",
                fingerprints = frozenset({"ee87d3d93a2efb32"}),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_load:begin_shard",
                replacement = "models.fsdp2_sharded_4bit:replace_begin_shard",
                fingerprints = frozenset({"36852de07d4541e7"}),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_load:finish_shard",
                replacement = "models.fsdp2_sharded_4bit:replace_finish_shard",
                fingerprints = frozenset({"43ac82533b55e12c"}),
            ),
            Target(
                attribute = "unsloth._cpu_init:FastLanguageModel.from_pretrained",
                replacement = "fsdp2_cpu_load:replace_cpu_from_pretrained",
            ),
            Target(
                attribute = "unsloth.models.fsdp2_save:_gather_full",
                replacement = "models.fsdp2_sharded_save:replace_gather_full",
                fingerprints = frozenset({"241be9beacc7af51"}),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_save:fsdp2_gathered",
                replacement = "models.fsdp2_sharded_save:replace_fsdp2_gathered",
                fingerprints = frozenset({"64625703a0a5ffac"}),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_native:native_full_state_dict",
                replacement = "models.fsdp2_sharded_save:replace_native_full_state_dict",
                fingerprints = frozenset({"e56be29fbb410847"}),
            ),
        ),
        modules = (
            "fsdp2_cpu_load.py",
            "models/fsdp2_checkpoint.py",
            "models/fsdp2_load_choice.py",
            "models/fsdp2_memory_count.py",
            "models/fsdp2_model_shape.py",
            "models/fsdp2_param_init.py",
            "models/fsdp2_quantize_rows.py",
            "models/fsdp2_sharded_4bit.py",
            "models/fsdp2_sharded_load.py",
            "models/fsdp2_sharded_params.py",
            "models/fsdp2_sharded_save.py",
            "models/fsdp2_usable_memory.py",
        ),
        tests = {"tests/test_fsdp2_sharded_4bit.py": "gloo"},
        since = "2026.10.9",
    ),
    Patch(
        name = "fsdp2-offload-plan",
        title = "Offload frozen weights under native FSDP2 by what fits",
        targets = (
            Target(
                attribute = "unsloth.models.fsdp2_native:shard_model",
                replacement = "models.fsdp2_offload_apply:replace_shard_model",
                fingerprints = frozenset({"91e99b737fc53ea5"}),
            ),
            Target(
                attribute = "unsloth.models.fsdp2_native:native_fsdp2_trainer_setup",
                replacement = "models.fsdp2_offload_apply:replace_native_fsdp2_trainer_setup",
                fingerprints = frozenset({"b803af7aea71b62a"}),
            ),
        ),
        modules = (
            "models/fsdp2_offload_apply.py",
            "models/fsdp2_offload_plan.py",
        ),
        tests = {"tests/test_fsdp2_offload_plan.py": "gloo"},
        requires = ("fsdp2-sharded-4bit",),
        since = "2026.10.9",
    ),
    Patch(
        name = "compile-variants",
        title = "Compile a block once for all its LoRA scales, lengths and packed rows",
        targets = (
            Target(
                attribute = "unsloth.kernels.utils:get_lora_parameters",
                replacement = "kernels.lora_scale_inputs:replace_get_lora_parameters",
                fingerprints = frozenset({"a6b2704a01310d5d"}),
                import_after = "from ..bnb_availability import native_kernels_ready",
            ),
            Target(
                attribute = "unsloth.models._block_compile:patch_block_compile",
                replacement = "models.compile_variants:replace_patch_block_compile",
                fingerprints = frozenset({"cbe892e347d670cf"}),
                import_after = "import types",
            ),
            Target(
                attribute = "unsloth.models._block_compile:_mark_seq_dynamic",
                replacement = "models.compile_variants:replace_mark_seq_dynamic",
                fingerprints = frozenset({"97cfd424baf498ba"}),
            ),
            Target(
                attribute = "unsloth.utils.packing:get_packed_info_from_kwargs",
                replacement = "models.compile_packed:replace_get_packed_info_from_kwargs",
                fingerprints = frozenset({"e5ace2c4f3b413db"}),
            ),
            Target(
                attribute = "unsloth.utils.attention_dispatch:_run_attention",
                replacement = "models.compile_packed:replace_run_attention",
                fingerprints = frozenset({"63208249b6f37a45"}),
            ),
        ),
        modules = (
            "kernels/lora_scale_inputs.py",
            "models/compile_packed.py",
            "models/compile_variants.py",
        ),
        tests = {"tests/test_compile_variants.py": "interpreter"},
        since = "2026.10.9",
    ),
    Patch(
        name = "compiled-swiglu-backward",
        title = "Reuse the gradient's buffer in the compiled SwiGLU backward",
        targets = (
            Target(
                attribute = "unsloth.kernels.swiglu:swiglu_DWf_DW_dfg_kernel",
                replacement = "kernels.swiglu_backward:replace_swiglu_DWf_DW_dfg_kernel",
                fingerprints = frozenset({"c63ff827627e9084"}),
            ),
        ),
        modules = ("kernels/swiglu_backward.py",),
        tests = {"tests/test_swiglu_backward.py": "interpreter"},
        since = "2026.10.9",
    ),
    Patch(
        name = "compile-workers",
        title = "Start Inductor's compile workers while the model loads",
        targets = (
            # No fingerprints: the functions are called as they are.
            Target(
                attribute = "unsloth.models.loader:FastLanguageModel.from_pretrained",
                replacement = "models.compile_workers:replace_from_pretrained",
            ),
            Target(
                attribute = "unsloth.models.loader:FastModel.from_pretrained",
                replacement = "models.compile_workers:replace_from_pretrained",
            ),
        ),
        modules = ("models/compile_workers.py",),
        tests = {"tests/test_compile_workers.py": "interpreter"},
        since = "2026.10.9",
    ),
    Patch(
        name = "tool-call-reload",
        title = "Render tool calls after a reload as the saved tokenizer did",
        targets = (
            Target(
                attribute = "unsloth._cpu_init:FastLanguageModel.from_pretrained",
                replacement = "tool_calls.reload:restore_tool_call_mode",
                optional = True,
            ),
            Target(
                attribute = "unsloth.models.loader:FastLanguageModel.from_pretrained",
                replacement = "tool_calls.reload:restore_tool_call_mode",
            ),
            Target(
                attribute = "unsloth.models.loader:FastModel.from_pretrained",
                replacement = "tool_calls.reload:restore_tool_call_mode",
            ),
        ),
        modules = ("tool_calls/reload.py",),
        tests = {"tests/test_tool_call_reload.py": "cpu"},
        # The last two decorate from_pretrained too, on the CPU backend and on GPUs.
        requires = ("parallel-tool-calls", "fsdp2-sharded-4bit", "compile-workers"),
    ),
    Patch(
        name = "compile-cache",
        title = "Keep compiled blocks in a folder for the next run's first step",
        targets = (
            Target(
                attribute = "unsloth.models._block_compile:patch_block_compile",
                replacement = "models.compile_cache:replace_patch_block_compile",
                fingerprints = frozenset({"cbe892e347d670cf"}),
            ),
        ),
        modules = (
            "models/compile_cache.py",
            "models/compile_cache_files.py",
            "models/compile_cache_triton.py",
        ),
        tests = {"tests/test_compile_cache.py": "cpu"},
        requires = ("compile-variants",),
        since = "2026.10.9",
    ),
    Patch(
        name = "fullgraph-report",
        title = "Report what was compiled, and enforce full graphs where they are asked for",
        targets = (
            Target(
                attribute = "unsloth.models._block_compile:_wrap",
                replacement = "models.compile_modes:replace_wrap",
                fingerprints = frozenset({"dbf509ead6fcfe32", "1a15d9c39b96959f"}),
            ),
            Target(
                attribute = "unsloth.trainer:_backwards_compatible_trainer",
                replacement = "models.compile_callback:replace_backwards_compatible_trainer",
                fingerprints = frozenset({"cbc126cbc4a01683", "f543f55889f17d6c"}),
            ),
        ),
        modules = (
            "models/compile_callback.py",
            "models/compile_events.py",
            "models/compile_logs.py",
            "models/compile_modes.py",
            "models/compile_report.py",
            "models/compile_speed.py",
            "models/compile_table.py",
        ),
        tests = {"tests/test_fullgraph_report.py": "interpreter"},
        requires = ("checkpoint-recompute",),
        since = "2026.10.9",
    ),
)


def main() -> None:
    """Print the fingerprints of every target in the installed Unsloth: what to write into an entry."""
    from .upstream_source import upstream_fingerprints

    for patch in PATCHES:
        for target in patch.targets:
            found = (
                ", ".join(sorted(upstream_fingerprints(target))) or "no definition (checks itself)"
            )
            print(f"{patch.name:24} {target.attribute:56} {found}")


if __name__ == "__main__":
    main()
