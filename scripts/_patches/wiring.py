# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The lines at a module's end that put a replacement in: what the hook does at import, as source."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional

from . import LINE_LENGTH, PatchesError
from .project import read_text


def wire(patch: Any, folder: Path) -> None:
    """Append to each file of the fork in ``folder`` the block for this patch's targets there."""
    by_file: Dict[str, List[Any]] = {}
    for target in patch.targets:
        path = _wired_file(target, folder)
        if path is not None:
            by_file.setdefault(path, []).append(target)
    for path, targets in by_file.items():
        file = folder / path
        text = read_text(file)
        block = _block(patch, path, targets, text)
        if block:
            file.write_bytes((text.rstrip("\n") + "\n\n\n" + block).encode("utf-8"))


def _home(target: Any, folder: Path) -> Optional[str]:
    base = target.module.replace(".", "/")
    candidates = (base + ".py", base + "/__init__.py")
    return next((path for path in candidates if (folder / path).is_file()), None)


def wired_path(target: Any) -> str:
    """The entry's ``wired_in`` as a path in the fork; empty where it names none."""
    path = target.wired_in
    return path if not path or path.startswith("unsloth/") else f"unsloth/{path}"


def _wired_file(target: Any, folder: Path) -> Optional[str]:
    """Path of the file that gets the line; None for an optional target that this release lacks."""
    path = wired_path(target) or _home(target, folder)
    if path and (folder / path).is_file():
        return path
    if target.optional:
        return None
    if target.module.split(".")[0] != "unsloth" and not target.wired_in:
        raise PatchesError(
            f"{target.attribute} is outside unsloth/, and its registry entry names no wired_in",
            "set wired_in to the file of unsloth/ that shall replace it",
        )
    raise PatchesError(
        f"{target.attribute}: Unsloth has no {path or target.module}", "fix the registry"
    )


def _block(patch: Any, path: str, targets: List[Any], text: str) -> str:
    tree = ast.parse(text)
    imports: Dict[str, set] = {}
    lines: List[str] = []
    for target in targets:
        module, _, function = target.replacement.partition(":")
        assignment = _assignment(target, path, function, tree)
        if assignment:
            imports.setdefault(_relative(path, f"unsloth.{module}"), set()).add(function)
            lines += assignment
    if not lines:
        return ""
    comment = textwrap.wrap(
        patch.title,
        LINE_LENGTH,
        initial_indent = "# ",
        subsequent_indent = "# ",
        break_long_words = False,
    )
    heads = [f"from {name} import {', '.join(sorted(imports[name]))}" for name in sorted(imports)]
    return "\n".join(comment + [part for head in heads for part in _folded(head)] + lines) + "\n"


def _folded(line: str) -> List[str]:
    if len(line) <= LINE_LENGTH:
        return [line]
    head, _, names = line.partition(" import ")
    return [f"{head} import (", *(f"    {name}," for name in names.split(", ")), ")"]


def _relative(path: str, module: str) -> str:
    """``module`` as a relative import in the file at ``path``: ``..kernels.linear_loss``."""
    package, wanted = path.split("/")[:-1], module.split(".")
    common = 0
    while common < min(len(package), len(wanted) - 1) and package[common] == wanted[common]:
        common += 1
    return "." * (len(package) - common + 1) + ".".join(wanted[common:])


def _assignment(target: Any, path: str, function: str, tree: ast.Module) -> List[str]:
    home = target.module.replace(".", "/")
    if path in (home + ".py", home + "/__init__.py"):
        return _at_home(target, function, tree)
    return _from_afar(target, path, function, tree)


def _at_home(target: Any, function: str, tree: ast.Module) -> List[str]:
    """``name = replace(name)`` in the module that defines the name."""
    head = target.name.split(".")[0]
    certain = head in _bound(tree.body)
    if not certain and not _bound_anywhere(tree, head):
        if target.optional:
            return []
        raise PatchesError(f"{target.attribute}: its module defines no {head}", "fix the registry")
    line = _replace_line(target.name, function, _decorated(tree, target.name))
    if certain or not target.optional:
        return line
    return [f'if "{head}" in globals():'] + _indented(line)


def _from_afar(target: Any, path: str, function: str, tree: ast.Module) -> List[str]:
    """Set the attribute on its module, and rebind the name here if this file imported it."""
    alias = "_" + target.module.replace("unsloth_zoo", "zoo").replace("unsloth.", "").replace(
        ".", "_"
    )
    if target.module.split(".")[0] == "unsloth":
        relative = _relative(path, target.module)
        dots = relative[: len(relative) - len(relative.lstrip("."))]
        above, _, leaf = relative.lstrip(".").rpartition(".")
        importing = f"from {dots}{above} import {leaf} as {alias}"
    else:
        importing = f"import {target.module} as {alias}"
    line = _replace_line(f"{alias}.{target.name}", function, decorated = False)
    if target.name in _imported_from(tree, target.module):
        line = line + [f"{target.name} = {alias}.{target.name}"]
    if not target.optional:
        return [importing] + line
    guarded = ["try:", *_indented([importing]), "except ImportError:", f"    {alias} = None"]
    return guarded + [f'if hasattr({alias}, "{target.name}"):'] + _indented(line)


def _replace_line(name: str, function: str, decorated: bool) -> List[str]:
    stock = name
    if decorated:
        # A staticmethod or classmethod as it stands in the class, not what attribute access makes of it.
        owner, _, leaf = name.rpartition(".")
        stock = f'vars({owner})["{leaf}"]'
    line = f"{name} = {function}({stock})"
    if len(line) <= LINE_LENGTH:
        return [line]
    return [f"{name} = {function}(", f"    {stock}", ")"]


def _indented(lines: List[str]) -> List[str]:
    return ["    " + line for line in lines]


def _bound(body: List[ast.stmt]) -> set:
    """Names that these statements bind whatever happens."""
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _bound_anywhere(tree: ast.Module, name: str) -> bool:
    """Bound at module level under some ``if``, ``try``, ``with`` or loop."""
    stack: List[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.stmt) and name in _bound([node]):
            return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            stack += ast.iter_child_nodes(node)
    return False


def _decorated(tree: ast.Module, name: str) -> bool:
    """Whether ``Class.method`` is a staticmethod or classmethod."""
    head, _, rest = name.partition(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == head and rest:
            for item in node.body:
                if getattr(item, "name", "") == rest and not isinstance(item, ast.ClassDef):
                    names = {getattr(d, "id", "") for d in getattr(item, "decorator_list", [])}
                    return bool(names & {"staticmethod", "classmethod"})
    return False


def _imported_from(tree: ast.Module, module: str) -> set:
    """Names that this file imported, unrenamed and absolutely, from ``module`` at its top level."""
    return {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == module
        for alias in node.names
        if alias.asname in (None, alias.name)
    }
