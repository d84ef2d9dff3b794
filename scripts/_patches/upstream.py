# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Unsloth's own source at a given release: the installed package, the user's cache, or a wheel through pip.

Unsloth publishes wheels only. Every file is compared with the sha256 in the wheel's RECORD each time, so
an edited site-packages or a torn cache is never taken for upstream.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from . import ROOT, PatchesError

PIN_KEYS = ("version", "wheel_sha256", "tree", "zoo_version", "zoo_wheel_sha256")
PIN_HEADER = """\
# The release of Unsloth that patches/*.patch are made for; written by `scripts/patches.py rebase --pin`.
# tree: git's object id of the wheel's folder that holds unsloth/ alone.
"""


@dataclass(frozen = True)
class Release:
    """One released package: ``root`` holds its folder, ``files`` are paths below ``root``."""

    package: str
    version: str
    root: Path
    files: Tuple[str, ...]
    wheel_sha256: str = ""

    def module_path(self, module: str) -> Optional[str]:
        """``unsloth.kernels.utils`` -> ``unsloth/kernels/utils.py``, or None where there is none."""
        base = module.replace(".", "/")
        candidates = (base + ".py", base + "/__init__.py")
        return next((path for path in candidates if path in self.files), None)


def read_pins(path: Path) -> Dict[str, str]:
    """``key = value`` lines of patches/UPSTREAM. Raises PatchesError for a missing file or key."""
    text = path.read_text(encoding = "utf-8") if path.is_file() else ""
    pins = dict(re.findall(r"(?m)^(\w+) = (.+)$", text))
    missing = [key for key in PIN_KEYS if key not in pins]
    if missing:
        raise PatchesError(
            f"{path} lacks {', '.join(missing)}", "restore patches/UPSTREAM from git"
        )
    return pins


def write_pins(pins: Dict[str, str], path: Path) -> None:
    lines = [f"{key} = {pins[key]}\n" for key in PIN_KEYS]
    path.write_bytes((PIN_HEADER + "".join(lines)).encode("utf-8"))


def cache_dir() -> Path:
    """Where unpacked wheels are kept; ``UNSLOTH_PATCHES_CACHE`` overrides it."""
    given = os.environ.get("UNSLOTH_PATCHES_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(given or base + "/unsloth_patches").expanduser()


def get_release(
    package: str,
    version: str,
    wheel_sha256: str = "",
    installed: bool = True,
) -> Release:
    """``unsloth`` or ``unsloth_zoo`` at a version: installed, cached or downloaded, and verified.

    installed: False leaves installed packages out; the result then knows its wheel's sha256.
    """
    if not re.fullmatch(r"\d+(\.\d+)+(\.?(post|rc|a|b|dev)\d+)?", version):
        raise PatchesError(f"{version!r} is not a version number", "give one such as 2026.10.9")
    folder = cache_dir() / f"{package}-{version}"
    places = [Path(entry) for entry in dict.fromkeys(sys.path) if entry]
    places += (ROOT / ".venv").glob("[Ll]ib/**/site-packages")
    for root in [*(places if installed else []), folder]:
        found = _verified(root, package, version)
        if found:
            return found
    _download(package, version, wheel_sha256, folder)
    found = _verified(folder, package, version)
    if found is None:
        raise PatchesError(
            f"the wheel of {package} {version} does not match its own RECORD",
            f"remove {folder} and try again; if it stays, the package index serves a broken file",
        )
    return found


def newest_version(package: str) -> str:
    """The newest release that pip's index has for this Python."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output = True, text = True)
    found = re.search(rf"^{package} \(([0-9.a-z]+)\)", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise PatchesError(
            f"pip does not say which {package} is the newest:\n{(done.stderr or done.stdout).strip()}",
            "check the network and pip's index, or name the release",
        )
    return found[1]


def zoo_version(release: Release) -> str:
    """The unsloth_zoo that belongs to a release of unsloth: the oldest that its metadata allows, which
    is the one that came out with it. Their numbers are often, but not always, the same."""
    path = release.root / f"{release.package}-{release.version}.dist-info" / "METADATA"
    text = path.read_text(encoding = "utf-8") if path.is_file() else ""
    found = re.findall(r"(?mi)^Requires-Dist: unsloth[-_]zoo *[(]?>=([0-9.]+[0-9])", text)
    return max(found, key = numbers) if found else release.version


def numbers(version: str) -> List[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _verified(root: Path, package: str, version: str) -> Optional[Release]:
    """The release below ``root`` if every file of it has the hash that RECORD states, else None."""
    record = root / f"{package}-{version}.dist-info" / "RECORD"
    if not record.is_file():
        return None
    with record.open(encoding = "utf-8", newline = "") as rows:
        stated = {row[0]: row[1] for row in csv.reader(rows) if row[0].startswith(package + "/")}
    stated = {path: digest for path, digest in stated.items() if digest}
    if not stated or any(_record_hash(root / path) != digest for path, digest in stated.items()):
        return None
    sha = root / "WHEEL_SHA256"
    known = sha.read_text(encoding = "utf-8").strip() if sha.is_file() else ""
    return Release(package, version, root, tuple(sorted(stated)), known)


def _record_hash(path: Path) -> str:
    """A file's digest as RECORD writes it; empty if it is not there."""
    if not path.is_file():
        return ""
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def _download(package: str, version: str, wheel_sha256: str, folder: Path) -> None:
    """The wheel's package folder and RECORD into ``folder``, which appears only when it is whole."""
    folder.parent.mkdir(parents = True, exist_ok = True)
    with tempfile.TemporaryDirectory(dir = folder.parent) as temporary:
        wheel = _pip_download(f"{package}=={version}", Path(temporary))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if wheel_sha256 and digest != wheel_sha256:
            raise PatchesError(
                f"{wheel.name} has sha256 {digest}, patches/UPSTREAM pins {wheel_sha256}",
                "do not use this file; check which index pip uses (`pip config list`)",
            )
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            wanted = re.compile(rf"{package}/|[^/]+\.dist-info/(RECORD|METADATA)$")
            archive.extractall(
                unpacked, [name for name in archive.namelist() if wanted.match(name)]
            )
        (unpacked / "WHEEL_SHA256").write_text(digest + "\n", encoding = "utf-8")
        shutil.rmtree(folder, ignore_errors = True)
        os.replace(unpacked, folder)


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--retries=2", "--disable-pip-version-check", f"--dest={folder}", requirement]
    done = subprocess.run(command, capture_output = True, text = True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise PatchesError(
            f"pip could not download {requirement}:\n{(done.stderr or done.stdout).strip()}",
            "check the network and pip's index; offline, install that version into .venv (scripts/setup.sh)",
        )
    return wheels[0]
