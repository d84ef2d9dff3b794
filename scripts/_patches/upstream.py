# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Unsloth's own source at a given release, read from its wheel.

Unsloth publishes wheels only. Three places are tried, the first two without a network: the
installed package of that version, the user's cache, and the package index through pip. Every file
is compared with the sha256 in the wheel's RECORD each time, so an edited site-packages or a torn
cache is never taken for upstream.
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
from typing import Dict, Iterator, List, Optional, Tuple

from . import ROOT, PatchesError

PIN_FILE = ROOT / "patches" / "UPSTREAM"
PIN_KEYS = ("version", "wheel_sha256", "tree", "zoo_version", "zoo_wheel_sha256")
PIN_HEADER = """\
# The release of Unsloth that patches/*.patch are made for; written by `scripts/patches.py rebase --pin`.
# tree: git's object id of the wheel's folder that holds unsloth/ alone.
"""
PIP_TIMEOUT_S = 600


@dataclass(frozen = True)
class Release:
    """One released package: ``root`` holds its folder, ``files`` are paths below ``root``."""

    package: str
    version: str
    root: Path
    files: Tuple[str, ...]
    wheel_sha256: str = ""

    def text(self, path: str) -> Optional[str]:
        """A file's text, or None where this release has no such file."""
        return (self.root / path).read_text(encoding = "utf-8") if path in self.files else None

    def module_path(self, module: str) -> Optional[str]:
        """``unsloth.kernels.utils`` -> ``unsloth/kernels/utils.py``, or None where there is none."""
        base = module.replace(".", "/")
        candidates = (base + ".py", base + "/__init__.py")
        return next((path for path in candidates if path in self.files), None)


def read_pins(path: Path = PIN_FILE) -> Dict[str, str]:
    """``key = value`` lines of patches/UPSTREAM. Raises PatchesError for a missing file or key."""
    try:
        lines = path.read_text(encoding = "utf-8").splitlines()
    except OSError as error:
        raise PatchesError(f"cannot read {path}: {error}", "restore patches/UPSTREAM from git")
    pins = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            pins[key.strip()] = value.strip()
    missing = [key for key in PIN_KEYS if not pins.get(key)]
    if missing:
        raise PatchesError(
            f"{path} lacks {', '.join(missing)}", "restore patches/UPSTREAM from git"
        )
    return pins


def write_pins(pins: Dict[str, str], path: Path = PIN_FILE) -> None:
    lines = [f"{key} = {pins[key]}\n" for key in PIN_KEYS]
    path.write_bytes((PIN_HEADER + "".join(lines)).encode("utf-8"))


def cache_dir() -> Path:
    """Where unpacked wheels are kept; ``UNSLOTH_PATCHES_CACHE`` overrides it."""
    given = os.environ.get("UNSLOTH_PATCHES_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "unsloth_patches"


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
    for root in _site_packages() if installed else ():
        found = _verified(root, package, version)
        if found:
            return found
    folder = cache_dir() / f"{package}-{version}"
    found = _verified(folder, package, version)
    if found is None:
        _download(package, version, wheel_sha256, folder)
        found = _verified(folder, package, version)
    if found is None:
        raise PatchesError(
            f"the wheel of {package} {version} does not match its own RECORD",
            f"remove {folder} and try again; if it stays, the package index serves a broken file",
        )
    return found


def _site_packages() -> Iterator[Path]:
    """Folders that may hold an installed Unsloth: this interpreter's, then the project's .venv."""
    for entry in dict.fromkeys(sys.path):
        if entry and Path(entry).is_dir():
            yield Path(entry)
    yield from (ROOT / ".venv").glob("lib/python*/site-packages")
    yield from (ROOT / ".venv").glob("Lib/site-packages")


def _verified(root: Path, package: str, version: str) -> Optional[Release]:
    """The release below ``root`` if every file of it has the hash that RECORD states, else None."""
    record = root / f"{package}-{version}.dist-info" / "RECORD"
    if not record.is_file():
        return None
    files = []
    with record.open(encoding = "utf-8", newline = "") as rows:
        for path, stated, *_ in csv.reader(rows):
            if not path.startswith(package + "/") or not stated:
                continue
            algorithm, _, digest = stated.partition("=")
            if algorithm != "sha256" or _sha256_of(root / path) != digest:
                return None
            files.append(path)
    sha = root / "WHEEL_SHA256"
    known = sha.read_text(encoding = "utf-8").strip() if sha.is_file() else ""
    return Release(package, version, root, tuple(sorted(files)), known) if files else None


def _sha256_of(path: Path) -> str:
    """A file's digest as RECORD writes it (urlsafe base64, no padding); empty if it is not there."""
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return ""
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _download(package: str, version: str, wheel_sha256: str, folder: Path) -> None:
    """The wheel's package folder and RECORD into ``folder``, which appears only when it is whole."""
    try:
        folder.parent.mkdir(parents = True, exist_ok = True)
        with tempfile.TemporaryDirectory(dir = folder.parent) as temporary:
            wheel = _pip_download(package, version, Path(temporary))
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if wheel_sha256 and digest != wheel_sha256:
                raise PatchesError(
                    f"{wheel.name} has sha256 {digest}, patches/UPSTREAM pins {wheel_sha256}",
                    "do not use this file; check which index pip uses (`pip config list`)",
                )
            unpacked = Path(temporary) / "unpacked"
            _unpack(wheel, package, unpacked)
            (unpacked / "WHEEL_SHA256").write_text(digest + "\n", encoding = "utf-8")
            shutil.rmtree(folder, ignore_errors = True)
            os.replace(unpacked, folder)
    except OSError as error:
        raise PatchesError(
            f"cannot keep {package} {version} in {folder.parent}: {error}",
            "free some space, or point UNSLOTH_PATCHES_CACHE to a writable folder",
        )


def _unpack(wheel: Path, package: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(package + "/") or re.match(r"[^/]+\.dist-info/RECORD$", name):
                archive.extract(name, target)


def _pip_download(package: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--retries", "2", "--disable-pip-version-check", "--dest", str(folder)]
    try:
        done = subprocess.run(
            command + [f"{package}=={version}"],
            capture_output = True,
            text = True,
            timeout = PIP_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise PatchesError(f"pip did not get {package} {version} in {PIP_TIMEOUT_S} s", _NETWORK)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise _pip_error(package, version, done.stdout + done.stderr)


_NETWORK = (
    "check the network and pip's index settings; offline, install that version into .venv first "
    "(scripts/setup.sh), which is then read instead of the package index"
)


def _pip_error(package: str, version: str, output: str) -> PatchesError:
    if "No module named pip" in output:
        return PatchesError(
            f"{sys.executable} has no pip, and {package} {version} is neither installed nor cached",
            "run this with the Python of .venv (scripts/setup.sh makes it)",
        )
    listed = re.search(r"from versions: ([^)]*)\)", output)
    versions: List[str] = listed.group(1).split(", ") if listed else []
    if versions and versions != ["none"]:
        newest = ", ".join(versions[-6:])
        return PatchesError(
            f"the package index has no {package} {version} for this Python",
            f"newest there: {newest}",
        )
    last = output.strip().splitlines()[-1:] or ["no output"]
    return PatchesError(f"pip could not download {package} {version}: {last[0]}", _NETWORK)
