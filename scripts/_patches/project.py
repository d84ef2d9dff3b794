# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What the working tree says: the catalogue of patches and the files each one is made of.

The registry is read as source, without importing unsloth_patches: that would install the import
hooks here, and it keeps this tool free of torch.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from . import ROOT, PatchesError
from .upstream import Release, get_release, numbers, read_pins


class Project:
    """The working tree at ``root``. ``patches`` are the registry's entries, in order."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.mirror = (
            root / "unsloth_patches" / "unsloth"
        )  # what lands, at the path that it has in the fork
        self.folder = root / "patches"
        self.pin_file = self.folder / "UPSTREAM"
        registry = _load_package(root / "unsloth_patches" / "registry")
        self.patches: Tuple[Any, ...] = registry.PATCHES
        self.supported: Tuple[str, ...] = registry.SUPPORTED_UPSTREAM
        fingerprints = _load(root / "unsloth_patches" / "fingerprints.py")
        self._fingerprints = fingerprints

    def pinned_unsloth(self) -> Release:
        pins = read_pins(self.pin_file)
        return get_release("unsloth", pins["version"], pins["wheel_sha256"])

    def pinned_zoo(self) -> Optional[Release]:
        """unsloth_zoo, where a target is in it."""
        pins = read_pins(self.pin_file)
        args = "unsloth_zoo", pins["zoo_version"], pins["zoo_wheel_sha256"]
        return get_release(*args) if self.needs_zoo() else None

    def needs_zoo(self) -> bool:
        targets = (target for patch in self.patches for target in patch.targets)
        return any(target.module.split(".")[0] == "unsloth_zoo" for target in targets)

    def lands(self, patch: Any) -> Dict[str, Path]:
        """Path in the fork -> file here, for everything that a patch adds whole."""
        modules = {f"unsloth/{name}": self.mirror / name for name in patch.modules}
        tests = [*patch.tests, *(f"tests/_shared/{name}" for name in patch.shared)]
        return {**modules, **{name: self.root / name for name in tests}}

    def message_file(self, patch: Any) -> Path:
        return self.folder / "messages" / f"{patch.name}.md"

    def callsite_file(self, patch: Any) -> Path:
        return self.folder / "callsites" / f"{patch.name}.diff"

    def patch_file(self, patch: Any) -> Path:
        return self.folder / f"{patch.name}.patch"

    def series(self) -> str:
        return "".join(f"{patch.name}.patch\n" for patch in self.patches)

    def commit_message(self, patch: Any) -> str:
        """Title, the pull request's text, and the patches that have to be in before, in order."""
        below = ", ".join(each.name for each in self.required(patch)[:-1])
        text = read_text(self.message_file(patch)).strip()
        return "\n\n".join([patch.title, text, *([f"Builds on: {below}"] if below else [])]) + "\n"

    def required(self, patch: Any) -> List[Any]:
        """All that the patch needs, directly or not, in the order of the series, and the patch last."""
        names = {patch.name, *patch.requires, *patch.after}
        for other in reversed(self.patches):
            names |= {*other.requires, *other.after} if other.name in names else set()
        return [other for other in self.patches if other.name in names]

    def shared_files(self) -> List[str]:
        return [f"tests/_shared/{name}" for patch in self.patches for name in patch.shared]

    def backends(self) -> Dict[str, str]:
        """Test file -> backend, over all patches."""
        return {test: backend for patch in self.patches for test, backend in patch.tests.items()}

    def newer_than(self, version: str) -> Set[str]:
        """Names of the patches that build on what a release lacks, or on such a patch."""
        found: Set[str] = set()
        for patch in self.patches:
            if numbers(version) < numbers(patch.since or "0") or found & set(patch.requires):
                found.add(patch.name)
        return found

    def fingerprints(self, target: Any, unsloth: Release, zoo: Optional[Release]) -> Set[str]:
        """Fingerprints of a target's definitions in a release; empty where it defines none."""
        find_file = _finder(unsloth, zoo)
        return self._fingerprints.fingerprint_module(target.module, target.name, find_file)

    def target_misfit(self, target: Any, unsloth: Release, zoo: Optional[Release]) -> str:
        """Why a target cannot be replaced in a release; empty where it can."""
        return self._fingerprints.target_misfit(target, _finder(unsloth, zoo))


def _finder(unsloth: Release, zoo: Optional[Release]) -> Callable[[str], Optional[Path]]:
    """Module -> its file in one of the two releases."""

    def find_file(module: str) -> Optional[Path]:
        release = {"unsloth": unsloth, "unsloth_zoo": zoo}.get(module.split(".")[0])
        path = release.module_path(module) if release else None
        return release.root / path if release and path else None

    return find_file


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding = "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchesError(f"cannot read {path}: {error}", "restore this file, as UTF-8")


def _load_package(folder: Path) -> types.ModuleType:
    """A package of such modules, of which ``entries.py`` is what the others import."""
    name = f"_patches_{folder.name}"
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = []  # its modules are those that are loaded here
    for path in sorted(folder.glob("[!_]*.py"), key = lambda path: path.name != "entries.py"):
        _load(path, f"{name}.{path.stem}")
    return _load(folder / "__init__.py", name, package = name)


def _load(
    path: Path,
    name: str = "",
    package: str = "",
) -> types.ModuleType:
    """Execute one stdlib-only module of the project from its text, so that no stale .pyc is used."""
    module = types.ModuleType(name or f"_patches_{path.stem}")
    module.__file__, module.__package__ = str(path), package or name.rpartition(".")[0]
    # dataclasses look up a class's module to resolve its annotations.
    sys.modules[module.__name__] = module
    code = read_text(path)
    try:
        exec(compile(code, str(path), "exec"), vars(module))
    except Exception as error:
        raise PatchesError(f"{path} does not load: {type(error).__name__}: {error}", "fix it first")
    return module
