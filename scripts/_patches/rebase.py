# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Try the series on another release of Unsloth and name what is stale there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from . import PatchesError
from .build import build_base
from .check import stale_target, syntax_errors
from .git import Git
from .project import Project
from .upstream import Release, get_release, read_pins

CLEAN, MERGED, STALE, NEWER = "clean", "merged", "stale", "not for it"


@dataclass
class Outcome:
    """How one patch fares: clean, merged (git moved hunks), stale, or not for it (the release is older
    than what the patch builds on); ``notes`` say where."""

    name: str
    state: str = CLEAN
    notes: List[str] = field(default_factory = list)


def rebase(project: Project, version: str, scratch: Path) -> List[Outcome]:
    """Every patch of the series on ``version``, each on top of those that applied before it."""
    unsloth = get_release("unsloth", version)
    zoo = get_release("unsloth_zoo", version) if project.needs_zoo() else None
    git = _with_both_bases(project, unsloth, scratch / "rebase")
    outcomes: List[Outcome] = []
    for patch in project.patches:
        outcome = Outcome(patch.name)
        outcomes.append(outcome)
        if patch.since and _numbers(version) < _numbers(patch.since):
            outcome.state = NEWER
            outcome.notes.append(f"made for {patch.since} and newer")
            continue
        lost = [o.name for o in outcomes if o.name in patch.requires and o.state == STALE]
        if lost:
            outcome.state = STALE
            outcome.notes.append(f"needs {', '.join(lost)}, which is stale")
            continue
        absent = _absent_optional_files(patch, project.pinned_unsloth(), unsloth)
        outcome.notes += [
            f"{path} is not there: left out, its target is optional" for path in absent
        ]
        _try(project.patch_file(patch), git, outcome, absent)
        for target in patch.targets:
            reason = stale_target(project, target, unsloth, zoo)
            if reason:
                outcome.state = STALE
                outcome.notes.append(reason)
    broken = list(syntax_errors(git.folder, []))
    if broken:
        outcomes.append(Outcome("compile", STALE, broken))
    return outcomes


def _numbers(version: str) -> List[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def new_pins(project: Project, version: str, scratch: Path) -> dict:
    """Pins for ``version``, from its wheels: an installed package does not tell its wheel's sha256."""
    unsloth = get_release("unsloth", version, installed = False)
    zoo = get_release("unsloth_zoo", version, installed = False)
    tree = build_base(unsloth, scratch / "pin").tree()
    return {
        "version": version,
        "wheel_sha256": unsloth.wheel_sha256,
        "tree": tree,
        "zoo_version": version,
        "zoo_wheel_sha256": zoo.wheel_sha256,
    }


def _with_both_bases(project: Project, release: Release, folder: Path) -> Git:
    """A repository at ``release`` that also holds the pinned blobs, which a three-way merge needs."""
    git = build_base(project.pinned_unsloth(), folder)
    git.run("tag", "pinned")
    if release.version == read_pins(project.pin_file)["version"]:
        return git
    other = build_base(release, folder.with_name(folder.name + "-target"))
    git.run("fetch", "--quiet", str(other.folder.resolve()), "HEAD")
    git.run("checkout", "--quiet", "--force", "-B", "target", "FETCH_HEAD")
    return git


def _absent_optional_files(patch: Any, pinned: Release, release: Release) -> List[str]:
    """Files of the pinned release that only optional targets edit and that this release lacks."""
    files: Dict[str, bool] = {}
    for target in patch.targets:
        path = target.wired_in or pinned.module_path(target.module)
        if path in pinned.files and path not in release.files:
            files[path] = files.get(path, True) and target.optional
    return [path for path, optional in files.items() if optional]


def _try(path: Path, git: Git, outcome: Outcome, exclude: Sequence[str]) -> None:
    if not path.is_file():
        raise PatchesError(f"{path} is missing", "run `python scripts/patches.py export`")
    content = path.read_bytes()
    options = [f"--exclude={path}" for path in exclude]
    if not git.am(content, *options):
        return
    moved = _rejected(content, git, exclude)
    if not git.am(content, "-3", *options):
        outcome.state = MERGED
        outcome.notes += [f"three-way merge moved {where}" for where in moved]
    else:
        outcome.state = STALE
        outcome.notes += moved or ["git am refuses it, and no single hunk is to blame"]


def _rejected(content: bytes, git: Git, exclude: Sequence[str]) -> List[str]:
    """The hunks that do not apply as they are: file, hunk number and header. Leaves the tree as it was."""
    options = ["--reject", "--verbose", "--recount", *(f"--exclude={path}" for path in exclude)]
    done = git.run("apply", *options, stdin = content, check = False)
    output = (done.stderr + done.stdout).decode(errors = "replace")
    git.run("reset", "--quiet", "--hard")
    git.run("clean", "--quiet", "-d", "--force", "-x")
    notes: List[str] = []
    file: Optional[str] = None
    for line in output.splitlines():
        found = re.match(r"Applying patch (.+?) with \d+ reject", line)
        file = found.group(1) if found else file
        found = re.match(r"Rejected hunk #(\d+)", line)
        if found and file:
            number = int(found.group(1))
            notes.append(f"{file}: hunk {number} {_header(content.decode(), file, number)}")
        elif "already exists" in line or "does not exist" in line or "No such file" in line:
            notes.append(line.partition("error: ")[2] or line)
    return notes


def _header(patch: str, file: str, number: int) -> str:
    """The @@ line of a file's n-th hunk and the first line that it changes."""
    _, _, section = patch.partition(f"\n+++ b/{file}\n")
    section = section.partition("\ndiff --git ")[0]
    hunks = re.split(r"(?m)^(?=@@ )", section)[1:]
    if number > len(hunks):
        return ""
    header, *body = hunks[number - 1].splitlines()
    changed = next((line for line in body if line[:1] in "+-" and line[1:].strip()), "")
    return f"{header} ({changed.strip()})"
