# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Production-grade patches for Unsloth: ``import unsloth_patches`` before ``from unsloth import …``.

Importing this package imports nothing of Unsloth, torch or transformers: it places one finder on
``sys.meta_path`` that replaces Unsloth's functions as their modules are imported.

    status()   what each patch replaces, whether it is in, and why not
    stock()    a context in which Unsloth's own functions run, for comparisons
    undo()     give Unsloth its own functions back
    install()  replace again what can still be replaced everywhere; a part of a class cannot

``UNSLOTH_PATCHES_DISABLE=name,name`` (or ``all``) in the environment leaves patches out;
``UNSLOTH_PATCHES_QUIET=1`` leaves out the summary line.
"""

__version__ = "0.2.0"
__all__ = ["status", "stock", "undo", "install", "__version__"]

# What only runs once Unsloth is imported or somebody asks is imported then: this import is to take
# milliseconds.
from . import hooks


def status():
    """The state of every patch: a list of ``PatchStatus`` (name, title, replaces, state, reason, …).

    state: pending, applied, skipped, failed, upstreamed, or off: after ``undo()``, and inside
    ``stock()``. After a late import the first row, "import order", says what that means.
    """
    from .reporting import status as _status
    return _status()


def stock():
    """Context manager: inside it Unsloth's own functions run. Not for use from several threads."""
    from .patching import stock as _stock
    return _stock()


def undo():
    """Give every module its own functions back and remove the hooks; see ``install()``."""
    from .patching import restore_all

    hooks.remove()
    restore_all()


def install():
    """Put the hooks in, once. Where Unsloth is imported already, replace what can be replaced whole."""
    hooks.place(_find_our_module, _is_hooked, _executed)
    if hooks.upstream_is_imported():
        from .patching import patch_imported_modules
        from .reporting import summarise

        patch_imported_modules()
        summarise()


def _find_our_module(name):
    from .states import find_our_module
    return find_our_module(name)


def _is_hooked(name):
    from .states import hooked_modules
    return name in hooked_modules()


def _executed(module):
    from .patching import module_imported
    from .reporting import summarise

    module_imported(module)
    if module.__name__ == "unsloth":
        summarise()


def _take_old_names():
    """Variables of earlier releases, if one is set."""
    import os

    old = ("UNSLOTH_PATCHES_FULLGRAPH", "UNSLOTH_FULLGRAPH", "UNSLOTH_PATCHES_OFFLOAD")
    if any(name in os.environ for name in old):
        from .settings import take_old_names
        take_old_names()


_take_old_names()
install()
