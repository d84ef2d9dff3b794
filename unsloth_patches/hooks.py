# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Import hooks: run the patches right after a module of Unsloth was executed, and publish new modules
at the path that they will have upstream.

One finder on ``sys.meta_path`` does both. It is our own and not wrapt's for three reasons, each
measured or tested here: importing wrapt takes two to three times the 30 ms that importing this
package may cost; wrapt does not see a reload, which would leave stock functions in half of a
patch; and an exception in one of its hooks breaks the import of the patched module.
"""

import importlib
import importlib.machinery
import sys
import threading

UPSTREAM = ("unsloth", "unsloth_zoo")


def _upstream_is_there():
    return any(sys.modules.get(name) is not None for name in UPSTREAM)


# Asked once, as this package is first imported: undo() and install() do not change what came first.
_late = _upstream_is_there()


class _PatchingLoader:
    """The module's own loader, then the patches: on a first import and on every reload."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # Code that asks a module for its loader (inspect, pkgutil, pickles of specs) gets the real one.
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        from .patching import module_imported

        module_imported(module)


class _AliasLoader:
    """``unsloth.kernels.x`` as the same module object as ``unsloth_patches.unsloth.kernels.x``: one copy of
    its state, and one registration of its custom operators."""

    def __init__(self, home):
        self._home = home

    def create_module(self, spec):
        module = importlib.import_module(self._home)
        self._own = module.__spec__, module.__loader__, module.__package__
        return module

    def exec_module(self, module):
        module.__spec__, module.__loader__, module.__package__ = self._own


class _Finder:
    def __init__(self):
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
            print(f"unsloth_patches: no patches in {name}: {error!r}", file = sys.stderr)
            return None

    def _spec(self, name, path, target):
        from .patching import hooked_modules, new_modules

        home = new_modules().get(name)
        if home is not None:
            return importlib.machinery.ModuleSpec(name, _AliasLoader(home))
        return self._wrapped_spec(name, path, target) if name in hooked_modules() else None

    def _wrapped_spec(self, name, path, target):
        busy = self._busy.__dict__.setdefault("names", set())
        if name in busy:
            return None
        busy.add(name)
        try:
            spec = _real_spec(name, path, target)
        finally:
            busy.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _PatchingLoader(spec.loader)
        return spec


def _real_spec(name, path, target):
    """What every other finder would answer."""
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(name, path, target) if find_spec and finder is not _finder else None
        if spec is not None:
            return spec
    return None


_finder = _Finder()


def imported_late():
    """Unsloth was imported before this package."""
    return _late


def installed():
    """The hooks are in: False between ``undo()`` and ``install()``."""
    return _finder in sys.meta_path


def install():
    """Put the hooks in, once. Where Unsloth is imported already, replace what can be replaced whole."""
    if not installed():
        sys.meta_path.insert(0, _finder)
    if _upstream_is_there():
        from .patching import patch_imported_modules

        patch_imported_modules()


def uninstall():
    """Take the hooks out and restore every function that was replaced."""
    if installed():
        sys.meta_path.remove(_finder)
    from .patching import restore_all

    restore_all()
