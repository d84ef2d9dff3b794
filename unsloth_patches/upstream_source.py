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

from .fingerprints import fingerprint_module
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


def _source_file(module: str) -> Optional[Path]:
    root, _, rest = module.partition(".")
    folder = _package_folder(root)
    if folder is None:
        return None
    base = folder.joinpath(*rest.split(".")) if rest else folder
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def is_upstreamed(patch: Patch) -> bool:
    """This Unsloth already contains the patch: its first new module is there."""
    folder = _package_folder("unsloth")
    return bool(patch.modules) and folder is not None and (folder / patch.modules[0]).is_file()


def upstream_fingerprints(target: Target) -> Set[str]:
    """Fingerprints of a target's definitions in the installed Unsloth, read without importing it."""
    return fingerprint_module(target.module, target.name, _source_file)


def _misfit(target: Target) -> str:
    """Why a target cannot be replaced, judged by the source alone; empty where it can."""
    if _source_file(target.module) is None:
        return "" if target.optional else f"this Unsloth has no module {target.module}"
    if not target.fingerprints:
        return ""
    found = upstream_fingerprints(target)
    if not found:
        return "" if target.optional else f"{target.attribute} is not defined in this Unsloth"
    if not found & target.fingerprints:
        return f"{target.attribute} is a version that this patch does not know ({', '.join(sorted(found))})"
    return ""


@functools.lru_cache(maxsize = None)
def _release() -> str:
    """This Unsloth's version, read from its source; empty where it does not say."""
    source = _source_file("unsloth._version")
    text = source.read_text(encoding = "utf-8") if source else ""
    found = re.search(r'^__version__ = "([0-9.]+)"', text, re.MULTILINE)
    return found[1] if found else ""


def _numbers(version: str) -> List[int]:
    return [int(part) for part in version.split(".") if part]


def patch_misfit(patch: Patch) -> str:
    """Why a patch cannot go in whole, judged by the sources alone; empty where it can."""
    if patch.since and _release() and _numbers(_release()) < _numbers(patch.since):
        return f"made for Unsloth {patch.since} and newer; this is {_release()}"
    return next(filter(None, map(_misfit, patch.targets)), "")


def forget() -> None:
    """Look again: another Unsloth may be first on the path by now."""
    _package_folder.cache_clear()
    _release.cache_clear()
