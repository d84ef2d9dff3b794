# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What ``status`` and ``doctor`` print in a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from unsloth_patches import cli
from unsloth_patches.patching import PatchStatus
from unsloth_patches.registry import PATCHES


def printed(listing, width = 80):
    console = Console(file = io.StringIO(), width = width)
    console.print(listing)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_status_breaks_no_name(width):
    """Every patch, state and replaced function stands whole on one line, reasons break between words."""
    reason = "for GPUs: not imported: " + ", ".join(t.module for p in PATCHES for t in p.targets)
    rows = [
        PatchStatus(p.name, p.title, tuple(t.attribute for t in p.targets), "pending", reason)
        for p in PATCHES
    ]
    text = printed(cli.status_listing(rows), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    words = {word.strip(",") for line in lines for word in line.split()}
    for patch in PATCHES:
        assert any(line.split()[:2] == [patch.name, "pending"] for line in lines)
        for target in patch.targets:
            assert {target.module, target.attribute.replace(":", ".")} <= words


def test_a_short_text_stands_beside_its_name_and_a_long_one_below():
    entries = [
        ("python", "ok", ["3.11.7", ""], ()),
        ("device", "note", ["CPU [4 threads]", "LoRA works"], ()),
        ("compiled-swiglu-backward", "upstreamed", ["x" * 60], ()),
    ]
    lines = [line.rstrip() for line in printed(cli.listing("doctor", entries)).splitlines()]
    assert lines[1].split() == ["python", "ok", "3.11.7"]
    assert lines[2].split() == ["device", "note"]
    assert lines[3:5] == ["    CPU [4 threads]", "    LoRA works"]
    assert lines[5].split() == ["compiled-swiglu-backward", "upstreamed"]
    assert lines[6].strip() == "x" * 60
