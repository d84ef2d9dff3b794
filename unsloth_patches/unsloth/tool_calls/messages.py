# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Checks and tidies a conversation with tool calls before a Llama 3.x chat template renders it.

The templates print what they get: a JSON text as arguments is quoted a second time, text beside a
call is lost, ``None`` prints as "None". Datasets bring all of these, Arrow above all, which gives
every row the union of all keys with None in them. So conversations are put into one form first:

- messages of other formats are read into OpenAI's (``reading.py``), and keys that are None dropped;
- arguments become a dict: JSON text of an object is parsed, None is ``{}``, and a None that the
  tool's schema does not allow (Arrow's filling) is dropped;
- results follow their calls in call order, paired by ``tool_call_id`` or else by position.

What cannot be rendered raises ToolCallError and names the message, the call and the remedy. What is
unusual is rendered, and told to ``warn(where, notice)``.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Sequence

from .calls import is_clean_call, silent, tidy_call
from .errors import ToolCallError, where_in
from .reading import read_messages
from .results import Turn, one_call_a_message
from .schemas import Schemas

_RESULT_ROLES = ("tool", "ipython")
_RESULT_KEYS = frozenset(("role", "content", "tool_call_id"))
_CALLING_KEYS = frozenset(("role", "content", "tool_calls"))
_KNOWN_ROLES = ("system", "user", "assistant", *_RESULT_ROLES)
_SPEAKERS = ("user", "assistant")
TAGGED_CALL = "<tool_call>"


def is_clean(
    messages: List[Any],
    builtin_tools: Sequence[str] = (),
    several: bool = False,
) -> bool:
    """Whether there is nothing to read, to tidy or to warn of: most conversations, told fast.

    several: a message may have several calls, and be rendered as it is.
    """
    # Ids of the calls whose results have to follow, None where they have none.
    expected: List[Any] = []
    answered = False
    for position, message in enumerate(messages):
        if type(message) is not dict:
            return False
        role, content = message.get("role"), message.get("content", "")
        if type(content) is not str or TAGGED_CALL in content:
            return False
        if len(message) == 2 and role in _SPEAKERS and not expected and "content" in message:
            continue
        if role == "tool":
            if not expected or message.get("tool_call_id") != expected.pop(0):
                return False
            if not message.keys() <= _RESULT_KEYS or "content" not in message:
                return False
            answered = True
        elif expected:
            return False
        elif role == "assistant" and "tool_calls" in message:
            calls = message["tool_calls"]
            if type(calls) is not list or (len(calls) > 1 and not several):
                return False
            if not message.keys() <= _CALLING_KEYS or content.strip():
                return False
            for call in calls:
                if not is_clean_call(call, builtin_tools):
                    return False
                expected.append(call.get("id"))
            answered = False
        elif len(message) != 2 or "content" not in message or role != "system" or position:
            return False
    ids = [one for one in expected if one is not None]
    return not (expected and answered) and len(ids) == len(set(ids))


def is_declared(messages: List[Dict[str, Any]], schemas: Schemas) -> bool:
    """Whether the calls of clean messages are of tools and arguments that were given."""
    return all(
        schemas.declare(call["function"]["name"], call["function"]["arguments"])
        for message in messages
        for call in message.get("tool_calls", ())
    )


def prepare_conversation(
    conversation: Any,
    tools: Any = None,
    builtin_tools: Sequence[str] = (),
    warn = None,
    arrange: Callable[..., List[Dict[str, Any]]] = one_call_a_message,
) -> List[Dict[str, Any]]:
    """A tidy copy of a conversation in any form that is read, as the Llama 3.x templates need it.

    tools: the tools on offer, or their ``Schemas``, which tell a null from Arrow's filling.
    builtin_tools: names of tools that are called in Llama's ``name.call(key="text")`` form.
    warn: called with ``(where, notice)``, two str, for what is rendered but hardly meant; None:
        silent.
    arrange: a ``Turn`` and its results in call order -> the messages to render.

    Raises ToolCallError (a ValueError).
    """
    warn = warn or silent
    schemas = tools if isinstance(tools, Schemas) else Schemas(tools)
    messages, places = read_messages(conversation)
    prepared: List[Dict[str, Any]] = []
    position = 0
    while position < len(messages):
        message, index = messages[position], places[position]
        _check_message(message, index, position, warn)
        position += 1
        if not message.get("tool_calls"):
            prepared.append(message)
            continue
        message["tool_calls"] = [
            tidy_call(call, index, number, schemas, builtin_tools, warn)
            for number, call in enumerate(message["tool_calls"], 1)
        ]
        start = position
        while position < len(messages) and messages[position]["role"] in _RESULT_ROLES:
            _check_content(messages[position], places[position])
            position += 1
        turn = Turn(
            message,
            messages[start:position],
            index,
            places[start:position],
            position == len(messages),
        )
        prepared += arrange(turn, turn.paired(warn), builtin_tools, warn)
    return prepared


def _check_message(message: Dict[str, Any], index: int, position: int, warn) -> None:
    role, calls = message["role"], message.get("tool_calls")
    if not isinstance(role, str):
        raise ToolCallError(where_in(index) + f"has the role {role!r}; give it a role.")
    if not calls:
        _check_content(message, index)
    elif role != "assistant":
        raise ToolCallError(
            where_in(index) + f"role {role!r} cannot call tools; calls belong to role 'assistant'."
        )
    elif isinstance(message.get("content"), str) and message["content"].strip():
        warn(
            where_in(index),
            "has text beside tool_calls, which the Llama templates do not render. Put "
            "the text into an assistant message of its own if it should be learned.",
        )
    if role in _RESULT_ROLES:
        call_id = message.get("tool_call_id")
        result = "a tool result" if call_id is None else f"the result of call id {call_id!r}"
        warn(
            where_in(index),
            f"is {result}, but no call stands before it. Put it right after the assistant message "
            "that makes the call.",
        )
    elif role == "system" and position:
        warn(where_in(index), "is a system message that is not the first one; Llama has seen few.")
    elif role == "developer":
        warn(where_in(index), "has role 'developer', which Llama does not know; use 'system'.")
    elif role not in _KNOWN_ROLES:
        warn(
            where_in(index),
            f"has role {role!r}, which Llama does not know; use 'system', 'user', 'assistant' or 'tool'.",
        )
    if role == "assistant" and TAGGED_CALL in str(message.get("content")):
        warn(
            where_in(index),
            f"has {TAGGED_CALL} in its text, as Hermes and Qwen write calls. Llama's parsers do not read "
            "it; put the calls into tool_calls to train Llama's own form.",
        )


def _check_content(message: Dict[str, Any], index: int) -> None:
    if message.get("content") is None:
        others = ", ".join(str(key) for key in message if key != "role")
        raise ToolCallError(
            where_in(index) + f"the {message['role']} message has neither content nor tool_calls"
            f"{f', only {others}' if others else ''}. "
            "Give it a text (an empty one is fine), or leave the message out."
        )
