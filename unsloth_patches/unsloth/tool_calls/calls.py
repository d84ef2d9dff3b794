# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One tool call, checked: a name and a dict of arguments that a Llama 3.x template can write.

What cannot be written raises ToolCallError; what is unusual is told to ``warn(where, notice)``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, Dict, Optional, Sequence

from .errors import ToolCallError, where_in
from .json_text import read_json
from .parser import MAX_DEPTH, NAME_PATTERN, USUAL_NAME, is_too_deep
from .schemas import Schemas, without_filling
from .values import plain

_ENCODER = json.JSONEncoder(ensure_ascii = False, allow_nan = False)
_USUAL_NAME = re.compile(USUAL_NAME)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SPECIAL_TOKEN_TEXT = re.compile(
    r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eo[tm]_id|python_tag)\|>"
)


def silent(where: str, notice: str) -> None:
    pass


def tidy_call(
    call: Dict[str, Any],
    index: int,
    number: int,
    schemas: Optional[Schemas] = None,
    builtin_tools: Sequence[str] = (),
    warn = silent,
) -> Dict[str, Any]:
    """A call that ``read_call`` returned, with a dict of arguments that can be written; changed in
    place.

    index, number: its place, for errors: message from 0, call from 1.
    schemas: tell Arrow's filling from a null that was meant.
    """
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    where = where_in(index, number, name)
    usual = isinstance(name, str) and _USUAL_NAME.fullmatch(name)
    if not usual and not (isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)):
        raise ToolCallError(
            where_in(index, number) + f"the name {name!r} cannot be written into the template; use "
            "no quotes, backslashes or control characters."
        )
    if not usual:
        warn(
            where,
            "has a name that some parsers of tool calls refuse; letters, digits, '_', '.' and '-' are "
            "read by all.",
        )
    from_text = isinstance(arguments, str)
    arguments = _as_object(arguments, where)
    text = as_json(arguments, where)
    if "null" in text and not from_text:
        arguments = _without_filling(arguments, name, schemas, where, warn)
    if name in builtin_tools:
        _check_builtin_arguments(arguments, where)
    elif warn is not silent and schemas is not None and not schemas.declare(name, arguments):
        _notice_undeclared(name, arguments, schemas, where, warn)
    if "<|" in text or "<|" in name:
        _notice_special_tokens(name + text, where, warn)
    call["function"]["arguments"] = arguments
    return call


def is_clean_call(call: Any, builtin_tools: Sequence[str] = ()) -> bool:
    """Whether ``tidy_call`` would leave the call as it is, without a word."""
    if type(call) is not dict or not call.keys() <= _CALL_KEYS:
        return False
    function = call.get("function")
    if type(function) is not dict or len(function) != 2:
        return False
    name, arguments = function.get("name"), function.get("arguments")
    if type(name) is not str or name in builtin_tools or type(arguments) is not dict:
        return False
    return _has_usual_name(name) and _is_clean_object(arguments)


@functools.lru_cache(maxsize = 1000)
def _has_usual_name(name: str) -> bool:
    return _USUAL_NAME.fullmatch(name) is not None


def _is_clean_object(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether JSON in UTF-8 holds a dict or list as it is, with no null and no special token in it.

    For most arguments a walk takes half the time that writing them as JSON does.
    """
    if not levels:
        return False
    if type(value) is dict:
        try:
            keys = "".join(value)
        except TypeError:
            return False
        if not _is_clean_text(keys):
            return False
        value = value.values()
    for one in value:
        kind = type(one)
        if kind is str:
            if not _is_clean_text(one):
                return False
        elif kind is int:
            if one.bit_length() > 10_000:  # Python writes no more than 4300 digits
                return False
        elif kind is float:
            if one - one != 0:
                return False
        elif kind is dict or kind is list:
            if not _is_clean_object(one, levels - 1):
                return False
        elif kind is not bool:
            return False
    return True


def _is_clean_text(text: str) -> bool:
    return "<|" not in text and (text.isascii() or not _SURROGATE.search(text))


_CALL_KEYS = frozenset(("id", "type", "function"))


def _as_object(arguments: Any, where: str) -> Dict[str, Any]:
    for _ in range(2):  # some have the JSON text of a JSON text
        if not isinstance(arguments, str):
            break
        try:
            arguments = read_json(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ToolCallError(
                where
                + f"the arguments are a text that is not JSON ({error}). Give a dict, or the JSON "
                "text of an object."
            ) from None
    if isinstance(arguments, list) and arguments and all(_is_pair(item) for item in arguments):
        arguments = dict(arguments)  # Arrow's map
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ToolCallError(
            where
            + f"the arguments are {arguments!r:.80}, a {type(arguments).__name__}; give an object "
            "(a dict, or its JSON text)."
        )
    return dict(arguments)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def as_json(arguments: Dict[str, Any], where: str) -> str:
    """The arguments' JSON. Values of numpy and Arrow in them are replaced by plain ones, in place.

    Raises ToolCallError for what JSON in UTF-8 cannot hold: NaN, infinity, sets, keys that are no
    text, lone surrogates.
    """
    try:
        text = _ENCODER.encode(arguments)
        text.encode("utf-8")
        same = json.loads(text) == arguments
    except (TypeError, ValueError, RecursionError):
        text, same = "", False
    if same and not is_too_deep(text):
        return text
    try:
        arguments.update(_plain_values(arguments, "arguments", where))
        text = _ENCODER.encode(arguments)
        text.encode("utf-8")
    except ToolCallError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolCallError(
            where + f"the arguments cannot be written as JSON in UTF-8: {error}."
        ) from None
    if is_too_deep(text):
        raise ToolCallError(
            where + f"the arguments are nested more than {MAX_DEPTH} levels deep; flatten them."
        )
    return text


def _plain_values(value: Any, path: str, where: str) -> Any:
    value = plain(value)
    if isinstance(value, Mapping):
        _check_keys(value, path, where)
        return {k: _plain_values(v, f"{path}[{k!r}]", where) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_values(v, f"{path}[{i}]", where) for i, v in enumerate(value)]
    if isinstance(value, float) and value - value != 0:
        raise ToolCallError(
            where + f"{path} is {value}, which JSON cannot hold; use null or a text."
        )
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ToolCallError(
            where + f"{path} is a {type(value).__name__}, which JSON cannot hold; convert it first."
        )
    return value


def _check_keys(value: Mapping[Any, Any], path: str, where: str) -> None:
    for key in value:
        if not isinstance(key, str):
            raise ToolCallError(
                where
                + f"the key {key!r} of {path} is a {type(key).__name__}, which JSON cannot hold; "
                "convert it first."
            )


def _without_filling(arguments, name, schemas, where, warn) -> Dict[str, Any]:
    schema = None if schemas is None else schemas.get(name)
    if schema is not None:
        return without_filling(arguments, schema)
    if None in arguments.values():
        warn(
            where,
            "has null arguments, and no schema of this tool was given. If Arrow filled them "
            "in, pass tools to apply_chat_template, or store the arguments as JSON text.",
        )
    return arguments


def _check_builtin_arguments(arguments: Mapping[str, Any], where: str) -> None:
    for key, value in arguments.items():
        if not isinstance(value, str) or '"' in value or not re.fullmatch(r"\w+", str(key)):
            raise ToolCallError(
                where + f"argument {key!r} = {value!r:.80} cannot be written in the built-in form "
                'name.call(key="text"), which has no escapes: use a text without quotes, or offer '
                "the tool through tools = [...] instead of builtin_tools."
            )


def _notice_undeclared(name, arguments, schemas: Schemas, where: str, warn) -> None:
    known = schemas.arguments(name)
    if known is None:
        names = ", ".join(schemas.names()[:8])
        warn(
            where,
            f"calls a tool that is not among those given ({names}). Correct the name, or add the "
            "tool to tools.",
        )
        return
    warn(
        where,
        f"has arguments that its tool does not declare: {sorted(arguments.keys() - known)}, where it "
        f"declares {sorted(known)}. Correct the names, or the tool's schema.",
    )


def _notice_special_tokens(text: str, where: str, warn) -> None:
    found = _SPECIAL_TOKEN_TEXT.search(text)
    if found:
        warn(
            where,
            f"contains the text {found.group()}, which the tokenizer "
            "turns into the special token. Remove it from the data unless that is meant.",
        )
