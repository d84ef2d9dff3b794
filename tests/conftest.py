# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Which Unsloth the tests run on: ``UNSLOTH_PATCHES_FORM=import`` (the default), ``fork`` or ``stock``.

import: ``import unsloth_patches`` comes first. fork and stock: unsloth_patches cannot be imported,
and Unsloth has to come from the folder in ``UNSLOTH_PATCHES_HOME`` if that is set.
``python scripts/patches.py test --form FORM`` prepares everything and runs one process per backend.
"""

import gc
import os
import sys
from pathlib import Path

import pytest

# What is imported for the tests stays. Searching it for garbage takes a sixth of the import, and half a
# second each time later.
gc.disable()

ROOT = Path(__file__).resolve().parents[1]
FORM = os.environ.get("UNSLOTH_PATCHES_FORM", "import")
HOME = os.environ.get("UNSLOTH_PATCHES_HOME")


# As in Unsloth's own conftest: helpers of several test files, no package.
sys.path.insert(0, str(ROOT / "tests" / "_shared"))


class _RefusePatches:
    """Import finder that hides unsloth_patches, which may be installed in this environment."""

    def find_spec(
        self,
        name,
        path = None,
        target = None,
    ):
        if name.partition(".")[0] == "unsloth_patches":
            raise ModuleNotFoundError(f"{name} is hidden in form {FORM!r}", name = name)
        return None


if FORM == "import":
    sys.path.insert(0, str(ROOT))
    import unsloth_patches  # noqa: F401  (before any test file imports unsloth)
elif FORM in ("fork", "stock"):
    sys.meta_path.insert(0, _RefusePatches())
else:
    raise pytest.UsageError(f"UNSLOTH_PATCHES_FORM={FORM!r}: choose import, fork or stock")


def _check_home():
    """Stop the run, rather than fail tests, which the stock form would take for the expected failures."""
    if FORM != "import" and "unsloth_patches" in sys.modules:
        pytest.exit(f"form {FORM}: unsloth_patches was imported all the same", returncode = 4)
    found = getattr(sys.modules.get("unsloth"), "__file__", None)
    if HOME and found and Path(HOME).resolve() not in Path(found).resolve().parents:
        pytest.exit(f"form {FORM}: unsloth came from {found}, not from {HOME}", returncode = 4)


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()
    _check_home()


def pytest_runtest_teardown(item, nextitem):
    _check_home()


def pytest_runtest_logreport(report):
    if report.failed:
        _FAILED.add(report.nodeid.partition("::")[0])


def pytest_runtest_setup(item):
    """On stock Unsloth one failing test of a file is all that is asked for; minutes are saved."""
    if FORM == "stock" and item.nodeid.partition("::")[0] in _FAILED:
        pytest.skip("this file has failed on stock Unsloth already, as it should")


def _backends():
    if FORM != "import":
        return {}  # scripts/patches.py has sorted the files already
    from unsloth_patches.registry import PATCHES
    return {ROOT / test: backend for patch in PATCHES for test, backend in patch.tests.items()}


def pytest_collectstart(collector):
    """Refuse to run tests of two backends in one process: Unsloth chooses its backend once."""
    backends = _backends()
    if not isinstance(collector, pytest.Module) or collector.path not in backends:
        return
    seen = collector.config.stash.setdefault(_SEEN, {})
    seen[backends[collector.path]] = collector.path.name
    if len(seen) > 1:
        files = " and ".join(f"{name} ({backend})" for backend, name in seen.items())
        raise pytest.UsageError(
            f"{files} need different backends of Unsloth, and so different processes; "
            "run `python scripts/patches.py test`, or pytest on one file"
        )


_SEEN = pytest.StashKey()
_FAILED = set()
