# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""git, cut off from the user's settings, so that the same input gives the same bytes everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import List, Optional, Sequence

from . import PatchesError

# A reserved domain (RFC 2606): patches must be byte-stable whoever exports them.
AUTHOR = "unsloth_patches authors"
EMAIL = "authors@unsloth-patches.invalid"
DATE = "2026-11-22T00:00:00+0000"
SETTINGS = (
    "core.autocrlf=false",
    "core.fileMode=false",
    "core.quotePath=false",
    "core.hooksPath=/dev/null",
    "commit.gpgsign=false",
    "gc.auto=0",
    "advice.detachedHead=false",
    "diff.noprefix=false",
)
FORMAT_PATCH = (
    "format-patch",
    "--stdout",
    "--zero-commit",
    "--no-signature",
    "--full-index",
    "--no-stat",
    "--no-renames",
    "--no-ext-diff",
    "--diff-algorithm=myers",
    "-N",
    "-k",
)


class Git:
    """Commands in one repository. Output is bytes: patches must not pass through a text decoder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(
        self,
        *arguments: str,
        stdin: bytes = b"",
        check: bool = True,
    ) -> subprocess.CompletedProcess:
        executable = shutil.which("git")
        if executable is None:
            raise PatchesError("git is not installed", "install git 2.30 or newer and try again")
        settings = [part for setting in SETTINGS for part in ("-c", setting)]
        done = subprocess.run(
            [executable, *settings, *arguments],
            cwd = self.folder,
            input = stdin,
            capture_output = True,
            env = _environment(),
        )
        if check and done.returncode:
            message = done.stderr.decode(errors = "replace").strip()
            raise PatchesError(f"git {arguments[0]} failed in {self.folder}: {message}")
        return done

    def text(self, *arguments: str) -> str:
        return self.run(*arguments).stdout.decode().strip()

    def init(self, branch: str) -> None:
        self.folder.mkdir(parents = True, exist_ok = True)
        self.run("init", "--quiet", "--template=", f"--initial-branch={branch}")

    def commit_all(self, message: str) -> None:
        self.run("add", "--all", "--force")
        self.run("commit", "--quiet", "--cleanup=verbatim", "-F", "-", stdin = message.encode())

    def tree(self, revision: str = "HEAD") -> str:
        return self.text("rev-parse", revision + "^{tree}")

    def changed_files(self, revision: str = "HEAD") -> List[str]:
        listed = self.text("diff-tree", "-r", "--root", "--no-commit-id", "--name-only", revision)
        return listed.splitlines()

    def format_patch(self, revision: str = "HEAD") -> bytes:
        return self.run(*FORMAT_PATCH, "-1", revision).stdout

    def am(
        self,
        patch: bytes,
        three_way: bool = False,
        exclude: Sequence[str] = (),
    ) -> Optional[str]:
        """Apply one mail. None, or git's reason, with the repository as it was before."""
        options = ["--3way"] if three_way else []
        options += [f"--exclude={path}" for path in exclude]
        done = self.run("am", "--quiet", "-k", *options, stdin = patch, check = False)
        if done.returncode == 0:
            return None
        self.run("am", "--abort", check = False)
        return (done.stderr + done.stdout).decode(errors = "replace").strip()


def _environment() -> dict:
    """The user's environment without git's own variables: a hook of git sets GIT_DIR, for one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    kept.update(
        GIT_CONFIG_GLOBAL = os.devnull,
        GIT_CONFIG_SYSTEM = os.devnull,
        GIT_CONFIG_NOSYSTEM = "1",
        GIT_TERMINAL_PROMPT = "0",
        LC_ALL = "C",
        TZ = "UTC",
    )
    for role in ("AUTHOR", "COMMITTER"):
        kept.update(
            {f"GIT_{role}_NAME": AUTHOR, f"GIT_{role}_EMAIL": EMAIL, f"GIT_{role}_DATE": DATE}
        )
    return kept
