# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tool calls for templates other than Llama 3.x: in the form that the template renders, or a warning.

``standardize_sharegpt`` stores arguments as JSON text, since Arrow would fill objects with nulls.
Most templates (qwen, mistral, gpt-oss) print that text quoted a second time, and some (chatml, llama-3)
print no calls at all. Many stop at a call without content, or print "None" for it. How a template takes
calls is found out by rendering one with it.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from typing import Any, Optional

from .checks import (
    MixedIn,
    checkable_parts,
    checks_level,
    is_llama_3x,
    known_signature,
    mixed_class,
)
from .reading import RESULT_ROLES
from .values import plain

logger = logging.getLogger(__name__)

_FILLED = ("tool_calls", "tool_call_id", "name")  # None in every other message after Arrow
_PROBE = {"probe_key": "probe_value"}
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
    if any(map(_calls_beside_text, messages)) and not _shows_beside_text(template, render, form):
        _warn_once(
            f"Unsloth: the chat template {name!r} shows no tool calls beside a text: such calls are missing "
            "from what is rendered and trained. Give them a message of their own, without content."
        )
    return [_in_form(message, form) for message in messages]


def _may_have_tools(message: Mapping) -> bool:
    return "tool_calls" in message or message.get("role") in RESULT_ROLES


def _has_tools(message: Mapping) -> bool:
    return bool(message.get("tool_calls")) or message.get("role") in RESULT_ROLES


def _without_filled(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {k: v for k, v in message.items() if v is not None or k not in _FILLED}


def _with_content(message: Any, template: str, render) -> Any:
    """A call whose content is absent, None or empty, as OpenAI allows, gets one that the template takes."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not calls or message.get("content") not in (None, ""):
        return message
    given = {"content": message["content"]} if "content" in message else {}
    key = (template, *given.values())
    if key not in _contents:
        _contents[key] = _content(template, render, given)
    return {**message, **_contents[key]}


def _calls_beside_text(message: Any) -> bool:
    return isinstance(message, Mapping) and bool(
        message.get("tool_calls") and message.get("content")
    )


def _in_form(message: Any, form: str) -> Any:
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, (list, tuple)) or not calls:
        return message
    return {**message, "tool_calls": [_call_in_form(call, form) for call in calls]}


def _call_in_form(call: Any, form: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if form == "text" and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii = False)
    elif form == "object" and isinstance(arguments, str):
        try:
            read = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            read = None
        if not isinstance(read, dict):
            _warn_once(
                f"Unsloth: the arguments {arguments[:80]!r} of a tool call are no JSON object, and are "
                "rendered as the text that they are; correct them where the template should show an object."
            )
            return call
        arguments = read
    return {**call, "function": {**function, "arguments": arguments}}


# ---------------------------------------------------------------- templates

_forms: dict = {}  # by template
_contents: dict = {}  # by template, and the empty content that was given, if one was
_beside_text: dict = {}  # by template
_EMPTY = ({"content": ""}, {"content": None})


def form_of_arguments(template: str, render) -> Optional[str]:
    """``"object"`` or ``"text"``, as the template prints arguments right; None: it shows no calls."""
    if template not in _forms:
        _forms[template] = _form(template, render)
    return _forms[template]


def _form(template: str, render) -> Optional[str]:
    for content in _EMPTY:  # DeepSeek's show calls beside None alone
        as_object = _rendered_probe(template, render, _PROBE, content)
        if "probe_value" in as_object and "probe_tool" in as_object and "{'probe" not in as_object:
            return "object"
        as_text = _rendered_probe(template, render, json.dumps(_PROBE), content)
        if json.dumps(_PROBE) in as_text and "probe_tool" in as_text:
            return "text"
    return None


def _content(template: str, render, given: dict) -> dict:
    """``given``, or the empty content with which the template renders a call better."""
    form = form_of_arguments(template, render)

    def merits(content):
        text = _rendered_probe(template, render, _in_probe(form), content)
        return bool(text), "probe_tool" in text, "None" not in text

    return max((given, *_EMPTY), key = merits)


def _shows_beside_text(template: str, render, form: str) -> bool:
    if template not in _beside_text:
        text = _rendered_probe(template, render, _in_probe(form), {"content": "Hi"})
        _beside_text[template] = (
            not text or "probe_tool" in text
        )  # no text: the template says it itself
    return _beside_text[template]


def _in_probe(form: Optional[str]) -> Any:
    return json.dumps(_PROBE) if form == "text" else _PROBE


def _rendered_probe(template: str, render, arguments: Any, content: dict) -> str:
    function = {"name": "probe_tool", "arguments": arguments}
    calls = [{"id": "probe0001", "type": "function", "function": function}]
    ask = {"role": "user", "content": "Hi"}
    try:
        messages = [ask, {"role": "assistant", **content, "tool_calls": calls}]
        return render(messages, chat_template = template, tokenize = False)
    except Exception:  # whatever a template raises for what it does not take
        return ""


@functools.lru_cache(maxsize = 1000)
def _warn_once(text: str) -> None:
    logger.warning(text)
