# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Llama 3.x chat templates and tool calls."""

from __future__ import annotations

from typing import Tuple

from .entries import Patch, Target

PATCHES: Tuple[Patch, ...] = (
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
        modules = (
            "tool_calls/call_reading.py",
            "tool_calls/calls.py",
            "tool_calls/json_text.py",
            "tool_calls/reading.py",
        ),
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
                imported = True,
            ),
            Target(
                attribute = "unsloth.chat_templates:standardize_sharegpt",
                replacement = "tool_calls.datasets:standardize_tool_calls",
                imported = True,
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
        modules = ("tool_calls/other_templates.py", "tool_calls/template_probes.py"),
        tests = {"tests/test_tool_call_other_templates.py": "cpu"},
        requires = ("test-backends", "tool-call-checks"),
        after = ("parallel-tool-calls", "assistant-masks", "tool-call-ollama"),
    ),
)

# It decorates from_pretrained, as patches of other subjects do, and comes after them.
RELOAD = Patch(
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
)
