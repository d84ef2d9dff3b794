# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Build the fork: a base commit with the wheel's ``unsloth/``, then one commit a patch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List

from . import PatchesError
from .git import Git
from .project import Project
from .upstream import Release, read_pins
from .wiring import wire


@dataclass(frozen = True)
class Built:
    """One patch as it leaves here. ``files``: paths in the fork that it touches."""

    name: str
    content: bytes
    tree: str
    files: List[str]


def build_base(release: Release, folder: Path) -> Git:
    """A repository in ``folder`` whose only commit is the release's ``unsloth/``."""
    for name in release.files:
        target = folder / name
        target.parent.mkdir(parents = True, exist_ok = True)
        shutil.copyfile(release.root / name, target)
    git = Git(folder)
    git.init(f"unsloth-{release.version}")
    git.commit_all(f"Unsloth {release.version}: unsloth/ as in its wheel\n")
    return git


def build_fork(project: Project, folder: Path) -> List[Built]:
    """Base and patches from the working tree, in ``folder``. Raises PatchesError naming the patch."""
    release = project.pinned_unsloth()
    git = build_base(release, folder)
    pinned = read_pins(project.pin_file)["tree"]
    if git.tree() != pinned:
        raise PatchesError(
            f"unsloth/ of {release.root} is tree {git.tree()}, patches/UPSTREAM pins {pinned}",
            "this is not the release that the patches are for; reinstall it, or check patches/UPSTREAM",
        )
    return [_commit(project, patch, git) for patch in project.patches]


def _commit(project: Project, patch: Any, git: Git) -> Built:
    for landed, source in project.lands(patch).items():
        _copy(patch, source, git.folder / landed)
    callsites = project.callsite_file(patch)
    if callsites.is_file():
        _apply_callsites(callsites, git)
    wire(patch, git.folder)
    if not git.text("status", "--porcelain"):
        raise PatchesError(f"{patch.name} changes nothing in Unsloth", "give it modules or targets")
    git.commit_all(project.commit_message(patch))
    files = git.changed_files()
    outside = [name for name in files if not name.startswith(("unsloth/", "tests/"))]
    if outside:
        raise PatchesError(
            f"{patch.name} touches {', '.join(outside)}",
            "a patch may change unsloth/ and tests/ alone",
        )
    return Built(patch.name, git.format_patch(), git.tree(), files)


def _copy(patch: Any, source: Path, target: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise PatchesError(
            f"{patch.name}: cannot read {source}: {error.strerror}", "fix the registry"
        )
    # An earlier patch may have brought the same file; upstream's own is never overwritten.
    if target.exists() and target.read_bytes() != content:
        raise PatchesError(
            f"{patch.name}: Unsloth already has a different {target.name} at that path",
            "rename the module, or put the change into patches/callsites/",
        )
    target.parent.mkdir(parents = True, exist_ok = True)
    target.write_bytes(content)


def _apply_callsites(path: Path, git: Git) -> None:
    done = git.run("apply", "--recount", "--whitespace=nowarn", str(path.resolve()), check = False)
    if done.returncode:
        reason = done.stderr.decode(errors = "replace").strip().replace("\n", "; ")
        raise PatchesError(
            f"patches/callsites/{path.name} does not apply: {reason}",
            "edit its hunks so that their context is what the pinned Unsloth says at that place",
        )
