# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What ``status`` and ``doctor`` print in a terminal of 80 columns."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console
from toy_project import ROOT

from unsloth_patches.console import doctor_listing, status_listing, verbose_status_listing
from unsloth_patches.doctor import Finding
from unsloth_patches.registry import PATCHES, SUPPORTED_UPSTREAM
from unsloth_patches.reporting import PatchStatus


def printed(listing, width = 80):
    console = Console(file = io.StringIO(), width = width)
    console.print(listing)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def rows(state, reason, brief):
    return [
        PatchStatus(p.name, p.title, tuple(t.attribute for t in p.targets), state, reason, brief)
        for p in PATCHES
    ]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_status_cuts_nothing(width):
    """Name, state and title whole, the title below itself where the line is full; a common reason once."""
    found = rows("pending", "a long reason", "for GPUs, not in use here")
    lines = printed(status_listing(found), width)
    assert max(map(len, lines)) <= width and "a long reason" not in " ".join(lines)
    assert lines[-2:] == ["", "pending: for GPUs, not in use here"]
    whole = " ".join(" ".join(lines[1:-2]).split())
    assert whole == " ".join(f"{patch.name} pending {patch.title}" for patch in PATCHES)
    column = lines[1].index(PATCHES[0].title[:20])
    assert all(line[:column].isspace() or " pending " in line[:column] for line in lines[1:-2])


def test_status_says_why_a_patch_is_not_in():
    """Each reason once, whole, with the names where it is not all of that state; nothing for the others."""
    first, second, third, *others = rows("applied", "", "")
    reason = (
        "made for Unsloth 2026.10.9 and newer; this is 2026.10.7, which lacks what it stands on"
    )
    found = [
        first._replace(state = "skipped", brief = reason),
        second._replace(state = "skipped", brief = reason),
        third._replace(state = "skipped", brief = "switched off"),
        PatchStatus(
            "part", "t", ("a:f", "a:g"), "applied", "1 of 2 targets; not …", "1 of 2 targets", 1
        ),
        *others,
    ]
    lines = printed(status_listing(found))
    assert [line.split()[:3] for line in lines if line.startswith("part")] == [
        ["part", "applied", "1/2"]
    ]
    below = " ".join(lines[lines.index("") :]).split()
    expected = (
        f"skipped: {reason} ({first.name}, {second.name}) skipped: switched off ({third.name}) "
        "n/m, as in 1/3: n of the patch's m functions are replaced now; the other functions' modules "
        "are not imported, or not in this release (--verbose says which)"
    )
    assert below == expected.split()


def test_a_patch_with_a_mistyped_switch_says_so_though_it_is_in():
    found = rows("applied", "", "")
    found[0] = found[0]._replace(
        brief = "UNSLOTH_BLOCK_FULLGRAPH='stict': choose one of auto, strict, off."
    )
    assert printed(status_listing(found), 120)[-1] == (
        f"applied: UNSLOTH_BLOCK_FULLGRAPH='stict': choose one of auto, strict, off. ({found[0].name})"
    )


@pytest.mark.parametrize("width", [80, 200])
def test_verbose_status_breaks_no_name(width):
    """Every patch, state and replaced function stands whole on one line, reasons break between words."""
    reason = "for GPUs: not imported: " + ", ".join(t.module for p in PATCHES for t in p.targets)
    lines = printed(verbose_status_listing(rows("pending", reason, "")), width)
    assert max(map(len, lines)) <= width
    words = {word.strip(",") for line in lines for word in line.split()}
    for patch in PATCHES:
        assert any(line.split()[:2] == [patch.name, "pending"] for line in lines)
        for target in patch.targets:
            assert {target.module, target.attribute.replace(":", ".")} <= words


def test_a_short_text_stands_beside_its_name_and_a_long_one_below():
    findings = [
        Finding("python", "3.11.7", "ok"),
        Finding("device", "CPU [4 threads]", "note", "LoRA works"),
        Finding("compiled-swiglu-backward-of-old", "x" * 60, "upstreamed"),
    ]
    lines = printed(doctor_listing(findings))
    assert lines[1].split() == ["python", "ok", "3.11.7"]
    assert lines[2].split() == ["device", "note"]
    assert lines[3:5] == ["    CPU [4 threads]", "    LoRA works"]
    assert lines[5].split() == ["compiled-swiglu-backward-of-old", "upstreamed"]
    assert lines[6].strip() == "x" * 60
    assert lines[-1] == "ready; notes: 1"
    findings.append(Finding("unsloth", "absent", "problem", "install it"))
    assert printed(doctor_listing(findings))[-1] == "1 of 4 checks found a problem"


def without(package, *arguments):
    """The command line where a package is not installed: (exit code, lines of its output)."""
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[0] = 'unsloth_patches'; "
    code += "runpy.run_module('unsloth_patches', run_name = '__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd = ROOT,
        capture_output = True,
        text = True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("options", [(), ("--verbose",)])
def test_status_without_unsloth_says_only_that(options):
    """Once, with the remedy, and without a list that would push it off the screen."""
    code, lines = without("unsloth", "status", *options)
    (line,) = lines
    assert code == 1 and line.startswith("no patch is in: this Python (")
    assert line.endswith(f"has no unsloth: pip install unsloth=={SUPPORTED_UPSTREAM[-1]}")


def test_json_of_status_without_unsloth_is_whole():
    code, lines = without("unsloth", "status", "--json")
    found = json.loads("\n".join(lines))
    names = {patch["name"] for patch in found["patches"]}
    assert code == 1 and names and names <= {patch.name for patch in PATCHES}
    assert "has no unsloth: pip install unsloth==" in found["unsloth_error"]


def test_check_chats_without_unsloth_names_the_remedy():
    code, lines = without("unsloth", "check-chats", "chats.jsonl")
    assert code == 2 and "has no unsloth: pip install unsloth==" in lines[-1] and len(lines) == 1


@pytest.mark.parametrize(
    "package, name", [("torch", "loss"), ("torch", "all"), ("unsloth", "chat")]
)
def test_bench_names_the_package_that_is_absent(tmp_path, package, name):
    code, lines = without(package, "bench", name, "--out", str(tmp_path))
    assert code == 1 and lines[-1].startswith(f"bench {name} did not run: this Python (")
    assert f"has no {package}: pip install {package}" in lines[-1]
