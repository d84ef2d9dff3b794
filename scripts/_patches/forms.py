# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Run the patches' tests in one of five forms.

import:   stock Unsloth with ``import unsloth_patches`` first (tests/conftest.py does that).
fork:     the patched Unsloth, without unsloth_patches.
alone:    Unsloth with one patch and what it requires, for the tests of that patch, and so for each.
stock:    Unsloth as it is. Every test file has to fail here: one that passes proves nothing.
upstream: the patched Unsloth as in its own CI: one process for all files, no GPU, and a conftest.py that
          imports unsloth first, for CUDA. Every file passes, or skips with a reason.

But for the last and `alone` there is one process per backend (Unsloth chooses it once, when it is imported, and a fork
after a backward pass hangs), or one per file with ``jobs``. Without a GPU, gloo's is the CPU backend too: both
processes are forks of one that has imported Unsloth, which takes ten seconds.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple
from xml.etree import ElementTree

from . import PatchesError
from .build import build_base, build_fork, build_patches
from .project import Project

FORMS = ("import", "fork", "alone", "stock", "upstream")
TEST_TIMEOUT_S = 600  # for one test, where pytest-timeout is installed
SUMMARY = re.compile(r"\d+ (passed|failed|skipped|error|deselected|xfailed).* in [\d.]+s.*")
CHOOSERS = ("TRITON_INTERPRET", "UNSLOTH_ALLOW_CPU", "UNSLOTH_FORCE_CPU")  # of Unsloth's backend
ENDED = "pytest ended with code "
# Runs pytest in a fork for each list of arguments, and says with which code it ended.
RUNNER = """
import gc, json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (child and os.kill(child, signal.SIGKILL), os._exit(1)))
child = 0
gc.disable()
import pytest
exec(sys.argv[1])
gc.freeze()
gc.enable()
for arguments in json.loads(sys.argv[2]):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = pytest.main(arguments)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print("\\npytest ended with code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush = True)
"""


@dataclass
class FileResult:
    """Counts of one test file; ``missing``: failures that only say that a module of the patch is absent."""

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
        return not any(result.verdict for result in self.files)


def run_form(
    project: Project,
    form: str,
    wanted: Sequence[str],
    scratch: Path,
    jobs: int = 1,
) -> FormResult:
    """Run the tests of all patches, or those ``wanted``. Raises PatchesError for an unknown file."""
    if form not in FORMS:
        raise PatchesError(f"unknown form {form!r}", f"choose one of {', '.join(FORMS)}")
    if jobs < 1:
        raise PatchesError(f"{jobs} processes cannot run anything", "--jobs takes 1 or more")
    backends = _choose(project, wanted)
    if (
        form == "stock"
    ):  # what a patch brings that adds test helpers alone needs no change of Unsloth
        patches = [patch for patch in project.patches if patch.targets or patch.modules]
        changes = {test for patch in patches for test in patch.tests}
        backends = {file: backend for file, backend in backends.items() if file in changes}
    if form == "import" and not wanted:
        backends = {file: backends[file] for file in _in_installed_release(project)}
    if form == "upstream":
        backends = dict.fromkeys(backends, "all")
    if form == "alone":
        homes = _make_homes(project, backends, scratch)
    else:
        homes = {project.root if form == "import" else _make_home(project, form, scratch): backends}
    result = FormResult(form, [], [])
    one_each = jobs > 1 and form != "upstream"
    alike = () if one_each or shutil.which("nvidia-smi") else ("cpu", "gloo")
    processes: Dict[Tuple[Path, str], Dict[str, List[str]]] = {}  # -> backend or file -> files
    for home, backends in homes.items():
        for file, backend in backends.items():
            part = Path(file).stem if one_each else backend
            name = "cpu" if part in alike else part
            processes.setdefault((home, name), {}).setdefault(part, []).append(file)

    def run(process: Tuple[Path, str]) -> List[FileResult]:
        began, home = time.monotonic(), process[0]
        arguments = form, processes[process], homes[home], home, scratch, result.summaries
        found = _run_process(*arguments, quiet = jobs > 1)
        if jobs > 1:  # the table comes when all are done, which may be long after this one
            counts = ", ".join(f"{r.file}: {r.passed} passed, {r.failed} failed" for r in found)
            print(f"{form}: {counts} ({time.monotonic() - began:.0f} s)", flush = True)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(run, processes):
            result.files += found
    return result


def _choose(project: Project, wanted: Sequence[str]) -> Dict[str, str]:
    """Test file -> backend, of the files wanted: paths from wherever the user stands, or below the root."""
    known = project.backends()
    chosen = {}
    for name in wanted or known:
        path = Path(name).resolve() if Path(name).exists() else project.root / name
        relative = Path(os.path.relpath(path, project.root)).as_posix()
        if relative not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise PatchesError(f"{name} is no test of a patch", f"the registry lists {listed}")
        chosen[relative] = known[relative]
    return chosen


def _in_installed_release(project: Project) -> List[str]:
    """Test files of the patches that the installed Unsloth has the features for."""
    try:
        unsloth = importlib.metadata.distribution("unsloth")
    except importlib.metadata.PackageNotFoundError:
        return list(project.backends())

    def absent(target: Any) -> bool:
        file = str(unsloth.locate_file(target.module.replace(".", "/")))
        return target.optional and not (Path(file + ".py").is_file() or Path(file).is_dir())

    left_out = project.newer_than(unsloth.version)
    for patch in project.patches:
        if patch.targets and all(absent(target) for target in patch.targets):
            left_out.add(patch.name)
    if left_out:
        print(f"Unsloth {unsloth.version} lacks what these build on: {', '.join(sorted(left_out))}")
    return [test for patch in project.patches if patch.name not in left_out for test in patch.tests]


def _make_home(project: Project, form: str, scratch: Path) -> Path:
    """A folder with the fork's or stock ``unsloth/`` and the tests, and nothing of unsloth_patches."""
    home = scratch / form
    if form == "stock":
        build_base(project.pinned_unsloth(), home)
    else:
        build_fork(project, home)
    for file in (*project.backends(), *project.shared_files(), "tests/conftest.py"):
        if (project.root / file).is_file():
            (home / file).parent.mkdir(parents = True, exist_ok = True)
            shutil.copyfile(project.root / file, home / file)
    if form == "upstream":
        shutil.copyfile(
            Path(__file__).with_name("upstream_conftest.py"), home / "tests/conftest.py"
        )
        (home / "tests/__init__.py").touch()
    return home


def _make_homes(
    project: Project, backends: Dict[str, str], scratch: Path
) -> Dict[Path, Dict[str, str]]:
    """A patch's folder, with the patch, all that it requires, and their tests -> its test files."""
    git, built = build_patches(project, scratch / "patches")
    homes = {}
    for each in built:
        files = {file: backends[file] for file in each.patch.tests if file in backends}
        if files:
            home = scratch / each.patch.name
            git.run("worktree", "add", "--quiet", "--detach", str(home), each.commit)
            shutil.copyfile(project.root / "tests/conftest.py", home / "tests/conftest.py")
            homes[home] = files
    return homes


def _run_process(
    form: str,
    parts: Dict[str, List[str]],
    backends: Dict[str, str],
    home: Path,
    scratch: Path,
    summaries: List[str],
    quiet: bool,
) -> List[FileResult]:
    """Run each part's files in a fork of one process; where there are several, it imports Unsloth first."""
    folder = scratch / f"process-{home.name}-{'-'.join(parts)}"
    folder.mkdir()
    reports = {part: folder / f"{part}.xml" for part in parts}
    arguments = [_arguments(form, home, files, reports[part]) for part, files in parts.items()]
    first = "import unsloth_patches, unsloth" if form == "import" else "import unsloth"
    command = [sys.executable, "-c", RUNNER, first * (len(parts) > 1), json.dumps(arguments)]
    gloo = any(backends[file] == "gloo" for files in parts.values() for file in files)
    quiet = quiet or form == "stock"
    output = _stream(command, home, _environment(form, gloo, home, folder), quiet)
    results: List[FileResult] = []
    for (part, files), (lines, code) in zip(parts.items(), _each_pytest(output)):
        backend = backends[files[0]]
        said = [line.strip("= \n") for line in lines]
        summary = [line for line in said if SUMMARY.fullmatch(line)]
        summaries += [f"{form} / {backend}: {line}" for line in summary[-1:]]
        results += _judge(form, code, _read_report(reports[part], files, backend))
    if quiet and any(result.verdict for result in results):
        print("".join(output), flush = True)
    return results


def _arguments(form: str, home: Path, files: List[str], report: Path) -> List[str]:
    """pytest's."""
    arguments = [*files, "-q", "-rs", "--color=no", "-p", "no:cacheprovider", f"--rootdir={home}"]
    arguments += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    arguments += ["-o", f"timeout={TEST_TIMEOUT_S}"]
    if form == "stock":
        return [*arguments, "--tb=line"]
    # What makes a run long is shown at its end.
    return [*arguments, "--continue-on-collection-errors", "--durations=15", "--durations-min=5"]


def _each_pytest(output: List[str]) -> Iterator[Tuple[List[str], Optional[int]]]:
    """The lines of each pytest and the code that it ended with; None where it was never told."""
    lines: List[str] = []
    for line in output:
        if line.startswith(ENDED):
            yield lines, int(line[len(ENDED) :])
            lines = []
        else:
            lines.append(line)
    yield from itertools.repeat((lines, None))


def _judge(form: str, code: Optional[int], results: List[FileResult]) -> List[FileResult]:
    # Codes 1 and 2 are told by the counts and by files that were not collected; anything else (a crash,
    # Ctrl-C, conftest.py stopping the run) is a fault of the whole run. 5: every file was skipped.
    told = {0: True, 1: any(r.failed or not r.collected for r in results)}
    told[2] = not all(r.collected for r in results)
    told[5] = form == "upstream" and all(r.skipped for r in results)
    for result in results:
        result.verdict = _verdict(result, form)
        if not told.get(code, False):
            result.verdict = result.verdict or f"pytest ended with code {code}, see its output"
    return results


def _environment(form: str, gloo: bool, home: Path, scratch: Path) -> Dict[str, str]:
    environment = {**os.environ, "UNSLOTH_PATCHES_FORM": "fork" if form == "alone" else form}
    # Unsloth writes generated code there; one form must never read what another one wrote.
    environment["UNSLOTH_COMPILE_LOCATION"] = str(scratch / "compiled")
    environment.pop("UNSLOTH_PATCHES_DISABLE", None)
    if gloo:  # ranks are forked, from a process without a GPU or other threads
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["OMP_NUM_THREADS"] = "1"
    if form == "upstream":
        environment.update(
            UNSLOTH_COMPILE_DISABLE = "1", UNSLOTH_IS_PRESENT = "1", CUDA_VISIBLE_DEVICES = ""
        )
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
        for name in CHOOSERS:
            environment.pop(name, None)
    if form != "import":
        # What else is on the path stays: pytest may be installed there.
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        others = [each for each in path if each and not (Path(each) / "unsloth_patches").is_dir()]
        environment["PYTHONPATH"] = os.pathsep.join([str(home), *others])
        environment["UNSLOTH_PATCHES_HOME"] = str(home)
    return environment


def _stream(
    command: List[str], folder: Path, environment: Dict[str, str], quiet: bool
) -> List[str]:
    """Run a command, showing its output as it comes; returns the lines."""
    lines = []
    pipes = dict(
        stdout = subprocess.PIPE, stderr = subprocess.STDOUT, encoding = "utf-8", errors = "replace"
    )
    process = subprocess.Popen(command, cwd = folder, env = environment, **pipes)
    try:
        for line in process.stdout:
            lines.append(line)
            if not quiet:
                print(line, end = "", flush = True)
        process.wait()
        return lines
    finally:
        if process.poll() is None:  # Ctrl-C: no test process is left behind
            process.terminate()
            process.wait()


def _read_report(report: Path, files: List[str], backend: str) -> List[FileResult]:
    results = {file: FileResult(file, backend, collected = report.is_file()) for file in files}
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        # xunit1 states the file; a file that is not collected, or skipped whole, is a case without one.
        result = results.get(case.get("file") or case.get("name", "").replace(".", "/") + ".py")
        if result is None:
            continue
        trouble = next(
            (case.find(kind) for kind in ("error", "failure") if case.find(kind) is not None), None
        )
        why = trouble.get("message") or "" if trouble is not None else ""
        if why == "collection failure":
            result.collected = False
        elif trouble is not None:
            result.failed += 1
            result.missing += "No module named 'unsloth." in why
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1
    return list(results.values())


def _verdict(result: FileResult, form: str) -> str:
    """What is wrong with a file's result; empty if nothing is."""
    if not result.collected:
        return "could not be collected: import new modules inside the tests, not at the top"
    if form == "stock":
        return "" if result.failed else "no test fails on stock Unsloth, so they prove nothing"
    if result.failed:
        return f"{result.failed} failed"
    fine = result.passed or form == "upstream" and result.skipped
    return "" if fine else "no test passed"
