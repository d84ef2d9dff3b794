# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tokenizers that read, check and tidy conversations before a Llama 3.x template renders them.

``UNSLOTH_TOOL_CHECKS`` says what happens to a conversation that cannot be rendered faithfully:

error  ToolCallError, which names the message, the call and the remedy (the default)
warn   a warning, one a kind, and the template gets the conversation as it is
off    nothing is read or checked: the template gets every conversation as it is

What is only unusual is rendered with one notice a kind at the first two, and never raises.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from ..llama_chat_templates import LLAMA_3X_NAMES
from .errors import ToolCallError
from .messages import is_clean, is_declared, prepare_conversation
from .reading import CONVERSATION_KEYS
from .results import one_call_a_message
from .schemas import Schemas, prepare_tools
from .values import plain

logger = logging.getLogger(__name__)

LEVELS = ("error", "warn", "off")


def check_tool_calls(stock):
    """``get_chat_template`` whose Llama 3.1, 3.2 and 3.3 tokenizers check conversations.

    They take conversations in every form that ``reading.py`` knows. Other templates are not touched.

    Decorates ``unsloth.chat_templates.get_chat_template``.
    """
    signature = known_signature(stock)

    @functools.wraps(stock)
    def get_chat_template(*args, **kwargs):
        checks_level()  # a level that is misspelt is told here, before any conversation
        given = signature.bind(*args, **kwargs).arguments
        with _Unchecked(given["tokenizer"]):
            tokenizer = stock(*args, **kwargs)
        if is_llama_3x(given.get("chat_template")):
            for part in checkable_parts(tokenizer):
                set_checks(part, Checks(tokenizer.chat_template))
        return tokenizer

    return get_chat_template


def known_signature(stock) -> inspect.Signature:
    """Of ``get_chat_template``. Raises NotImplementedError for one with other parameters."""
    signature = inspect.signature(stock)
    if not {"tokenizer", "chat_template"} <= set(signature.parameters):
        raise NotImplementedError("get_chat_template has other parameters than the known ones")
    return signature


def show_keyword(function, signature: inspect.Signature, name: str, default: Any) -> None:
    """Documents ``function``, which takes the keyword ``name``, as ``signature`` with that keyword."""
    extra = inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default = default, annotation = type(default)
    )
    function.__signature__ = signature.replace(parameters = [*signature.parameters.values(), extra])


def is_llama_3x(chat_template: Any) -> bool:
    return isinstance(chat_template, str) and chat_template in LLAMA_3X_NAMES


class Checks(NamedTuple):
    """What a tokenizer checks: conversations for this template, with several calls in this mode.

    arrange: see ``prepare_conversation``. A function of a module, so that it can be pickled.
    """

    template: str
    mode: str = "error"
    arrange: Callable[..., List[Dict[str, Any]]] = one_call_a_message

    @property
    def maps_keys(self) -> bool:
        """get_chat_template was given a mapping: the template reads keys of the caller's own."""
        return "messages[0]['role']" not in self.template


def has_builtin_tools(template: str) -> bool:
    """Whether a Llama template knows built-in tools (3.1 and 3.3 do, 3.2 does not)."""
    return "<|python_tag|>" in template


def tool_call_mode(tokenizer) -> str:
    """``"error"``, ``"split"`` or ``"join"``; ``""`` for a tokenizer without these checks."""
    return getattr(tokenizer, "_tool_call_checks", Checks("", "")).mode


def checkable_parts(tokenizer) -> List[Any]:
    """The tokenizer, or the processor and its tokenizer; empty for other objects."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    parts = (tokenizer, getattr(tokenizer, "tokenizer", None))
    return [part for part in parts if isinstance(part, (PreTrainedTokenizerBase, ProcessorMixin))]


def set_checks(part, checks: Checks) -> None:
    """Makes a tokenizer or processor check conversations, in place."""
    if not isinstance(part, ChecksToolCalls):
        part.__class__ = mixed_class(ChecksToolCalls, type(part))
    part.chat_template = checks.template
    part._tool_call_checks = checks


# ---------------------------------------------------------------- the tokenizer's own checks


class MixedIn:
    """Mixed into the class of a tokenizer or processor.

    A subclass and not a method on the object, so that copies and pickles (``datasets`` sends
    tokenizers to worker processes) keep it. Its name stays that of the plain class, which
    ``save_pretrained`` writes.
    """

    _mixin: type
    _plain_class: type

    def __reduce_ex__(self, protocol):
        make, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        return (_new_mixed, (self._mixin, self._plain_class, make, tuple(arguments[1:])), *state)


@functools.lru_cache(maxsize = None)
def mixed_class(mixin: type, plain_class: type) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    attributes = {name: getattr(plain_class, name) for name in names}
    attributes.update(_mixin = mixin, _plain_class = plain_class)
    return type(plain_class.__name__, (mixin, plain_class), attributes)


def _new_mixed(mixin: type, plain_class: type, make, arguments):
    """Unpickles an object of a mixed class, which no module has under its name."""
    return make(mixed_class(mixin, plain_class), *arguments)


class ChecksToolCalls(MixedIn):
    """Conversations are tidied before rendering."""

    _tool_call_checks: Checks

    def apply_chat_template(self, conversation, *args, **kwargs):
        render = super().apply_chat_template
        options = {**_named_arguments(render, args), **kwargs} if args else kwargs
        checks = self._tool_call_checks
        is_own = self.chat_template == checks.template
        is_own = is_own and options.get("chat_template") in (None, checks.template)
        if is_own and not checks.maps_keys:
            conversation, options = _prepared(conversation, options, checks)
        return render(conversation, **options)


def checks_level() -> str:
    """``UNSLOTH_TOOL_CHECKS``, one of ``LEVELS``; raises ValueError for another value."""
    level = os.environ.get("UNSLOTH_TOOL_CHECKS", "").strip().lower() or "error"
    if level not in LEVELS:
        raise ValueError(f"Unsloth: UNSLOTH_TOOL_CHECKS={level!r}; choose {', '.join(LEVELS)}.")
    return level


def _prepared(conversation, options: Mapping[str, Any], checks: Checks):
    """Conversation (or batch of them) and options as the template needs them."""
    tools, custom = options.get("tools"), options.get("custom_tools")
    builtin = options.get("builtin_tools") or ()
    builtin = builtin if builtin and has_builtin_tools(checks.template) else ()
    several = checks.mode == "join"
    clean = type(conversation) is list and is_clean(conversation, builtin, several)
    if clean and tools is None and not custom:  # as it is at every level, which takes long to read
        return conversation, options
    level = checks_level()
    if level == "off":
        return conversation, options
    given = tools is not None
    tools = prepare_tools(tools) if given else _tools_of_rows(conversation)
    if given or tools:
        options = {**options, "tools": tools}
    schemas = Schemas(custom) if custom else Schemas(tools, is_prepared = True)
    if clean and is_declared(conversation, schemas):
        return conversation, options

    def prepare(messages):
        if type(messages) is list and is_clean(messages, builtin, several):
            if is_declared(messages, schemas):
                return messages
        return prepare_conversation(messages, schemas, builtin, warn_once, checks.arrange)

    conversation = plain(conversation)
    is_batch = isinstance(conversation, (list, tuple)) and _holds_conversations(conversation)
    batch = conversation if is_batch else [conversation]
    prepared = []
    for number, messages in enumerate(batch):
        try:
            prepared.append(prepare(messages))
        except ToolCallError as error:
            error = error.in_conversation(number) if is_batch else error
            error = error.in_row(_row_of_map(number if is_batch else 0))
            if level == "error":
                raise error from None
            warn_once("", f"{error} It is rendered as it is (UNSLOTH_TOOL_CHECKS=warn).")
            prepared.append(messages)
    return (prepared if is_batch else prepared[0]), options


def _tools_of_rows(rows: Any) -> Optional[List[Any]]:
    """The tools that a whole row of a data set brings, or all rows of a batch."""
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(rows, (list, tuple)) or not all(map(_is_row, rows)):
        return None
    brought = [prepare_tools(row.get("tools")) for row in rows]
    for number, tools in enumerate(brought):
        if tools != brought[0]:
            raise ToolCallError(
                f"Unsloth: rows 0 and {number} of the batch bring different tools, and a batch is "
                "rendered with one list of them; render the rows one by one, or pass tools = [...]."
            )
    return brought[0] if brought else None


def _is_row(value: Any) -> bool:
    keys = value.keys() if isinstance(value, Mapping) else ()
    return "role" not in keys and any(key in keys for key in CONVERSATION_KEYS)


def _holds_conversations(batch) -> bool:
    """Whether a list holds conversations, not messages."""
    first = plain(batch[0]) if batch else None
    if isinstance(first, str):
        return first.lstrip().startswith("[")
    return isinstance(first, (list, tuple)) or _is_row(first) or hasattr(first, "messages")


def _row_of_map(number: int) -> Optional[int]:
    """Row of the data set whose ``map`` is running now, for errors; None outside of one."""
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_locals
        if frame.f_code.co_name == "apply_function" and "indices" in names:
            indices, offset = names["indices"], names.get("offset", 0) or 0
            if isinstance(indices, int):
                return indices + offset
            try:
                return list(indices)[number] + offset
            except (IndexError, TypeError):
                return None
        frame = frame.f_back
    return None


# Of PreTrainedTokenizerBase.apply_chat_template, after the conversation. With a GPU unsloth_zoo
# puts a function with *args in its place, whose signature names nothing.
_POSITIONAL = (
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
)


def _named_arguments(render, args) -> Dict[str, Any]:
    names = tuple(inspect.signature(render).parameters)[1:]
    names = names if "chat_template" in names else _POSITIONAL
    if len(args) > len(names):
        raise TypeError(f"apply_chat_template got {len(args) + 1} positional arguments; name them")
    return dict(zip(names, args))


_warned = set()


def warn_once(where: str, notice: str) -> None:
    """One notice of each kind: a dataset would repeat it for thousands of rows."""
    kind = notice[:20] if where else notice.partition(": ")[2].partition(": ")[2][:20]
    if kind not in _warned:
        _warned.add(kind)
        logger.warning(where + notice)


class _Unchecked:
    """Within it a tokenizer has no checks; after an error it has the same ones again."""

    def __init__(self, tokenizer):
        parts = [tokenizer, getattr(tokenizer, "tokenizer", None)]
        self._parts = [part for part in parts if isinstance(part, ChecksToolCalls)]

    def __enter__(self):
        self._before = [(part, part.__class__, dict(part.__dict__)) for part in self._parts]
        for part in self._parts:
            part.__class__ = part._plain_class
            part.__dict__.pop("_tool_call_checks", None)

    def __exit__(self, error_type, error, traceback):
        if error_type is not None:
            for part, checking, attributes in self._before:
                part.__class__ = checking
                part.__dict__.update(attributes)
