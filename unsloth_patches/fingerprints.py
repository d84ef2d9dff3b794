# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Recognise a function of upstream: by a hash of its AST without docstrings and positions, or by its
parameters alone.

Comments, formatting and line numbers may change from release to release without making a
replacement wrong; the code may not. Over a year Unsloth's ``_cross_entropy_forward`` had four
texts and one AST. A replacement that calls the stock function counts on no more than its
parameters, and on the names that it uses of the module.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import os
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

FindFile = Callable[[str], Optional[Path]]
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


def fingerprint_module(module: str, name: str, find_file: FindFile) -> Set[str]:
    """``fingerprint_file`` for a dotted module; a name that it only imports is sought where it comes from.

    find_file: file of a dotted module, or None.
    """
    return {fingerprint_node(node) for node in find_definitions(module, name, find_file)[1]}


def find_definitions(
    module: str,
    name: str,
    find_file: FindFile,
    hops: int = 5,
) -> Tuple[str, List[ast.AST]]:
    """(Module, definitions of ``name`` there): a dotted module's own, or those where it imports the name
    from, ``hops`` imports away."""
    path = find_file(module)
    found = list(_definitions(_parsed(str(path)), name)) if path else []
    if found or path is None or not hops:
        return module, found
    head, dot, rest = name.partition(".")
    for origin, there in _find_imports(path, module, head):
        home, found = find_definitions(origin, there + dot + rest, find_file, hops - 1)
        if found:
            return home, found
    return module, []


def binds(
    module: str,
    name: str,
    find_file: FindFile,
    hops: int = 5,
) -> bool:
    """Whether the module's source binds ``name`` at its top, in whatever branch, or ``from … import *`` does."""
    path = find_file(module)
    if path is None or hops < 0:
        return False
    head = name.partition(".")[0]
    bound = set(_bound_names(_parsed(str(path))))
    if head in bound or "*" not in bound:
        return head in bound
    origins = (origin for origin, _ in _find_imports(path, module, head))
    return any(binds(origin, head, find_file, hops - 1) for origin in origins)


def binds_field(module: str, name: str, find_file: FindFile) -> bool:
    """Whether a class of the module binds a name in its body, or its methods do on ``self``: ``Class.field``."""
    owner, _, field = name.partition(".")
    classes = find_definitions(module, owner, find_file)[1]
    return any(field in _bound_names(node) or field in _set_on_self(node) for node in classes)


def _set_on_self(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def _bound_names(tree: ast.AST) -> Iterator[str]:
    """What the statements of a module bind, those of branches, loops and handlers included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _DEFINITIONS):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif not isinstance(node, ast.Lambda):
            yield from _bound_names(node)


def target_misfit(target: Any, find_file: FindFile) -> str:
    """Why a target (see ``registry.Target``) cannot be replaced, judged by the sources that ``find_file``
    finds; empty where it can, and where an optional one is not there."""
    if find_file(target.module) is None:
        return "" if target.optional else f"this Unsloth has no module {target.module}"
    home, found = find_definitions(target.module, target.name, find_file)
    if not found:
        known = binds(target.module, target.name, find_file)
        read = target.fingerprints or target.signature or target.uses
        if known and not read or target.optional:
            return ""
        what = "defined in this Unsloth" if read else "there"
        return f"{target.attribute} is not {what}"
    if home != target.module and not target.imported:
        return moved(target, home)
    reason = _unknown_code(target, found)
    if reason:
        return reason
    for place in target.names:
        module, _, name = place.rpartition(":")
        if not binds(module or target.module, name, find_file):
            return f"{module or target.module} has no {name}, which the patch relies on"
    return ""


def moved(target: Any, home: str) -> str:
    """What it reads there is not what the target's module has, and what reads it need not ask that one."""
    return (
        f"{target.attribute} moved to {home}, where this patch does not follow; "
        "`python -m unsloth_patches doctor` names the releases that it is for"
    )


def _unknown_code(target: Any, definitions: List[ast.AST]) -> str:
    """One definition that is known is enough: another may be for another device. The live one is
    checked once it is there."""
    prints = {fingerprint_node(node) for node in definitions}
    if target.fingerprints and not prints & target.fingerprints:
        found = ", ".join(sorted(prints))
        return f"{target.attribute} is a version that this patch does not know ({found})"
    reasons = [
        parameter_misfit(node, target.signature) or _unused(node, target.uses)
        for node in definitions
    ]
    return f"{target.attribute}: {reasons[0]}" if all(reasons) else ""


def _unused(node: ast.AST, uses: Sequence[str]) -> str:
    """Which of the dotted names the definition does not use; empty where it uses all of them."""
    used = {
        ast.unparse(each) for each in ast.walk(node) if isinstance(each, (ast.Name, ast.Attribute))
    }
    missing = [name for name in uses if name not in used]
    return f"its code does not use {', '.join(missing)}" if missing else ""


def parameter_misfit(node: ast.AST, signature: Sequence[str]) -> str:
    """What a definition lacks of a target's ``signature``; empty where it has all of it."""
    arguments = getattr(node, "args", None)
    if not signature or arguments is None:
        return "it is no function, and has no parameters" if signature else ""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    defaults += arguments.kw_defaults
    texts = ["" if default is None else "=" + ast.unparse(default) for default in defaults]
    names = [each.arg for each in [*positional, *arguments.kwonlyargs]]
    more = [
        f"{star}{each.arg}"
        for star, each in (("*", arguments.vararg), ("**", arguments.kwarg))
        if each
    ]
    return _lacking(dict(zip(names, texts)), len(positional), more, signature)


def live_parameter_misfit(function: Any, signature: Sequence[str]) -> str:
    """``parameter_misfit`` of a function that is there."""
    if not signature:
        return ""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "it tells no parameters"
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [each for each in parameters if each.kind in kinds]
    keyword = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    more = [stars[each.kind] + each.name for each in parameters if each.kind in stars]
    found = {
        each.name: "" if each.default is each.empty else f"={each.default!r}"
        for each in [*positional, *keyword]
    }
    return _lacking(found, len(positional), more, signature)


def _lacking(
    found: Dict[str, str], positional: int, more: List[str], signature: Sequence[str]
) -> str:
    """found: parameter -> its default as ``=text``, or empty; those that can be given by position come
    first. more: ``*args``, ``**kwargs``."""
    names = list(found)
    split = signature.index("*") if "*" in signature else len(signature)
    first, anywhere = signature[:split], signature[split + 1 :]
    if names[: min(split, positional)] != [each.partition("=")[0] for each in first]:
        there = ", ".join(names[: min(split, positional)])
        return f"its first parameters are ({there}), not ({', '.join(first)})"
    missing = [each for each in anywhere if each.partition("=")[0] not in names]
    if missing:
        return f"it has no parameter {', '.join(missing)}"
    others = names[split:] + more
    if "*" not in signature and others:
        return f"it has other parameters too: {', '.join(others)}"
    for each in [*first, *anywhere]:
        name, equals, default = each.partition("=")
        if equals and found[name] != f"={default}":
            return f"the default of {name} is {found[name][1:] or 'none'}, not {default}"
    return ""


def _find_imports(path: Path, module: str, name: str) -> Iterator[Tuple[str, str]]:
    """(module, name there) of each ``from … import`` that may give this module its ``name``."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_parsed(str(path))):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if alias.name == "*" or (alias.asname or alias.name) == name:
                there = name if alias.name == "*" else alias.name
                origin = "." * node.level + (node.module or "")
                yield importlib.util.resolve_name(origin, package), there


def _parsed(path: str) -> ast.AST:
    """The file as it is now: it may have been edited, and its module reloaded."""
    status = os.stat(path)
    return _parsed_version(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize = 16)
def _parsed_version(path: str, modified: int, size: int) -> ast.AST:
    with open(path, encoding = "utf-8") as file:
        return ast.parse(file.read())


def fingerprint_live(function: Any) -> str:
    """Fingerprint of the definition behind a live function or class; ``""`` where there is none to read,
    or where it cannot be told which of several it is."""
    try:
        target = inspect.unwrap(function)
        tree = _parsed(inspect.getsourcefile(target) or "")
    except (TypeError, OSError, SyntaxError, ValueError):
        return ""
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, _DEFINITIONS) and node.name == target.__name__
    ]
    lines = _first_lines(target)
    if lines:
        nodes = [node for node in nodes if _first_line(node) <= lines[0] <= (node.end_lineno or 0)]
        if not isinstance(target, type):
            nodes = [node for node in nodes if _first_line(node) == lines[0]]
    prints = {fingerprint_node(node) for node in nodes}
    return prints.pop() if len(prints) == 1 else ""


def live_home(function: Any) -> str:
    """Module whose code a live function or class is; ``""`` where that says nothing: a function made by
    another one (a decorator's, of whatever module it wraps), and callables of other kinds.

    Not ``__module__``, which ``functools.wraps`` copies from what a function wraps.
    """
    if isinstance(function, type):
        return "" if "<locals>" in function.__qualname__ else function.__module__
    if (
        not isinstance(function, types.FunctionType)
        or function.__code__.co_flags & inspect.CO_NESTED
    ):
        return ""
    return function.__globals__.get("__name__", "")


def _first_line(node: ast.AST) -> int:
    return min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])


def _first_lines(target: Any) -> List[int]:
    """Lines of code that lie in its definition: its own, or a class's methods'."""
    if isinstance(target, types.FunctionType):
        return [target.__code__.co_firstlineno]
    members = vars(target).values() if isinstance(target, type) else ()
    functions = [inspect.unwrap(getattr(member, "__func__", member)) for member in members]
    return [
        function.__code__.co_firstlineno
        for function in functions
        if isinstance(function, types.FunctionType)
        and function.__qualname__.startswith(f"{target.__qualname__}.")
        and function.__code__.co_filename == inspect.getsourcefile(target)
    ]
