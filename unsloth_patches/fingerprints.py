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
import importlib.util
import inspect
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Set, Tuple

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


def fingerprint_file(path: str, name: str) -> Set[str]:
    """Fingerprints of every definition of ``name`` (``f`` or ``Class.method``) in a file, parsed once.

    An empty set: it defines no such name. Raises SyntaxError for a file that does not parse.
    """
    return {fingerprint_node(node) for node in _definitions(_parsed(path), name)}


def fingerprint_module(
    module: str,
    name: str,
    find_file: Callable[[str], Optional[Path]],
    hops: int = 5,
) -> Set[str]:
    """``fingerprint_file`` for a dotted module; a name that it only imports is sought where it comes from.

    find_file: file of a dotted module, or None. hops: how many imports are followed.
    """
    path = find_file(module)
    if path is None or hops < 0:
        return set()
    found = fingerprint_file(str(path), name)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for origin, there in () if found else _imports_of(str(path), name):
        origin = importlib.util.resolve_name(origin, package)
        found = found or fingerprint_module(origin, there, find_file, hops - 1)
    return found


def _imports_of(path: str, name: str) -> Iterator[Tuple[str, str]]:
    """(module, name there) of each ``from … import`` that may give the file its ``name``."""
    for node in ast.walk(_parsed(path)):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if alias.name == "*" or (alias.asname or alias.name) == name:
                there = name if alias.name == "*" else alias.name
                yield "." * node.level + (node.module or ""), there


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
