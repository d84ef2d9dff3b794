# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""git, cut off from the user's settings, so that the same input gives the same bytes everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from . import PatchesError

# A reserved domain (RFC 2606): patches must be byte-stable whoever exports them.
WHO = {"NAME": "unsloth_patches authors", "EMAIL": "authors@unsloth-patches.invalid"}
WHO["DATE"] = "2026-11-22T00:00:00+0000"
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
    "format-patch --stdout --zero-commit --no-signature --full-index --no-stat --no-renames "
    "--no-ext-diff --diff-algorithm=myers -N -k -1"
).split()


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
        command = [executable, *settings, *arguments]
        done = subprocess.run(
            command,
            cwd = self.folder,
            input = stdin,
            capture_output = True,
            env = _environment(),
        )
        if check and done.returncode:
            raise PatchesError(f"git {arguments[0]} failed in {self.folder}: {said(done)}")
        return done

    def text(self, *arguments: str) -> str:
        return self.run(*arguments).stdout.decode().strip()

    def init(self, branch: str) -> None:
        self.folder.mkdir(parents = True, exist_ok = True)
        self.run("init", "--quiet", "--template=", f"--initial-branch={branch}")

    def commit_all(self, message: str) -> bool:
        """Commit everything, ignored files too; False where nothing has changed."""
        self.run("add", "--all", "--force")
        commit = ("commit", "--cleanup=verbatim", "-F", "-")
        done = self.run(*commit, stdin = message.encode(), check = False)
        if done.returncode and b"nothing to commit" not in done.stdout:
            raise PatchesError(f"git commit failed in {self.folder}: {said(done)}")
        return not done.returncode

    def checkout(self, commit: str) -> None:
        self.run("checkout", "--quiet", "--force", "--detach", commit)

    def tree(self, revision: str = "HEAD") -> str:
        return self.text("rev-parse", revision + "^{tree}")

    def format_patch(self) -> bytes:
        return self.run(*FORMAT_PATCH, "HEAD").stdout

    def am(self, mails: bytes, *options: str) -> str:
        """Apply mails. Empty, or git's reason, with the repository as it was before."""
        done = self.run("am", "--quiet", "-k", *options, stdin = mails, check = False)
        if done.returncode:
            self.run("am", "--abort", check = False)
        return said(done) if done.returncode else ""


def said(done: subprocess.CompletedProcess) -> str:
    """What git wrote, without its advice on what to type next."""
    lines = (done.stderr + done.stdout).decode(errors = "replace").strip().splitlines()
    return "\n".join(
        line for line in lines if not line.startswith(("hint:", "When you have", "If you"))
    )


def _environment() -> dict:
    """The user's environment without git's own variables: a hook of git sets GIT_DIR, for one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    kept.update(GIT_CONFIG_GLOBAL = os.devnull, GIT_CONFIG_SYSTEM = os.devnull)
    kept.update(GIT_CONFIG_NOSYSTEM = "1", GIT_TERMINAL_PROMPT = "0", LC_ALL = "C", TZ = "UTC")
    roles = ("AUTHOR", "COMMITTER")
    kept.update({f"GIT_{role}_{key}": value for role in roles for key, value in WHO.items()})
    return kept
