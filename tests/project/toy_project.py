# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""A small project for the tests of scripts/patches.py: a toy Unsloth, a toy patch, and helpers."""

import base64
import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from _patches import upstream  # noqa: E402,F401
from _patches.build import build_base, build_fork, build_patches  # noqa: E402,F401
from _patches.check import check, export  # noqa: E402
from _patches.project import Project  # noqa: E402

HEADER = "# SPDX-License-Identifier: Apache-2.0\n# Copyright 2026 the unsloth_patches authors\n"
UPSTREAM = {
    "unsloth/__init__.py": "from .sub.b import area, Shape\nfrom .sub.b import TABLE\n",
    "unsloth/device_type.py": "",
    "unsloth/sub/__init__.py": "",
    "unsloth/sub/b.py": (
        "# Toy\n# of\n# Unsloth\n\nimport os\n\nTABLE = {'a': 1}\nfor key in 'xy':\n    TABLE[key] = os.sep\nOTHER = 1\n\n\n"
        "def area(x):\n    return x * x\n\n\n"
        "class Shape:\n"
        "    @staticmethod\n    def corners(n):\n        return n\n\n"
        "    def name(self):\n        return 'shape'\n\n\n"
        "class Round(Shape):\n    pass\n\n\n"
        "if len(TABLE) == 3:\n\n    def branch():\n        return 1\n"
    ),
    "unsloth/zoo_user.py": "from unsloth_zoo.losses import loss\n",
}
ZOO = {
    "unsloth_zoo/__init__.py": "",
    "unsloth_zoo/device_type.py": "",
    "unsloth_zoo/losses.py": "def loss(x):\n    return x\n",
}
MODULE = HEADER + (
    '"""Doubles what upstream returns."""\n\n\n'
    "def doubled(stock):\n    return lambda x: 2 * stock(x)\n\n\n"
    "def exclaimed(stock):\n    return lambda self: stock(self) + '!'\n\n\n"
    "def with_b(stock):\n    return {**stock, 'b': len(stock)}\n"
)
TEST = HEADER + (
    "import unsloth\n\n\n"
    "def test_area():\n    assert unsloth.area(3) == 18\n\n\n"
    "def test_name():\n    assert unsloth.Shape().name() == 'shape!'\n"
)
MESSAGE = "Motivation:\n\nWhy.\n\nWhat changes:\n\nThat.\n\nHow it was tested:\n\nSo.\n"
# The import form of the toy patch: enough of a hook for its own test.
PACKAGE = HEADER + (
    "import unsloth as toy\nfrom .unsloth.sub.double import doubled, exclaimed\n"
    "toy.area = doubled(toy.area)\n"
    "toy.Shape.name = exclaimed(toy.Shape.name)\n"
)
REGISTRY = f"""{HEADER}from .entries import Patch, Target

SUPPORTED_UPSTREAM = ("2026.10.9",)
"""
ENTRY = """
PATCHES = (
    Patch(
        name = "double-area",
        title = "Double the area",
        targets = ({targets}),
        modules = ("sub/double.py",),
        tests = {{"tests/test_area.py": "cpu"}},
    ),
)
"""
TARGETS = (
    'Target(attribute = "unsloth.sub.b:area", replacement = "sub.double:doubled"{prints}),'
    'Target(attribute = "unsloth.sub.b:Shape.corners", replacement = "sub.double:doubled"),'
    'Target(attribute = "unsloth.sub.b:Shape.name", replacement = "sub.double:exclaimed"),'
    'Target(attribute = "unsloth.sub.b:TABLE", replacement = "sub.double:with_b"),'
)


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents = True, exist_ok = True)
        (root / name).write_bytes(text.encode())


def make_release(cache, package, version, files):
    """An unpacked wheel in the cache, with the RECORD that a wheel has."""
    root = cache / f"{package}-{version}"
    write(root, files)
    record = root / f"{package}-{version}.dist-info" / "RECORD"
    record.parent.mkdir()
    with record.open("w", encoding = "utf-8", newline = "") as out:
        for name, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            csv.writer(out).writerow([name, "sha256=" + digest.decode().rstrip("="), len(text)])


def write_registry(
    root,
    targets = TARGETS.format(prints = ""),
    entry = ENTRY,
):
    folder = "unsloth_patches/registry"
    write(
        root,
        {
            f"{folder}/entries.py": (ROOT / folder / "entries.py").read_text(encoding = "utf-8"),
            f"{folder}/__init__.py": REGISTRY + entry.format(targets = targets),
        },
    )


def export_all(root, scratch):
    project = Project(root)
    return dict(export(project, build_patches(project, scratch)[1]))


def check_all(root, scratch):
    """Problems of `check`, by step."""
    found = {}
    check(Project(root), scratch, lambda step, problems: found.update({step: problems}))
    return [problem for problems in found.values() for problem in problems]


def run_python(folder, code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env = {**os.environ, "PYTHONPATH": str(folder), **environment},
        cwd = folder,
        capture_output = True,
        text = True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
