# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Llama 3.x templates that mark what the assistant writes, for TRL's ``assistant_only_loss``.

The same bytes are rendered; ``{% generation %}`` stands around answers and calls with their end tokens.
"""

from __future__ import annotations

import functools

from .checks import checkable_parts, is_llama_3x, known_signature, set_checks, show_keyword

_HEADER = "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' "
_TEXT = (
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}\n"
)
_MARKED_TEXT = """\
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message['role'] == 'assistant' %}
            {%- generation %}
            {{- message['content'] | trim + '<|eot_id|>' }}
            {%- endgeneration %}
        {%- else %}
            {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endif %}
"""
_ONE_CALL = "        {%- set tool_call = message.tool_calls[0].function %}\n"
_SEVERAL_CALLS = "    {%- elif 'tool_calls' in message and message.tool_calls|length > 1 %}\n"
_NEXT_BRANCH = "    {%- elif "


def mark_assistant_turns(stock):
    """``get_chat_template`` with the keyword ``assistant_only_loss``, for the Llama 3.x templates.

    True gives the tokenizer a template with ``{% generation %}``, which SFTConfig's
    ``assistant_only_loss = True`` needs. What it renders stays the same.

    Decorates ``unsloth.chat_templates.get_chat_template``.
    """
    signature = known_signature(stock)

    @functools.wraps(stock)
    def get_chat_template(
        *args,
        assistant_only_loss = False,
        **kwargs,
    ):
        name = signature.bind(*args, **kwargs).arguments.get("chat_template")
        if assistant_only_loss and not is_llama_3x(name):
            raise ValueError(
                f"Unsloth: assistant_only_loss = True needs a Llama 3.x template, not {name!r}. Leave it "
                "out, and use train_on_responses_only."
            )
        tokenizer = stock(*args, **kwargs)
        if assistant_only_loss:
            for part in checkable_parts(tokenizer):
                checks = part._tool_call_checks
                set_checks(part, checks._replace(template = with_generation(checks.template)))
        return tokenizer

    show_keyword(get_chat_template, signature, "assistant_only_loss", False)
    return get_chat_template


def with_generation(template: str) -> str:
    """The template with ``{% generation %}`` around what the assistant writes.

    Raises NotImplementedError where it is not one of the Llama 3.x templates.
    """
    if template.count(_TEXT) != 1 or template.count(_ONE_CALL) != 1:
        raise NotImplementedError("the chat template renders assistant turns in an unknown way")
    template = template.replace(_TEXT, _MARKED_TEXT)
    for start in (_SEVERAL_CALLS, _ONE_CALL):
        head, found, rest = template.partition(start)
        if found:
            end = rest.index(_NEXT_BRANCH)
            template = head + found + _marked(rest[:end]) + rest[end:]
    return template


def _marked(branch: str) -> str:
    """A branch that renders calls: its header once, first, and the mark around all else."""
    lines = [line for line in branch.splitlines(keepends = True) if _HEADER not in line]
    body = "".join(lines)
    return f"        {_HEADER}}}}}\n        {{%- generation %}}\n{body}        {{%- endgeneration %}}\n"
