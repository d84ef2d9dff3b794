# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What the installed Unsloth is, judged by its sources alone: nothing of it is imported here.

Before a patch replaces anything it has to be known that all of it fits, and its later targets may
stand in modules that nobody has imported yet.
"""

from __future__ import annotations

import functools
import importlib.machinery
import re
import sys
from pathlib import Path
from typing import List, Optional, Set

from . import fingerprints, private_names
from .registry import Patch, Target


@functools.lru_cache(maxsize = None)
def _package_folder(root: str) -> Optional[Path]:
    module = sys.modules.get(root)
    locations = getattr(module, "__path__", None)
    if not locations:
        # Not importlib.util.find_spec: that asks our own finder, which asks here.
        spec = importlib.machinery.PathFinder.find_spec(root)
        locations = spec.submodule_search_locations if spec else None
    return Path(list(locations)[0]) if locations else None


@functools.lru_cache(maxsize = None)
def source_file(module: str) -> Optional[Path]:
    """Where a module of any package lies, found without importing it."""
    root, _, rest = module.partition(".")
    folder = _package_folder(root)
    if folder is None:
        return None
    base = folder.joinpath(*rest.split(".")) if rest else folder
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def has_module(module: str) -> bool:
    """The installed Unsloth has this module, as a file or as a package."""
    return source_file(module) is not None


def is_upstreamed(patch: Patch) -> bool:
    """This Unsloth already contains the patch: its first new module is there."""
    return bool(patch.modules) and has_module(f"unsloth.{patch.dotted_modules[0]}")


def upstream_fingerprints(target: Target) -> Set[str]:
    """Fingerprints of a target's definitions in the installed Unsloth, read without importing it."""
    return fingerprints.fingerprint_module(target.module, target.name, source_file)


@functools.lru_cache(maxsize = None)
def is_absent(target: Target) -> bool:
    """This Unsloth's sources have no such module, or it binds no such name."""
    return not fingerprints.binds(target.module, target.name, source_file)


def on_cpu_backend() -> bool:
    """Unsloth has been imported, and chose its CPU backend."""
    zoo = sys.modules.get("unsloth_zoo")
    return "unsloth" in sys.modules and bool(getattr(zoo, "_IS_CPU_BACKEND", False))


@functools.lru_cache(maxsize = None)
def target_misfit(target: Target) -> str:
    """Why a target cannot be replaced, judged by the source alone; empty where it can."""
    return fingerprints.target_misfit(target, source_file)


@functools.lru_cache(maxsize = None)
def _release() -> str:
    """This Unsloth's version, read from its source; empty where it does not say."""
    source = source_file("unsloth._version")
    text = source.read_text(encoding = "utf-8") if source else ""
    found = re.search(r'^__version__ = "([0-9.]+)"', text, re.MULTILINE)
    return found[1] if found else ""


def _numbers(version: str) -> List[int]:
    return [int(part) for part in version.split(".") if part]


def patch_misfit(patch: Patch) -> str:
    """Why a patch cannot go in whole, judged by the sources alone; empty where it can."""
    if patch.since and _release() and _numbers(_release()) < _numbers(patch.since):
        return (
            f"not in this release: made for Unsloth {patch.since} and newer, this is {_release()}"
        )
    for module in map("unsloth.{}".format, patch.dotted_modules):
        if has_module(module):
            return f"this Unsloth has a module of its own at {module}"
    reason = next(filter(None, map(target_misfit, patch.targets)), "")
    return reason or private_names.why_skipped(patch.name, source_file)


def forget() -> None:
    """Look again: another Unsloth may be first on the path by now."""
    for cache in (_package_folder, source_file, _release, is_absent, target_misfit):
        cache.cache_clear()
