# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Tell the state of every patch: what ``status()`` returns, and the summary line of an import."""

from __future__ import annotations

import itertools
import os
import sys
from typing import Dict, Iterable, List, NamedTuple, Tuple

from .hooks import imported_late, installed
from .private_names import SKIPPED as NAME_SKIPS_PATCH
from .private_names import missing
from .registry import Patch, Target
from .settings import set_values
from .states import (
    APPLIED,
    FAILED,
    LATE,
    OFF,
    PENDING,
    SKIPPED,
    SWITCHED_OFF,
    UPSTREAMED,
    Record,
    misfit,
    records,
    say,
    watched_modules,
)
from .upstream_source import is_absent, is_upstreamed, on_cpu_backend, source_file

_UNDONE = "undo() gave Unsloth its own functions back; install() replaces again what it still can"
_IN_STOCK = "only inside this stock() block, where Unsloth's own functions run; in again after it"
LATE_MEANS = (
    "what could still be replaced everywhere was replaced, the other patches are skipped, and models "
    "and trainers made before keep stock functions; in a new process, put `import unsloth_patches` "
    "before `from unsloth import …`"
)
FOR_GPUS = "for GPUs, not in use here"
WILL_APPLY = "will apply"
# What Unsloth runs on its CPU backend beside unsloth_zoo.cpu.
_CPU_MODULES = (
    "unsloth",
    "unsloth._cpu_init",
    "unsloth.chat_templates",
    "unsloth.ollama_template_mappers",
)


class PatchStatus(NamedTuple):
    """One row of ``status()``. brief: the reason without the names of modules. replaced: how many of
    the functions in ``replaces`` are replaced now."""

    name: str
    title: str
    replaces: Tuple[str, ...]
    state: str
    reason: str
    brief: str = ""
    replaced: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.state}" + (f" ({self.reason})" if self.reason else "")


def status() -> List[PatchStatus]:
    """The state of every patch now. A pending one says what it waits for and whether it will fit.

    A late import has a row of its own, the first. A patch whose environment variable has an unknown
    value says so in its reason, and so does one that goes without a name of torch or Triton.
    """
    rows = [_patch_status(record) for record in records().values()]
    if imported_late() and installed():
        title = "unsloth_patches was imported after unsloth"
        rows.insert(0, PatchStatus("import order", title, (), LATE, LATE_MEANS, LATE_MEANS))
    problems = _switch_problems()
    for name in missing(source_file, on_gpu = False):
        for patch in name.patches if name.without != NAME_SKIPS_PATCH else ():
            problems.setdefault(patch, []).append(f"{name}: {name.without}")
    return [_with_problems(row, problems.get(row.name, [])) for row in rows]


def _with_problems(row: PatchStatus, problems: List[str]) -> PatchStatus:
    if row.state in (SKIPPED, FAILED) or not problems:
        return row
    reason, brief = ("; ".join(filter(None, [old, *problems])) for old in (row.reason, row.brief))
    return row._replace(reason = reason, brief = brief)


def _switch_problems() -> Dict[str, List[str]]:
    """Patch -> what its environment variables say that it does not know. Their readers need torch:
    before it is imported nothing is told, since Unsloth wants to be first."""
    found: Dict[str, List[str]] = {}
    for value in set_values() if "torch" in sys.modules else ():
        if value.problem:
            found.setdefault(value.patch, []).append(value.problem)
    return found


def _patch_status(record: Record) -> PatchStatus:
    state, brief, more = _patch_state(record)
    reason = "; ".join(filter(None, [brief, *more]))
    patch, names = record.patch, tuple(target.attribute for target in record.patch.targets)
    replaced = sum(not done.taken_out for done in record.replaced)
    return PatchStatus(patch.name, patch.title, names, state, reason, brief, replaced)


def _patch_state(record: Record) -> Tuple[str, str, List[str]]:
    """(state, reason in brief, what makes it whole)."""
    out = [done for done in record.replaced if done.taken_out]
    if record.state == PENDING:
        return _outlook(record)
    if record.state != APPLIED:
        return record.state, record.reason, []
    if not out:
        return _applied(record)
    if len(out) == len(record.replaced):
        return OFF, _IN_STOCK, []
    # A module was imported inside the block.
    return OFF, f"{len(out)} of {len(record.replaced)} replacements are off {_IN_STOCK}", []


def _outlook(record: Record) -> Tuple[str, str, List[str]]:
    if is_upstreamed(record.patch):
        return UPSTREAMED, "this Unsloth already contains it", []
    if not installed():
        return OFF, _UNDONE, []
    missing, waiting = _missing(record)
    if record.patch.targets and not waiting:
        return PENDING, missing[0], []
    waiting = waiting or watched_modules(record.patch)
    if on_cpu_backend() and not serves_cpu(record.patch):
        return PENDING, FOR_GPUS, [f"Unsloth's CPU backend has not imported {', '.join(waiting)}"]
    reason = misfit(record)
    if reason:
        return PENDING, f"will be skipped: {reason}", []
    return PENDING, WILL_APPLY, [f"waits for {', '.join(waiting)}", *missing]


def _applied(record: Record) -> Tuple[str, str, List[str]]:
    missing, waiting = _missing(record)
    if not waiting:
        return APPLIED, "", missing
    brief = f"{len(record.replaced)} of {len(record.patch.targets)} targets"
    return APPLIED, brief, [f"not imported: {', '.join(waiting)}", *missing]


def _missing(record: Record) -> Tuple[List[str], List[str]]:
    """(a line on what this release lacks, modules that are still to come)."""
    done = {replaced.target.attribute for replaced in record.replaced}
    rest = [target for target in record.patch.targets if target.attribute not in done]
    lacking = [target for target in rest if target.optional and is_absent(target)]
    waiting = _modules(target for target in rest if target not in lacking)
    line = f"not in this release: {', '.join(_modules(lacking))}"
    return ([line] if lacking else []), waiting


def _modules(targets: Iterable[Target]) -> List[str]:
    return sorted({target.module for target in targets})


def serves_cpu(patch: Patch) -> bool:
    """Unsloth's CPU backend imports a module that the patch replaces something in, or leaves that to
    the script, as it does with the chat templates."""
    return any(
        m in _CPU_MODULES or m.startswith("unsloth_zoo.cpu.") for m in watched_modules(patch)
    )


def summarise() -> None:
    """One line on stderr, right after Unsloth was imported."""
    if os.environ.get("UNSLOTH_PATCHES_QUIET") == "1":
        return
    rows = status()
    for_gpus = [r for r in rows if r.state == PENDING and r.brief.startswith(FOR_GPUS)]
    counts = [
        (state, [r for r in rows if r.state == state and r not in for_gpus])
        for state in (APPLIED, PENDING, UPSTREAMED)
    ]
    counts.append((FOR_GPUS, for_gpus))
    parts = [f"{len(found)} {state}" for state, found in counts if found]
    off = [r for r in rows if r.state == SKIPPED and r.reason == SWITCHED_OFF]
    if off and len(off) == len(rows):
        parts, rows = [f"all {len(off)} {SWITCHED_OFF}"], []
    parts += [f"{r.name} {r.state} ({r.reason})" for r in rows if r.state in (SKIPPED, FAILED)]
    for row in rows:
        if row.state == LATE:
            say(f"imported after unsloth: {row.reason}")
    say("; ".join(parts) or "no patches")
    for problem in itertools.chain(*_switch_problems().values()):
        say(problem)
