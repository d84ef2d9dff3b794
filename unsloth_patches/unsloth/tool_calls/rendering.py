# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Several tool calls in one assistant message, for the Llama 3.1, 3.2 and 3.3 chat templates.

::

    tokenizer = get_chat_template(tokenizer, "llama-3.1", parallel_tool_calls = "join")
    text = tokenizer.apply_chat_template(messages, tools = tools, tokenize = False)

========= ==================================================================================
mode      a message with two calls is rendered as
========= ==================================================================================
"error"   nothing: ToolCallError, since Meta's format has one call a message (the default)
"split"   assistant ``{call 1}<|eot_id|>``, ipython ``result 1``, assistant ``{call 2}<|eot_id|>``
"join"    assistant ``{call 1}; {call 2}<|eot_id|>``, ipython ``result 1``, ipython ``result 2``
========= ==================================================================================

A single call is rendered as Meta publishes it in all three. "join" is an extension of Meta's
format, in the form that the parsers of vLLM (llama3_json) and SGLang (llama3) read.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, Dict, Optional

from ..llama_chat_templates import LLAMA_3X_NAMES
from .errors import ToolCallError
from .messages import MODES, prepare_conversation
from .schemas import prepare_tools
from .templates import has_builtin_tools, join_template, response_template

logger = logging.getLogger(__name__)


def render_parallel_tool_calls(stock):
    """``get_chat_template`` with the keyword ``parallel_tool_calls`` = "error", "split" or "join".

    For the llama-3.1, 3.2 and 3.3 templates the returned tokenizer checks conversations before it
    renders them (see ``messages.py``), and has a ``response_template``, so that
    ``parse_response`` and TRL's tools work. Other templates are not touched; with them, "split" and
    "join" raise ValueError.

    Decorates ``unsloth.chat_templates.get_chat_template``.
    """
    signature = inspect.signature(stock)
    if not {"tokenizer", "chat_template"} <= set(signature.parameters):
        raise NotImplementedError("get_chat_template has other parameters than the known ones")

    @functools.wraps(stock)
    def get_chat_template(
        *args,
        parallel_tool_calls = "error",
        **kwargs,
    ):
        bound = signature.bind(*args, **kwargs)
        template, tokenizer = bound.arguments.get("chat_template"), bound.arguments["tokenizer"]
        is_llama = isinstance(template, str) and template in LLAMA_3X_NAMES
        _check_mode(parallel_tool_calls, template, is_llama)
        with _Unchecked(tokenizer):
            result = stock(*args, **kwargs)
        return _checked(result, parallel_tool_calls) if is_llama else result

    extra = inspect.Parameter(
        "parallel_tool_calls", inspect.Parameter.KEYWORD_ONLY, default = "error", annotation = str
    )
    get_chat_template.__signature__ = signature.replace(
        parameters = [*signature.parameters.values(), extra]
    )
    return get_chat_template


def _check_mode(mode: Any, template: Any, is_llama: bool) -> None:
    if mode not in MODES:
        raise ValueError(
            f"Unsloth: parallel_tool_calls = {mode!r} is unknown; choose one of "
            f"{', '.join(map(repr, MODES))}."
        )
    if mode != "error" and not is_llama:
        name = template if isinstance(template, str) else "a custom template"
        raise ValueError(
            f"Unsloth: parallel_tool_calls = {mode!r} needs one of the templates "
            f"{', '.join(LLAMA_3X_NAMES)}, not {name}. Leave it out."
        )


def tool_call_mode(tokenizer) -> str:
    """``"error"``, ``"split"`` or ``"join"``; ``""`` for a tokenizer without these templates."""
    return getattr(tokenizer, "_parallel_tool_calls", "")


# ---------------------------------------------------------------- the tokenizer's own checks


class _ChecksToolCalls:
    """Mixed into the class of a tokenizer or processor: conversations are tidied before rendering.

    A subclass and not a method on the object, so that copies and pickles (``datasets`` sends
    tokenizers to worker processes) keep it. Its name stays that of the plain class, which
    ``save_pretrained`` writes.
    """

    _plain_class: type

    def apply_chat_template(self, conversation, *args, **kwargs):
        render = super().apply_chat_template
        options = {**_named_arguments(render, args), **kwargs}
        if self._renders_own_template(options.get("chat_template")):
            if options.get("tools") is not None:
                options["tools"] = prepare_tools(options["tools"])
            conversation = self._prepared(conversation, options)
        return render(conversation, **options)

    def _renders_own_template(self, chat_template: Optional[str]) -> bool:
        own = self._tool_call_template
        return self.chat_template == own and chat_template in (None, own)

    def _prepared(self, conversation, options: Dict[str, Any]):
        tools = options.get("custom_tools") or options.get("tools")
        builtin = options.get("builtin_tools") or ()
        if not has_builtin_tools(self._tool_call_template):
            builtin = ()

        def prepare(messages):
            messages = getattr(messages, "messages", messages)
            if not _is_openai_form(messages):
                return messages
            return prepare_conversation(
                messages, self._parallel_tool_calls, tools, builtin, warn = _warn_once
            )

        first = (
            conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        )
        if not isinstance(first, (list, tuple)) and not hasattr(first, "messages"):
            return prepare(conversation)
        prepared = []
        for number, messages in enumerate(conversation):
            try:
                prepared.append(prepare(messages))
            except ToolCallError as error:
                raise error.in_conversation(number) from None
        return prepared

    def __reduce_ex__(self, protocol):
        make, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        return (_new_checked, (self._plain_class, make, tuple(arguments[1:])), *state)


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


def _is_openai_form(messages) -> bool:
    """ShareGPT keys are mapped by the template itself, if get_chat_template was given a mapping."""
    return (
        isinstance(messages, (list, tuple))
        and bool(messages)
        and not (isinstance(messages[0], dict) and "role" not in messages[0])
    )


_warned = set()


def _warn_once(where: str, notice: str) -> None:
    # One notice of each kind: a dataset would repeat it for thousands of rows.
    kind = notice[:20]
    if kind not in _warned:
        _warned.add(kind)
        logger.warning(where + notice)


@functools.lru_cache(maxsize = None)
def _checking_class(plain: type) -> type:
    attributes = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "_plain_class": plain,
    }
    return type(plain.__name__, (_ChecksToolCalls, plain), attributes)


def _new_checked(plain: type, make, arguments):
    """Unpickles an object of the checking class, which no module has under its name."""
    return make(_checking_class(plain), *arguments)


_OWN_ATTRIBUTES = ("_tool_call_template", "_parallel_tool_calls")


class _Unchecked:
    """Within it a tokenizer has no checks; after an error it has the same ones again."""

    def __init__(self, tokenizer):
        parts = [tokenizer, getattr(tokenizer, "tokenizer", None)]
        self._parts = [part for part in parts if isinstance(part, _ChecksToolCalls)]

    def __enter__(self):
        self._before = [(part, part.__class__, dict(part.__dict__)) for part in self._parts]
        for part in self._parts:
            part.__class__ = part._plain_class
            for name in _OWN_ATTRIBUTES:
                part.__dict__.pop(name, None)
            if hasattr(part, "response_template"):
                part.response_template = None

    def __exit__(self, error_type, error, traceback):
        if error_type is not None:
            for part, checking, attributes in self._before:
                part.__class__ = checking
                part.__dict__.update(attributes)


def _checked(tokenizer, mode: str):
    """Makes what get_chat_template returned check tool calls, and render them by ``mode``."""
    inner = getattr(tokenizer, "tokenizer", None)
    parts = [part for part in (tokenizer, inner) if _can_check(part)]
    if not parts:
        if mode != "error":
            raise NotImplementedError(
                f"Unsloth: parallel_tool_calls = {mode!r} works on transformers' tokenizers and "
                f"processors, not on {type(tokenizer).__name__}."
            )
        return tokenizer
    text = join_template(tokenizer.chat_template) if mode == "join" else tokenizer.chat_template
    for part in parts:
        part.__class__ = _checking_class(type(part))
        part.chat_template = part._tool_call_template = text
        part._parallel_tool_calls = mode
        # transformers < 5.13 has no response templates, and ignores the attribute.
        if hasattr(part, "parse_response") and not hasattr(part, "tokenizer"):
            part.response_template = response_template(text)
    return tokenizer


def _can_check(part: Any) -> bool:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    return isinstance(part, (PreTrainedTokenizerBase, ProcessorMixin))
