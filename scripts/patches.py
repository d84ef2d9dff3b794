#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The git form of unsloth_patches: patches for a fork of Unsloth, built from the same sources.

A patch is made of the modules and tests that its entry in unsloth_patches/registry.py lists, a
block at the end of every module with a target, the hand-edited hunks in patches/callsites/NAME.diff
(if any) and the pull request's text in patches/messages/NAME.md.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from _patches import PatchesError
from _patches.build import build_fork, build_patches
from _patches.check import check as run_checks
from _patches.check import export as write_patches
from _patches.forms import FORMS, FormResult, run_form
from _patches.lint import problems
from _patches.project import Project
from _patches.rebase import CLEAN, MERGED, NEWER, STALE, new_pins
from _patches.rebase import rebase as try_rebase
from _patches.upstream import read_pins, write_pins

app = typer.Typer(help = __doc__, no_args_is_help = True, add_completion = False, rich_markup_mode = None)
console = Console(highlight = False, soft_wrap = True)
errors = Console(stderr = True, highlight = False, soft_wrap = True)
COLOURS = {CLEAN: "green", MERGED: "yellow", STALE: "red", NEWER: "cyan"}


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix = "unsloth-patches-") as folder:
        yield Path(folder).resolve()


def _fail_on(found: List[str]) -> None:
    if found:
        for problem in found:
            console.print(f"  [red]{escape(problem)}[/]")
        raise PatchesError(
            "the patches cannot be built from the working tree", "correct what is listed"
        )


@app.command()
def export() -> None:
    """Write patches/*.patch and patches/series from the working tree."""
    project = Project()
    _fail_on(problems(project))
    with _scratch() as scratch:
        outcome = write_patches(project, build_patches(project, scratch / "patches")[1])
    for name, what in outcome:
        console.print(f"patches/{name}: {what}")


@app.command()
def check(
    any_size: bool = typer.Option(
        False, "--any-size", help = "do not fail for a patch that is too large"
    ),
) -> None:
    """Check that patches/ is up to date, that each patch applies alone and all in order, and their sizes."""
    failed = []

    def report(what: str, found: List[str]) -> None:
        console.print(f"[red]FAILED[/] {what}" if found else f"[green]ok[/]     {what}")
        for problem in found:
            console.print(f"       [red]{escape(problem)}[/]")
        if found and not (any_size and "lines" in what):
            failed.append(what)

    project = Project()
    with _scratch() as scratch:
        built = run_checks(project, scratch, report)
    for each in sorted(built, key = lambda each: -sum(each.size)):
        console.print(f"{each.patch.name:32} {each.size[0]:5} + {each.size[1]:5} of tests")
    middle = statistics.median(sum(each.size) for each in built) if built else 0
    clean = "[red]not clean[/]" if failed else "clean"
    console.print(f"{len(project.patches)} patches, half of them up to {middle:.0f} lines: {clean}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def fork(directory: Path = typer.Argument(..., metavar = "DIR", help = "absent or empty")) -> None:
    """Make a git repository in DIR: the wheel's unsloth/, then one commit a patch."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PatchesError(
            f"{directory} exists and is not an empty folder", "name a new or empty folder"
        )
    project = Project()
    _fail_on(problems(project))
    with _scratch() as scratch:
        # Built aside and moved, so that a failure leaves DIR as it was.
        built = build_fork(project, scratch / "fork")
        try:
            shutil.copytree(scratch / "fork", directory, dirs_exist_ok = True)
        except OSError as error:
            raise PatchesError(
                f"cannot write {directory}: {error}", "name a folder that you may write to"
            )
    for patch in built:
        console.print(f"{patch.patch.name}: {', '.join(patch.lines)}")
    console.print(
        f"Run it with PYTHONPATH={directory.resolve()}; `git log` there shows one commit a patch."
    )


@app.command()
def rebase(
    version: Optional[str] = typer.Argument(
        None, help = "a release such as 2026.10.7; default: every other supported one"
    ),
    pin: bool = typer.Option(False, "--pin", help = "if nothing is stale, pin this release"),
) -> None:
    """Try the series on another release of Unsloth, and name precisely what is stale there."""
    project = Project()
    pinned = read_pins(project.pin_file)["version"]
    if pin and version is None:
        raise PatchesError(
            "--pin needs a VERSION", "python scripts/patches.py rebase VERSION --pin"
        )
    versions = [version] if version else [v for v in project.supported if v != pinned]
    with _scratch() as scratch:
        clean = [_rebase_on(project, each, scratch / each) for each in versions]
        if pin and all(clean):
            write_pins(new_pins(project, version, scratch), project.pin_file)
            console.print(
                f"patches/UPSTREAM pins {version}; now `python scripts/patches.py export`"
            )
    raise typer.Exit(0 if all(clean) else 1)


def _rebase_on(project: Project, version: str, scratch: Path) -> bool:
    outcomes = try_rebase(project, version, scratch)
    table = Table(title = f"The series on Unsloth {version}", title_justify = "left")
    for column in ("patch", "state", "where"):
        table.add_column(column, overflow = "fold")
    for outcome in outcomes:
        notes = escape("\n".join(outcome.notes))
        table.add_row(outcome.name, f"[{COLOURS[outcome.state]}]{outcome.state}[/]", notes)
    Console(highlight = False).print(table)
    stale = [outcome.name for outcome in outcomes if outcome.state == STALE]
    if stale:
        console.print(f"{len(stale)} of {len(project.patches)} stale: {', '.join(stale)}")
    return not stale


@app.command()
def test(
    files: Optional[List[str]] = typer.Argument(None, help = "test files of patches; default all"),
    form: str = typer.Option("import", "--form", help = " | ".join(FORMS)),
    jobs: int = typer.Option(1, "--jobs", help = "more than 1: a process a file, so many at a time"),
) -> None:
    """Run the patches' tests on stock Unsloth with the import hooks, on the fork, or on stock alone."""
    with _scratch() as scratch:
        result = run_form(Project(), form, files or [], scratch, jobs)
    _print_results(result)
    raise typer.Exit(0 if result.ok else 1)


def _print_results(result: FormResult) -> None:
    table = Table(title = f"Form: {result.form}", title_justify = "left")
    for column in ("test file", "backend", "passed", "failed", "skipped", "verdict"):
        table.add_column(column, overflow = "fold")
    for row in result.files:
        good = "ok"
        if result.form == "stock":
            good = "fails, as it must" + f" ({row.missing} for want of a module)" * bool(
                row.missing
            )
        verdict = f"[red]{escape(row.verdict)}[/]" if row.verdict else f"[green]{good}[/]"
        table.add_row(
            row.file, row.backend, str(row.passed), str(row.failed), str(row.skipped), verdict
        )
    Console(highlight = False).print(table)
    for line in result.summaries:
        console.print(escape(line))


def main() -> int:
    try:
        app(standalone_mode = True)
    except PatchesError as error:
        return _complain(str(error), error.remedy)
    except OSError as error:
        return _complain(str(error), "check the permissions and the space left there")
    return 0


def _complain(message: str, remedy: str) -> int:
    errors.print(f"[red]error:[/] {escape(message)}")
    if remedy:
        errors.print(f"[yellow]remedy:[/] {escape(remedy)}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
