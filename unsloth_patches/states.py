# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What is known of each patch: its state, what it has replaced, and the modules that concern it.

States: *pending* (its module has not been imported), *applied*, *skipped* (upstream is not what the
patch knows, or it was switched off: stock functions stay), *failed* (an error of ours: stock
functions stay), *upstreamed* (this Unsloth already contains it), and told only by ``status()``: *off*
(taken out by ``undo()``, or inside ``stock()``) and *late*, the row of an import after Unsloth.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Set

from .registry import PATCHES, Patch, Target
from .upstream_source import forget, has_module, is_upstreamed, patch_misfit

PENDING, APPLIED, SKIPPED = "pending", "applied", "skipped"
FAILED, UPSTREAMED = "failed", "upstreamed"
# Told by status(), never the state of a record: taken out for now; and the row that a late import has.
OFF, LATE = "off", "late"
HOME = f"{__package__}.unsloth"
SWITCHED_OFF = "switched off by UNSLOTH_PATCHES_DISABLE"


class Replaced:
    """One replacement that is in, or that ``stock()`` has taken out for now."""

    # Not a dataclass: its __dict__ would be one more holder of the stock function (_check_not_held).
    __slots__ = ("target", "owner", "leaf", "stock", "new", "taken_out")

    def __init__(self, target: Target, owner: Any, leaf: str, stock: Any, new: Any) -> None:
        self.target, self.owner, self.leaf = target, owner, leaf
        self.stock, self.new = stock, new
        self.taken_out = False


@dataclass
class Record:
    patch: Patch
    state: str = PENDING
    reason: str = ""
    replaced: List[Replaced] = field(default_factory = list)
    checked: bool = False


def say(text: str) -> None:
    print(f"unsloth_patches: {text}", file = sys.stderr)


def patch_names() -> List[str]:
    """Patches of which users see something; what only brings helpers for tests is none."""
    return [patch.name for patch in PATCHES if patch.targets or patch.modules]


def disabled_names() -> Set[str]:
    """Names in ``UNSLOTH_PATCHES_DISABLE``; ``all`` stands for every patch."""
    listed = os.environ.get("UNSLOTH_PATCHES_DISABLE", "").split(",")
    names = {name.strip() for name in listed} - {""}
    return set(patch_names()) if "all" in names else names


def records() -> Dict[str, Record]:
    """Patch name -> what is known of it."""
    with _making_records:
        return _records()


# lru_cache alone lets two threads that are the first to ask make one each, and what a thread writes into
# its own is lost.
_making_records = threading.Lock()


@functools.lru_cache(maxsize = None)
def _records() -> Dict[str, Record]:
    names, disabled = patch_names(), disabled_names()
    found = {patch.name: Record(patch) for patch in PATCHES if patch.name in names}
    for name in disabled & set(found):
        found[name].state, found[name].reason = SKIPPED, SWITCHED_OFF
    for name in sorted(disabled - set(found)):
        known = ", ".join(found)
        say(f"UNSLOTH_PATCHES_DISABLE names {name!r}, which is no patch. Known: {known}, all.")
    return found


def watched_modules(patch: Patch) -> List[str]:
    """Modules after whose import the patch has something to do; one that only adds modules is in as
    soon as Unsloth is."""
    return list(dict.fromkeys(target.module for target in patch.targets)) or ["unsloth"]


@functools.lru_cache(maxsize = None)
def hooked_modules() -> Set[str]:
    """Modules after whose import something is to be done; ``unsloth`` itself for the summary line."""
    return {"unsloth"}.union(*(watched_modules(record.patch) for record in records().values()))


@functools.lru_cache(maxsize = None)
def new_modules() -> Dict[str, str]:
    """Upstream path -> our module, for the modules that patches add and this Unsloth lacks."""
    paths = {}
    for record in records().values():
        if record.reason == SWITCHED_OFF or is_upstreamed(record.patch):
            continue
        for dotted in record.patch.dotted_modules:
            if not has_module(f"unsloth.{dotted}"):
                paths[f"unsloth.{dotted}"] = f"{HOME}.{dotted}"
    return paths


def find_our_module(name: str) -> Optional[str]:
    """Our module at this path of Unsloth. What lies in a package of ours is ours, listed or not: found
    by its file, it would be a second copy under another name."""
    homes = new_modules()
    above, _, leaf = name.rpartition(".")
    if name in homes or above not in homes:
        return homes.get(name)
    return f"{homes[above]}.{leaf}"


def why_not(record: Record) -> str:
    """Why a patch is not in and will not be; empty where it is, or will be."""
    if record.state in (SKIPPED, FAILED):
        return f"{record.state}: {record.reason}"
    reason = misfit(record) if record.state == PENDING else ""
    return reason and f"to be skipped: {reason}"


def misfit(record: Record) -> str:
    """Why a patch cannot go in whole, judged by Unsloth's sources and by the patches that it requires."""
    if is_upstreamed(record.patch):
        return ""
    reason = patch_misfit(record.patch)
    for name in record.patch.requires:
        required = records().get(name)
        why = why_not(required) if required and not reason else ""
        if why:  # the one at the bottom, not those between
            _, _, below = why.partition(": ")
            reason = below if below.startswith("needs ") else f"needs {name}, which is {why}"
    return reason


def forget_all() -> None:
    """Start again, with the environment and the Unsloth that are there by now."""
    for cache in (_records, hooked_modules, new_modules):
        cache.cache_clear()
    forget()
