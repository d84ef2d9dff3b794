# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Texts that render tool calls of Llama 3.x: the joined chat template, and transformers' response
template that reads it back.

Meta's templates render one call a message. ``join`` adds one branch for messages with several; the
branch for one call is not touched, so single calls render as Meta publishes them.
"""

from __future__ import annotations

from typing import Any, Dict

from .checks import has_builtin_tools

ASSISTANT_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_CALLS_BRANCH = "    {%- elif 'tool_calls' in message %}\n"
_JOINED_CALLS = """\
    {%- elif 'tool_calls' in message and message.tool_calls|length > 1 %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- for tool_call in message.tool_calls %}
            %BUILTIN%
            {{- '{"name": "' + tool_call.function.name + '", "parameters": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}' if loop.last else '}; ' }}
        {%- endfor %}
        {{- %END% }}
"""
_NO_JOINED_BUILTIN = """\
{%- if builtin_tools is defined and tool_call.function.name in builtin_tools %}
                {{- raise_exception("A built-in tool cannot share a turn with other calls.") }}
            {%- endif %}"""


def join_template(template: str) -> str:
    """Meta's template plus a branch that renders several calls as ``{...}; {...}`` in one turn.

    Raises NotImplementedError where the template has no branch for tool calls to put it before.
    """
    # The last occurrence: a system message, earlier in the text, may quote anything.
    head, found, tail = template.rpartition(_CALLS_BRANCH)
    if not found:
        raise NotImplementedError("the chat template has no branch for messages with tool_calls")
    builtin = has_builtin_tools(template)
    end = (
        "'<|eom_id|>' if builtin_tools is defined else '<|eot_id|>'" if builtin else "'<|eot_id|>'"
    )
    branch = _JOINED_CALLS.replace("%END%", end)
    branch = branch.replace(
        "            %BUILTIN%\n", f"            {_NO_JOINED_BUILTIN}\n" if builtin else ""
    )
    return head + branch + found + tail


def response_template(template: str) -> Dict[str, Any]:
    r"""What ``tokenizer.parse_response`` (transformers >= 5.13) needs to read calls.

    A call opens at the start of the reply or after ``; ``, and closes before the next one or at the
    reply's end, so that no text inside its arguments can close it.
    """
    end = r"(?:\s*<\|eo[tm]_id\|>)*\s*\Z"
    fields = {
        "tool_calls": {
            "open_pattern": r"(?:\A\s*(?:<\|python_tag\|>)?|(?<=\};)\s*)"
            r'\{"name":\s*"(?P<name>[^"\\]+)",\s*"parameters":\s*',
            "close_pattern": r'\}(?:;(?=\s*\{"name":)|' + end + ")",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close_pattern": r"<\|eo[tm]_id\|>\s*", "content": "text"},
    }
    if has_builtin_tools(template):
        # name.call(key="text") is no JSON: it is handed out as text, for parse_tool_calls to read.
        fields["python_tag"] = {
            "open_pattern": r"<\|python_tag\|>(?!\s*\{)",
            "close_pattern": end,
            "content": "text",
        }
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": ASSISTANT_HEADER,
        "fields": fields,
    }
