# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Put a replacement in beside what it replaces: what the hooks do at import, as source.

- a line ``@decorator`` above every live ``def`` or ``class`` (one per device branch), below ``@staticmethod``;
- ``name = decorator(name)`` after the statement that imports or assigns a name, or that fills a table last;
- the decorator's import at its sorted place among the imports at the top.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from . import LINE_LENGTH, PatchesError
from .project import read_text

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Edit = Tuple[int, List[str]]  # lines to insert, and how many of the file's lines stand above them


def wire(patch: Any, folder: Path) -> None:
    """Edit the files of the fork in ``folder`` for this patch's targets."""
    by_file: Dict[str, List[Any]] = {}
    for target in patch.targets:
        path = wired_path(target, folder)
        if path:
            by_file.setdefault(path, []).append(target)
    for path, targets in by_file.items():
        text = read_text(folder / path)
        file = _File(path, text.split("\n"), ast.parse(text))
        edits = _edits(file, targets)
        # From the end, and what belongs to one place in the order in which it was asked for.
        for above, new in sorted(reversed(edits), key = lambda edit: -edit[0]):
            file.lines[above:above] = new
        (folder / path).write_bytes("\n".join(file.lines).encode("utf-8"))


@dataclass
class _File:
    path: str
    lines: List[str]
    tree: ast.Module


def wired_path(target: Any, folder: Path) -> str:
    """Path of the file that is edited for a target; empty for an optional one that this release lacks."""
    if not target.wired_in and target.module.split(".")[0] != "unsloth":
        raise PatchesError(
            f"{target.attribute} is outside unsloth/, and its registry entry names no wired_in",
            "set wired_in to the file of unsloth/ that shall replace it",
        )
    home = target.module.replace(".", "/")
    candidates = [target.wired_in] if target.wired_in else [home + ".py", home + "/__init__.py"]
    found = [path for path in candidates if (folder / path).is_file()]
    if not found and not target.optional:
        raise PatchesError(
            f"{target.attribute}: Unsloth has no {candidates[0]}", "fix the registry"
        )
    return found[0] if found else ""


def _edits(file: _File, targets: List[Any]) -> List[Edit]:
    edits: List[Edit] = []
    imports: Dict[str, List[Any]] = {}
    afar: List[Any] = []
    for target in targets:
        home = target.module.replace(".", "/")
        if file.path not in (home + ".py", home + "/__init__.py"):
            afar.append(target)
            continue
        same = {t.name for t in targets if t.replacement == target.replacement} - {target.name}
        found = list(_at_home(target, file.tree, same, file.lines))
        edits += found
        if found:
            imports.setdefault(_source(file.path, target), []).append(target)
    first_use = min((above for above, _ in edits), default = 0)
    heads: List[Edit] = []
    for module in sorted(imports, key = _order):
        above, new = _import(file, module, imports[module], first_use)
        # One empty line before all that are put in at one place.
        heads.append((above, new[1:] if heads and heads[-1][0] == above and not new[0] else new))
    return heads + edits + ([_from_afar(afar, file.path, file.tree)] if afar else [])


def _decorator(target: Any) -> str:
    return target.replacement.partition(":")[2]


# ------------------------------------------------------------------------- in the name's own module


def _at_home(target: Any, tree: ast.Module, same: set, lines: List[str]) -> Iterator[Edit]:
    head, _, method = target.name.partition(".")
    live = _live(tree.body, head)
    if not live and not target.optional:
        raise PatchesError(f"{target.attribute}: its module defines no {head}", "fix the registry")
    for node, block in live:
        if method and isinstance(node, ast.ClassDef):
            yield _method(node, method, _decorator(target), lines)
        elif isinstance(node, DEFINITIONS):
            yield _above(node, _decorator(target))
        elif not _is_none(node) and not _aliases(node, same):
            yield _after(node, block, target)


def _live(body: List[ast.stmt], name: str) -> List[Tuple[Any, List[ast.stmt]]]:
    """The statements that may have bound ``name`` last, each with its block: one, or one per branch."""
    found: List[Tuple[Any, List[ast.stmt]]] = []
    for node in body:
        if name in _bound(node):
            # `f = wrap(f)` keeps what f was given before.
            found = found if found and _mentions(node, name) else [(node, body)]
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            branches = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            branches += [handler.body for handler in getattr(node, "handlers", [])]
            inner = [_live(branch, name) for branch in branches]
            always = isinstance(node, ast.With) or (
                isinstance(node, ast.If) and inner[0] and inner[1]
            )
            always = always or (isinstance(node, ast.Try) and inner[0] and all(inner[3:]))
            wraps = found and all(_mentions(each, name) for branch in inner for each, _ in branch)
            if not wraps:
                found = ([] if always else found) + [each for branch in inner for each in branch]
    return found


def _mentions(node: ast.stmt, name: str) -> bool:
    value = getattr(node, "value", None)
    names = ast.walk(value) if isinstance(node, ast.Assign) else ()
    return any(isinstance(each, ast.Name) and each.id == name for each in names)


def _bound(node: ast.stmt) -> set:
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = getattr(node, "targets", []) or [getattr(node, "target", None)]
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return set()
    tuples = [each for t in targets for each in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return {each.id for each in tuples if isinstance(each, ast.Name)}


def _is_none(node: ast.stmt) -> bool:
    value = getattr(node, "value", ast.Constant(0))
    return isinstance(value, ast.Constant) and value.value is None


def _aliases(node: ast.stmt, names: set) -> bool:
    """``a = b`` where b was given the same decorator above: a has it already."""
    value = getattr(node, "value", None)
    return isinstance(value, ast.Name) and value.id in names


def _after(node: ast.stmt, block: List[ast.stmt], target: Any) -> Edit:
    """``name = decorator(name)`` after the statement that binds it, or the last one of its block that fills it."""
    last = position = block.index(node)
    for place, statement in enumerate(block[position + 1 :], position + 1):
        fills = _mentions(statement, target.name) and target.name in _bound(statement)
        for part in ast.walk(statement) if not isinstance(statement, DEFINITIONS) else ():
            stores = isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store)
            fills |= stores and getattr(part.value, "id", "") == target.name
        last = place if fills else last
    new = _assignment(target.name, _decorator(target), target.name, node.col_offset)
    if last > position:  # not amid lines that belong together
        while [each.lineno for each in block[last + 1 : last + 2]] == [block[last].end_lineno + 1]:
            last += 1
        return block[last].end_lineno, ["", *new]
    imports = (ast.Import, ast.ImportFrom)
    if isinstance(block[last], imports) and not node.col_offset:  # as ruff format wants it
        new = ["", *new, *[""] * isinstance((block + [node])[last + 1], imports)]
    return block[last].end_lineno, new


def _above(node: Any, decorator: str) -> Edit:
    """Topmost, but below @staticmethod and @classmethod: the decorator gets and returns a plain function."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    for each in node.decorator_list:
        if getattr(each, "id", "") in ("staticmethod", "classmethod"):
            first = each.end_lineno + 1
    return first - 1, [" " * node.col_offset + f"@{decorator}"]


def _method(owner: ast.ClassDef, name: str, decorator: str, lines: List[str]) -> Edit:
    own = [node for node, _ in _live(owner.body, name) if isinstance(node, DEFINITIONS)]
    if own:
        return _above(own[-1], decorator)
    # Inherited, and in Unsloth those are static: `from_pretrained` and its like.
    first = owner.body[0]
    base = ast.unparse(owner.bases[0]) if owner.bases else "object"
    stock = f"{base}.{name}"
    new = _assignment(name, f"staticmethod({decorator}", f"{stock})", first.col_offset)
    if isinstance(first, ast.Pass) and len(owner.body) == 1:
        lines[first.lineno - 1] = "\n".join(new)
        return first.lineno, []
    for node in owner.body:
        if name in _bound(node) and ast.unparse(node.value).startswith("staticmethod("):
            # A patch before this one has decorated it: around that, in as many lines until all is put in.
            inner = ast.unparse(node.value.args[0])
            new = _assignment(name, "staticmethod", f"{decorator}({inner})", first.col_offset)
            one = node.end_lineno == node.lineno
            lines[node.lineno - 1 : node.end_lineno] = ["\n".join(new)] if one else new
            return node.end_lineno, []
    return owner.body[-1].end_lineno, ["", *new]


def _assignment(
    name: str,
    decorator: str,
    stock: str,
    column: int = 0,
) -> List[str]:
    indent = " " * column
    line = f"{indent}{name} = {decorator}({stock})"
    if len(line) <= LINE_LENGTH:
        return [line]
    return [f"{indent}{name} = {decorator}(", f"{indent}    {stock}", f"{indent})"]


# ------------------------------------------------------------ from another module (names of the zoo)


def _from_afar(targets: List[Any], path: str, tree: ast.Module) -> Edit:
    """Replace names in their own modules, after the import here that leads there, and rebind imported ones."""
    sources: Dict[str, set] = {}
    zoo: List[str] = []
    lines: List[str] = []
    place = 0
    heads = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for target in targets:
        alias = "_" + target.module.replace("unsloth_", "").replace(".", "_")
        sources.setdefault(_source(path, target), set()).add(_decorator(target))
        zoo += [f"import {target.module} as {alias}"]
        lines += _assignment(f"{alias}.{target.name}", _decorator(target), f"{alias}.{target.name}")
        for node in heads:
            module = getattr(node, "module", "") or ""
            if module and (target.module + ".").startswith(module + "."):
                place = max(place, node.end_lineno)
            if module == target.module and target.name in _bound(node):
                lines.append(f"{target.name} = {alias}.{target.name}")
    own = [part for name in sorted(sources) for part in _importing(name, sources[name])]
    return place or heads[-1].end_lineno, ["", *own, *sorted(set(zoo)), "", *lines]


# --------------------------------------------------------------------------------------- the import


def _import(file: _File, module: str, targets: List[Any], first_use: int) -> Edit:
    """The import line, after the relative import at the top that sorts next before it."""
    new = _importing(module, {_decorator(target) for target in targets})
    anchor = next((target.import_after for target in targets if target.import_after), "")
    if anchor == "beside":
        starts = [
            min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            for node in file.tree.body
        ]
        return max(start for start in starts if start <= first_use + 1) - 1, [*new, "", ""]
    if anchor:
        if anchor not in file.lines[:first_use]:
            raise PatchesError(f"no line {anchor!r} before the first use", "correct import_after")
        return file.lines.index(anchor) + 1, new
    head: List[Any] = []
    for node in file.tree.body:
        if isinstance(node, DEFINITIONS) or node.end_lineno > first_use:
            break
        head += [node] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
    if not head:
        return file.tree.body[0].lineno - 1, [*new, ""]
    relative = {
        node: _order("." * node.level + (node.module or "")) for node in head if _level(node)
    }
    earlier = [node for node in relative if relative[node] <= _order(module)]
    if earlier:
        best = max(earlier, key = lambda node: (relative[node], node.lineno)).end_lineno
    else:
        best = next(iter(relative)).lineno - 1 if relative else head[-1].end_lineno
    after = next((node for node in head if node.end_lineno == best), None)
    last = after is head[-1] and not _level(after) and not file.lines[best].strip()
    return best, ["", *new] if last else new


def _level(node: Any) -> int:
    return getattr(node, "level", 0)


def _source(path: str, target: Any) -> str:
    return _relative(path, "unsloth." + target.replacement.partition(":")[0])


def _order(module: str) -> Tuple[int, str]:
    """As isort orders relative imports: the furthest package first."""
    name = module.lstrip(".")
    return len(name) - len(module), name


def _importing(module: str, names: set) -> List[str]:
    line = f"from {module} import {', '.join(sorted(names))}"
    if len(line) <= LINE_LENGTH:
        return [line]
    return [f"from {module} import (", *(f"    {name}," for name in sorted(names)), ")"]


def _relative(path: str, module: str) -> str:
    """``module`` as a relative import in the file at ``path``: ``..kernels.linear_loss``."""
    package, wanted = path.split("/")[:-1], module.split(".")
    common = 0
    while common < min(len(package), len(wanted) - 1) and package[common] == wanted[common]:
        common += 1
    return "." * (len(package) - common + 1) + ".".join(wanted[common:])
