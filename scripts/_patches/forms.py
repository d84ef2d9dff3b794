# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Run the patches' tests in one of three forms, one pytest process per world.

import: stock Unsloth with ``import unsloth_patches`` first (tests/conftest.py does that).
fork:   the patched Unsloth, without unsloth_patches.
stock:  Unsloth as it is. Every test file has to fail here: one that passes proves nothing.

The worlds are Unsloth's CPU backend, Triton's interpreter, and forked gloo ranks. Unsloth chooses its
backend once, when it is imported, and a fork after a backward pass hangs, so they cannot share a process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence
from xml.etree import ElementTree

from . import PatchesError
from .build import build_base, build_fork
from .project import Project

FORMS = ("import", "fork", "stock")
TEST_TIMEOUT_S = 600  # for one test, where pytest-timeout is installed
SUMMARY = re.compile(r"=* ?\d+ (passed|failed|skipped|error|deselected|xfailed).* in [\d.]+s.*")


@dataclass
class FileResult:
    """One test file: counts of its tests, and whether pytest could collect it at all.

    missing: how many of the failures only say that a module of the patch is not there.
    """

    file: str
    world: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    missing: int = 0
    collected: bool = True
    verdict: str = ""


@dataclass
class FormResult:
    """``summaries``: pytest's own last lines, one a process."""

    form: str
    files: List[FileResult]
    summaries: List[str]

    @property
    def ok(self) -> bool:
        return all(not result.verdict for result in self.files)


def run_form(project: Project, form: str, wanted: Sequence[str], scratch: Path) -> FormResult:
    """Run the tests of all patches, or those ``wanted``. Raises PatchesError for an unknown file."""
    if form not in FORMS:
        raise PatchesError(f"unknown form {form!r}", f"choose one of {', '.join(FORMS)}")
    chosen = _choose(project, wanted)
    home = project.root if form == "import" else _make_home(project, form, scratch)
    result = FormResult(form, [], [])
    for world in sorted(set(chosen.values())):
        files = [file for file in chosen if chosen[file] == world]
        result.files += _run_world(form, world, files, home, scratch, result.summaries)
    return result


def _choose(project: Project, wanted: Sequence[str]) -> Dict[str, str]:
    worlds = project.worlds()
    if not wanted:
        return worlds
    chosen = {}
    for name in wanted:
        # A path from wherever the user stands, or one below the project's root.
        path = Path(name).resolve() if Path(name).exists() else project.root / name
        relative = Path(os.path.relpath(path, project.root)).as_posix()
        if relative not in worlds:
            raise PatchesError(
                f"{name} is no test of a patch",
                "the registry lists " + (", ".join(sorted(worlds)) or "none"),
            )
        chosen[relative] = worlds[relative]
    return chosen


def _make_home(project: Project, form: str, scratch: Path) -> Path:
    """A folder with the fork's or stock ``unsloth/`` and the tests, and nothing of unsloth_patches."""
    home = scratch / form
    if form == "fork":
        build_fork(project, home)
    else:
        build_base(project.pinned_unsloth(), home)
    # All tests, whatever was chosen: one may import helpers of another.
    for file in (*project.worlds(), "tests/conftest.py"):
        if (project.root / file).is_file():
            (home / file).parent.mkdir(parents = True, exist_ok = True)
            shutil.copyfile(project.root / file, home / file)
    return home


def _run_world(
    form: str,
    world: str,
    files: List[str],
    home: Path,
    scratch: Path,
    summaries: List[str],
) -> List[FileResult]:
    report = scratch / f"{form}-{world}.xml"
    command = [sys.executable, "-m", "pytest", *files, "-q", "-rs", "--color=no"]
    command += ["-p", "no:cacheprovider", f"--rootdir={home}", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1", "-o", f"timeout={TEST_TIMEOUT_S}"]
    expect_failures = form == "stock"
    if expect_failures:
        command += ["--tb=line"]
    code, output = _stream(command, home, _environment(form, home, scratch), quiet = expect_failures)
    summaries += [f"{form} / {world}: {line}" for line in _last_summary(output)]
    results = _read_report(report, files, world)
    for result in results:
        result.verdict = _verdict(result, expect_failures)
    # Code 1 is told by the counts, 2 by a file that was not collected; anything else (a crash, Ctrl-C,
    # conftest.py stopping the run) is a fault of the whole run.
    told = {0: True, 1: any(r.failed for r in results), 2: not all(r.collected for r in results)}
    for result in results:
        if not told.get(code, False):
            result.verdict = result.verdict or f"pytest ended with code {code}, see its output"
    if expect_failures and any(result.verdict for result in results):
        print(output)
    return results


def _environment(form: str, home: Path, scratch: Path) -> Dict[str, str]:
    environment = dict(os.environ)
    environment["UNSLOTH_PATCHES_FORM"] = form
    # Unsloth writes generated code there; one form must never read what another one wrote.
    environment["UNSLOTH_COMPILE_LOCATION"] = str(scratch / f"compiled-{form}")
    environment.pop("UNSLOTH_PATCHES_DISABLE", None)
    if form != "import":
        environment["PYTHONPATH"] = str(home)
        environment["UNSLOTH_PATCHES_HOME"] = str(home)
    return environment


def _stream(command: List[str], folder: Path, environment: Dict[str, str], quiet: bool) -> tuple:
    """Run a command, showing its output as it comes; returns (exit code, output)."""
    lines = []
    process = subprocess.Popen(
        command,
        cwd = folder,
        env = environment,
        stdout = subprocess.PIPE,
        stderr = subprocess.STDOUT,
        text = True,
        encoding = "utf-8",
        errors = "replace",
    )
    try:
        for line in process.stdout:
            lines.append(line)
            if not quiet:
                print(line, end = "", flush = True)
        return process.wait(), "".join(lines)
    finally:
        if process.poll() is None:  # Ctrl-C: no test process is left behind
            process.kill()
            process.wait()


def _last_summary(output: str) -> List[str]:
    found = [line.strip("= ") for line in output.splitlines() if SUMMARY.fullmatch(line.strip())]
    return found[-1:]


def _read_report(report: Path, files: List[str], world: str) -> List[FileResult]:
    results = {file: FileResult(file, world) for file in files}
    if not report.is_file():
        return [FileResult(file, world, collected = False) for file in files]
    for case in ElementTree.parse(report).iter("testcase"):
        # xunit1 states the file; a file that cannot be collected appears as a case without one.
        file = case.get("file") or case.get("name", "").replace(".", "/") + ".py"
        result = results.get(file)
        if result is None:
            continue
        error, failure = case.find("error"), case.find("failure")
        if error is not None and error.get("message") == "collection failure":
            result.collected = False
        elif error is not None or failure is not None:
            result.failed += 1
            why = (failure if error is None else error).get("message") or ""
            result.missing += "No module named 'unsloth." in why
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1
    return list(results.values())


def _verdict(result: FileResult, expect_failures: bool) -> str:
    """What is wrong with a file's result; empty if nothing is."""
    if not result.collected:
        return "could not be collected: import new modules inside the tests, not at the top"
    if expect_failures:
        return "" if result.failed else "no test fails on stock Unsloth, so they prove nothing"
    if result.failed:
        return f"{result.failed} failed"
    return "" if result.passed else "no test passed"
