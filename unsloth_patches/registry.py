# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The one catalogue of patches: what each replaces, with what, and how it is tested.

Everything else reads it: the import hooks (``hooks.py``), the command line, and
``scripts/patches.py``, which writes the git form from the same entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, FrozenSet, Tuple

SUPPORTED_UPSTREAM = ("2026.10.6", "2026.10.7", "2026.10.8", "2026.10.9")

# unsloth_zoo's unsloth_fused_ce_loss of 2026.10.9 to .6: the same loss in all.
ZOO_FUSED_LOSS = frozenset(
    "f90bc40b4e42a1c5 2f6ef353c3b8c337 0cd37c91e1fc3d12 bfeca6162b0c40c0".split()
)


@dataclass(frozen = True)
class Target:
    """One attribute of Unsloth (or unsloth_zoo) and what replaces it.

    attribute: ``"package.module:name"``, on the leaf module that defines the name.
    replacement: ``"path.below.unsloth:decorator"``, a function ``stock -> new object``; of a staticmethod or
        classmethod it takes the plain function. In the fork it stands as ``@decorator`` above the
        definition, or as ``name = decorator(name)`` after an import or assignment.
    fingerprints: accepted AST hashes of the stock function: for a replacement that does its body's work
        itself. Empty where it calls stock (then ``signature`` and ``names`` say what it counts on, and
        releases that only edit the body keep the patch), or where it checks the stock object itself (a
        table of templates has no AST).
    signature: parameters that stock has to have, ``"name"`` or ``"name=default"``: these and no others, in
        this order. A ``"*"`` stands for others that a replacement hands on; those named after it can
        stand anywhere: ``("model", "labels", "*", "n_items")``.
    names: what the replacement uses of stock's module, ``"name"``, or of another, ``"package.module:name"``.
    uses: dotted names that stock's code has to use, as ``"torch.compile"``, for a replacement that changes
        what they do while stock runs.
    wired_in: the fork's file that is edited; by default the file of ``attribute``'s module. Needed for
        names of unsloth_zoo, which a patch to Unsloth cannot edit.
    import_after: the line of that file that the decorator's import follows; by default the import that sorts
        before it; ``check`` names patches that meet there. ``"beside"``: right above the definition,
        as Unsloth does itself where a module's top has no place for it.
    optional: a supported release lacks the module or the name; the rest of the patch holds without it.
    """

    attribute: str
    replacement: str
    fingerprints: FrozenSet[str] = frozenset()
    wired_in: str = ""
    optional: bool = False
    import_after: str = ""
    signature: Tuple[str, ...] = ()
    names: Tuple[str, ...] = ()
    uses: Tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return self.attribute.partition(":")[0]

    @property
    def name(self) -> str:
        return self.attribute.partition(":")[2]


@dataclass(frozen = True)
class Patch:
    """A focused change that is one pull request in the git form.

    modules: files it adds, relative to ``unsloth_patches/unsloth/`` here and to ``unsloth/`` in the fork;
        of a new package ``__init__.py`` too.
    tests: test file -> backend it needs, ``"cpu"`` (Unsloth's CPU backend) or ``"interpreter"``
        (GPU code paths, Triton kernels in the interpreter) or ``"gloo"`` (the CPU backend, in a process
        that does nothing but fork ranks: a fork after a backward pass would hang).
    shared: files of ``tests/_shared/`` that it brings for its tests and those of the patches that require it.
    requires: names of patches that have to be in before this one; they stand earlier in ``PATCHES``.
    after: names of patches that decorate the same function: in the git form it stands on them, so that
        no hunks meet; at import it does without them.
    wraps_later: functions, ``"package.module:name"``, that its replacements wrap (``functools.wraps``) once
        they run; ``undo()`` takes those wraps off.
    since: the oldest release that has what it builds on; with an older one it is skipped.
    """

    name: str
    title: str
    targets: Tuple[Target, ...]
    modules: Tuple[str, ...] = ()
    tests: Dict[str, str] = field(default_factory = dict)
    shared: Tuple[str, ...] = ()
    requires: Tuple[str, ...] = ()
    after: Tuple[str, ...] = ()
    wraps_later: Tuple[str, ...] = ()
    since: str = ""

    @property
    def dotted_modules(self) -> Tuple[str, ...]:
        """``modules`` as they are imported below ``unsloth``; a package by its folder's name."""
        paths = (file[: -len(".py")].replace("/", ".") for file in self.modules)
        return tuple(
            path[: -len(".__init__")] if path.endswith(".__init__") else path for path in paths
        )


PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "test-backends",
        title = "Let a test file say which backend of Unsloth it needs",
        targets = (),
        shared = ("backend.py", "fast_models.py", "faults.py", "small_models.py"),
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
            "tool_calls/values.py",
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
        name = "tool-call-reading",
        title = "Read tool calls of every usual format",
        targets = (),
        modules = ("tool_calls/calls.py", "tool_calls/reading.py"),
        tests = {"tests/test_tool_call_reading.py": "cpu"},
        shared = ("conversation_formats.py",),
        requires = ("tool-call-parser",),
    ),
    Patch(
        name = "tool-call-datasets",
        title = "Read tool calls in standardize_sharegpt",
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
            ),
        ),
        modules = ("tool_calls/datasets.py",),
        tests = {"tests/test_tool_call_datasets.py": "cpu"},
        requires = ("llama-chat-templates", "tool-call-reading"),
    ),
    Patch(
        name = "tool-call-checks",
        title = "Check conversations with tool calls before a Llama 3.x template renders them",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:get_chat_template",
                replacement = "tool_calls.checks:check_tool_calls",
                signature = ("*", "tokenizer", "chat_template"),
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
                import_after = "from .ollama_template_mappers import OLLAMA_TEMPLATES",
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
                import_after = "from .tool_calls.assistant_masks import mark_assistant_turns",
            ),
        ),
        modules = ("tool_calls/ollama.py",),
        tests = {"tests/test_tool_call_ollama.py": "cpu"},
        # The last two decorate get_chat_template, too.
        requires = ("llama-chat-templates", "parallel-tool-calls"),
        after = ("assistant-masks",),
    ),
    Patch(
        name = "tool-call-other-templates",
        title = "Give other chat templates tool calls as they render them, or warn",
        targets = (
            Target(
                attribute = "unsloth.chat_templates:get_chat_template",
                replacement = "tool_calls.other_templates:show_tool_calls",
            ),
        ),
        modules = ("tool_calls/other_templates.py",),
        tests = {"tests/test_tool_call_other_templates.py": "cpu"},
        requires = ("tool-call-checks",),
        after = ("parallel-tool-calls", "assistant-masks", "tool-call-ollama"),
    ),
    Patch(
        name = "nf4-kernel",
        title = "Add a Triton kernel that decodes any bitsandbytes 4-bit weight in one launch",
        targets = (),
        modules = ("kernels/nf4_decode.py", "kernels/nf4_dequantize_kernel.py"),
        shared = ("nf4_weights.py",),
        tests = {"tests/test_nf4_kernel.py": "interpreter"},
        requires = ("test-backends",),
    ),
    Patch(
        name = "nf4-dequantize",
        title = "Dequantize every bitsandbytes 4-bit weight in one Triton launch",
        targets = (
            Target(
                attribute = "unsloth.kernels.utils:fast_dequantize",
                replacement = "kernels.nf4_fast_dequantize:dequantize_in_one_launch",
                import_after = "from ..bnb_availability import native_kernels_ready",
                fingerprints = frozenset(
                    # One definition per device branch, and the outermost one that is live: 2026.10.9, .7
                    "1454833d36486569 317cbc886535aa9f 6362d349d6e3df04 d01b9c70a43e6aa4 "
                    "1929688413cf077a 5996de1656b594d5 a796198c099dfb75 dd96aa49b3577ea4".split()
                ),
            ),
        ),
        modules = ("kernels/nf4_dequantize.py", "kernels/nf4_fast_dequantize.py"),
        tests = {"tests/test_nf4_dequantize.py": "interpreter"},
        requires = ("nf4-kernel",),
    ),
    Patch(
        name = "cross-entropy-kernel",
        title = "Add a cross entropy kernel that turns logits into their gradients in place",
        targets = (),
        modules = (
            "kernels/cross_entropy_kernel.py",
            "kernels/cross_entropy_rows.py",
            "kernels/cross_entropy_spec.py",
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
            "kernels/loss_calls.py",
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
            ),
        ),
        modules = ("fused_cross_entropy.py",),
        tests = {"tests/test_fused_cross_entropy.py": "interpreter"},
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
        modules = ("loss_in_trainers.py", "loss_options.py"),
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
            ),
        ),
        modules = ("fused_loss_cpu.py",),
        tests = {"tests/test_loss_options_sft.py": "cpu"},
        shared = ("loss_trainer.py",),
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
            ),
            Target(
                attribute = "unsloth_zoo.fused_losses.forward_adapter:unsloth_fused_ce_loss",
                replacement = "fused_loss_models:loss_of_compiled_forwards",
                fingerprints = ZOO_FUSED_LOSS,
                wired_in = "unsloth/models/_utils.py",
                optional = True,
            ),
            Target(
                attribute = "unsloth.models.vision:post_patch_loss_function",
                replacement = "fused_loss_models:loaded_models_take_options",
                signature = ("model",),
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
        name = "fsdp2-param-init",
        title = "Fill a meta 4-bit model that FSDP2 has sharded, each rank from its slices",
        targets = (),
        modules = (
            "models/fsdp2_lean_gather.py",
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
            "models/fsdp2_usable_memory.py",
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
        requires = ("parallel-tool-calls", "tool-call-other-templates"),
        after = ("fsdp2-sharded-4bit", "compile-workers"),
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
            Target(
                attribute = "unsloth.trainer:_backwards_compatible_trainer",
                replacement = "models.compile_strict:require_full_graphs",
                signature = ("trainer_class", "config_class"),
            ),
        ),
        modules = ("models/compile_modes.py", "models/compile_strict.py"),
        tests = {"tests/test_compile_strict.py": "interpreter"},
        requires = ("compile-events", "checkpoint-shared-graph"),
    ),
    Patch(
        name = "compile-report",
        title = "Sum up what was compiled, what was not and why",
        targets = (),
        modules = ("models/compile_report.py", "models/compile_table.py"),
        tests = {"tests/test_compile_report.py": "interpreter"},
        requires = ("compile-strict",),
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
    Patch(
        name = "step-graphs-capture",
        title = "Capture a stack of decoder blocks, forward and backward, in CUDA graphs that share memory",
        targets = (),
        modules = (
            "models/step_graphs_blocks.py",
            "models/step_graphs_buckets.py",
            "models/step_graphs_capture.py",
        ),
        shared = ("graph_tape.py",),
        tests = {"tests/test_step_graphs_capture.py": "interpreter"},
        requires = ("test-backends",),
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
        ),
        modules = ("models/step_graphs.py", "models/step_graphs_state.py"),
        tests = {"tests/test_step_graphs.py": "interpreter"},
        requires = ("step-graphs-capture",),
        since = "2026.10.9",
    ),
)
