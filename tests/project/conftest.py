# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Tests of this project alone: there is nothing for them to test in the fork or on stock Unsloth.

Fixtures: the toy project on which scripts/patches.py is tested, a fake Unsloth for the hooks, and forks of
processes that have imported the installed one.
"""

import os
import shutil

import pytest
from fake_unsloth import make_fake
from imported_unsloth import Imported
from toy_project import (
    MESSAGE,
    MODULE,
    PACKAGE,
    ROOT,
    TEST,
    UPSTREAM,
    ZOO,
    build_base,
    export_all,
    make_release,
    upstream,
    write,
    write_registry,
)

if os.environ.get("UNSLOTH_PATCHES_FORM", "import") != "import":
    collect_ignore_glob = ["*.py"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Toy Unsloth 1.0 and unsloth_zoo 1.0 in an empty cache, and a pip that is never reached."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNSLOTH_PATCHES_CACHE", str(folder))
    monkeypatch.setattr(upstream, "_pip_download", lambda *_: pytest.fail("pip was called"))
    make_release(folder, "unsloth", "1.0", UPSTREAM)
    make_release(folder, "unsloth_zoo", "1.0", ZOO)
    return folder


@pytest.fixture
def root(tmp_path, cache, monkeypatch):
    """A project with one patch, pinned to the toy Unsloth and exported."""
    # pytest runs on the toy need none of the plugins that are installed, and start faster without.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    folder = tmp_path / "project"
    write(
        folder,
        {
            "unsloth_patches/__init__.py": PACKAGE,
            "unsloth_patches/unsloth/sub/__init__.py": "",
            "unsloth_patches/unsloth/sub/double.py": MODULE,
            "tests/test_area.py": TEST,
            "patches/messages/double-area.md": MESSAGE,
        },
    )
    shutil.copy(ROOT / "unsloth_patches" / "fingerprints.py", folder / "unsloth_patches")
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    write_registry(folder)
    git = build_base(upstream.get_release("unsloth", "1.0"), tmp_path / "pin")
    pins = dict(version = "1.0", wheel_sha256 = "0", tree = git.tree(), zoo_version = "1.0")
    upstream.write_pins({**pins, "zoo_wheel_sha256": "0"}, folder / "patches" / "UPSTREAM")
    export_all(folder, tmp_path / "first-export")
    return folder


@pytest.fixture(scope = "session")
def _fake(tmp_path_factory):
    return make_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(_fake, tmp_path):
    """A folder with a fake Unsloth and our package, for processes of ``fake_unsloth.run``."""
    # With the times of its files, so that what was compiled stays good.
    return shutil.copytree(_fake, tmp_path, dirs_exist_ok = True)


def _imported(first):
    @pytest.fixture(scope = "session")
    def process():
        one = Imported(first)
        yield one
        one.end()

    return process


_patched_process, _stock_process = _imported("patched"), _imported("late")


@pytest.fixture
def with_patched_unsloth(_patched_process, tmp_path):
    """with_patched_unsloth(code) -> its output, where ``unsloth_patches`` and then unsloth were imported."""
    return lambda code: _patched_process.run(code, tmp_path)


@pytest.fixture
def with_stock_unsloth(_stock_process, tmp_path):
    """The same where unsloth was imported, and ``unsloth_patches`` can only come late."""
    return lambda code: _stock_process.run(code, tmp_path)
