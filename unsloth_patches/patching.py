# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Take replacements in and out, once a module of Unsloth is there.

All targets of a patch are replaced or none: the sources of modules still to come are checked before
the first replacement, and a target that fails later takes the earlier ones back, and with them the
patches that need them. No exception leaves this module.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import threading
import types
from typing import Any, Dict, Iterator, List, Tuple

from .fingerprints import fingerprint_live, live_home, live_parameter_misfit, moved
from .hooks import UPSTREAM, imported_late
from .registry import Target
from .states import (
    APPLIED,
    FAILED,
    HOME,
    PENDING,
    SKIPPED,
    UPSTREAMED,
    Record,
    Replaced,
    forget_all,
    misfit,
    records,
    watched_modules,
)
from .upstream_source import is_upstreamed, on_cpu_backend


class _Unsupported(Exception):
    """Upstream is not what the patch was written for; its text is the reason that users read."""


# Two threads can import two modules of one patch at the same time. No deadlock with import locks: under
# this one only our own modules are imported, and those import nothing of Unsloth at their top.
_lock = threading.RLock()


# --- replacing ---------------------------------------------------------------------------------


def module_imported(module: types.ModuleType) -> None:
    """Called by the import hook right after ``module`` was executed, also on a reload."""
    for record in records().values():
        if module.__name__ in watched_modules(record.patch):
            _apply(record, module, late = False)
    with _lock:
        _swap_in_early_holders(module)


def _swap_in_early_holders(module: types.ModuleType) -> None:
    """Modules that ``module`` imports can have taken its names while it was being executed, and hold a
    stock function that nothing else calls any more."""
    pairs: Dict[int, Tuple[Any, Any]] = {}
    first: Dict[int, Any] = {}
    for done in (done for record in records().values() for done in record.replaced):
        if done.target.module == module.__name__ and not done.target.imported:
            # Of a chain, from its first to its last.
            stock = first[id(done.new)] = first.get(id(done.stock), done.stock)
            pairs[id(stock)] = (stock, done.new)
    upstream = [m for m in _modules() if getattr(m, "__name__", "").partition(".")[0] in UPSTREAM]
    _swap(pairs, upstream if pairs else [])


def patch_imported_modules() -> None:
    """For a late ``import unsloth_patches``: replace in modules that are imported already."""
    for record in records().values():
        for name in watched_modules(record.patch):
            module = sys.modules.get(name)
            if module is None or _is_stand_in(module):
                continue
            if not any(r.target.module == name for r in record.replaced):
                _apply(record, module, late = True)


def _is_stand_in(module: types.ModuleType) -> bool:
    """Made by Unsloth's CPU backend in the place of a module that it does not import: what a patch
    would replace was never there, and the patch waits, as it does with the hooks in time."""
    return on_cpu_backend() and getattr(module, "__file__", None) is None


def _apply(record: Record, module: types.ModuleType, late: bool) -> None:
    with _lock:
        if record.state not in (PENDING, APPLIED):
            return
        try:
            if not record.checked:
                _preflight(record)
                if record.state == UPSTREAMED:
                    return
            _forget_reloaded(record, module)
            # Chained targets (two on one name) see each other's result, so one at a time.
            for target in record.patch.targets:
                if target.module == module.__name__:
                    _replace(record, target, module, late)
            record.state, record.reason = APPLIED, ""
        except (_Unsupported, NotImplementedError) as error:
            _give_up(record, SKIPPED, str(error))
        except Exception as error:
            _give_up(record, FAILED, f"{type(error).__name__}: {error}")


def _preflight(record: Record) -> None:
    if is_upstreamed(record.patch):
        record.state, record.reason = UPSTREAMED, "this Unsloth already contains it"
        return
    reason = misfit(record)
    if reason:
        raise _Unsupported(reason)
    record.checked = True


def _forget_reloaded(record: Record, module: types.ModuleType) -> None:
    """A reloaded module has stock functions again; what we remember of it is gone."""
    for done in record.replaced:
        if done.target.module == module.__name__:
            done.taken_out = False  # the end of a stock() block must not bring it back
    record.replaced = [r for r in record.replaced if r.target.module != module.__name__]


def _give_up(record: Record, state: str, reason: str) -> None:
    """Take a patch back, and first the patches that wrapped what it had put in, or that need it."""
    mine = {id(done.new) for done in record.replaced}
    name = record.patch.name
    for other in records().values():
        if other is record or other.state != APPLIED:
            continue
        if any(id(done.stock) in mine for done in other.replaced):
            _give_up(other, SKIPPED, f"stands on {name}, which is {state}: {reason}")
        elif name in other.patch.requires:
            _give_up(other, SKIPPED, f"needs {name}, which is {state}: {reason}")
    _restore(record)
    record.state, record.reason = state, reason or "no reason given"


def _find_owner(target: Target, module: types.ModuleType) -> Tuple[Any, str]:
    *path, leaf = target.name.split(".")
    owner = module
    for part in path:
        owner = getattr(owner, part)
    return owner, leaf


def _replace(record: Record, target: Target, module: types.ModuleType, late: bool) -> None:
    owner, leaf = _find_owner(target, module)
    if not hasattr(owner, leaf):
        if target.optional:
            return
        raise _Unsupported(f"{target.attribute} is not there")
    # Not getattr: a staticmethod or a plain function of a class has to stay what it is.
    stock = vars(owner).get(leaf, getattr(owner, leaf))
    is_method = isinstance(stock, (staticmethod, classmethod))
    function = stock.__func__ if is_method else stock
    if stock is None:  # Unsloth's own words for what this host lacks, say torch
        return
    _check_home(target, owner if isinstance(owner, type) else function)
    _check_live(target, function, module, chained = _is_ours(stock))
    if late:
        _check_not_held(target, stock)
    path, _, name = target.replacement.partition(":")
    decorator = getattr(importlib.import_module(f"{HOME}.{path}"), name)
    # As in the fork, where the decorator stands below @staticmethod.
    new = type(stock)(decorator(function)) if is_method else decorator(function)
    setattr(owner, leaf, new)
    record.replaced.append(Replaced(target, owner, leaf, stock, new))
    if late:
        _swap({id(stock): (stock, new)}, _modules())


def _is_ours(stock: Any) -> bool:
    return any(r.new is stock for record in records().values() for r in record.replaced)


def _check_home(target: Target, definition: Any) -> None:
    """The live one of several definitions, or the class that has it, can be another module's."""
    home = "" if target.imported else live_home(definition)
    if home != target.module and home.partition(".")[0] in UPSTREAM:
        raise _Unsupported(moved(target, home))


def _check_live(target: Target, stock: Any, module: types.ModuleType, chained: bool) -> None:
    """The live object must be what the source said: another library may have replaced it before us."""
    if target.fingerprints and not chained:
        found = fingerprint_live(stock)
        if found not in target.fingerprints:
            raise _Unsupported(
                f"{target.attribute} is a version that this patch does not know ({found or 'no source'})"
            )
    reason = live_parameter_misfit(stock, target.signature)
    if reason:
        raise _Unsupported(f"{target.attribute}: {reason}")
    for place in target.names:
        other, _, name = place.rpartition(":")
        there = sys.modules.get(other) if other else module
        if there is not None and not hasattr(there, name):
            raise _Unsupported(
                f"{other or module.__name__} has no {name}, which the patch relies on"
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
        if id(holder) in module_dicts or isinstance(holder, (types.FrameType, Replaced)):
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


def _swap(
    pairs: Dict[int, Tuple[Any, Any]], modules: List[types.ModuleType]
) -> List[Tuple[dict, str, Any]]:
    """In these modules: names bound to an old object (``from x import y``) get the new one.

    Returns what was swapped: (the module's names, name, old object).
    """
    places = []
    for module in modules:
        for name, value in list(vars(module).items()):
            pair = pairs.get(id(value))
            if pair is not None and pair[0] is value:
                vars(module)[name] = pair[1]
                places.append((vars(module), name, value))
    return places


def _restore(record: Record) -> None:
    for done in reversed(record.replaced):
        setattr(done.owner, done.leaf, done.stock)
        _swap({id(done.new): (done.new, done.stock)}, _modules())
        done.taken_out = False  # stock() must not bring it back
    for place in record.patch.wraps_later if record.replaced else ():
        _unwrap(place)
    record.replaced = []


def _unwrap(place: str) -> None:
    """Take our wraps off a function; one over which another library's wrap lies stays."""
    module, _, name = place.partition(":")
    *path, leaf = name.split(".")
    owner = functools.reduce(
        lambda owner, part: getattr(owner, part, None), path, sys.modules.get(module)
    )
    function = getattr(owner, leaf, None)
    while _defined_by_us(function):
        function = function.__wrapped__
        setattr(owner, leaf, function)


def _defined_by_us(function: Any) -> bool:
    home = getattr(function, "__globals__", {}).get("__name__", "")
    return home.startswith(f"{HOME}.") and hasattr(function, "__wrapped__")


def restore_all() -> None:
    """Undo every patch, last one first, and forget what was found out."""
    with _lock:
        for record in reversed(list(records().values())):
            _restore(record)
        forget_all()


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """Run stock functions inside the block: module attributes and their aliases are swapped, and back."""
    # Inside another stock() there is nothing left to take out, and the outer one brings it back.
    done = [r for record in records().values() for r in record.replaced if not r.taken_out]
    for r in reversed(done):
        setattr(r.owner, r.leaf, r.stock)
        r.taken_out = True
    # Chained replacements: an alias of any of them has to end at the bottom of its chain.
    bottom: Dict[int, Any] = {}
    for r in done:
        bottom[id(r.new)] = bottom.get(id(r.stock), r.stock)
    swapped = _swap({id(r.new): (r.new, bottom[id(r.new)]) for r in done}, _modules())
    try:
        yield
    finally:
        # Without what undo(), or a patch that failed in between, has taken back for good.
        back = [r for r in done if r.taken_out]
        objects = {id(r.new) for r in back}
        for names, name, new in swapped:
            if id(new) in objects:
                names[name] = new
        for r in back:
            setattr(r.owner, r.leaf, r.new)
            r.taken_out = False
