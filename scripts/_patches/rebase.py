# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Try the series on another release of Unsloth and name what is stale there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from . import PatchesError
from .build import build_base, build_patches, commit_patch
from .check import stale_target, syntax_errors
from .git import Git, said
from .project import Project
from .upstream import Release, get_release, numbers, read_pins, zoo_version

CLEAN, MERGED, REWIRED, STALE = "clean", "merged", "exported anew", "stale"
NEWER = "not in this release"


@dataclass
class Outcome:
    """How one patch fares: clean, merged (git moved hunks), exported anew (it fits, but by edits made
    anew, so that a fork needs another export of it), stale, or not in this release (which is older than
    what the patch builds on); ``notes`` say where."""

    name: str
    state: str = CLEAN
    notes: List[str] = field(default_factory = list)


def rebase(
    project: Project,
    version: str,
    scratch: Path,
    keep: Optional[Path] = None,
) -> List[Outcome]:
    """Every patch of the series on ``version``, each on top of those that applied before it.

    keep: a folder for the patches as they apply there, and their series.
    """
    unsloth = get_release("unsloth", version)
    zoo = get_release("unsloth_zoo", zoo_version(unsloth)) if project.needs_zoo() else None
    git = _with_both_bases(project, unsloth, scratch / "rebase")
    outcomes: Dict[str, Outcome] = {}
    kept: List[str] = []
    for patch in project.patches:
        outcome = outcomes[patch.name] = Outcome(patch.name)
        if patch.since and numbers(version) < numbers(patch.since):
            outcome.state, outcome.notes = NEWER, [f"made for {patch.since} and newer"]
            continue
        lost = [name for name in patch.requires if outcomes[name].state in (STALE, NEWER)]
        if lost:
            states = {outcomes[name].state for name in lost}
            outcome.state = STALE if STALE in states else NEWER
            outcome.notes = [f"needs {', '.join(lost)}, which is not in"]
            continue
        absent = _absent_optional_files(patch, project.pinned_unsloth(), unsloth)
        outcome.notes = [
            f"{path} is not there: left out, its target is optional" for path in absent
        ]
        _try(project, patch, git, outcome, [f"--exclude={path}" for path in absent])
        reasons = [stale_target(project, target, unsloth, zoo) for target in patch.targets]
        if any(reasons):
            outcome.state = STALE
            outcome.notes += filter(None, reasons)
        if keep is not None and outcome.state != STALE:
            kept.append(project.patch_file(patch).name)
            (keep / kept[-1]).write_bytes(git.format_patch())
    if keep is not None:
        (keep / "series").write_text("".join(f"{name}\n" for name in kept), encoding = "utf-8")
    broken = list(syntax_errors(git.folder, []))
    return [*outcomes.values(), *([Outcome("compile", STALE, broken)] if broken else [])]


def new_pins(version: str, scratch: Path) -> dict:
    """Pins for ``version``, from its wheels: an installed package does not tell its wheel's sha256."""
    unsloth = get_release("unsloth", version, installed = False)
    zoo = get_release("unsloth_zoo", zoo_version(unsloth), installed = False)
    return {
        "version": version,
        "wheel_sha256": unsloth.wheel_sha256,
        "tree": build_base(unsloth, scratch / "pin").tree(),
        "zoo_version": zoo.version,
        "zoo_wheel_sha256": zoo.wheel_sha256,
    }


def _with_both_bases(project: Project, release: Release, folder: Path) -> Git:
    """A repository at ``release`` that also holds what the patches are made on, for three-way merges."""
    git, _ = build_patches(project, folder)
    git.checkout("base")
    if release.version != read_pins(project.pin_file)["version"]:
        other = build_base(release, folder.with_name(folder.name + "-target"))
        git.run("fetch", "--quiet", str(other.folder.resolve()), "HEAD")
        git.checkout("FETCH_HEAD")
    return git


def _absent_optional_files(patch: Any, pinned: Release, release: Release) -> List[str]:
    """Files of the pinned release that only optional targets edit and that this release lacks."""
    files: Dict[str, bool] = {}
    for target in patch.targets:
        path = target.wired_in or pinned.module_path(target.module)
        if path in pinned.files and path not in release.files:
            files[path] = files.get(path, True) and target.optional
    return [path for path, optional in files.items() if optional]


def _try(project: Project, patch: Any, git: Git, outcome: Outcome, options: List[str]) -> None:
    path = project.patch_file(patch)
    if not path.is_file():
        raise PatchesError(f"{path} is missing", "run `python scripts/patches.py export`")
    mail = path.read_bytes()
    if not git.am(mail, *options):
        return
    # What git says of the hunks that do not apply as they are.
    done = git.run("apply", "--check", *options, stdin = mail, check = False)
    outcome.notes += re.findall(r"patch failed: (.+)|error: (?:.+: No such .+)", said(done))
    outcome.state = MERGED
    if git.am(mail, "-3", *options):
        outcome.state = REWIRED
        try:
            commit_patch(project, patch, git)
        except PatchesError as error:
            outcome.state = STALE
            outcome.notes.append(str(error))
            git.run("reset", "--quiet", "--hard")
            git.run("clean", "--quiet", "-d", "--force", "-x")
