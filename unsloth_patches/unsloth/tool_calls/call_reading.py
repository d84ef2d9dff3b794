# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One tool call as people have it, read into OpenAI's form.

Nothing is guessed: a key that looks like arguments and is none that is known raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Dict

from .errors import ToolCallError, where_in
from .json_text import checked_json
from .values import is_missing, plain

_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "tool_kwargs")
# A key that holds something which is not read, and would be lost in silence.
_LOOKS_LIKE_ARGUMENTS = re.compile(r"arg(ument)?s?(_?json)?$|param|inputs?$|kwargs$", re.IGNORECASE)


def read_call(raw: Any, index: int, number: int) -> Dict[str, Any]:
    """``{"id", "type": "function", "function": {"name", "arguments"}}``, arguments as they are."""
    if type(raw) is dict and raw.keys() <= _CALL_KEYS and type(raw.get("function")) is dict:
        function = raw["function"]  # OpenAI's own form, as most calls are
        if function.keys() == _FUNCTION_KEYS:
            simple = {"type": "function", "function": dict(function)}
            return simple if raw.get("id") is None else {"id": raw["id"], **simple}
    where = where_in(index, number)
    call = plain(raw)
    if isinstance(call, str) and call.lstrip().startswith("{"):
        call = checked_json(call, where + "it")
    if not isinstance(call, Mapping):
        raise ToolCallError(
            where + f"is a {type(call).__name__}; expected "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
        )
    fields = {key: plain(value) for key, value in call.items() if not is_missing(value)}
    function = fields.pop("function", None)
    if isinstance(function, Mapping):
        fields.update((k, plain(v)) for k, v in function.items() if not is_missing(v))
    elif isinstance(function, str):
        fields.setdefault("name", function)
    name = fields.get("name", fields.get("tool_name"))
    ids = (fields.get(key) for key in ("id", "call_id", "tool_id", "tool_call_id"))
    call_id = next((one for one in ids if one is not None), None)
    function = {"name": name, "arguments": read_arguments(fields, where_in(index, number, name))}
    tidy = {"type": "function", "function": function}
    return tidy if call_id is None else {"id": call_id, **tidy}


_CALL_KEYS = frozenset(("id", "type", "function"))
_FUNCTION_KEYS = {"name", "arguments"}


def is_lost(key: Any, value: Any, looks_like: "re.Pattern[str]") -> bool:
    """Whether a key that is not read may hold what its name says; a number, as of ``num_calls``, does not."""
    is_number = isinstance(plain(value), (int, float))
    return not is_number and looks_like.search(str(key)) is not None


def read_arguments(fields: Dict[str, Any], where: str) -> Any:
    given = [key for key in _ARGUMENT_KEYS if key in fields]
    if any(fields[key] != fields[given[0]] for key in given[1:]):
        raise ToolCallError(
            where + f"has {' and '.join(given)}, which differ; keep the one that is meant."
        )
    for key, value in fields.items():
        unread = isinstance(value, Mapping) and not given and value
        if key not in _ARGUMENT_KEYS and (unread or is_lost(key, value, _LOOKS_LIKE_ARGUMENTS)):
            raise ToolCallError(
                where
                + f"the key {key!r} looks like arguments and is not read; name it 'arguments', "
                "or leave it out."
            )
    return fields[given[0]] if given else None
