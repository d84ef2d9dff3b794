# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Is patches/ what the working tree exports, and does each patch hold on the pinned Unsloth, alone too?"""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

from . import PatchesError
from .build import Built, build_patches, mails
from .git import Git
from .lint import OLDEST_PYTHON, clashes, orphans, our_names, problems
from .project import Project, read_text

REEXPORT = "run `python scripts/patches.py export`"
LARGEST = (
    800  # changed lines of a patch below unsloth/, and as many of tests; see docs of pull requests
)


def check(project: Project, scratch: Path, report: Callable[[str, List[str]], None]) -> List[Built]:
    """Run every check, calling ``report(what, problems)`` after each; returns the patches for their sizes."""
    before = problems(project) + stale_fingerprints(project)
    report("catalogue, files that land, fingerprints of the pinned Unsloth", before)
    if before:
        return []  # no use in building from files that are known to be wrong
    orphaned = [*orphans(project), *our_names(project)]
    report("every module and test belongs to a patch, and none names a variable of ours", orphaned)
    report("no two patches replace the same thing side by side", list(clashes(project)))
    git, built = build_patches(project, scratch / "patches")
    report("patches/ is what the working tree exports", list(differences(project, built)))
    report("git am of each patch alone, with what it requires", list(_alone(project, git, built)))
    report("git am of the series", list(_series(project, git, built)))
    report("every file compiles", list(syntax_errors(git.folder, built)))
    large = [each for each in built if max(each.size) > LARGEST]
    names = (f"{each.patch.name}: {each.size[0]} + {each.size[1]}" for each in large)
    report(f"no patch changes more than {LARGEST} lines + {LARGEST} of tests", list(names))
    return built


def export(project: Project, built: List[Built]) -> List[Tuple[str, str]]:
    """Write patches/*.patch and series; returns (file, what happened to it)."""
    wanted = {f"{each.patch.name}.patch": each.content for each in built}
    wanted["series"] = project.series().encode()
    outcome = []
    for name, content in wanted.items():
        path = project.folder / name
        before = path.read_bytes() if path.is_file() else None
        if before != content:
            path.write_bytes(content)
        state = "new" if before is None else "kept" if before == content else "changed"
        outcome.append((name, state))
    for path in sorted(project.folder.glob("*.patch")):
        if path.name not in wanted:
            path.unlink()
            outcome.append((path.name, "removed: its patch is not in the registry"))
    return outcome


def differences(project: Project, built: List[Built]) -> Iterator[str]:
    """Where patches/ is not what would be exported now, and files there that nothing lists."""
    wanted = {f"{each.patch.name}.patch": each.content for each in built}
    wanted["series"] = project.series().encode()
    for name, content in wanted.items():
        path = project.folder / name
        old = path.read_bytes() if path.is_file() else b""
        if old != content:
            pairs = enumerate(zip(old.splitlines(), content.splitlines()), 1)
            line = next((number for number, (a, b) in pairs if a != b), old.count(b"\n") + 1)
            yield f"patches/{name} is out of date from line {line}; {REEXPORT}"
    known = {"UPSTREAM", "README.md", *wanted}
    known |= {f"messages/{patch.name}.md" for patch in project.patches}
    known |= {f"callsites/{patch.name}.diff" for patch in project.patches}
    for path in sorted(project.folder.rglob("*")):
        name = path.relative_to(project.folder).as_posix()
        if path.is_file() and name not in known:
            yield f"patches/{name} belongs to no patch in the registry; remove it, or register its patch"


def _alone(project: Project, git: Git, built: List[Built]) -> Iterator[str]:
    """Each patch on the pinned release and what it requires gives the tree that was exported."""
    for each in built:
        for option in ("--no-3way", "-3"):
            names = {patch.name for patch in project.required(each.patch)}
            reason = _apply(git, [one for one in built if one.patch.name in names], option)
            if not reason and git.tree() != git.tree(each.commit):
                reason = "the tree is not the one that was exported"
            if reason:
                yield f"{each.patch.name} ({option}): {reason}"


def _series(project: Project, git: Git, built: List[Built]) -> Iterator[str]:
    """The whole series in order; leaves it checked out."""
    for option in ("-3", "--no-3way"):
        reason = _apply(git, built, option)
        if reason:
            yield f"git am {option}: {reason}"
            yield "where two patches meet, let one require the other, or set a target's import_after"
            return
    for each, said in zip(reversed(built), git.text("log", "--format=%B%x00").split("\0")):
        if said.strip() != project.commit_message(each.patch).strip():
            yield f"{each.patch.name}: git am changes the commit message"


def _apply(git: Git, patches: List[Built], option: str) -> str:
    git.checkout("base")
    return git.am(mails(patches), option)


def syntax_errors(folder: Path, built: List[Built]) -> Iterator[str]:
    """Compile the whole tree; files that a patch touches also have to parse as Python 3.9."""
    touched = {name for each in built for name in each.lines}
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
    releases = project.pinned_unsloth(), project.pinned_zoo()
    rows = (stale_target(project, t, *releases) for p in project.patches for t in p.targets)
    return [row for row in rows if row]


def stale_target(project: Project, target: Any, unsloth: Any, zoo: Any) -> str:
    """Why a target does not fit a release, or an empty string: what the import form says, too."""
    try:
        return project.target_misfit(target, unsloth, zoo)
    except SyntaxError as error:
        raise PatchesError(
            f"{target.module} does not parse on this Python: {error}", "use Python 3.10 or newer"
        )
