# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Triton's own kernels in a compile cache.

``torch.compiler.save_cache_artifacts`` holds the kernels that Inductor wrote. Those that Python
launches by ``kernel[grid]`` (dequantize, loss, optimizer) it does not know, nor the launcher that
Triton has a C compiler build for each: seconds of a first step, found again only in Triton's cache
folder. ``watch`` notes which entries of it a process uses, ``pack`` makes bytes of them, and
``unpack`` puts them where this process's Triton will look.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import uuid
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, Set, Tuple

import torch

__all__ = ["pack", "unpack", "used", "watch"]

_used: Set[Path] = set()  # Triton's entries: a folder each, named by a hash of all that went in
_GROUP = "__grp__"  # a file of absolute paths to an entry's other files
_NAME = re.compile(r"\w[\w.+,-]*")  # no separators, no dots in front


def watch() -> bool:
    """Note every entry of Triton's file cache from now on; False if Triton keeps none such.

    Triton's folder stays where it is now, or where Inductor will put it: Inductor names another
    once it compiles, and would look past what was put into the first.
    """
    try:
        from torch._inductor.runtime.runtime_utils import triton_cache_dir
        from triton import knobs
        from triton.runtime.cache import FileCacheManager
    except ImportError:
        return False
    current = knobs.cache.manager_class
    if current is not None:  # ours, or a remote cache of the user's
        return bool(getattr(current, "_notes_entries", False))

    class NotingCacheManager(FileCacheManager):
        _notes_entries = True

        def __init__(
            self,
            key,
            override = False,
            dump = False,
        ):
            super().__init__(key, override, dump)
            if not (override or dump):
                _used.add(Path(self.cache_dir))

    knobs.cache.manager_class = NotingCacheManager
    if "TRITON_CACHE_DIR" not in os.environ:
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        os.environ["TRITON_CACHE_DIR"] = triton_cache_dir(device)
    return True


def _files(entry: Path) -> Iterator[Path]:
    """An entry's files, the one that names the others last; not Triton's temporary folders."""
    if entry.is_dir():
        files = (path for path in sorted(entry.iterdir()) if path.is_file() and path.name != "lock")
        yield from sorted(files, key = lambda path: path.name.startswith(_GROUP))


def used() -> FrozenSet[str]:
    """``triton:key`` of every entry noted so far that holds something."""
    return frozenset(f"triton:{entry.name}" for entry in _used if any(_files(entry)))


def pack() -> bytes:
    """All noted entries as a tar archive of ``key/file``, without this machine's paths."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj = buffer, mode = "w") as archive:
        for entry in sorted(_used):
            for path in _files(entry):
                data = path.read_bytes()
                if path.name.startswith(_GROUP):
                    names = list(json.loads(data).get("child_paths", {}))
                    data = json.dumps(names).encode()
                info = tarfile.TarInfo(f"{entry.name}/{path.name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _members(packed: bytes) -> Iterator[Tuple[str, str, bytes]]:
    """(key, file, contents); ValueError for a name that leads out of its folder."""
    with tarfile.open(fileobj = io.BytesIO(packed)) as archive:
        for info in archive:
            key, _, name = info.name.partition("/")
            if not (info.isreg() and _NAME.fullmatch(key) and _NAME.fullmatch(name)):
                raise ValueError(f"Triton entry {info.name!r} has no plain name")
            file: Any = archive.extractfile(info)
            yield key, name, file.read()


def unpack(packed: bytes) -> FrozenSet[str]:
    """Put packed entries into Triton's cache folder; returns their names as ``used`` has them.

    What the folder holds already is left. Raises ValueError for an archive of another kind and
    OSError where the folder cannot be written; Triton compiles what it does not find.
    """
    from triton import knobs

    found: Dict[str, Dict[str, bytes]] = {}
    try:
        for key, name, data in _members(packed):
            found.setdefault(key, {})[name] = data
    except tarfile.TarError as error:
        raise ValueError(f"its Triton kernels cannot be read: {error}") from error
    for key, files in found.items():
        entry = Path(knobs.cache.dir) / key
        entry.mkdir(parents = True, exist_ok = True)
        for name, data in files.items():
            if name.startswith(_GROUP):
                paths = {child: str(entry / child) for child in json.loads(data)}
                data = json.dumps({"child_paths": paths}).encode()
            _write(entry / name, data)
        _used.add(entry)
    return frozenset(f"triton:{key}" for key in found)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, as other processes may be looking; not over what is there."""
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
