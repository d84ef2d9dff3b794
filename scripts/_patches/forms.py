# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Run the patches' tests in one of three forms, one pytest process per backend, or per file in parallel.

import: stock Unsloth with ``import unsloth_patches`` first (tests/conftest.py does that).
fork:   the patched Unsloth, without unsloth_patches.
stock:  Unsloth as it is. Every test file has to fail here: one that passes proves nothing.

The backends are Unsloth's CPU backend, Triton's interpreter, and forked gloo ranks. Unsloth chooses its
backend once, when it is imported, and a fork after a backward pass hangs, so they cannot share a process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence, Tuple
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
    backend: str
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


def run_form(
    project: Project,
    form: str,
    wanted: Sequence[str],
    scratch: Path,
    jobs: int = 1,
) -> FormResult:
    """Run the tests of all patches, or those ``wanted``. Raises PatchesError for an unknown file.

    jobs: with more than one, every file gets a process of its own, so many at a time.
    """
    if form not in FORMS:
        raise PatchesError(f"unknown form {form!r}", f"choose one of {', '.join(FORMS)}")
    if jobs < 1:
        raise PatchesError(f"{jobs} processes cannot run anything", "--jobs takes 1 or more")
    chosen = _choose(project, wanted)
    if form == "stock":
        # What a patch brings that adds test helpers alone needs no change of Unsloth.
        patches = [patch for patch in project.patches if patch.targets or patch.modules]
        changes = {test for patch in patches for test in patch.tests}
        chosen = {file: backend for file, backend in chosen.items() if file in changes}
    home = project.root if form == "import" else _make_home(project, form, scratch)
    result = FormResult(form, [], [])

    def run(part: Tuple[str, List[str]]) -> List[FileResult]:
        name, files = part
        folder = scratch / name
        folder.mkdir()
        backend = chosen[files[0]]
        quiet = form == "stock" or jobs > 1
        began = time.monotonic()
        results = _run_process(form, backend, files, home, folder, result.summaries, quiet)
        if jobs > 1:  # the table comes when all are done, which may be long after this one
            counts = ", ".join(f"{r.file}: {r.passed} passed, {r.failed} failed" for r in results)
            print(f"{form}: {counts} ({time.monotonic() - began:.0f} s)", flush = True)
        return results

    parts = _processes(chosen, jobs).items()
    if jobs == 1:
        found = [run(part) for part in parts]
    else:
        with ThreadPoolExecutor(jobs) as pool:
            found = list(pool.map(run, parts))
    result.files += [each for files in found for each in files]
    return result


def _processes(chosen: Dict[str, str], jobs: int) -> Dict[str, List[str]]:
    """name -> the test files of one process: those of a backend, or one file where jobs are many."""
    if jobs > 1:
        return {f"process-{Path(file).stem}": [file] for file in chosen}
    backends = sorted(set(chosen.values()))
    return {
        f"process-{backend}": [file for file in chosen if chosen[file] == backend]
        for backend in backends
    }


def _choose(project: Project, wanted: Sequence[str]) -> Dict[str, str]:
    backends = project.backends()
    if not wanted:
        return backends
    chosen = {}
    for name in wanted:
        # A path from wherever the user stands, or one below the project's root.
        path = Path(name).resolve() if Path(name).exists() else project.root / name
        relative = Path(os.path.relpath(path, project.root)).as_posix()
        if relative not in backends:
            raise PatchesError(
                f"{name} is no test of a patch",
                "the registry lists " + (", ".join(sorted(backends)) or "none"),
            )
        chosen[relative] = backends[relative]
    return chosen


def _make_home(project: Project, form: str, scratch: Path) -> Path:
    """A folder with the fork's or stock ``unsloth/`` and the tests, and nothing of unsloth_patches."""
    home = scratch / form
    if form == "fork":
        build_fork(project, home)
    else:
        build_base(project.pinned_unsloth(), home)
    # All tests, whatever was chosen: one may import helpers of another.
    for file in (*project.backends(), *project.shared_files(), "tests/conftest.py"):
        if (project.root / file).is_file():
            (home / file).parent.mkdir(parents = True, exist_ok = True)
            shutil.copyfile(project.root / file, home / file)
    return home


def _run_process(
    form: str,
    backend: str,
    files: List[str],
    home: Path,
    scratch: Path,
    summaries: List[str],
    quiet: bool,
) -> List[FileResult]:
    report = scratch / "report.xml"
    command = [sys.executable, "-m", "pytest", *files, "-q", "-rs", "--color=no"]
    command += ["-p", "no:cacheprovider", f"--rootdir={home}", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1", "-o", f"timeout={TEST_TIMEOUT_S}"]
    expect_failures = form == "stock"
    if expect_failures:
        command += ["--tb=line"]
    code, output = _stream(command, home, _environment(form, backend, home, scratch), quiet)
    summaries += [f"{form} / {backend}: {line}" for line in _last_summary(output)]
    results = _read_report(report, files, backend)
    for result in results:
        result.verdict = _verdict(result, expect_failures)
    # Code 1 is told by the counts, 2 by a file that was not collected; anything else (a crash, Ctrl-C,
    # conftest.py stopping the run) is a fault of the whole run.
    told = {0: True, 1: any(r.failed for r in results), 2: not all(r.collected for r in results)}
    for result in results:
        if not told.get(code, False):
            result.verdict = result.verdict or f"pytest ended with code {code}, see its output"
    if quiet and any(result.verdict for result in results):
        print(output, flush = True)
    return results


def _environment(form: str, backend: str, home: Path, scratch: Path) -> Dict[str, str]:
    environment = dict(os.environ)
    environment["UNSLOTH_PATCHES_FORM"] = form
    # Unsloth writes generated code there; one form must never read what another one wrote.
    environment["UNSLOTH_COMPILE_LOCATION"] = str(scratch / "compiled")
    environment.pop("UNSLOTH_PATCHES_DISABLE", None)
    if backend == "gloo":  # ranks are forked, and a forked process cannot use a GPU
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if form != "import":
        # What else is on the path stays: pytest may be installed there.
        others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        others = [each for each in others if not (Path(each) / "unsloth_patches").is_dir()]
        environment["PYTHONPATH"] = os.pathsep.join([str(home), *others])
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


def _read_report(report: Path, files: List[str], backend: str) -> List[FileResult]:
    results = {file: FileResult(file, backend) for file in files}
    if not report.is_file():
        return [FileResult(file, backend, collected = False) for file in files]
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
