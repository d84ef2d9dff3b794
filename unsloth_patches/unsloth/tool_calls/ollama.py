# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The Ollama modelfile of Llama 3.1, 3.2 and 3.3: what the chat templates render, in Go's language."""

from __future__ import annotations

import functools
import hashlib

from ..llama_chat_templates import LLAMA_3X_NAMES
from .checks import tool_call_mode
from .templates import ASSISTANT_HEADER

# Of the llama-3.1 modelfile that ours takes the place of: it leaves out the end of a call's turn,
# runs calls together, and samples at temperature 1.5.
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


def render_tool_calls_in_modelfiles(stock):
    """A copy of OLLAMA_TEMPLATES with the refreshed modelfile under the six Llama 3.x names.

    Raises NotImplementedError where the stock modelfile is not the known one. Decorates
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


def choose_modelfile_by_mode(stock):
    """``get_chat_template`` whose tokenizer exports the modelfile of its ``parallel_tool_calls``.

    Decorates ``unsloth.chat_templates.get_chat_template``.
    """

    @functools.wraps(stock)
    def get_chat_template(*args, **kwargs):
        tokenizer = stock(*args, **kwargs)
        if tool_call_mode(tokenizer) == "split":
            for part in filter(None, (tokenizer, getattr(tokenizer, "tokenizer", None))):
                part._ollama_modelfile = ollama_modelfile("split")
        return tokenizer

    return get_chat_template
