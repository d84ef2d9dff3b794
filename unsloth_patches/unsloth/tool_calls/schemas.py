# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tools and the JSON schemas of their parameters, and what Arrow fills into both.

In an Arrow table every row has the union of all keys, with None for those it had not. A tool's
schema tells such a None in a call's arguments from a null that was meant.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Dict, FrozenSet, Iterator, List, Optional

from .errors import ToolCallError
from .values import is_missing, plain

_NULL_MAY_BE_MEANT = ("default", "const", "example", "examples", "enum")


def prepare_tools(tools: Any) -> Optional[List[Any]]:
    """Tools as the template needs them, from a list of schemas or functions, numpy or Arrow values, or
    JSON text of the list or of its entries. Arrow's filling is taken out. None where there are none.

    Raises ToolCallError for a text that is not the JSON of a list.
    """
    tools = None if is_missing(tools) else plain(tools)
    if isinstance(tools, str):
        tools = _loaded(tools) if tools.strip() else None
    if isinstance(tools, Mapping):
        inner = plain(tools.get("tools"))
        tools = inner if isinstance(inner, list) else [tools]
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise ToolCallError(f"Unsloth: tools is a {type(tools).__name__}; give a list of tools.")
    tools = [_tool(tool) for tool in tools or ()]
    if _may_have_null(tools):
        tools = [_without_null_keywords(tool) if _is_filled(tool) else tool for tool in tools]
    return tools or None


def _loaded(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ToolCallError(
            f"Unsloth: tools is a text that is not JSON ({error}). Give a list."
        ) from None
    if value is not None and not isinstance(value, (list, dict)):
        raise ToolCallError(f"Unsloth: tools is the JSON of a {type(value).__name__}; give a list.")
    return value


def _tool(tool: Any) -> Any:
    if type(tool) is dict and "input_schema" not in tool:
        return tool
    tool = plain(tool)
    if isinstance(tool, str):
        tool = _loaded(tool)
    if isinstance(tool, Mapping) and isinstance(tool.get("input_schema"), Mapping):  # Anthropic's
        function = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
        return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}
    return tool


def tool_name(tool: Any) -> str:
    """Name of a tool as apply_chat_template takes it: a function, or a schema with or without
    ``{"type": "function", "function": ...}`` around it."""
    if isinstance(tool, Mapping):
        function = tool.get("function")
        return str((function if isinstance(function, Mapping) else tool).get("name"))
    return getattr(tool, "__name__", str(tool))


def tool_names(tools: Any) -> List[str]:
    return [tool_name(tool) for tool in prepare_tools(tools) or ()]


class Schemas:
    """Tool name -> JSON schema of its parameters, each read when it is first asked for.

    is_prepared: the tools come from ``prepare_tools``.
    """

    def __init__(
        self,
        tools: Any,
        is_prepared: bool = False,
    ):
        self._given, self._is_prepared = tools, is_prepared
        self._tools: Optional[Dict[str, Any]] = None
        self._schemas: Dict[str, Any] = {}
        self._arguments: Dict[str, Optional[FrozenSet[str]]] = {}

    def names(self) -> List[str]:
        return list(self._by_name())

    def get(self, name: str) -> Any:
        if name not in self._schemas:
            self._schemas[name] = _parameters(self._by_name().get(name))
        return self._schemas[name]

    def arguments(self, name: str) -> Optional[FrozenSet[str]]:
        """Names of the arguments that a tool declares; None where it takes any, or is not known."""
        if name not in self._arguments:
            self._arguments[name] = _argument_names(self.get(name))
        return self._arguments[name]

    def declare(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether a call is of a tool and of arguments that are declared, or no tools are at all."""
        tools = self._by_name()
        if name not in tools:
            return not tools
        known = self.arguments(name)
        return known is None or arguments.keys() <= known

    def _by_name(self) -> Dict[str, Any]:
        if self._tools is None:
            tools = self._given if self._is_prepared else prepare_tools(self._given)
            self._tools = {tool_name(tool): tool for tool in tools or ()}
        return self._tools


@functools.lru_cache(maxsize = 100)
def _schema_of_function(function: Any) -> Any:
    from transformers.utils import get_json_schema
    return get_json_schema(function)


def _argument_names(schema: Any) -> Optional[FrozenSet[str]]:
    places = list(_alternatives(schema, schema))
    listed = [one["properties"] for one in places if isinstance(one.get("properties"), Mapping)]
    takes_any = any(one.get(key) for one in places for key in _OTHER_NAMES)
    names = frozenset(name for properties in listed for name in properties)
    # None named is more often a schema left out than a tool without arguments.
    return names if names and not takes_any else None


_OTHER_NAMES = ("additionalProperties", "patternProperties")


def _parameters(tool: Any) -> Any:
    """The schema of a tool's parameters; None where it has none that can be read."""
    if callable(tool):
        tool = _schema_of_function(tool)
    if not isinstance(tool, Mapping):
        return None
    function = tool.get("function")
    function = function if isinstance(function, Mapping) else tool
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        return None
    # A tool without parameters has none that could be null, unless it takes any.
    known = parameters.get("additionalProperties") or any(
        key in parameters for key in ("$ref", "allOf", "anyOf", "oneOf")
    )
    return parameters if known else {"properties": {}, **parameters}


def _may_have_null(value: Any) -> bool:
    """False where plain lists and dicts have no None in them: most tools, told fast."""
    for one in value.values() if type(value) is dict else value:
        kind = type(one)
        if kind is dict or kind is list:
            if _may_have_null(one):
                return True
        elif kind is not str and kind is not bool and kind is not int and kind is not float:
            return True
    return False


def _is_filled(schema: Any) -> bool:
    """Whether a keyword is None that can never be: then Arrow merged this schema with others."""
    if isinstance(schema, Mapping):
        return any(
            key not in _NULL_MAY_BE_MEANT and (value is None or _is_filled(value))
            for key, value in schema.items()
        )
    return isinstance(schema, (list, tuple)) and any(map(_is_filled, schema))


def _without_null_keywords(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {
            k: v if k == "enum" else _without_null_keywords(v)
            for k, v in schema.items()
            if v is not None
        }
    if isinstance(schema, (list, tuple)):
        return [_without_null_keywords(inner) for inner in schema]
    return schema


# ---------------------------------------------------------------- null or filling


def without_filling(value: Any, schema: Any) -> Any:
    """``value`` without the None entries that ``schema`` does not allow."""
    return _without_filling(value, [schema], schema)


def _without_filling(value: Any, schemas: List[Any], root: Any) -> Any:
    """schemas: those that may describe the value, which all stand in ``root``."""
    if isinstance(value, Mapping):
        places = [one for schema in schemas for one in _alternatives(schema, root)]
        objects = [one for one in places if isinstance(one.get("properties"), Mapping)]
        takes_any = not objects or any(one.get("additionalProperties") for one in places)
        kept = {}
        for key, inner in value.items():
            known = [one["properties"][key] for one in objects if key in one["properties"]]
            allowed = any(_allows_null(one, root) for one in known) if known else takes_any
            if inner is not None or allowed:
                kept[key] = _without_filling(inner, known, root)
        return kept
    if isinstance(value, (list, tuple)):
        places = [one for schema in schemas for one in _alternatives(schema, root)]
        items = [one["items"] for one in places if one.get("items")]
        return [_without_filling(inner, items, root) for inner in value]
    return value


def _alternatives(
    schema: Any,
    root: Any,
    seen: tuple = (),
) -> Iterator[Mapping[str, Any]]:
    """The schema and those that it is made of or chooses from, each reference followed once."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    reference = schema.get("$ref")
    if reference is not None and reference not in seen:
        seen += (reference,)
        yield from _alternatives(_referred(reference, root), root, seen)
    for key in ("allOf", "anyOf", "oneOf"):
        for inner in schema.get(key) or ():
            yield from _alternatives(inner, root, seen)


def _referred(reference: Any, root: Any) -> Any:
    """What ``#/$defs/Name`` points to in ``root``; None where it points nowhere."""
    found = root
    for part in str(reference).lstrip("#").strip("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) and part else found
    return found


def _allows_null(
    schema: Any,
    root: Any,
    seen: tuple = (),
) -> bool:
    if not isinstance(schema, Mapping):
        return True
    reference = schema.get("$ref")
    seen_here = seen if reference is None else seen + (reference,)

    def inner(part: Any) -> bool:
        return _allows_null(part, root, seen_here)

    if schema.get("nullable") or ("default" in schema and schema["default"] is None):
        return True
    unions = [schema[key] for key in ("anyOf", "oneOf") if schema.get(key)]
    if not all(any(map(inner, union)) for union in unions):
        return False
    if not all(map(inner, schema.get("allOf") or ())):
        return False
    if reference is not None and reference not in seen:
        if not inner(_referred(reference, root)):
            return False
    if schema.get("enum"):
        return None in schema["enum"]
    if "const" in schema:
        return schema["const"] is None
    declared = schema.get("type")
    return declared is None or "null" in ([declared] if isinstance(declared, str) else declared)
