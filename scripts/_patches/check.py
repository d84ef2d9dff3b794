# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Is patches/ what the working tree exports, and does it hold on the pinned Unsloth?"""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

from . import PatchesError
from .build import Built, build_base, build_fork
from .git import Git
from .lint import OLDEST_PYTHON, orphans, problems
from .project import Project, read_text

REEXPORT = "run `python scripts/patches.py export`"


def check(project: Project, scratch: Path, report: Callable[[str, List[str]], None]) -> bool:
    """Run every check, calling ``report(what, problems)`` after each; True if all are clean."""
    clean = True

    def step(what: str, found: List[str]) -> None:
        nonlocal clean
        clean = clean and not found
        report(what, found)

    step("catalogue and files that land", problems(project))
    step("fingerprints of the pinned Unsloth", stale_fingerprints(project))
    if not clean:
        return False  # no use in building from files that are known to be wrong
    step("every module and test belongs to a patch", list(orphans(project)))
    built = build_fork(project, scratch / "exported")
    step("patches/ is what the working tree exports", list(differences(project, built)))
    applied = build_base(project.pinned_unsloth(), scratch / "applied")
    step("git am of the series on the pinned Unsloth", apply_series(project, built, applied))
    step("every file compiles", list(syntax_errors(applied.folder, built)))
    return clean


def export(project: Project, built: List[Built]) -> List[Tuple[str, str]]:
    """Write patches/*.patch and series; returns (file, what happened to it)."""
    wanted = {f"{patch.name}.patch": patch.content for patch in built}
    wanted["series"] = project.series().encode()
    outcome = []
    for name, content in wanted.items():
        path = project.folder / name
        before = path.read_bytes() if path.is_file() else None
        if before != content:
            path.write_bytes(content)
        outcome.append(
            (name, "new" if before is None else "kept" if before == content else "changed")
        )
    for path in sorted(project.folder.glob("*.patch")):
        if path.name not in wanted:
            path.unlink()
            outcome.append((path.name, "removed: its patch is not in the registry"))
    return outcome


def differences(project: Project, built: List[Built]) -> Iterator[str]:
    """Where patches/ is not what would be exported now, and files there that nothing lists."""
    for patch in built:
        path = project.folder / f"{patch.name}.patch"
        if not path.is_file():
            yield f"patches/{path.name} is missing; {REEXPORT}"
        elif path.read_bytes() != patch.content:
            line = _first_difference(path.read_bytes(), patch.content)
            yield f"patches/{path.name} is out of date from line {line}; {REEXPORT}"
    series = project.folder / "series"
    if not series.is_file() or series.read_bytes() != project.series().encode():
        yield f"patches/series does not list the registry's patches in order; {REEXPORT}"
    known = {"UPSTREAM", "series", "README.md"}
    for patch in project.patches:
        known |= {
            f"{patch.name}.patch",
            f"messages/{patch.name}.md",
            f"callsites/{patch.name}.diff",
        }
    for path in sorted(project.folder.rglob("*")):
        name = path.relative_to(project.folder).as_posix()
        if path.is_file() and name not in known:
            yield f"patches/{name} belongs to no patch in the registry; remove it, or register its patch"


def _first_difference(old: bytes, new: bytes) -> int:
    pairs = zip(old.splitlines(), new.splitlines())
    same = (number for number, (a, b) in enumerate(pairs, 1) if a != b)
    return next(same, min(old.count(b"\n"), new.count(b"\n")) + 1)


def apply_series(project: Project, built: List[Built], git: Git) -> List[str]:
    """git am of the files in patches/ must give the commits that were exported, message and tree."""
    for patch in built:
        path = project.folder / f"{patch.name}.patch"
        if not path.is_file():
            return [f"{path.name} is missing"]
        reason = git.am(path.read_bytes())
        if reason:
            return [f"{path.name}: {reason}"]
        if git.tree() != patch.tree:
            return [f"{path.name}: git am gives tree {git.tree()}, the export {patch.tree}"]
        message = project.commit_message(next(p for p in project.patches if p.name == patch.name))
        if git.text("log", "-1", "--format=%B") != message.strip():
            return [f"{path.name}: git am changes the commit message"]
    return []


def syntax_errors(folder: Path, built: List[Built]) -> Iterator[str]:
    """Compile the whole tree; files that a patch touches also have to parse as Python 3.9."""
    touched = {name for patch in built for name in patch.files}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # upstream's invalid escapes are not ours to report
                compile(path.read_bytes(), name, "exec", dont_inherit = True)
                if name in touched:
                    ast.parse(read_text(path), feature_version = OLDEST_PYTHON)
        except SyntaxError as error:
            yield f"{name}:{error.lineno}: {error.msg}"


def stale_fingerprints(project: Project) -> List[str]:
    """Targets whose definition in the pinned release is none that the registry accepts."""
    unsloth = project.pinned_unsloth()
    zoo = project.pinned_zoo() if project.needs_zoo() else None
    rows = (stale_target(project, t, unsloth, zoo) for p in project.patches for t in p.targets)
    return [row for row in rows if row]


def stale_target(project: Project, target: Any, unsloth: Any, zoo: Any) -> str:
    """Why a target does not fit a release, or an empty string."""
    release = zoo if target.module.split(".")[0] == "unsloth_zoo" else unsloth
    path = release.module_path(target.module) if release else None
    if path is None:
        return "" if target.optional else f"{target.module} is not there"
    if not target.fingerprints:
        head = target.name.split(".")[0]
        return "" if target.optional or head in release.text(path) else f"{path} has no {head}"
    try:
        found = project.fingerprints(target, unsloth, zoo)
    except SyntaxError as error:
        raise PatchesError(
            f"{path} does not parse on this Python: {error}", "use Python 3.10 or newer"
        )
    if not found:
        return "" if target.optional else f"{path} defines no {target.name}"
    if found & target.fingerprints:
        return ""
    return (
        f"{target.attribute} has fingerprint {', '.join(sorted(found))}, "
        f"the registry accepts {', '.join(sorted(target.fingerprints))}"
    )
