# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Tools and the JSON schemas of their parameters, and what Arrow fills into both.

In an Arrow table every row has the union of all keys, with None for those it had not. A tool's
schema tells such a None in a call's arguments from a null that was meant.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Mapping

from .errors import ToolCallError


_NULL_MAY_BE_MEANT = ("default", "const", "example", "examples")


def prepare_tools(tools: Any) -> Any:
    """Tools as the template needs them: JSON text is parsed, and Arrow's filling is taken out.

    Raises ToolCallError for a text that is not the JSON of a list.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ToolCallError(
                f"Unsloth: tools is a text that is not JSON ({error}). Give a list."
            ) from None
        if tools is not None and not isinstance(tools, list):
            raise ToolCallError(
                f"Unsloth: tools is the JSON of a {type(tools).__name__}; give a list."
            )
    if not isinstance(tools, (list, tuple)):
        return tools
    return [_without_null_keywords(tool) if _is_filled(tool) else tool for tool in tools]


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
        return {k: _without_null_keywords(v) for k, v in schema.items() if v is not None}
    if isinstance(schema, (list, tuple)):
        return [_without_null_keywords(inner) for inner in schema]
    return schema


def schemas_of(tools: Any) -> Dict[str, Any]:
    """Tool name -> JSON schema of its parameters."""
    schemas = {}
    for tool in prepare_tools(tools) or ():
        if callable(tool):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        if isinstance(tool, Mapping):
            function = tool.get("function")
            function = function if isinstance(function, Mapping) else tool
            parameters = function.get("parameters") or {}
            # A tool without parameters has none that could be null, unless it takes any.
            has_any = parameters.get("additionalProperties")
            schemas[tool_name(dict(tool))] = (
                parameters if has_any else {"properties": {}, **parameters}
            )
    return schemas


def tool_name(tool) -> str:
    """Name of a tool as apply_chat_template takes it: a function, or a schema with or without
    ``{"type": "function", "function": ...}`` around it."""
    if isinstance(tool, dict):
        function = tool.get("function")
        return str((function if isinstance(function, dict) else tool).get("name"))
    return getattr(tool, "__name__", str(tool))


def without_filling(value: Any, schema: Any) -> Any:
    """``value`` without the None entries that ``schema`` does not allow."""
    schema = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, Mapping) and isinstance(schema.get("properties"), Mapping):
        known = schema["properties"]
        return {
            key: without_filling(inner, known.get(key))
            for key, inner in value.items()
            if inner is not None or (key in known and _allows_null(known[key]))
        }
    if isinstance(value, (list, tuple)) and schema.get("items"):
        return [without_filling(inner, schema["items"]) for inner in value]
    return value


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return True
    for union in ("anyOf", "oneOf"):
        if schema.get(union):
            return any(map(_allows_null, schema[union]))
    if schema.get("nullable"):
        return True
    if schema.get("enum"):
        return None in schema["enum"]
    declared = schema.get("type")
    return declared is None or "null" in ([declared] if isinstance(declared, str) else declared)
