# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
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
from typing import Any, Dict, Iterable, List, Optional, Sequence

from .errors import ToolCallError
from .messages import tidy_call
from .schemas import schemas_of

CALL_ROLES = ("function_call", "function-call", "tool_call", "tool_calls")
RESULT_ROLES = (
    "observation",
    "tool",
    "ipython",
    "tool_response",
    "tool_result",
    "function",
    "function_response",
    "function-response",
)
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
    # On a host without torch unsloth_zoo.dataset_utils is not imported, and the name is None.
    if stock is None or getattr(stock, "_standardizes_tool_calls", False):
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
    if not isinstance(first, dict) or not isinstance(first.get(COLUMN), (list, tuple)):
        return False
    rows = dataset.select_columns([COLUMN]) if hasattr(dataset, "select_columns") else dataset
    if not hasattr(dataset, "__len__"):
        rows = itertools.islice(rows, STREAM_ROWS)
    return any(_is_tool_message(message) for row in rows for message in row[COLUMN])


def _is_tool_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    role = message.get("role", message.get("from"))
    tool_role = isinstance(role, str) and role.strip().lower() in CALL_ROLES + RESULT_ROLES
    return tool_role or bool(message.get("tool_calls"))


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
        ("tool", RESULT_ROLES),
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
        return {
            COLUMN: [
                self._conversation(messages, index, schemas_of(own_tools))
                for messages, index, own_tools in zip(batch[COLUMN], indices, tools)
            ]
        }

    def _conversation(
        self,
        messages: List[Dict[str, Any]],
        row: int,
        schemas: Dict[str, Any],
    ) -> List[Dict[str, Any]]:
        converted: List[Dict[str, Any]] = []
        for index, message in enumerate(messages):
            where = f"Unsloth: conversation {row}, messages[{index}]: "
            role, content = self._role_and_content(message, where)
            calls = self._calls(role, content, message, where)
            if role == "call" and converted and converted[-1]["from_call_role"]:
                converted[-1]["tool_calls"] += calls
                continue
            converted.append(
                {
                    "role": "assistant" if role == "call" else role,
                    "content": "" if role == "call" or content is None else content,
                    "tool_calls": calls,
                    "tool_call_id": message.get("tool_call_id"),
                    "name": message.get("name"),
                    "from_call_role": role == "call",
                }
            )
        try:
            return [
                self._finished(m, i, schemas) for i, m in enumerate(_with_single_results(converted))
            ]
        except ToolCallError as error:
            raise error.in_conversation(row) from None

    def _role_and_content(self, message: Any, where: str):
        if not isinstance(message, dict):
            raise TypeError(where + f"is a {type(message).__name__}; expected a dict.")
        raw = message.get("role") or message.get("from")
        role = self._roles.get(str(raw).strip().lower())
        if role is None:
            raise TypeError(
                where + f"role {raw!r} is not known. Known: {', '.join(self._roles)}. Add it to "
                "aliases_for_user or another alias list."
            )
        content = message.get("content")
        return role, message.get("value") if content is None else content

    def _calls(self, role: str, content: Any, message: Dict[str, Any], where: str) -> List[Any]:
        if role != "call":
            return list(message.get("tool_calls") or ())
        try:
            value = json.loads(content) if isinstance(content, str) else content
        except ValueError as error:
            raise ToolCallError(
                where + f"the call is not JSON ({error}): {content!r:.80}"
            ) from None
        calls = value if isinstance(value, list) else [value]
        if not calls or not all(isinstance(call, dict) for call in calls):
            raise ToolCallError(
                where + f"the call is {content!r:.80}; expected "
                '{"name": ..., "arguments": {...}} or a list of those.'
            )
        return calls

    def _finished(
        self,
        message: Dict[str, Any],
        index: int,
        schemas: Dict[str, Any],
    ) -> Dict[str, Any]:
        del message["from_call_role"]
        calls = [
            tidy_call(call, index, number, schemas)
            for number, call in enumerate(message["tool_calls"], 1)
        ]
        for call in calls:
            arguments = call["function"]["arguments"]
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii = False)
            call.setdefault("id", None)
        message["tool_calls"] = calls or None
        if self._is_vlm and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message


def _with_single_results(messages: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """One observation that is a JSON list with a result per call becomes that many results."""
    expanded: List[Dict[str, Any]] = []
    for index, message in enumerate(messages):
        before = messages[index - 1] if index else {"tool_calls": []}
        after = messages[index + 1]["role"] if index + 1 < len(messages) else ""
        results = None
        if message["role"] == "tool" and len(before["tool_calls"]) > 1 and after != "tool":
            results = _list_in(message["content"])
        if results is None or len(results) != len(before["tool_calls"]):
            expanded.append(message)
            continue
        for result in results:
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii = False)
            expanded.append({**message, "content": text})
    return expanded


def _list_in(text: Any) -> Optional[List[Any]]:
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return None
    return value if isinstance(value, list) else None
