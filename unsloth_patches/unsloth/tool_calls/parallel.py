# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Several tool calls in one assistant message, for the Llama 3.1, 3.2 and 3.3 chat templates.

::

    tokenizer = get_chat_template(tokenizer, "llama-3.1", parallel_tool_calls = "join")
    text = tokenizer.apply_chat_template(messages, tools = tools, tokenize = False)

========= ==================================================================================
mode      a message with two calls is rendered as
========= ==================================================================================
"error"   nothing: ToolCallError, since Meta's format has one call a message (the default)
"split"   assistant ``{call 1}<|eot_id|>``, ipython ``result 1``, assistant ``{call 2}<|eot_id|>``
"join"    assistant ``{call 1}; {call 2}<|eot_id|>``, ipython ``result 1``, ipython ``result 2``
========= ==================================================================================

A single call is rendered as Meta publishes it in all three. "join" is an extension of Meta's
format, in the form that the parsers of vLLM (llama3_json) and SGLang (llama3) read.
"""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Sequence

from ..llama_chat_templates import LLAMA_3X_NAMES
from .checks import Checks, checkable_parts, is_llama_3x, known_signature, set_checks, show_keyword
from .errors import ToolCallError
from .results import Turn, one_call_a_message
from .templates import join_template, response_template

Results = Sequence[Optional[Dict[str, Any]]]


def render_parallel_tool_calls(stock):
    """``get_chat_template`` with the keyword ``parallel_tool_calls`` = "error", "split" or "join".

    The tokenizers of the llama-3.1, 3.2 and 3.3 templates also have a ``response_template``, so that
    ``parse_response`` and TRL's tools work. Other templates are not touched; with them, "split" and
    "join" raise ValueError.

    Decorates ``unsloth.chat_templates.get_chat_template``.
    """
    signature = known_signature(stock)

    @functools.wraps(stock)
    def get_chat_template(
        *args,
        parallel_tool_calls = "error",
        **kwargs,
    ):
        template = signature.bind(*args, **kwargs).arguments.get("chat_template")
        _check_mode(parallel_tool_calls, template)
        tokenizer = stock(*args, **kwargs)
        set_mode(tokenizer, parallel_tool_calls if is_llama_3x(template) else None)
        return tokenizer

    show_keyword(get_chat_template, signature, "parallel_tool_calls", "error")
    return get_chat_template


def _check_mode(mode: Any, template: Any) -> None:
    if mode not in MODES:
        raise ValueError(
            f"Unsloth: parallel_tool_calls = {mode!r} is unknown; choose one of "
            f"{', '.join(map(repr, MODES))}."
        )
    if mode != "error" and not is_llama_3x(template):
        name = template if isinstance(template, str) else "a custom template"
        raise ValueError(
            f"Unsloth: parallel_tool_calls = {mode!r} needs one of the templates "
            f"{', '.join(LLAMA_3X_NAMES)}, not {name}. Leave it out."
        )


def set_mode(tokenizer, mode: Optional[str]) -> None:
    """Makes a tokenizer with a Llama 3.x template render several calls by ``mode``, in place.

    None: it got another template, and a response template of an earlier one goes.
    """
    parts = checkable_parts(tokenizer)
    if not parts and mode in ("split", "join"):
        raise NotImplementedError(
            f"Unsloth: parallel_tool_calls = {mode!r} works on transformers' tokenizers and "
            f"processors, not on {type(tokenizer).__name__}."
        )
    for part in parts:
        if mode is not None:
            text = join_template(part.chat_template) if mode == "join" else part.chat_template
            set_checks(part, Checks(text, mode, MODES[mode]))
        _record(part, mode)
        # transformers < 5.13 has no response templates, and ignores the attribute.
        if hasattr(part, "parse_response") and not hasattr(part, "tokenizer"):
            if mode is not None:
                part.response_template = response_template(text)
            elif getattr(part, "response_template", None) is not None:
                part.response_template = None


def _record(part, mode: Optional[str]) -> None:
    """save_pretrained writes ``init_kwargs`` into tokenizer_config.json."""
    saved = getattr(part, "init_kwargs", None)
    if saved is not None:
        saved.pop("parallel_tool_calls", None)
        saved.update({} if mode is None else {"parallel_tool_calls": mode})


# ---------------------------------------------------------------- the modes


def _refused(turn: Turn, results: Results, builtin_tools: Sequence[str], warn):
    try:
        return one_call_a_message(turn, results, builtin_tools, warn)
    except ToolCallError as error:
        raise ToolCallError(
            f'{error} Or pass parallel_tool_calls = "split" (one assistant turn a call, as in '
            'Meta\'s format) or "join" (all calls in one turn) to get_chat_template.'
        ) from None


def _split(turn: Turn, results: Results, builtin_tools: Sequence[str], warn):
    """Each call in an assistant message of its own, its result after it."""
    pieces: List[Dict[str, Any]] = []
    last = len(turn.calls) - 1
    for position, call in enumerate(turn.calls):
        if results[position] is None and position < last:
            raise ToolCallError(
                turn.where(position + 1)
                + f"has no result. Add a message with role 'tool' after messages[{turn.index}]. "
                "Splitting needs a result after every call but the last."
            )
        pieces.append({**turn.message, "tool_calls": [call]})
        pieces += filter(None, results[position:] if position == last else [results[position]])
    return pieces


def _joined(turn: Turn, results: Results, builtin_tools: Sequence[str], warn):
    """The message as it is; results stand in call order, and a reader tells them by their place."""
    names = [call["function"]["name"] for call in turn.calls]
    builtin = [name for name in names if name in builtin_tools]
    if builtin and len(names) > 1:
        raise ToolCallError(
            turn.where(names.index(builtin[0]) + 1)
            + "a built-in tool cannot share a turn with other calls; "
            'use parallel_tool_calls = "split".'
        )
    given = [result for result in results if result is not None]
    if any(result is None for result in results[: len(given)]):
        number = list(results).index(None) + 1
        raise ToolCallError(
            turn.where(number)
            + "has no result, and a later call has one, which would be taken for "
            f"its own. Add a message with role 'tool' after messages[{turn.index}]."
        )
    return [turn.message, *given]


MODES = {"error": _refused, "split": _split, "join": _joined}
