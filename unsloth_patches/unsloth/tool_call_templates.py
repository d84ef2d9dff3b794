# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Texts that render tool calls of Llama 3.x: the joined chat template, transformers' response
template that reads it back, and the Ollama modelfile.

Meta's templates render one call a message. ``join`` adds one branch for messages with several; the
branch for one call is not touched, so single calls render as Meta publishes them.
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict

from .llama_chat_templates import LLAMA_3X_NAMES

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


def has_builtin_tools(template: str) -> bool:
    """Whether a Llama template knows built-in tools (3.1 and 3.3 do, 3.2 does not)."""
    return "<|python_tag|>" in template


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
            r'\{"name":\s*"(?P<name>[A-Za-z0-9_.-]+)",\s*"parameters":\s*',
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


# ---------------------------------------------------------------- Ollama

# Unsloth's modelfile of llama-3.1 in 2026.10.7 and 2026.10.9. It leaves out the end of a call's
# turn, runs calls together, and samples at temperature 1.5.
STOCK_MODELFILE_MD5 = "8d48049825cef8903f0744708272d135"

# Ollama finds out how a model calls tools from the first text inside `if .ToolCalls`, so that text
# has to be the call itself: headers and separators stand before or behind it.
_MODELFILE = '''
FROM {__FILE_LOCATION__}
TEMPLATE """{{- if .Messages }}
{{- $start := 0 }}
{{- if eq (index .Messages 0).Role "system" }}{{ $start = 1 }}{{ end -}}
<|start_header_id|>system<|end_header_id|>

{{ if .Tools }}Environment: ipython
{{ end }}Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

{{ if $start }}{{ (index .Messages 0).Content }}{{ end }}<|eot_id|>
{{- range $i, $message := .Messages }}
{{- $rest := slice $.Messages $i }}
{{- $last := eq (len $rest) 1 }}
{{- if lt $i $start }}
{{- else if eq .Role "assistant" -}}
<|start_header_id|>assistant<|end_header_id|>

{{ if .ToolCalls }}
{{- range $j, $call := .ToolCalls -}}
{"name": "{{ .Function.Name }}", "parameters": {{ json .Function.Arguments }}}%BETWEEN%
{{- end }}%AFTER%
{{- else }}{{ .Content }}{{ if not $last }}<|eot_id|>{{ end }}
{{- end }}
{{- else if eq .Role "tool" }}%RESULT%
{{- else -}}
<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ if and $.Tools (eq $i $start) -}}
Given the following functions, please respond with a JSON for a function call with its proper arguments that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.

{{ range $.Tools }}{{ json . }}

{{ end }}
{{- end }}{{ .Content }}<|eot_id|>
{{- end }}
{{- if and $last (ne .Role "assistant") -}}
<|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- end }}
{{- else }}
{{- if .System -}}
<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}
{{- if .Prompt -}}
<|start_header_id|>user<|end_header_id|>

{{ .Prompt }}<|eot_id|>{{ end -}}
<|start_header_id|>assistant<|end_header_id|>

{{ end }}{{ .Response }}{{ if .Response }}<|eot_id|>{{ end }}"""
PARAMETER stop "<|start_header_id|>"
PARAMETER stop "<|end_header_id|>"
PARAMETER stop "<|eot_id|>"
PARAMETER stop "<|eom_id|>"
PARAMETER temperature 0.6
PARAMETER top_p 0.9
'''
_RESULT = "<|start_header_id|>ipython<|end_header_id|>\n\n{{ json %s }}<|eot_id|>"
_IF_MORE_CALLS = "{{ if gt (len (slice $message.ToolCalls $j)) 1 }}"
_JOINED = {
    "%BETWEEN%": _IF_MORE_CALLS + "; {{ end }}",
    "%AFTER%": "<|eot_id|>",
    "%RESULT%": _RESULT % ".Content",
}
# The result of call j of message i is message i + 1 + j; Go's templates cannot add, so it is entry
# j of what follows message i. Results are rendered with their calls and not a second time.
_SPLIT = {
    "%BETWEEN%": "<|eot_id|>"
    "{{ $after := slice $rest 1 }}{{ if gt (len $after) $j }}{{ $result := index $after $j }}"
    '{{ if eq $result.Role "tool" }}'
    + _RESULT % "$result.Content"
    + "{{ end }}{{ end }}"
    + _IF_MORE_CALLS
    + ASSISTANT_HEADER
    + "{{ end }}",
    "%AFTER%": "",
    "%RESULT%": "",
}


def ollama_modelfile(parallel_tool_calls: str) -> str:
    """Modelfile for Llama 3.1, 3.2 and 3.3, with ``{__FILE_LOCATION__}`` for the weights.

    parallel_tool_calls: ``"split"`` renders each call and its result in a turn of its own;
    otherwise several calls are joined by ``; ``. Single calls are the same in both.

    Where it has to differ from the chat template: Ollama writes JSON without spaces, with ``<``,
    ``>`` and ``&`` escaped, and tools in one line; it cannot trim texts; the date is a fixed one.
    """
    text = _MODELFILE
    for mark, part in (_SPLIT if parallel_tool_calls == "split" else _JOINED).items():
        text = text.replace(mark, part)
    return text


def replace_ollama_templates(stock):
    """A copy of OLLAMA_TEMPLATES with the refreshed modelfile under the six Llama 3.x names.

    Raises NotImplementedError where the stock modelfile is not the known one. Replaces:
    ``unsloth.ollama_template_mappers.OLLAMA_TEMPLATES``.
    """
    changed = dict(stock)
    for name in LLAMA_3X_NAMES:
        if name not in stock:
            raise NotImplementedError(f"OLLAMA_TEMPLATES has no {name}")
        found = hashlib.md5(stock[name].encode("utf-8"), usedforsecurity = False).hexdigest()
        if found != STOCK_MODELFILE_MD5:
            raise NotImplementedError(
                f"the Ollama modelfile of {name} is not the known one (md5 {found})"
            )
        changed[name] = ollama_modelfile("error")
    return changed
