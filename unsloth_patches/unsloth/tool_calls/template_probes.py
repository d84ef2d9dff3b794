# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""How a chat template takes tool calls, found out by rendering a conversation with one."""

from __future__ import annotations

import functools
import json
from typing import Any, Optional

_PROBE = {"probe_key": "probe_value"}
_EMPTY = ({"content": ""}, {"content": None})


def _found_out_once(find):
    """``find(template, render, *more)``, called once for each template and ``more``."""
    found: dict = {}

    @functools.wraps(find)
    def kept(template, render, *more):
        key = (template, *more)
        if key not in found:
            found[key] = find(template, render, *more)
        return found[key]

    return kept


@_found_out_once
def form_of_arguments(template: str, render) -> Optional[str]:
    """``"object"`` or ``"text"``, as the template prints arguments right; None: it has no calls."""
    for content in _EMPTY:  # DeepSeek's show calls beside None alone
        as_object = _rendered_probe(template, render, _PROBE, content)
        if "probe_value" in as_object and "probe_tool" in as_object and "{'probe" not in as_object:
            return "object"
        as_text = _rendered_probe(template, render, json.dumps(_PROBE), content)
        if json.dumps(_PROBE) in as_text and "probe_tool" in as_text:
            return "text"
    return None


@_found_out_once
def content_beside_calls(template: str, render, *given) -> dict:
    """The content given (none, None or ""), or the empty one that renders a call better."""
    arguments = _in_probe(form_of_arguments(template, render))

    def merits(content):
        text = _rendered_probe(template, render, arguments, content)
        return bool(text), "probe_tool" in text, "None" not in text

    return max(({"content": one for one in given}, *_EMPTY), key = merits)


# Of a template that stops, here and below, nothing is said: it says itself what it does not take.


@_found_out_once
def shows_several_calls(template: str, render) -> bool:
    arguments = _in_probe(form_of_arguments(template, render))
    content, names = content_beside_calls(template, render, ""), ("probe_tool", "probe_other")
    text = _rendered_probe(template, render, arguments, content, names = names)
    return not text or "probe_other" in text


@_found_out_once
def lost_beside_text(template: str, render, answered: bool) -> str:
    """What the template leaves out of a call beside a text: ``"call"``, ``"text"`` or nothing."""
    arguments = _in_probe(form_of_arguments(template, render))
    answer = [{"role": "assistant", "content": "Hi"}] if answered else []
    after = [{"role": "tool", "tool_call_id": "probe0001", "content": "Hi"}, *answer]
    for following in (after, []):  # some take no role tool
        text = _rendered_probe(
            template, render, arguments, {"content": "probe_text"}, after = following
        )
        if text:
            return "call" if "probe_tool" not in text else "" if "probe_text" in text else "text"
    return ""


@_found_out_once
def reads_legacy_calls(template: str, render) -> bool:
    call = {"name": "probe_tool", "arguments": json.dumps(_PROBE)}
    messages = [{"role": "assistant", **content, "function_call": call} for content in _EMPTY]
    return any("probe_tool" in _rendered(template, render, [message]) for message in messages)


def _in_probe(form: Optional[str]) -> Any:
    return json.dumps(_PROBE) if form == "text" else _PROBE


def _rendered_probe(
    template: str,
    render,
    arguments: Any,
    content: dict,
    names = ("probe_tool",),
    after = (),
) -> str:
    calls = [
        {
            "id": f"probe{number:04}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for number, name in enumerate(names, 1)
    ]
    message = {"role": "assistant", **content, "tool_calls": calls}
    return _rendered(template, render, [message, *after])


def _rendered(template: str, render, messages) -> str:
    try:
        messages = [{"role": "user", "content": "Hi"}, *messages]
        return render(messages, chat_template = template, tokenize = False)
    except Exception:  # whatever a template raises for what it does not take
        return ""
