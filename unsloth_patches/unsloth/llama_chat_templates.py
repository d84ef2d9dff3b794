# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Llama 3.1, 3.2 and 3.3 chat templates that render as Meta publishes them.

Meta publishes one template for Llama 3.1 and 3.3 and another for Llama 3.2. Both are derived here
from the llama-3.1 text in ``CHAT_TEMPLATES`` by small named edits. Every edit has to match exactly
once, and the results have to have the md5 sums of the published files, so this never guesses: with
any other llama-3.1 text the decorator raises NotImplementedError, and says what it did not find.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import textwrap

LLAMA_31_NAMES = ("llama-3.1", "llama-31", "llama-3.3", "llama-33")
LLAMA_32_NAMES = ("llama-3.2", "llama-32")
LLAMA_3X_NAMES = LLAMA_31_NAMES + LLAMA_32_NAMES

# chat_template of meta-llama/Llama-3.1-8B-Instruct and Llama-3.3-70B-Instruct (4614 bytes), and of
# Llama-3.2-1B-Instruct and 3B-Instruct (3827 bytes); TRL ships them as llama3_{1,2}.jinja.
OFFICIAL_LLAMA_31_MD5 = "81de1619b73b2fdd744897ca14b4f0ad"
OFFICIAL_LLAMA_32_MD5 = "0ce9ccbb6a0057ebacb468281e9ebb53"

# get_chat_template puts the default system message here; Meta's text has nothing in its place.
SYSTEM_PLACEHOLDER = "{system_message}"

BEHAVIOUR_CHANGE = (
    "Unsloth: the llama-3.1, llama-3.2 and llama-3.3 chat templates now render exactly as Meta "
    'publishes them. New: the default date is "26 Jul 2024" (it was "26 July 2024"; pass '
    "date_string to apply_chat_template to choose one), whitespace around system, user and "
    "assistant texts is trimmed, and llama-3.2 has its own template (today's date, no built-in "
    "tools)."
)


def published_llama_templates(stock):
    """A copy of CHAT_TEMPLATES in which the llama-3.1, 3.2 and 3.3 entries carry Meta's templates.

    stock: name -> (template, stop word, map_eos_token, Ollama modelfile). Only the template text of
    the six names in ``LLAMA_3X_NAMES`` changes; all other entries are the same objects.

    Raises NotImplementedError, naming the reason, where the stock text is not the known one.
    Decorates ``unsloth.chat_templates.CHAT_TEMPLATES``.
    """
    missing = [name for name in LLAMA_3X_NAMES if name not in stock]
    if missing:
        raise NotImplementedError(f"CHAT_TEMPLATES has no {', '.join(missing)}")
    shipped = {stock[name][0] for name in LLAMA_3X_NAMES}
    if len(shipped) != 1:
        raise NotImplementedError(
            f"the Llama 3.1, 3.2 and 3.3 names carry {len(shipped)} different templates, not one"
        )
    llama_31 = official_llama_31(shipped.pop())
    llama_32 = official_llama_32(llama_31)

    changed = dict(stock)
    for name in LLAMA_31_NAMES:
        changed[name] = (llama_31,) + tuple(stock[name][1:])
    for name in LLAMA_32_NAMES:
        changed[name] = (llama_32,) + tuple(stock[name][1:])
    return changed


def announce_published_llama_templates(stock):
    """``get_chat_template`` that says once what changed, on the first use of a Llama 3.x template.

    Decorates ``unsloth.chat_templates.get_chat_template``.
    """
    signature = inspect.signature(stock)
    if "chat_template" not in signature.parameters:
        raise NotImplementedError("get_chat_template has no parameter chat_template")

    @functools.wraps(stock)
    def get_chat_template(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        template = bound.arguments.get("chat_template")
        if isinstance(template, str) and template in LLAMA_3X_NAMES:
            stock.__globals__["logger"].warning_once(BEHAVIOUR_CHANGE)
        return stock(*args, **kwargs)

    return get_chat_template


# (what, text in Unsloth's llama-3.1 template, text in Meta's)
LLAMA_31_EDITS = (
    ("default date", '"26 July 2024"', '"26 Jul 2024"'),
    (
        "trimmed system message",
        "set system_message = messages[0]['content'] %}",
        "set system_message = messages[0]['content']|trim %}",
    ),
    (
        "trimmed first user message",
        "set first_user_message = messages[0]['content'] %}",
        "set first_user_message = messages[0]['content']|trim %}",
    ),
    (
        "trimmed content",
        "+ message['content'] + '<|eot_id|>'",
        "+ message['content'] | trim + '<|eot_id|>'",
    ),
)


def official_llama_31(shipped):
    """Meta's template of Llama 3.1 and 3.3, with ``{system_message}`` kept, from Unsloth's text."""
    text = _escape_newlines_in_literals(shipped)
    for what, old, new in LLAMA_31_EDITS:
        text = _replace_once(text, what, old, new)
    return _checked(text, "llama-3.1", OFFICIAL_LLAMA_31_MD5)


def official_llama_32(llama_31):
    """Meta's template of Llama 3.2, from the one of 3.1: today's date, and no built-in tools."""
    text = _edit_span(
        llama_31,
        "date of today",
        '    {%- set date_string = "26 Jul 2024" %}\n',
        "{%- endif %}",
        lambda span: _indent(
            "{%- if strftime_now is defined %}\n"
            '    {%- set date_string = strftime_now("%d %b %Y") %}\n'
            "{%- else %}\n" + span + "{%- endif %}\n"
        ),
    )
    text = _replace_once(
        text, "comment", "{#- System message + builtin tools #}", "{#- System message #}"
    )
    text = _replace_once(
        text,
        "ipython line",
        "if builtin_tools is defined or tools is not none",
        "if tools is not none",
    )
    text = _edit_span(
        text,
        "list of built-in tools",
        '{%- if builtin_tools is defined %}\n    {{- "Tools: "',
        '{{- "Cutting Knowledge Date',
        lambda span: "",
    )
    text = _edit_span(
        text,
        "built-in tool call",
        "        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}\n",
        '    {%- elif message.role == "tool"',
        _without_builtin_branch,
    )
    return _checked(text, "llama-3.2", OFFICIAL_LLAMA_32_MD5)


def _without_builtin_branch(span):
    """The rendering of one call: only what stands after each ``else``, one level further left."""
    json_call = _between(span, "{%- else  %}\n", "        {%- endif %}")
    end_token = _between(span, "{%- else %}\n", "        {%- endif %}")
    return _indent(textwrap.dedent(json_call) + textwrap.dedent(end_token), 8)


def _between(text, start, end):
    _, found, rest = text.partition(start)
    inner, closed, _ = rest.partition(end)
    if not (found and closed):
        raise NotImplementedError("the llama-3.1 template renders tool calls in an unknown way")
    return inner


def _indent(text, spaces = 4):
    return textwrap.indent(text, " " * spaces)


def _escape_newlines_in_literals(text):
    r"""Newlines inside ``{{ ... }}`` stand only in string literals there; Meta writes them as \n."""
    return re.sub(r"\{\{.*?\}\}", lambda m: m.group().replace("\n", r"\n"), text, flags = re.DOTALL)


def _replace_once(text, what, old, new):
    _require_once(text, what, old)
    return text.replace(old, new)


def _edit_span(text, what, start, end, edit):
    """Replaces ``text[start:end]``, from the only ``start`` up to the next ``end``, by edit(span)."""
    _require_once(text, what, start)
    begin = text.index(start)
    stop = text.find(end, begin)
    if stop < 0:
        raise NotImplementedError(f"edit '{what}' of the Llama template: {end!r} not found")
    return text[:begin] + edit(text[begin:stop]) + text[stop:]


def _require_once(text, what, old):
    count = text.count(old)
    if count != 1:
        raise NotImplementedError(
            f"edit '{what}' of the Llama template: {old!r} found {count} times, expected once"
        )


def _checked(text, name, md5):
    official = _replace_once(text, "system message", SYSTEM_PLACEHOLDER, "")
    found = hashlib.md5(official.encode("utf-8"), usedforsecurity = False).hexdigest()
    if found != md5:
        raise NotImplementedError(
            f"the edited {name} template has md5 {found}, Meta's has {md5}: CHAT_TEMPLATES has another text"
        )
    return text
