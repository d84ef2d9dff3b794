# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Recognise a function of upstream by its code: a hash of its AST without docstrings and positions.

Comments, formatting and line numbers may change from release to release without making a
replacement wrong; the code may not. Over a year Unsloth's ``_cross_entropy_forward`` had four
texts and one AST.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from typing import Any, Iterator, Set

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Fields that say nothing of what the code does, or that only some Python versions have.
_IGNORED_FIELDS = {"ctx", "kind", "type_comment", "type_ignores", "type_params"}


def _without_docstring(body: list) -> list:
    first = body[0] if body else None
    is_docstring = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    return body[1:] if is_docstring else body


def _canonical(node: Any) -> str:
    """Text of an AST that is the same on every Python version (``ast.dump`` is not)."""
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name, value in ast.iter_fields(node):
        if isinstance(node, _DEFINITIONS) and name == "body":
            value = _without_docstring(value)
        if name not in _IGNORED_FIELDS and value is not None and value != []:
            parts.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def fingerprint_node(node: ast.AST) -> str:
    """Hash of one definition: 16 hexadecimal digits."""
    return hashlib.sha256(_canonical(node).encode()).hexdigest()[:16]


def _definitions(tree: ast.AST, name: str) -> Iterator[ast.AST]:
    """Definitions of ``name`` or ``Class.method`` outside other functions; a name can have several,
    one per branch of an ``if`` on the device."""
    head, _, rest = name.partition(".")
    for node in getattr(tree, "body", []) + getattr(tree, "orelse", []):
        if isinstance(node, _DEFINITIONS):
            if node.name == head:
                yield from _definitions(node, rest) if rest else (node,)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            yield from _definitions(node, name)
            for handler in getattr(node, "handlers", []):
                yield from _definitions(handler, name)


def fingerprint_source(source: str, name: str) -> Set[str]:
    """Fingerprints of every definition of ``name`` (``f`` or ``Class.method``) in a module's text.

    An empty set: the text defines no such name. Raises SyntaxError for text that does not parse.
    """
    return {fingerprint_node(node) for node in _definitions(ast.parse(source), name)}


def fingerprint_file(path: str, name: str) -> Set[str]:
    """``fingerprint_source`` of a file, parsed once however many names are asked for."""
    return {fingerprint_node(node) for node in _definitions(_parsed(path), name)}


@functools.lru_cache(maxsize = 16)
def _parsed(path: str) -> ast.AST:
    with open(path, encoding = "utf-8") as file:
        return ast.parse(file.read())


def fingerprint_live(function: Any) -> str:
    """Fingerprint of the definition behind a live function or class; ``""`` where there is none to read."""
    try:
        target = inspect.unwrap(function)
        path = inspect.getsourcefile(target)
        tree = _parsed(path)
    except (TypeError, OSError, SyntaxError, ValueError):
        return ""
    code = getattr(target, "__code__", None)
    for node in ast.walk(tree):
        if not isinstance(node, _DEFINITIONS) or node.name != target.__name__:
            continue
        first_line = min([node.lineno] + [d.lineno for d in node.decorator_list])
        if code is None or first_line == code.co_firstlineno:
            return fingerprint_node(node)
    return ""
