# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Rules that a file must meet before it may land in Unsloth, checked on its text alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, Iterator, List, Tuple

from . import LINE_LENGTH
from .project import MESSAGE_PARTS, BACKENDS, Project, read_text

LICENCE = "# SPDX-License-Identifier: Apache-2.0"
OLDEST_PYTHON = (3, 9)
# Lines of a message that git am would take for the end of it or for a mail header.
UNMAILABLE = re.compile(r"^(---|diff -|Index: |>?From |From:|Subject:|Date:)")


def problems(project: Project) -> List[str]:
    """What makes the patches impossible to build or to send, one sentence each; empty if nothing does."""
    found = list(_catalogue(project))
    for patch in project.patches:
        found += _files(project, patch)
        found += _message(project, patch)
        found += _replacements(project, patch)
    return found


def _catalogue(project: Project) -> Iterator[str]:
    seen: List[str] = []
    for patch in project.patches:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", patch.name):
            yield f"patch {patch.name!r}: a name is lower-case words joined by hyphens"
        if patch.name in seen:
            yield f"{patch.name}: two patches have this name"
        for name in patch.requires:
            if name not in seen:
                yield f"{patch.name} requires {name}, which does not stand before it in PATCHES"
        for test, backend in patch.tests.items():
            if backend not in BACKENDS:
                yield f"{patch.name}: {test} names backend {backend!r}; known: {', '.join(BACKENDS)}"
        if not patch.tests:
            yield f"{patch.name} has no tests: a patch is sent with a test that fails without it"
        seen.append(patch.name)


def _files(project: Project, patch: Any) -> Iterator[str]:
    allowed = {name for other in project.required(patch) for name in other.modules}
    for landed, path in project.lands(patch).items():
        where = path.relative_to(project.root)
        if not path.is_file():
            yield f"{patch.name}: {where} does not exist"
            continue
        text = read_text(path)
        if b"\r" in path.read_bytes():
            yield f"{where} has carriage returns; save it with LF line ends"
        if not text.endswith("\n"):
            yield f"{where} does not end with a newline"
        if LICENCE not in text.splitlines()[:3]:
            yield f"{where} does not start with {LICENCE!r}"
        if "unsloth_patches" in text.replace("the unsloth_patches authors", ""):
            yield f"{where} names unsloth_patches, which the fork does not have"
        try:
            tree = ast.parse(text, feature_version = OLDEST_PYTHON)
        except SyntaxError as error:
            yield f"{where}:{error.lineno}: not Python 3.9: {error.msg}"
            continue
        if landed.startswith("unsloth/"):
            yield from (f"{where}:{line}: {what}" for line, what in _imports(tree, landed, allowed))


def _imports(tree: ast.Module, landed: str, allowed: set) -> Iterator[Tuple[int, str]]:
    """Imports that would not work in both homes: Unsloth at the top, or a module outside the patch."""
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in ("unsloth", "unsloth_zoo"):
                yield node.lineno, f"imports {name} at its top; import it where it is used"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            folder = landed.split("/")[1:-1]
            package = folder[: len(folder) - node.level + 1]
            base = "/".join(package + (node.module.split(".") if node.module else []))
            if base + ".py" in allowed:
                continue
            for name in (f"{base}/{alias.name}".lstrip("/") for alias in node.names):
                if name + ".py" not in allowed:
                    dotted = (base or name).replace("/", ".")
                    yield (
                        node.lineno,
                        f"imports .{dotted}, which neither its patch nor one it requires adds",
                    )


def _message(project: Project, patch: Any) -> Iterator[str]:
    path = project.message_file(patch)
    where = path.relative_to(project.root)
    if not path.is_file():
        yield f"{where} is missing: the pull request's text, with the parts {', '.join(MESSAGE_PARTS)}"
        return
    lines = read_text(path).splitlines()
    for part in MESSAGE_PARTS:
        if part not in lines:
            yield f"{where} has no line {part!r}"
    for number, line in enumerate(lines, 1):
        if UNMAILABLE.match(line):
            yield f"{where}:{number}: git am would cut the message at {line[:20]!r}; indent this line"
        if len(line) > LINE_LENGTH:
            yield f"{where}:{number}: {len(line)} characters; wrap at {LINE_LENGTH}"
    title = patch.title
    if not title[:1].isupper() or title.endswith(".") or "\n" in title or len(title) > LINE_LENGTH:
        yield f"{patch.name}: title {title!r}; one capitalised line up to {LINE_LENGTH} characters, no full stop"


def _replacements(project: Project, patch: Any) -> Iterator[str]:
    modules = {name for other in project.required(patch) for name in other.modules}
    for target in patch.targets:
        if not (target.module and target.name):
            yield f"{patch.name}: target {target.attribute!r} is not 'package.module:name'"
        path, _, function = target.replacement.partition(":")
        file = path.replace(".", "/") + ".py"
        if file not in modules:
            yield f"{patch.name}: {target.replacement} is in no module of the patch ({file})"
        elif (project.mirror / file).is_file() and function not in _defined(project.mirror / file):
            yield f"{patch.name}: unsloth_patches/unsloth/{file} defines no {function}"


def _defined(path: Path) -> set:
    try:
        body = ast.parse(read_text(path)).body
    except SyntaxError:
        return set()  # reported by _files
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def clashes(project: Project) -> Iterator[str]:
    """Patches that replace the same thing without an order, or with decorators of one name in one file."""
    seen: List[Tuple[Any, Any]] = []
    for patch in project.patches:
        for target in patch.targets:
            for other, theirs in seen:
                both = f"{other.name} and {patch.name} both"
                if theirs.attribute == target.attribute and other not in project.required(patch):
                    yield f"{both} replace {target.attribute}: let one require the other"
                names = {each.replacement.partition(":")[2] for each in (theirs, target)}
                same_file = (theirs.wired_in or theirs.module) == (target.wired_in or target.module)
                if same_file and len(names) == 1 and theirs.replacement != target.replacement:
                    yield f"{both} import a {names.pop()} into {target.module}: rename one of the two"
        seen += [(patch, target) for target in patch.targets]


def orphans(project: Project) -> Iterator[str]:
    """Modules and tests at a place where files land that no patch adds: nothing would run them."""
    listed = {name for patch in project.patches for name in patch.modules}
    for path in sorted(project.mirror.rglob("*.py")):
        name = path.relative_to(project.mirror).as_posix()
        # An empty __init__.py only makes a folder of Unsloth's importable here.
        if name not in listed and name != "__init__.py" and read_text(path).strip():
            yield f"unsloth_patches/unsloth/{name} belongs to no patch: add it to an entry's modules"
    for path in sorted((project.root / "tests").glob("test_*.py")):
        if f"tests/{path.name}" not in project.backends():
            yield f"tests/{path.name} belongs to no patch: add it, with its backend, to an entry's tests"
    for path in sorted(project.shared.glob("*.py")):
        if f"tests/_shared/{path.name}" not in project.shared_files():
            yield f"tests/_shared/{path.name} belongs to no patch: add it to an entry's shared"
