# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Rules that a patch must meet before it may land in Unsloth, checked on the text of its files alone."""

from __future__ import annotations

import ast
import re
from typing import Any, Iterator, List, Tuple

from . import LINE_LENGTH
from .project import Project, read_text

BACKENDS = ("cpu", "interpreter", "gloo")
MESSAGE_PARTS = ("Motivation:", "What changes:", "How it was tested:")
LICENCE = "# SPDX-License-Identifier: Apache-2.0"
OLDEST_PYTHON = (3, 9)
# Lines of a message that git am would take for the end of it or for a mail header.
UNMAILABLE = re.compile(r"^(---|diff -|Index: |>?From |From:|Subject:|Date:)")


def problems(project: Project) -> List[str]:
    """What makes the patches impossible to build or to send, one sentence each; empty if nothing does."""
    found: List[str] = []
    before: List[str] = []
    for patch in project.patches:
        for rule in (_entry, _files, _message, _replacements):
            found += (f"{patch.name}: {what}" for what in rule(project, patch))
        found += (
            f"{patch.name} requires {name}, which does not stand before it in PATCHES"
            for name in (*patch.requires, *patch.after)
            if name not in before
        )
        before.append(patch.name)
    return found + [
        f"two patches are called {name}" for name in set(before) if before.count(name) > 1
    ]


def _entry(project: Project, patch: Any) -> Iterator[str]:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", patch.name):
        yield "a name is lower-case words joined by hyphens"
    if not re.fullmatch(rf"[A-Z][^\n]{{,{LINE_LENGTH - 2}}}[^\n.]", patch.title):
        yield f"title {patch.title!r}: one capitalised line up to {LINE_LENGTH} characters, no full stop"
    if not patch.tests:
        yield "it has no tests: a patch is sent with a test that fails without it"
    for test, backend in patch.tests.items():
        if backend not in BACKENDS:
            yield f"{test} names backend {backend!r}; known: {', '.join(BACKENDS)}"


def _files(project: Project, patch: Any) -> Iterator[str]:
    allowed = {name for other in project.required(patch) for name in other.modules}
    for landed, path in project.lands(patch).items():
        where = path.relative_to(project.root)
        if not path.is_file():
            yield f"{where} does not exist"
            continue
        text = read_text(path)
        if b"\r" in path.read_bytes() or not text.endswith("\n"):
            yield f"{where} has carriage returns or no newline at its end; save it with LF line ends"
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
            names = [base, *(f"{base}/{alias.name}".lstrip("/") for alias in node.names)]
            ends = (".py", "/__init__.py")
            if not any(name + end in allowed for name in names for end in ends):
                dotted = (base or names[1]).replace("/", ".")
                yield (
                    node.lineno,
                    f"imports .{dotted}, which neither its patch nor one it requires adds",
                )


def _message(project: Project, patch: Any) -> Iterator[str]:
    path = project.message_file(patch)
    where = path.relative_to(project.root)
    lines = read_text(path).splitlines() if path.is_file() else []
    for part in MESSAGE_PARTS:
        if part not in lines:
            yield f"{where} has no line {part!r}"
    for number, line in enumerate(lines, 1):
        if UNMAILABLE.match(line):
            yield f"{where}:{number}: git am would cut the message at {line[:20]!r}; indent this line"
        if len(line) > LINE_LENGTH:
            yield f"{where}:{number}: {len(line)} characters; wrap at {LINE_LENGTH}"


def _replacements(project: Project, patch: Any) -> Iterator[str]:
    modules = {name for other in project.required(patch) for name in other.modules}
    for target in patch.targets:
        if not (target.module and target.name):
            yield f"target {target.attribute!r} is not 'package.module:name'"
        module, _, function = target.replacement.partition(":")
        base = module.replace(".", "/")
        file = next((base + end for end in (".py", "/__init__.py") if base + end in modules), "")
        if not file:
            yield f"{target.replacement} is in no module of the patch"
        elif (project.mirror / file).is_file():
            text = read_text(project.mirror / file)
            bound = rf"(?m)^(def|class) {function}\b|^{function} =|import \(?(.|\n[^\n]*,\n)*\b{function}\b"
            if not re.search(bound, text):
                yield f"unsloth_patches/unsloth/{file} defines no {function}"


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


def our_names(project: Project) -> Iterator[str]:
    for patch in project.patches:
        for path in project.lands(patch).values():
            if "UNSLOTH_PATCHES" in read_text(path):
                yield f"{path.relative_to(project.root)} names a variable UNSLOTH_PATCHES_…: call it UNSLOTH_…"


def orphans(project: Project) -> Iterator[str]:
    """Modules and tests at a place where files land that no patch adds: nothing would run them."""
    listed = {path for patch in project.patches for path in project.lands(patch).values()}
    files = [*project.mirror.rglob("*.py"), *project.root.glob("tests/test_*.py")]
    files += project.root.glob("tests/_shared/*.py")
    for path in sorted(files):
        # An empty __init__.py only makes a folder of Unsloth's importable here.
        stub = path.name == "__init__.py" and (
            path.parent == project.mirror or not read_text(path).strip()
        )
        if path not in listed and not stub:
            where = path.relative_to(project.root)
            yield f"{where} belongs to no patch: add it to an entry's modules, tests or shared"
