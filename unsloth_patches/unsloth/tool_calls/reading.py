# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Conversations as people have them, read into OpenAI's messages.

Read are: dumps of OpenAI's APIs (chat completions with ``tool_calls`` or ``function_call``, items of
the Responses API), LangChain's and LlamaIndex's messages (objects, dumps, serialised), Anthropic's
content parts, ShareGPT with ``function_call`` and ``observation``, and each of these as JSON text,
pydantic models, Arrow, numpy or pandas values. What is there is kept; nothing is guessed: a key that
looks like arguments and is none that is known raises, and so does content that is no text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

from .call_reading import is_lost, read_call
from .errors import ToolCallError, where_in
from .json_text import checked_json, read_json
from .values import is_missing, plain

CALL_ROLES = ("function_call", "function-call", "tool_call", "tool_calls")
RESULT_ROLES = (
    "observation",
    "tool",
    "tool_response",
    "tool_result",
    "function",
    "function_response",
    "function-response",
)
ROLES = {
    **{role: role for role in ("system", "user", "assistant")},
    "human": "user",
    "input": "user",
    **dict.fromkeys(("gpt", "ai", "model", "bot", "chatbot", "output"), "assistant"),
    "aimessage": "assistant",
    "aimessagechunk": "assistant",
    "humanmessage": "user",
    "systemmessage": "system",
    "toolmessage": "tool",
    **{role: "call" for role in CALL_ROLES},
    **{role: "tool" for role in RESULT_ROLES},
}
# Keys that hold something which is not read, and would be lost in silence.
_LOOKS_LIKE_CALLS = re.compile(r"((tool|function)_?)?calls$|(tool|function)_?call$", re.IGNORECASE)
CONVERSATION_KEYS = ("messages", "conversations", "conversation")  # of a whole row of a data set
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(
    conversation: Any, roles: Mapping[str, str] = ROLES
) -> Tuple[List[Dict[str, Any]], List[int]]:
    """OpenAI's messages, and for each the index of the message that it was read from.

    roles: lower-case role -> ``"system"``, ``"user"``, ``"assistant"``, ``"tool"``, or ``"call"`` for
        messages that are a call themselves; others stay what they are.

    Raises ToolCallError.
    """
    messages: List[Dict[str, Any]] = []
    places: List[int] = []
    in_calls = False
    for index, raw in enumerate(*_listed(conversation)):
        for role, message in _read_message(raw, index, roles):
            # Calls one after the other are calls of one message.
            if role == "call" and in_calls:
                messages[-1]["tool_calls"] += message["tool_calls"]
                continue
            in_calls = role == "call"
            messages.append(message)
            places.append(index)
    if any(len(message.get("tool_calls", ())) > 1 for message in messages):
        return _with_single_results(messages, places)
    return messages, places


def _listed(conversation: Any) -> Tuple[List[Any], int]:
    """The messages and the first one's index: -1 for a system text that stood beside them."""
    conversation = plain(getattr(conversation, "messages", conversation))
    if isinstance(conversation, str):
        conversation = checked_json(conversation, "Unsloth: the conversation")
    if isinstance(conversation, Mapping):
        keys = [key for key in CONVERSATION_KEYS if key in conversation]
        if not keys:
            raise ToolCallError(
                f"Unsloth: the conversation is a dict with the keys {', '.join(map(str, conversation))}; "
                "give a list of messages, each a dict with role and content."
            )
        system, conversation = plain(conversation.get("system")), plain(conversation[keys[0]])
        if isinstance(conversation, (list, tuple)) and not is_missing(system) and system:
            return [{"role": "system", "content": system}, *conversation], -1
    if not isinstance(conversation, (list, tuple)):
        raise ToolCallError(
            f"Unsloth: the conversation is a {type(conversation).__name__}; give a list of messages, "
            "each a dict with role and content."
        )
    return conversation, 0


# ---------------------------------------------------------------- one message


def _read_message(
    raw: Any, index: int, roles: Mapping[str, str]
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """(role or "call", message) of each message that one entry of the list holds."""
    where = where_in(index)
    given = {key: value for key, value in _unwrapped(raw, where).items() if not is_missing(value)}
    role = _role(given, roles)
    for key in given:
        if key not in _READ_KEYS and given[key] and is_lost(key, given[key], _LOOKS_LIKE_CALLS):
            raise ToolCallError(
                where + f"the key {key!r} looks like tool calls and is not read; name it "
                "'tool_calls', or leave it out."
            )
    content = _content(given)
    message = {key: given[key] for key in given if key not in _READ_KEYS}
    extra = plain(given.get("additional_kwargs"))
    holders = (given, extra if isinstance(extra, Mapping) else {})
    ids = (holder.get(key) for holder in holders for key in ("tool_call_id", "tool_use_id"))
    call_id = next((one for one in ids if one is not None), None)
    if role == "call" or given.get("type") == "function_call":
        message.pop("type", None)
        yield "call", {"role": "assistant", "tool_calls": _calls_in_text(given, content, index)}
        return
    if given.get("type") == "function_call_output":
        role, content, call_id = "tool", given.get("output", ""), given.get("call_id")
        message = {}
    calls = _listed_calls(holders, where)
    text, used, results = _parts(content, role, where)
    for result in results:
        yield "tool", result
    if results and not text and not calls:
        return
    if used:
        ids = [plain(call).get("id") for call in calls if isinstance(plain(call), Mapping)]
        calls += [call for call in used if call.get("id") is None or call["id"] not in ids]
    message["role"] = role
    if text is not None:
        message["content"] = text
    if calls:
        message["tool_calls"] = [read_call(call, index, n) for n, call in enumerate(calls, 1)]
    if call_id is not None:
        message["tool_call_id"] = call_id
    yield role, message


_READ_KEYS = frozenset(
    "role from content value blocks tool_calls function_call additional_kwargs tool_use_id".split()
)


def _unwrapped(raw: Any, where: str) -> Dict[str, Any]:
    message = plain(raw)
    if isinstance(message, str) and message.lstrip().startswith("{"):
        message = checked_json(message, where + "it")
    if not isinstance(message, Mapping):
        raise ToolCallError(
            where + f"is a {type(message).__name__}; expected a dict with role and content."
        )
    if isinstance(message.get("kwargs"), Mapping) and isinstance(message.get("id"), list):
        return {"type": message["id"][-1], **message["kwargs"]}  # LangChain's dumpd
    if isinstance(message.get("data"), Mapping) and "content" in message["data"]:
        return {"type": message.get("type"), **message["data"]}  # its messages_to_dict
    return message


def _role(message: Dict[str, Any], roles: Mapping[str, str]) -> Any:
    role = plain(message.get("role") or message.get("from") or message.get("type"))
    known = roles.get(role.strip().lower()) if isinstance(role, str) else None
    return role if known is None else known


def _content(message: Dict[str, Any]) -> Any:
    for key in ("content", "value", "blocks"):
        if key in message:
            return plain(message[key])
    return None


def _listed_calls(holders: Iterable[Mapping[str, Any]], where: str) -> List[Any]:
    """The entries of tool_calls or function_call of the first that has any: the message itself, or
    where LangChain and LlamaIndex keep what a provider sent."""
    for holder in holders:
        calls = plain(holder.get("tool_calls"))
        if isinstance(calls, str):
            calls = checked_json(calls, where + "tool_calls") if calls.strip() else None
        if isinstance(calls, Mapping):
            calls = [calls]
        if calls:
            if not isinstance(calls, (list, tuple)):
                raise ToolCallError(
                    where + f"tool_calls is a {type(calls).__name__}; give a list of calls."
                )
            return list(calls)
        if plain(holder.get("function_call")):
            return [holder["function_call"]]
    return []


def _calls_in_text(message: Dict[str, Any], content: Any, index: int) -> List[Dict[str, Any]]:
    """The calls of a message that is a call itself: JSON of one, or of a list of them."""
    if content is None:
        content = {key: value for key, value in message.items() if key not in ("role", "from")}
        if content.get("type") == "function_call":
            content = {k: v for k, v in content.items() if k not in ("id", "status")}
    where = where_in(index)
    try:
        value = read_json(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
        raise ToolCallError(where + f"the call is not JSON ({error}): {content!r:.80}") from None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise ToolCallError(
            where + f"the call is {content!r:.80}; expected "
            '{"name": ..., "arguments": {...}} or a list of those.'
        )
    calls = [read_call(call, index, number) for number, call in enumerate(calls, 1)]
    if isinstance(content, str):  # kept as text: what was null there was meant
        for call in calls:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, Mapping):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii = False)
    return calls


def _parts(content: Any, role: Any, where: str):
    """(text or other content, calls, results) of content that may be a list of parts."""
    if isinstance(content, Mapping) and role not in ("tool", "ipython"):
        content = [content]
    if not isinstance(content, (list, tuple)) or (
        role in ("tool", "ipython") and not (_is_text(content) and _may_be_parts(content))
    ):
        return content, [], []
    texts: List[str] = []
    calls: List[Any] = []
    results: List[Dict[str, Any]] = []
    for number, raw in enumerate(content, 1):
        part = plain(raw)
        kind = part.get("type") or part.get("block_type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif _is_text([part]):
            texts.append(part["text"])
        elif kind in ("tool_use", "tool_call") and role == "assistant":
            calls.append(part)
        elif kind == "tool_result":
            result = {"role": "tool", "tool_call_id": part.get("tool_use_id")}
            inner = plain(part.get("content"))
            if _may_be_parts(inner):
                inner, _, _ = _parts(inner, "user", f"{where}part {number}: ")
            results.append({**result, "content": "" if inner is None else inner})
        else:
            raise ToolCallError(
                where
                + f"part {number} of the content is {kind or _described(part)!r}, which the Llama 3 "
                "templates cannot render; keep text parts, or leave the message out."
            )
    return "".join(texts) if texts or not (calls or results) else None, calls, results


def _is_text(content: Any) -> bool:
    """A list of text parts, and not a tool's result that is a list."""
    return bool(content) and all(
        isinstance(part, Mapping)
        and isinstance(part.get("text"), str)
        and (
            (part.get("type") or part.get("block_type")) in _TEXT_PARTS
            or [key for key in part if part[key] is not None] == ["text"]  # Bedrock's
        )
        for part in content
    )


def _may_be_parts(result: Any) -> bool:
    """Whether a tool's result may be content in parts; several texts without a type are none."""
    several = isinstance(result, (list, tuple)) and len(result) > 1 and _is_text(result)
    return not several or all(part.get("type") or part.get("block_type") for part in result)


def _described(part: Any) -> str:
    return (
        f"dict of {', '.join(map(str, part))}" if isinstance(part, Mapping) else type(part).__name__
    )


# ---------------------------------------------------------------- results


def _with_single_results(
    messages: List[Dict[str, Any]], places: List[int]
) -> Tuple[List[Dict[str, Any]], List[int]]:
    """One observation that is a JSON list with a result per call becomes that many results."""
    expanded: List[Dict[str, Any]] = []
    where: List[int] = []
    for position, message in enumerate(messages):
        results = _results_of_all(messages, position)
        for result in [None] if results is None else results:
            if results is not None:
                text = result if isinstance(result, str) else json.dumps(result, ensure_ascii = False)
                message = {**message, "content": text}
            expanded.append(message)
            where.append(places[position])
    return expanded, where


def _results_of_all(messages: List[Dict[str, Any]], position: int) -> Optional[List[Any]]:
    message = messages[position]
    if message["role"] != "tool" or "tool_call_id" in message or not position:
        return None
    count = len(messages[position - 1].get("tool_calls") or ())
    follows = position + 1 < len(messages) and messages[position + 1]["role"] == "tool"
    if count < 2 or follows:
        return None
    try:
        content = message.get("content")
        value = read_json(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and len(value) == count else None
