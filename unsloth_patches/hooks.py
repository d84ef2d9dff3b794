# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Import hooks: say when a module of Unsloth was executed, and publish new modules at the path that
they will have upstream.

One finder on ``sys.meta_path`` does both, and knows of patches only what its three callbacks answer.
It is our own and not wrapt's for three reasons, each measured or tested here: importing wrapt takes
two to three times the 30 ms that importing this package may cost; wrapt does not see a reload, which
would leave stock functions in half of a patch; and an exception in one of its hooks breaks the import
of the patched module.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import threading

UPSTREAM = ("unsloth", "unsloth_zoo")


def upstream_is_imported():
    return any(sys.modules.get(name) is not None for name in UPSTREAM)


# Asked once, as this package is first imported: undo() and install() do not change what came first.
_late = upstream_is_imported()


def _complain(name, error):
    print(f"unsloth_patches: no patches in {name}: {error!r}", file = sys.stderr)


class _PatchingLoader:
    """The module's own loader, then the patches: on a first import and on every reload."""

    def __init__(self, loader, executed):
        self._loader = loader
        self._executed = executed

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # Code that asks a module for its loader (inspect, pkgutil, pickles of specs) gets the real one.
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            self._executed(module)
        except Exception as error:  # our error must never break `import unsloth`
            _complain(module.__name__, error)


class _AliasLoader:
    """``unsloth.kernels.x`` as the same module object as ``unsloth_patches.unsloth.kernels.x``: one copy of
    its state, and one registration of its custom operators. The module keeps its own name, which
    pickles of its functions then have, whichever path they were imported by."""

    def __init__(self, home):
        self._home = home

    def create_module(self, spec):
        module = importlib.import_module(self._home)
        self._own = module.__spec__, module.__loader__, module.__package__
        return module

    def exec_module(self, module):
        module.__spec__, module.__loader__, module.__package__ = self._own


class Finder:
    """find_our_module(name): our module that stands at this path of Unsloth, or None. is_hooked(name): whether
    executed(module) is to be called after that module has run."""

    def __init__(self, find_our_module, is_hooked, executed):
        self._find_our_module = find_our_module
        self._is_hooked = is_hooked
        self._executed = executed
        # Names being looked up by this thread: the real finders are asked through the same path.
        self._busy = threading.local()

    def find_spec(
        self,
        name,
        path = None,
        target = None,
    ):
        if name.partition(".")[0] not in UPSTREAM:
            return None
        try:
            return self._spec(name, path, target)
        except Exception as error:  # our error must never break `import unsloth`
            _complain(name, error)
            return None

    def _spec(self, name, path, target):
        home = self._find_our_module(name)
        if home is not None:
            return _alias_spec(name, home)
        return self._wrapped_spec(name, path, target) if self._is_hooked(name) else None

    def _wrapped_spec(self, name, path, target):
        busy = self._busy.__dict__.setdefault("names", set())
        if name in busy:
            return None
        busy.add(name)
        try:
            spec = self._real_spec(name, path, target)
        finally:
            busy.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _PatchingLoader(spec.loader, self._executed)
        return spec

    def _real_spec(self, name, path, target):
        """What every other finder would answer."""
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec and finder is not self else None
            if spec is not None:
                return spec
        return None


def _alias_spec(name, home):
    """None where we have no such module: Python then says that there is none."""
    own = importlib.util.find_spec(home)
    if own is None:
        return None
    is_package = own.submodule_search_locations is not None
    loader = _AliasLoader(home)
    return importlib.machinery.ModuleSpec(name, loader, origin = own.origin, is_package = is_package)


_finder = None


def imported_late():
    """Unsloth was imported before this package."""
    return _late


def installed():
    """The hooks are in: False between ``undo()`` and ``install()``."""
    return _finder in sys.meta_path


def place(find_our_module, is_hooked, executed):
    """Put the hooks in, once; see ``Finder``."""
    global _finder
    if not installed():
        _finder = Finder(find_our_module, is_hooked, executed)
        sys.meta_path.insert(0, _finder)


def remove():
    """Take the hooks out. Modules that were imported stay as they are."""
    if installed():
        sys.meta_path.remove(_finder)
