# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Build the patches: each is a commit on the wheel's ``unsloth/`` and the patches that it requires."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

from . import PatchesError
from .git import Git, said
from .project import Project
from .upstream import Release, read_pins
from .wiring import wire


@dataclass(frozen = True)
class Built:
    """One patch as it leaves here; ``lines``: changed ones by file."""

    patch: Any
    content: bytes
    commit: str
    lines: Dict[str, int]

    @property
    def size(self) -> Tuple[int, int]:
        """Changed lines below unsloth/ and of tests."""
        tests = sum(count for file, count in self.lines.items() if file.startswith("tests/"))
        return sum(self.lines.values()) - tests, tests


def build_base(release: Release, folder: Path) -> Git:
    """A repository in ``folder`` whose only commit, tagged ``base``, is the release's ``unsloth/``."""
    for name in release.files:
        target = folder / name
        target.parent.mkdir(parents = True, exist_ok = True)
        shutil.copyfile(release.root / name, target)
    git = Git(folder)
    git.init(f"unsloth-{release.version}")
    git.commit_all(f"Unsloth {release.version}: unsloth/ as in its wheel\n")
    git.run("tag", "base")
    return git


def build_patches(project: Project, folder: Path) -> Tuple[Git, List[Built]]:
    """Every patch from the working tree, in a repository in ``folder``. Raises PatchesError naming it."""
    release = project.pinned_unsloth()
    git = build_base(release, folder)
    pinned = read_pins(project.pin_file)["tree"]
    if git.tree() != pinned:
        raise PatchesError(
            f"unsloth/ of {release.root} is tree {git.tree()}, patches/UPSTREAM pins {pinned}",
            "this is not the release that the patches are for; reinstall it, or check patches/UPSTREAM",
        )
    commits: Dict[Tuple[str, ...], str] = {(): "base"}
    built: Dict[str, Built] = {}

    def with_all(names: Tuple[str, ...]) -> str:
        """The commit that has these patches."""
        if names not in commits:
            git.checkout(with_all(names[:-1]))
            done = git.run("cherry-pick", built[names[-1]].commit, check = False)
            if done.returncode:
                raise PatchesError(
                    f"{names[-1]} does not fit on {', '.join(names[:-1])}: {said(done)}",
                    "let one of them require the other",
                )
            commits[names] = git.text("rev-parse", "HEAD")
        return commits[names]

    for patch in project.patches:
        *below, last = (each.name for each in project.required(patch))
        git.checkout(with_all(tuple(below)))
        built[last] = commit_patch(project, patch, git)
        commits[tuple(below) + (last,)] = built[last].commit
    return git, list(built.values())


def build_fork(project: Project, folder: Path) -> List[Built]:
    """A fork in ``folder``: the pinned release, then one commit a patch."""
    git, built = build_patches(project, folder)
    git.run("checkout", "--quiet", "--force", f"unsloth-{project.pinned_unsloth().version}")
    reason = git.am(mails(built), "-3")
    if reason:
        raise PatchesError(f"the series does not apply: {reason}", "see `scripts/patches.py check`")
    return built


def mails(built: Iterable[Built]) -> bytes:
    return b"\n".join(each.content for each in built)


def commit_patch(project: Project, patch: Any, git: Git) -> Built:
    """Land a patch on what is checked out, and commit it."""
    for landed, source in project.lands(patch).items():
        _copy(patch, source, git.folder / landed)
    callsites = project.callsite_file(patch)
    if callsites.is_file():
        options = ("--recount", "--whitespace=nowarn", str(callsites.resolve()))
        done = git.run("apply", *options, check = False)
        if done.returncode:
            raise PatchesError(
                f"patches/callsites/{callsites.name} does not apply: {said(done)}",
                "edit its hunks so that their context is what the pinned Unsloth says at that place",
            )
    wire(patch, git.folder)
    if not git.commit_all(project.commit_message(patch)):
        raise PatchesError(f"{patch.name} changes nothing in Unsloth", "give it modules or targets")
    shown = git.text("show", "--format=%H", "--numstat", "--no-renames", "HEAD").split("\n")
    rows = [line.split("\t") for line in shown[1:] if line]
    lines = {name: int(added) + int(removed) for added, removed, name in rows}
    outside = [name for name in lines if not name.startswith(("unsloth/", "tests/"))]
    if outside:
        raise PatchesError(
            f"{patch.name} touches {', '.join(outside)}",
            "a patch may change unsloth/ and tests/ alone",
        )
    return Built(patch, git.format_patch(), shown[0], lines)


def _copy(patch: Any, source: Path, target: Path) -> None:
    # A patch that it requires may have brought the same file; upstream's own is never overwritten.
    if target.exists() and target.read_bytes() != source.read_bytes():
        raise PatchesError(
            f"{patch.name}: Unsloth already has a different {target.name} at that path",
            "rename the module, or put the change into patches/callsites/",
        )
    target.parent.mkdir(parents = True, exist_ok = True)
    target.write_bytes(source.read_bytes())
