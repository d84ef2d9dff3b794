# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tool calls for templates other than Llama 3.x: in the form that the template renders, or a warning.

``standardize_sharegpt`` stores arguments as JSON text, since Arrow would fill objects with nulls.
Most templates (qwen, mistral, gpt-oss) print that text quoted a second time, and some (chatml, llama-3)
print no calls at all. Many stop at a call without content, or print "None" for it; gpt-oss prints
the first call of a message alone, most print results without their ids, and none knows OpenAI's old
``function_call``. How a template takes calls is found out by rendering one with it.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Mapping
from typing import Any, List

from .call_reading import read_arguments, read_call
from .checks import (
    MixedIn,
    checkable_parts,
    checks_level,
    is_llama_3x,
    known_signature,
    mixed_class,
)
from .errors import ToolCallError
from .json_text import read_json
from .reading import RESULT_ROLES
from .template_probes import (
    content_beside_calls,
    form_of_arguments,
    lost_beside_text,
    reads_legacy_calls,
    shows_several_calls,
)
from .values import is_missing, plain

logger = logging.getLogger(__name__)

# None in every other message after Arrow
_FILLED = ("tool_calls", "tool_call_id", "name", "function_call")
_FINITE = json.JSONEncoder(allow_nan = False)
SAVED_NAME = "unsloth_chat_template"  # in tokenizer_config.json, for a reload


def show_tool_calls(stock):
    """``get_chat_template`` whose other templates get tool calls as they render them.

    Conversations without calls, and calls that are in the right form, are rendered as before.

    Decorates ``unsloth.chat_templates.get_chat_template``.
    """
    signature = known_signature(stock)

    @functools.wraps(stock)
    def get_chat_template(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        before = [p for p in checkable_parts(given["tokenizer"]) if isinstance(p, _ShowsToolCalls)]
        for part in before:
            part.__class__ = part._plain_class
        try:
            tokenizer = stock(*args, **kwargs)
        except BaseException:
            for part in before:
                part.__class__ = mixed_class(_ShowsToolCalls, type(part))
            raise
        name = given.get("chat_template")
        for part in checkable_parts(tokenizer):
            saved = getattr(part, "init_kwargs", {})  # save_pretrained writes them
            saved.pop(SAVED_NAME, None)
            if not is_llama_3x(name):
                saved[SAVED_NAME] = name if isinstance(name, str) else "of your own"
                show_calls_in(part)
        return tokenizer

    return get_chat_template


def show_calls_in(part) -> None:
    """Makes a tokenizer or processor with another template show tool calls, in place."""
    if not isinstance(part, _ShowsToolCalls):
        part.__class__ = mixed_class(_ShowsToolCalls, type(part))


class _ShowsToolCalls(MixedIn):
    """Tool calls get the form that the template prints, before rendering."""

    def apply_chat_template(self, conversation, *args, **kwargs):
        render = super().apply_chat_template
        template = kwargs.get("chat_template") or self.chat_template
        # A template that is the third positional argument is the caller's own.
        if checks_level() != "off" and isinstance(template, str) and len(args) < 3:
            conversation = plain(conversation)
            if isinstance(conversation, (list, tuple)):
                name = getattr(self, "init_kwargs", {}).get(SAVED_NAME, "")
                conversation = _prepared(conversation, render, template, name)
        return render(conversation, *args, **kwargs)


# ---------------------------------------------------------------- conversations


def _prepared(conversation, render, template: str, name: str):
    """The conversation, or batch of them; the same object where there is nothing to change."""
    if conversation and isinstance(conversation[0], (list, tuple)):
        return [_prepared(messages, render, template, name) for messages in conversation]
    if not any(isinstance(m, Mapping) and _may_have_tools(m) for m in conversation):
        return conversation
    messages = [_without_filled(message) for message in conversation]
    if any(_legacy_call(m) for m in messages):
        if reads_legacy_calls(template, render):
            return messages
        messages = [_with_legacy_call(m, index, name) for index, m in enumerate(messages)]
    if not any(isinstance(m, Mapping) and _has_tools(m) for m in messages):
        return messages
    messages = [_with_content(message, template, render) for message in messages]
    form = form_of_arguments(template, render)
    if form is None:
        _warn_once(
            f"Unsloth: the chat template {name!r} cannot show tool calls: calls are missing from what is "
            "rendered and trained, and results may be, too. Choose a template that has them, such as "
            "llama-3.1 or qwen-2.5, or write the calls into the content."
        )
        return messages
    _tell_what_is_lost(messages, template, render, name)
    return _in_call_order([_in_form(message, form, name) for message in messages])


def _may_have_tools(message: Mapping) -> bool:
    return "tool_calls" in message or "function_call" in message or _is_result(message)


def _has_tools(message: Mapping) -> bool:
    return bool(message.get("tool_calls")) or _is_result(message)


def _is_result(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") in RESULT_ROLES


def _calls(message: Any) -> List[Any]:
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    return list(calls) if isinstance(calls, (list, tuple)) else []


def _without_filled(message: Any) -> Any:
    """Without what Arrow filled in, and without a list of no calls, which stops gpt-oss."""
    if not isinstance(message, Mapping):
        return message
    kept = {key: plain(value) for key, value in message.items() if key in _FILLED}
    gone = [key for key, value in kept.items() if is_missing(value) or value in ([], ())]
    return {key: kept.get(key, value) for key, value in message.items() if key not in gone}


def _legacy_call(message: Any) -> Any:
    """OpenAI's function_call, from before tool_calls; None where there is none."""
    if not isinstance(message, Mapping) or message.get("tool_calls"):
        return None
    call = plain(message.get("function_call"))
    # Older Arrow files fill objects in with nulls.
    return None if isinstance(call, Mapping) and not any(call.values()) else call


def _with_legacy_call(message: Any, index: int, name: str) -> Any:
    call = _legacy_call(message)
    if not call:
        return message
    try:
        calls = [read_call(call, index, 1)]
    except ToolCallError as error:
        _warn_once(
            f"Unsloth: a function_call is missing from what the chat template {name!r} renders. "
            "Write it as tool_calls.",
            str(error).replace("Unsloth: ", "", 1),
        )
        return message
    return {**{k: v for k, v in message.items() if k != "function_call"}, "tool_calls": calls}


def _with_content(message: Any, template: str, render) -> Any:
    """A call whose content is absent, None or empty, as OpenAI allows, gets one that the template takes."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not calls or message.get("content") not in (None, ""):
        return message
    given = (message["content"],) if "content" in message else ()
    return {**message, **content_beside_calls(template, render, *given)}


def _tell_what_is_lost(messages: List[Any], template: str, render, name: str) -> None:
    """Warns of calls and texts that the template leaves out, though it shows calls."""
    if any(len(_calls(m)) > 1 for m in messages) and not shows_several_calls(template, render):
        _warn_once(
            f"Unsloth: the chat template {name!r} shows one tool call a message: the others are "
            "missing from what is rendered and trained, and their results may stand under the name "
            "of the first. Give each call a message of its own, its result after it, or choose a "
            "template that shows several, such as qwen-2.5."
        )
    answered = False  # gpt-oss drops a text beside a call where an answer comes later
    for message in reversed(messages):
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue
        if not message.get("tool_calls"):
            answered = True
        elif message.get("content"):
            _tell_of_text(lost_beside_text(template, render, answered), name)


def _tell_of_text(lost: str, name: str) -> None:
    if lost == "call":
        _warn_once(
            f"Unsloth: the chat template {name!r} shows no tool calls beside a text: such calls "
            "are missing from what is rendered and trained. Give them a message of their own, "
            "without content."
        )
    elif lost == "text":
        _warn_once(
            f"Unsloth: the chat template {name!r} does not show a text beside tool calls: it is "
            "missing from what is rendered and trained. Give it a message of its own, before that "
            "with the calls."
        )


def _in_call_order(messages: List[Any]) -> List[Any]:
    """Results in the order of their calls, where ids tell it: most templates print no ids."""
    ordered: List[Any] = []
    for are_results, run in itertools.groupby(messages, _is_result):
        run = list(run)
        if are_results and ordered:
            calls = [call for call in _calls(ordered[-1]) if isinstance(call, Mapping)]
            ids = [call["id"] for call in calls if call.get("id") is not None]
            given = [result.get("tool_call_id") for result in run]
            if all(ids.count(one) == given.count(one) == 1 for one in given):
                run.sort(key = lambda result: ids.index(result["tool_call_id"]))
        ordered += run
    return ordered


def _in_form(message: Any, form: str, name: str) -> Any:
    """The message with calls as the template takes them; role ``function`` becomes ``tool``."""
    if _is_result(message) and message["role"] == "function":
        return {**message, "role": "tool"}
    calls = _calls(message)
    if not calls:
        return message
    return {**message, "tool_calls": [_call_in_form(call, form, name) for call in calls]}


def _call_in_form(call: Any, form: str, name: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    try:
        if is_missing(arguments):
            given = {key: value for key, value in function.items() if not is_missing(value)}
            arguments = read_arguments(given, "")  # they may have another name
            arguments = {} if arguments is None else arguments
        if form == "text" and isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii = False)
        elif form == "object" and isinstance(arguments, str):
            arguments = _read_object(arguments)
    except (ValueError, RecursionError) as error:
        _warn_once(
            f"Unsloth: arguments of a tool call are no JSON object, and the chat template {name!r} "
            "renders them as they are; give a dict, or the JSON text of one.",
            f"{str(arguments)[:80]!r}: {error}",
        )
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _read_object(text: str) -> dict:
    """The object that a JSON text is. Raises ValueError for what would not be shown as it is."""
    read = read_json(text) if text.strip() else {}
    if not isinstance(read, dict):
        raise ValueError(f"it is a {type(read).__name__}")
    _FINITE.encode(read)  # 1e400 is read as infinity
    return read


_warned: set = set()


def _warn_once(text: str, example: str = "") -> None:
    """Once a text; the first one's example comes with it."""
    if text not in _warned:
        _warned.add(text)
        logger.warning(f"{text} {example}" if example else text)
