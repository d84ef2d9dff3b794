# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Apply, check, undo: what happens to each patch once a module of Unsloth is there.

States: *pending* (its module has not been imported), *applied*, *skipped* (upstream is not what the
patch knows, or it was switched off: stock functions stay), *failed* (an error of ours: stock
functions stay), *upstreamed* (this Unsloth already contains it), and told only by ``status()``: *off*
(taken out by ``undo()``, or inside ``stock()``). All targets of a patch are
replaced or none: the sources of modules still to come are checked before the first replacement,
and a target that fails later takes the earlier ones back. No exception leaves this module.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import os
import sys
import threading
import types
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, NamedTuple, Set, Tuple

from .fingerprints import fingerprint_live
from .hooks import imported_late, installed
from .registry import PATCHES, Patch, Target
from .upstream_source import forget, is_upstreamed, patch_misfit

PENDING, APPLIED, SKIPPED, FAILED, UPSTREAMED = (
    "pending",
    "applied",
    "skipped",
    "failed",
    "upstreamed",
)
# Told by status(), never the state of a record: taken out for now; and the row that a late import has.
OFF, LATE = "off", "late"
_UNDONE = "undo() gave Unsloth its own functions back; install() replaces again what it still can"
_IN_STOCK = "only inside this stock() block, where Unsloth's own functions run; in again after it"
LATE_MEANS = (
    "what could still be replaced everywhere was replaced, the other patches are skipped, and models "
    "and trainers made before keep stock functions; in a new process, put `import unsloth_patches` "
    "before `from unsloth import …`"
)
HOME = f"{__package__}.unsloth"

_SWITCHED_OFF = "switched off by UNSLOTH_PATCHES_DISABLE"
_FOR_GPUS = "for GPUs: "
# What Unsloth runs on its CPU backend beside unsloth_zoo.cpu.
_CPU_MODULES = ("unsloth._cpu_init", "unsloth.chat_templates", "unsloth.ollama_template_mappers")


class PatchStatus(NamedTuple):
    """One row of ``status()``."""

    name: str
    title: str
    replaces: Tuple[str, ...]
    state: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.state}" + (f" ({self.reason})" if self.reason else "")


class _Unsupported(Exception):
    """Upstream is not what the patch was written for; its text is the reason that users read."""


@dataclass
class _Replaced:
    target: Target
    owner: Any
    leaf: str
    stock: Any
    new: Any


@dataclass
class _Record:
    patch: Patch
    state: str = PENDING
    reason: str = ""
    replaced: List[_Replaced] = field(default_factory = list)
    checked: bool = False


# Two threads can import two modules of one patch at the same time. No deadlock with import locks: under
# this one only our own modules are imported, and those import nothing of Unsloth at their top.
_lock = threading.RLock()
# What stock() has taken out at the moment, by identity.
_taken_out: Dict[int, _Replaced] = {}


# --- what is there to do -----------------------------------------------------------------------


def disabled_names() -> Set[str]:
    """Names in ``UNSLOTH_PATCHES_DISABLE``; ``all`` stands for every patch."""
    listed = os.environ.get("UNSLOTH_PATCHES_DISABLE", "").split(",")
    names = {name.strip() for name in listed} - {""}
    return {patch.name for patch in PATCHES} if "all" in names else names


@functools.lru_cache(maxsize = None)
def _records() -> Dict[str, _Record]:
    disabled = disabled_names()
    records = {patch.name: _Record(patch) for patch in PATCHES}
    for name in disabled & set(records):
        records[name].state = SKIPPED
        records[name].reason = _SWITCHED_OFF
    for name in sorted(disabled - set(records)):
        known = ", ".join(records)
        _say(f"UNSLOTH_PATCHES_DISABLE names {name!r}, which is no patch. Known: {known}, all.")
    return records


@functools.lru_cache(maxsize = None)
def hooked_modules() -> Set[str]:
    """Modules after whose import something is to be done; ``unsloth`` itself for the summary line."""
    targets = (target for record in _records().values() for target in record.patch.targets)
    return {"unsloth"} | {target.module for target in targets}


@functools.lru_cache(maxsize = None)
def new_modules() -> Dict[str, str]:
    """Upstream path -> our module, for the modules that patches add and this Unsloth lacks."""
    paths = {}
    for record in _records().values():
        if record.reason.startswith("switched off") or is_upstreamed(record.patch):
            continue
        for file in record.patch.modules:
            dotted = file[: -len(".py")].replace("/", ".")
            dotted = dotted[: -len(".__init__")] if dotted.endswith(".__init__") else dotted
            paths[f"unsloth.{dotted}"] = f"{HOME}.{dotted}"
    return paths


def _preflight(record: _Record) -> None:
    if is_upstreamed(record.patch):
        record.state, record.reason = UPSTREAMED, "this Unsloth already contains it"
        return
    for name in record.patch.requires:
        other = _records()[name]
        if other.state in (SKIPPED, FAILED):
            raise _Unsupported(f"needs {name}, which is {other.state}: {other.reason}")
    reason = patch_misfit(record.patch)
    if reason:
        raise _Unsupported(reason)
    record.checked = True


# --- replacing ---------------------------------------------------------------------------------


def module_imported(module: types.ModuleType) -> None:
    """Called by the import hook right after ``module`` was executed, also on a reload."""
    for record in _records().values():
        if any(target.module == module.__name__ for target in record.patch.targets):
            _apply(record, module, late = False)
    if module.__name__ == "unsloth":
        _summarise()


def patch_imported_modules() -> None:
    """For a late ``import unsloth_patches``: replace in modules that are imported already."""
    for record in _records().values():
        for name in dict.fromkeys(target.module for target in record.patch.targets):
            module = sys.modules.get(name)
            if module is None or _is_stand_in(module):
                continue
            if not any(r.target.module == name for r in record.replaced):
                _apply(record, module, late = True)
    _summarise()


def _is_stand_in(module: types.ModuleType) -> bool:
    """Made by Unsloth's CPU backend in the place of a module that it does not import: what a patch
    would replace was never there, and the patch waits, as it does with the hooks in time."""
    return _on_cpu_backend() and getattr(module, "__file__", None) is None


def _apply(record: _Record, module: types.ModuleType, late: bool) -> None:
    with _lock:
        if record.state not in (PENDING, APPLIED):
            return
        try:
            if not record.checked:
                _preflight(record)
                if record.state == UPSTREAMED:
                    return
            # A reloaded module has stock functions again; what we remember of it is gone.
            record.replaced = [r for r in record.replaced if r.target.module != module.__name__]
            targets = [t for t in record.patch.targets if t.module == module.__name__]
            # Chained targets (two on one name) see each other's result, so one at a time.
            for target in targets:
                _replace(record, target, module, late)
            record.state, record.reason = APPLIED, ""
        except (_Unsupported, NotImplementedError) as error:
            _give_up(record, SKIPPED, str(error))
        except Exception as error:
            _give_up(record, FAILED, f"{type(error).__name__}: {error}")


def _give_up(record: _Record, state: str, reason: str) -> None:
    """Take a patch back, and first the patches that wrapped what it had put in."""
    mine = {id(done.new) for done in record.replaced}
    for other in _records().values():
        if other is not record and any(id(done.stock) in mine for done in other.replaced):
            _give_up(other, SKIPPED, f"stands on {record.patch.name}, which is {state}: {reason}")
    _restore(record)
    record.state, record.reason = state, reason or "no reason given"


def _owner_of(target: Target, module: types.ModuleType) -> Tuple[Any, str]:
    *path, leaf = target.name.split(".")
    owner = module
    for part in path:
        owner = getattr(owner, part)
    return owner, leaf


def _replace(record: _Record, target: Target, module: types.ModuleType, late: bool) -> None:
    owner, leaf = _owner_of(target, module)
    if not hasattr(owner, leaf):
        if target.optional:
            return
        raise _Unsupported(f"{target.attribute} is not there")
    # Not getattr: a staticmethod or a plain function of a class has to stay what it is.
    stock = vars(owner).get(leaf, getattr(owner, leaf))
    _check_live(record, target, stock)
    if late:
        _check_not_held(target, stock)
    path, _, function = target.replacement.partition(":")
    make = getattr(importlib.import_module(f"{HOME}.{path}"), function)
    new = make(stock)
    setattr(owner, leaf, new)
    record.replaced.append(_Replaced(target, owner, leaf, stock, new))
    if late:
        _swap({id(stock): (stock, new)})


def _check_live(record: _Record, target: Target, stock: Any) -> None:
    """The live object must be what the source said: another library may have replaced it before us."""
    ours = any(r.new is stock for other in _records().values() for r in other.replaced)
    if not target.fingerprints or ours:
        return
    found = fingerprint_live(stock)
    if found not in target.fingerprints:
        raise _Unsupported(
            f"{target.attribute} is a version that this patch does not know ({found or 'no source'})"
        )


def _check_not_held(target: Target, stock: Any) -> None:
    """Module attributes can be rebound late; closures, class attributes, lists and compiled code cannot."""
    if isinstance(stock, type) or "." in target.name:
        raise _Unsupported(
            f"{_came_late()}: {target.attribute} is a class or a part of one, which can only be replaced "
            f"while its module is imported; {_remedy()}"
        )
    module_dicts = {id(vars(m)) for m in _modules()}
    for holder in gc.get_referrers(stock):
        if id(holder) in module_dicts or isinstance(holder, (types.FrameType, _Replaced)):
            continue
        raise _Unsupported(
            f"{_came_late()}: {target.attribute} is already held by a {type(holder).__name__}; {_remedy()}"
        )


def _came_late() -> str:
    if imported_late():
        return "unsloth was imported before unsloth_patches"
    return "install() after undo(), with unsloth imported"


def _remedy() -> str:
    if imported_late():
        return "put `import unsloth_patches` first"
    return "in a new process, put `import unsloth_patches` first and leave out undo()"


# --- rebinding, undo, stock --------------------------------------------------------------------


def _modules() -> List[types.ModuleType]:
    return [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]


def _swap(pairs: Dict[int, Tuple[Any, Any]]) -> None:
    """In every module: names bound to an old object (``from x import y``) get the new one."""
    for module in _modules():
        for name, value in list(vars(module).items()):
            pair = pairs.get(id(value))
            if pair is not None and pair[0] is value:
                vars(module)[name] = pair[1]


def _restore(record: _Record) -> None:
    for done in reversed(record.replaced):
        setattr(done.owner, done.leaf, done.stock)
        _swap({id(done.new): (done.new, done.stock)})
        # What a replacement has changed elsewhere since then, it knows itself how to take back.
        getattr(done.new, "_undo_replacement", lambda: None)()
        _taken_out.pop(id(done), None)  # stock() must not bring it back
    record.replaced = []


def restore_all() -> None:
    """Undo every patch, last one first, and forget what was found out."""
    with _lock:
        for record in reversed(list(_records().values())):
            _restore(record)
    for cache in (_records, hooked_modules, new_modules):
        cache.cache_clear()
    forget()


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """Run stock functions inside the block: module attributes and their aliases are swapped, and back."""
    # Inside another stock() there is nothing left to take out, and the outer one brings it back.
    done = [r for record in _records().values() for r in record.replaced if id(r) not in _taken_out]
    for r in reversed(done):
        setattr(r.owner, r.leaf, r.stock)
    # Chained replacements: an alias of any of them has to end at the bottom of its chain.
    bottom: Dict[int, Any] = {}
    for r in done:
        bottom[id(r.new)] = bottom.get(id(r.stock), r.stock)
    swapped = _swap_remembering({id(r.new): (r.new, bottom[id(r.new)]) for r in done})
    _taken_out.update((id(r), r) for r in done)
    try:
        yield
    finally:
        # Without what undo(), or a patch that failed in between, has taken back for good.
        back = [r for r in done if _taken_out.pop(id(r), None)]
        objects = {id(r.new) for r in back}
        for names, name, new in swapped:
            if id(new) in objects:
                names[name] = new
        for r in back:
            setattr(r.owner, r.leaf, r.new)


def _swap_remembering(pairs: Dict[int, Tuple[Any, Any]]) -> List[Tuple[dict, str, Any]]:
    places = []
    for module in _modules():
        for name, value in list(vars(module).items()):
            pair = pairs.get(id(value))
            if pair is not None and pair[0] is value:
                vars(module)[name] = pair[1]
                places.append((vars(module), name, value))
    return places


# --- telling -----------------------------------------------------------------------------------


def status() -> List[PatchStatus]:
    """The state of every patch now. A pending one says what it waits for and whether it will fit.

    A late import has a row of its own, the first. A patch whose environment variable has an unknown
    value says so in its reason.
    """
    rows = [_status_of(record) for record in _records().values()]
    if imported_late() and installed():
        title = "unsloth_patches was imported after unsloth"
        rows.insert(0, PatchStatus("import order", title, (), LATE, LATE_MEANS))
    problems = _switch_problems()
    return [_with_problems(row, problems.get(row.name, [])) for row in rows]


def _with_problems(row: PatchStatus, problems: List[str]) -> PatchStatus:
    if row.state in (SKIPPED, FAILED) or not problems:
        return row
    return row._replace(reason = "; ".join(filter(None, [row.reason, *problems])))


def _switch_problems() -> Dict[str, List[str]]:
    """Patch -> what its environment variables say that it does not know. Their readers need torch:
    before it is imported nothing is told, since Unsloth wants to be first."""
    found: Dict[str, List[str]] = {}
    if "torch" in sys.modules:
        from .settings import set_values

        for value in set_values():
            if value.problem:
                found.setdefault(value.patch, []).append(value.problem)
    return found


def _status_of(record: _Record) -> PatchStatus:
    state, reason = record.state, record.reason
    done = {r.target.attribute for r in record.replaced}
    waiting = sorted({t.module for t in record.patch.targets if t.attribute not in done})
    taken_out = [r for r in record.replaced if id(r) in _taken_out]
    if state == PENDING and is_upstreamed(record.patch):
        state, reason = UPSTREAMED, "this Unsloth already contains it"
    elif state == PENDING and not installed():
        state, reason = OFF, _UNDONE
    elif state == APPLIED and taken_out:
        state, reason = OFF, _IN_STOCK
        if len(taken_out) < len(record.replaced):  # a module was imported inside the block
            reason = f"{len(taken_out)} of {len(record.replaced)} replacements are off {reason}"
    elif state == PENDING:
        misfit = patch_misfit(record.patch)
        outlook = f"will be skipped: {misfit}" if misfit else "will apply"
        reason = f"{outlook}; waits for {', '.join(waiting)}"
        if _on_cpu_backend() and not serves_cpu(record.patch):
            reason = f"{_FOR_GPUS}Unsloth's CPU backend has not imported {', '.join(waiting)}"
    elif state == APPLIED and waiting:
        total = len(record.patch.targets)
        reason = f"{len(done)} of {total} targets; not imported: {', '.join(waiting)}"
    replaces = tuple(target.attribute for target in record.patch.targets)
    return PatchStatus(record.patch.name, record.patch.title, replaces, state, reason)


def serves_cpu(patch: Patch) -> bool:
    """Unsloth's CPU backend imports a module that the patch replaces something in, or leaves that to
    the script, as it does with the chat templates."""
    modules = [target.module for target in patch.targets]
    return any(m in _CPU_MODULES or m.startswith("unsloth_zoo.cpu.") for m in modules)


def _on_cpu_backend() -> bool:
    """Unsloth has been imported, and chose its CPU backend."""
    zoo = sys.modules.get("unsloth_zoo")
    return "unsloth" in sys.modules and bool(getattr(zoo, "_IS_CPU_BACKEND", False))


def _summarise() -> None:
    if os.environ.get("UNSLOTH_PATCHES_QUIET") == "1":
        return
    rows = status()
    for_gpus = [r for r in rows if r.state == PENDING and r.reason.startswith(_FOR_GPUS)]
    counts = [
        (state, [r for r in rows if r.state == state and r not in for_gpus])
        for state in (APPLIED, PENDING, UPSTREAMED)
    ]
    counts.append(("for GPUs, not in use here", for_gpus))
    parts = [f"{len(found)} {state}" for state, found in counts if found]
    off = [r for r in rows if r.state == SKIPPED and r.reason == _SWITCHED_OFF]
    if len(off) == len(rows):
        parts, rows = [f"all {len(off)} {_SWITCHED_OFF}"], []
    parts += [f"{r.name} {r.state} ({r.reason})" for r in rows if r.state in (SKIPPED, FAILED)]
    for row in rows:
        if row.state == LATE:
            _say(f"imported after unsloth: {row.reason}")
    _say("; ".join(parts) or "no patches")
    for problem in itertools.chain(*_switch_problems().values()):
        _say(problem)


def _say(text: str) -> None:
    print(f"unsloth_patches: {text}", file = sys.stderr)
