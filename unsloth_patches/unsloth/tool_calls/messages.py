# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Checks and tidies a conversation with tool calls before a Llama 3.x chat template renders it.

The templates print what they get: a JSON text as arguments is quoted a second time, text beside a
call is lost, ``None`` prints as "None". Datasets bring all of these, Arrow above all, which gives
every row the union of all keys with None in them. So conversations are put into one form first:

- ``tool_calls`` that are None or empty are dropped, and so are other keys that are None;
- arguments become a dict: JSON text of an object is parsed, None is ``{}``, and a None that the
  tool's schema does not allow (Arrow's filling) is dropped;
- results follow their calls in call order, paired by ``tool_call_id`` or else by position.

What cannot be put right raises ToolCallError and names the message, the call and the remedy.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence

from .errors import ToolCallError, where_in
from .parser import NAME_PATTERN
from .results import Turn
from .schemas import schemas_of, without_filling

MODES = ("error", "split", "join")
RESULT_ROLES = ("tool", "ipython")
_SPECIAL_TOKEN_TEXT = re.compile(
    r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eo[tm]_id|python_tag)\|>"
)


def _silent(where: str, notice: str) -> None:
    pass


def prepare_conversation(
    messages: Sequence[Mapping[str, Any]],
    parallel_tool_calls: str = "error",
    tools: Optional[Sequence[Any]] = None,
    builtin_tools: Sequence[str] = (),
    warn = None,
) -> List[Dict[str, Any]]:
    """A tidy copy of a conversation in OpenAI's form, as the Llama 3.x templates need it.

    messages: dicts with ``role`` and ``content``; assistant ones may have ``tool_calls``, results
        have role ``tool`` or ``ipython`` and may have ``tool_call_id``. They are not changed.
    parallel_tool_calls: what to do with several calls in one message: ``"error"`` raises,
        ``"join"`` leaves them together, ``"split"`` gives each call its own assistant message, its
        result after it.
    tools: the tools on offer (schemas or functions); their schemas tell a null from Arrow's
        filling.
    builtin_tools: names of tools that are called in Llama's ``name.call(key="text")`` form.
    warn: called with ``(where, notice)``, two str, for what is rendered but hardly meant; None:
        silent.

    Raises ToolCallError (a ValueError).
    """
    warn = warn or _silent
    schemas = schemas_of(tools)
    prepared, index = [], 0
    while index < len(messages):
        message = _tidy_message(messages[index], index)
        calls = message.get("tool_calls")
        if not calls:
            _check_stray_result(message, index)
            prepared.append(message)
            index += 1
            continue
        message["tool_calls"] = calls = [
            tidy_call(call, index, number, schemas, builtin_tools, warn)
            for number, call in enumerate(calls, 1)
        ]
        _notice_text_beside_calls(message, index, warn)
        end = index + 1
        while end < len(messages) and _role(messages[end], end) in RESULT_ROLES:
            end += 1
        results = [_tidy_message(messages[i], i) for i in range(index + 1, end)]
        turn = Turn(message, results, index, is_last = end == len(messages))
        prepared += turn.arranged(parallel_tool_calls, builtin_tools, warn)
        index = end
    return prepared


# ---------------------------------------------------------------- messages


def _role(message: Any, index: int) -> str:
    if not isinstance(message, Mapping):
        raise ToolCallError(
            where_in(index)
            + f"is a {type(message).__name__}; expected a dict with role and content."
        )
    return message.get("role")


def _tidy_message(message: Any, index: int) -> Dict[str, Any]:
    """A copy without keys that are None, and without empty tool_calls."""
    role = _role(message, index)
    tidy = {key: value for key, value in message.items() if value is not None}
    calls = tidy.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise ToolCallError(
            where_in(index) + f"tool_calls is a {type(calls).__name__}; give a list of calls."
        )
    if not calls:
        tidy.pop("tool_calls", None)
        if tidy.get("content") is None:
            raise ToolCallError(
                where_in(index)
                + f"the {role} message has neither content nor tool_calls. Give it a "
                "text (an empty one is fine), or leave the message out."
            )
    elif role != "assistant":
        raise ToolCallError(
            where_in(index) + f"role {role!r} cannot call tools; calls belong to role 'assistant'."
        )
    return tidy


def _check_stray_result(message: Dict[str, Any], index: int) -> None:
    if message.get("role") in RESULT_ROLES and "tool_call_id" in message:
        raise ToolCallError(
            where_in(index)
            + f"is the result of call id {message['tool_call_id']!r}, but no call stands "
            "before it. Put it right after the assistant message that makes the call."
        )


def _notice_text_beside_calls(message: Dict[str, Any], index: int, warn) -> None:
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        warn(
            where_in(index),
            "has text beside tool_calls, which the Llama templates do not render. Put "
            "the text into an assistant message of its own if it should be learned.",
        )


# ---------------------------------------------------------------- calls


def tidy_call(
    call: Any,
    index: int,
    number: int,
    schemas: Mapping[str, Any],
    builtin_tools: Sequence[str] = (),
    warn = _silent,
) -> Dict[str, Any]:
    """One call, with its id, as ``{"type": "function", "function": {"name", "arguments"}}``."""
    if not isinstance(call, Mapping):
        raise ToolCallError(
            where_in(index, number) + f"is a {type(call).__name__}; expected "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
        )
    function = call.get("function")
    function = function if isinstance(function, Mapping) else call
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise ToolCallError(
            where_in(index, number)
            + f"the name {name!r} cannot be written into the template; use only "
            "letters, digits, '_', '.' and '-'."
        )
    where = where_in(index, number, name)
    arguments = _as_object(function.get("arguments", function.get("parameters")), where)
    if name in builtin_tools:
        _check_builtin_arguments(arguments, where)
    if name in schemas:
        arguments = without_filling(arguments, schemas[name])
    elif None in arguments.values():
        warn(
            where,
            "has null arguments, and no schema of this tool was given. If Arrow filled them "
            "in, pass tools to apply_chat_template, or store the arguments as JSON text.",
        )
    _check_writable(arguments, where, warn)
    tidy = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return tidy if call.get("id") is None else {"id": call["id"], **tidy}


def _as_object(arguments: Any, where: str) -> Dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ToolCallError(
                where
                + f"the arguments are a text that is not JSON ({error}). Give a dict, or the JSON "
                "text of an object."
            ) from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ToolCallError(
            where
            + f"the arguments are {arguments!r:.80}, a {type(arguments).__name__}; give an object "
            "(a dict, or its JSON text)."
        )
    return dict(arguments)


def _check_builtin_arguments(arguments: Mapping[str, Any], where: str) -> None:
    for key, value in arguments.items():
        if not isinstance(value, str) or '"' in value or not re.fullmatch(r"\w+", str(key)):
            raise ToolCallError(
                where + f"argument {key!r} = {value!r:.80} cannot be written in the built-in form "
                'name.call(key="text"), which has no escapes: use a text without quotes, or offer '
                "the tool through tools = [...] instead of builtin_tools."
            )


def _check_writable(arguments: Dict[str, Any], where: str, warn) -> None:
    """JSON has no NaN and infinity and only text keys; UTF-8 has no lone surrogates."""
    for path, value in _leaves(arguments, "arguments"):
        if isinstance(value, float) and not math.isfinite(value):
            raise ToolCallError(
                where + f"{path} is {value}, which JSON cannot hold; use null or a text."
            )
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ToolCallError(
                where
                + f"{path} is a {type(value).__name__}, which JSON cannot hold; convert it first."
            )
    try:
        text = json.dumps(arguments, ensure_ascii = False)
        text.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ToolCallError(
            where + f"the arguments cannot be written as JSON in UTF-8: {error}."
        ) from None
    if _SPECIAL_TOKEN_TEXT.search(text):
        warn(
            where,
            f"contains the text {_SPECIAL_TOKEN_TEXT.search(text).group()}, which the tokenizer "
            "turns into the special token. Remove it from the data unless that is meant.",
        )


def _leaves(value: Any, path: str):
    """(path, value) of all that is neither an object nor a list, and of keys that are no text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"the key {key!r} of {path}", object()
            yield from _leaves(inner, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, value
