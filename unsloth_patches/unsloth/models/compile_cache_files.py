# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The files of a compile cache: whole or absent, of one environment, from nobody else.

``<environment>-<content>.compiled``: a line of JSON with the environment, the artifacts' names,
lengths and SHA-256 of what follows, then torch's artifacts and Triton's kernels. The checksum finds
damage; it is no signature. Who may write to a file decides whether it is read at all.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import stat
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, Iterator, Optional, Tuple

import torch

__all__ = ["CompileCacheError", "check_folder", "environment", "read_caches", "write_cache"]

SUFFIX = ".compiled"
FORMAT = "unsloth compile cache 2"
_PACKAGES = ("triton", "unsloth", "unsloth_zoo", "transformers", "peft", "bitsandbytes")


class CompileCacheError(RuntimeError):
    """A folder that was given for the compile cache cannot serve; says why and what to do."""


@functools.lru_cache(maxsize = None)
def environment() -> Dict[str, str]:
    """What has to be the same for a cache to be of use: software versions and the GPU's model."""
    found = {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "cuda": str(torch.version.cuda or torch.version.hip),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "gpu": "none",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = f"{properties.name} sm_{properties.major}{properties.minor}"
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _key() -> str:
    text = json.dumps(environment(), sort_keys = True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _distrust(status: os.stat_result) -> Optional[str]:
    """Why somebody else may have written what `status` describes, or None."""
    if os.name != "posix":
        return None
    if status.st_mode & stat.S_IWOTH:
        return "everybody may write to it (remedy: chmod o-w)"
    if status.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    return None


def check_folder(folder: Path) -> None:
    """Make ``folder`` if it is missing; CompileCacheError if it is not writable or open to all."""
    try:
        folder.mkdir(mode = 0o700, parents = True, exist_ok = True)
        with tempfile.TemporaryFile(dir = folder):
            pass
    except OSError as error:
        raise CompileCacheError(
            f"compile cache folder {str(folder)!r} cannot be written ({error.strerror or error}); "
            "give one that can, or none."
        ) from error
    reason = _distrust(folder.stat())
    if reason:
        raise CompileCacheError(f"compile cache folder {str(folder)!r} is refused: {reason}.")


def read_caches(folder: Path, say: Callable[[str], None]) -> Iterator[Tuple[Path, bytes, bytes]]:
    """(path, torch's artifacts, Triton's kernels) of the files for this environment; says what it
    leaves out."""
    if not folder.is_dir():
        return
    reason = _distrust(folder.stat())
    if reason:
        say(f"compile cache folder {str(folder)!r} is ignored: {reason}.")
        return
    foreign = 0
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if not path.name.startswith(_key()):
            foreign += 1
            continue
        try:
            header, data = _read(path)
        except (OSError, ValueError) as error:
            say(f"compile cache {path} is ignored: {error}.")
            continue
        if header["environment"] != environment():
            foreign += 1
            continue
        split = header["torch_bytes"]
        yield path, data[:split], data[split:]
    if foreign:
        say(
            f"{foreign} of the compile caches in {folder} are of other versions or another GPU and "
            "are ignored."
        )


def _read(path: Path) -> Tuple[Dict[str, Any], bytes]:
    """(header, what follows it); ValueError with the reason if it is damaged or not to be trusted."""
    # Not through a link, and not waiting for a pipe: what is checked is what is read.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        reason = "it is no plain file" if not stat.S_ISREG(status.st_mode) else _distrust(status)
        if reason:
            raise ValueError(reason)
        line, data = file.readline(), file.read()
    try:
        header = json.loads(line)
        wanted = {"format": FORMAT, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        whole = {name: header.get(name) for name in wanted} == wanted
        whole = whole and isinstance(header["artifacts"], list) and "environment" in header
        whole = whole and isinstance(header["torch_bytes"], int)
    except (ValueError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError("it is damaged (remedy: delete it; the next run writes a new one)")
    return header, data


def write_cache(folder: Path, torchs: bytes, tritons: bytes, artifacts: FrozenSet[str]) -> Path:
    """Write torch's artifacts and Triton's kernels under their content's name, then remove this
    environment's files that hold no more.

    Raises CompileCacheError if the disk does not take it.
    """
    data = torchs + tritons
    digest = hashlib.sha256(data).hexdigest()
    header = {
        "format": FORMAT,
        "bytes": len(data),
        "torch_bytes": len(torchs),
        "sha256": digest,
        "environment": environment(),
        "artifacts": sorted(artifacts),
    }
    path = folder / f"{_key()}-{digest[:12]}{SUFFIX}"
    try:
        # mkstemp's mode is 0600; replacing is atomic within a folder.
        number, temporary = tempfile.mkstemp(dir = folder, prefix = ".", suffix = ".part")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n" + data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CompileCacheError(f"compile cache {path} cannot be written: {error}.") from error
    _remove_superseded(folder, path, artifacts)
    return path


def _remove_superseded(folder: Path, new: Path, artifacts: FrozenSet[str]) -> None:
    for path in folder.glob(f"{_key()}-*{SUFFIX}"):
        if path != new:
            try:
                if artifacts.issuperset(_read(path)[0]["artifacts"]):
                    path.unlink()
            except (OSError, ValueError):
                continue  # damaged or another's: reading says so, nothing of it is removed
