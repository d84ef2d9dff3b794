# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""ShareGPT- and OpenAI-style conversations with tool calls, in one form that Arrow keeps as it is.

Arrow gives every row the union of all keys, so two calls of different tools would each get the
other's arguments with None in them. Arguments are therefore stored as JSON text, as OpenAI's API
has them; the chat template's checks parse it again.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
from collections.abc import Mapping
from typing import Any, Dict, Iterable, List, Optional, Sequence

from .calls import tidy_call
from .errors import ToolCallError, where_in
from .reading import CALL_ROLES, RESULT_ROLES, read_messages
from .schemas import Schemas
from .values import plain

COLUMN = "conversations"
# Rows of a stream that are looked at to find out whether it has tool calls.
STREAM_ROWS = 1000


def standardize_tool_calls(stock):
    """``standardize_data_formats`` (= ``standardize_sharegpt``) that also converts tool calls.

    Conversations with tool roles (``function_call``, ``observation``, ``tool``, ...) or
    ``tool_calls`` become OpenAI's form: assistant messages with ``tool_calls``, and results with
    role ``tool``. Calls one after the other, or a JSON list of them, are calls of one message.
    Datasets without any go to the stock function.

    Raises TypeError for an unknown role, ToolCallError for a call that is not JSON with a name,
    each with the conversation and message. Decorates
    ``unsloth.chat_templates.standardize_data_formats`` and ``standardize_sharegpt``, and
    ``unsloth._cpu_init.standardize_data_formats``; decorating twice is once.
    """
    if getattr(stock, "_standardizes_tool_calls", False):
        return stock
    parameters = inspect.signature(stock).parameters
    if "dataset" not in parameters and not any(
        p.kind is p.VAR_POSITIONAL for p in parameters.values()
    ):
        raise NotImplementedError("standardize_data_formats has no parameter dataset")

    @functools.wraps(stock)
    def standardize_data_formats(dataset, *args, **kwargs):
        if not _has_tool_calls(dataset):
            return stock(dataset, *args, **kwargs)
        return _convert(dataset, *args, **kwargs)

    standardize_data_formats._standardizes_tool_calls = True
    return standardize_data_formats


def _has_tool_calls(dataset) -> bool:
    first = next(iter(dataset), None)
    if not isinstance(first, dict) or not isinstance(plain(first.get(COLUMN)), (list, tuple)):
        return False
    rows = dataset.select_columns([COLUMN]) if hasattr(dataset, "select_columns") else dataset
    if not hasattr(dataset, "__len__"):
        rows = itertools.islice(rows, STREAM_ROWS)
    return any(_is_tool_message(message) for row in rows for message in plain(row[COLUMN]) or ())


def _is_tool_message(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    role = message.get("role", message.get("from"))
    if isinstance(role, str) and role.strip().lower() in _TOOL_ROLES:
        return True
    if message.get("tool_calls") or message.get("function_call"):
        return True
    parts = message.get("content")
    return isinstance(parts, (list, tuple)) and any(
        isinstance(part, Mapping) and part.get("type") in ("tool_use", "tool_result")
        for part in parts
    )


_TOOL_ROLES = (*CALL_ROLES, *RESULT_ROLES, "ipython")


def _convert(
    dataset,
    tokenizer = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: Optional[int] = None,
):
    """The dataset with OpenAI-style messages in ``conversations``; parameters as in stock."""
    groups = (
        ("system", aliases_for_system),
        ("user", aliases_for_user),
        ("assistant", aliases_for_assistant),
        ("call", CALL_ROLES),
        ("tool", (*RESULT_ROLES, "ipython")),
    )
    roles: Dict[str, str] = {}
    for role, aliases in groups:
        for alias in aliases:
            if roles.setdefault(alias.strip().lower(), role) != role:
                raise TypeError(
                    f"Unsloth: the alias {alias!r} of {role!r} also means "
                    f"{roles[alias.strip().lower()]!r}; give it to one role."
                )
    is_vlm = hasattr(tokenizer, "image_processor") or hasattr(tokenizer, "tokenizer")
    options: Dict[str, Any] = {"batched": True, "batch_size": batch_size, "with_indices": True}
    if getattr(dataset, "features", None) is not None:
        options["features"] = _features(dataset.features, is_vlm)
    if hasattr(dataset, "__len__"):
        options.update(num_proc = num_proc, desc = "Unsloth: Standardizing formats")
    return dataset.map(_Converter(roles, is_vlm), **options)


def _features(features, is_vlm: bool):
    """Fixed, since a first batch without calls would otherwise fix their column as null."""
    from datasets import Features, Value

    text = Value("string")
    function = {"name": text, "arguments": text}
    message = {
        "role": text,
        "content": [{"type": text, "text": text}] if is_vlm else text,
        "tool_calls": [{"id": text, "type": text, "function": function}],
        "tool_call_id": text,
        "name": text,
    }
    return Features({**features, COLUMN: [message]})


class _Converter:
    """Converts batches. A class, so that worker processes can unpickle it."""

    def __init__(self, roles: Dict[str, str], is_vlm: bool):
        self._roles, self._is_vlm = roles, is_vlm

    def __call__(self, batch: Dict[str, List[Any]], indices: Iterable[int]) -> Dict[str, List[Any]]:
        tools = batch.get("tools") or [None] * len(batch[COLUMN])
        rows = []
        for messages, row, own_tools in zip(batch[COLUMN], indices, tools):
            try:
                rows.append(self._conversation(messages, Schemas(own_tools)))
            except (ToolCallError, TypeError) as error:
                place = f"Unsloth: conversation {row}, "
                raise type(error)(str(error).replace("Unsloth: ", place, 1)) from None
        return {COLUMN: rows}

    def _conversation(self, conversation: Any, schemas: Schemas) -> List[Dict[str, Any]]:
        messages, places = read_messages(conversation, self._roles)
        return [self._finished(*one, schemas) for one in zip(messages, places)]

    def _finished(self, message: Dict[str, Any], index: int, schemas: Schemas) -> Dict[str, Any]:
        role, content = message["role"], message.get("content")
        if role not in self._roles.values():
            raise TypeError(
                where_in(index)
                + f"role {role!r} is not known. Known: {', '.join(self._roles)}. Add "
                "it to aliases_for_user or another alias list."
            )
        calls = []
        for number, call in enumerate(message.get("tool_calls") or (), 1):
            call = tidy_call(call, index, number, schemas)
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii = False)
            function = {"name": call["function"]["name"], "arguments": arguments}
            calls.append({"id": call.get("id"), "type": "function", "function": function})
        if not isinstance(content, str):
            content = "" if content is None else json.dumps(content, ensure_ascii = False)
        return {
            "role": role,
            "content": [{"type": "text", "text": content}] if self._is_vlm else content,
            "tool_calls": calls or None,
            "tool_call_id": message.get("tool_call_id"),
            "name": message.get("name"),
        }
