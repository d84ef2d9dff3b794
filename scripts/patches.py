#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The git form of unsloth_patches: patches for a fork of Unsloth, built from the same sources.

A patch is made of the modules and tests that its entry in unsloth_patches/registry/ lists, its
decorators beside what they replace, the hand-edited hunks in patches/callsites/NAME.diff (if any)
and the pull request's text in patches/messages/NAME.md.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from _patches import PatchesError, releases
from _patches.build import build_fork, build_patches
from _patches.check import check as run_checks
from _patches.check import export as write_patches
from _patches.forms import FORMS, FormResult, run_form
from _patches.lint import problems
from _patches.project import Project
from _patches.rebase import CLEAN, MERGED, NEWER, REWIRED, STALE, Outcome, new_pins
from _patches.rebase import rebase as try_rebase
from _patches.upstream import newest_version, read_pins, write_pins

app = typer.Typer(help = __doc__, no_args_is_help = True, add_completion = False, rich_markup_mode = None)
console = Console(highlight = False, soft_wrap = True)
errors = Console(stderr = True, highlight = False, soft_wrap = True)
COLOURS = {CLEAN: "green", MERGED: "yellow", REWIRED: "yellow", STALE: "red", NEWER: "cyan"}


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix = "unsloth-patches-") as folder:
        yield Path(folder).resolve()


def _buildable() -> Project:
    project = Project()
    found = problems(project)
    if found:
        raise PatchesError(
            "the patches cannot be built:\n" + "\n".join(found), "correct what is listed"
        )
    return project


@app.command()
def export() -> None:
    """Write patches/*.patch and patches/series from the working tree."""
    project = _buildable()
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

    with _scratch() as scratch:
        built = run_checks(Project(), scratch, report)
    for each in sorted(built, key = lambda each: -sum(each.size)):
        console.print(f"{each.patch.name:32} {each.size[0]:5} lines {each.size[1]:5} of tests")
    middle = statistics.median(sum(each.size) for each in built) if built else 0
    clean = "[red]not clean[/]" if failed else "clean"
    console.print(f"{len(built)} patches, the median {middle:.0f} lines: {clean}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def fork(directory: Path = typer.Argument(..., metavar = "DIR", help = "absent or empty")) -> None:
    """Make a git repository in DIR: the wheel's unsloth/, then one commit a patch."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PatchesError(
            f"{directory} exists and is not an empty folder", "name a new or empty folder"
        )
    project = _buildable()
    with _scratch() as scratch:
        # Built aside and moved, so that a failure leaves DIR as it was.
        built = build_fork(project, scratch / "fork")
        shutil.copytree(scratch / "fork", directory, dirs_exist_ok = True)
    for each in built:
        console.print(f"{each.patch.name}: {', '.join(each.lines)}")
    where = directory.resolve()
    console.print(
        f"Run it with PYTHONPATH={where} (its tests also need {where}/tests/_shared there); `git log` shows one commit a patch."
    )


@app.command()
def rebase(
    version: Optional[str] = typer.Argument(
        None, help = "a release such as 2026.10.7; default: the oldest supported one"
    ),
    every: bool = typer.Option(
        False, "--all", help = "every supported release, and write the matrix of docs/releases.md"
    ),
    newest: bool = typer.Option(False, "--newest", help = "the newest release that pip finds"),
    pin: bool = typer.Option(False, "--pin", help = "if nothing is stale, pin this release"),
    report_to: Optional[Path] = typer.Option(
        None, "--report", metavar = "FILE", help = "write the table there, as Markdown"
    ),
    patches_to: Optional[Path] = typer.Option(
        None, "--patches", metavar = "DIR", help = "write the patches as they apply there"
    ),
) -> None:
    """Try the series on another release of Unsloth, and name precisely what is stale there.

    Exit code: 0 where nothing is stale, 1 where something is, 2 for an error (no such release, no network).
    """
    if sum([version is not None, every, newest]) > 1:
        raise PatchesError("VERSION, --all and --newest exclude one another", "give one of them")
    if every and (report_to or patches_to):
        raise PatchesError(
            "--report and --patches are for one release", "name it, or give --newest"
        )
    if pin and not (version or newest):
        raise PatchesError("--pin needs a VERSION", "scripts/patches.py rebase VERSION --pin")
    project = Project()
    pinned = read_pins(project.pin_file)["version"]
    one = newest_version("unsloth") if newest else version or project.supported[0]
    found: Dict[str, List[Outcome]] = {}
    if patches_to is not None:
        patches_to.mkdir(parents = True, exist_ok = True)
    with _scratch() as scratch:
        for each in project.supported if every else [one]:
            found[each] = try_rebase(project, each, scratch / each, patches_to)
            _print_outcomes(each, found[each])
        clean = not any(row.state == STALE for rows in found.values() for row in rows)
        if pin and clean:
            write_pins(new_pins(one, scratch), project.pin_file)
            console.print(f"patches/UPSTREAM pins {one}; now `python scripts/patches.py export`")
    if every:
        console.print(f"wrote the matrix in {releases.write_matrix(project, found)}")
    if report_to is not None:
        report_to.write_text(releases.report(one, pinned, found[one]), encoding = "utf-8")
    raise typer.Exit(0 if clean else 1)


def _print_outcomes(version: str, outcomes: List[Outcome]) -> None:
    console.print(f"The series on Unsloth {version}")
    for row in outcomes:
        console.print(f"{row.name:32} [{COLOURS[row.state]}]{row.state}[/]")
        for note in row.notes:  # not in a table, which would break file:line
            console.print(f"    {escape(note)}")


@app.command()
def fingerprints() -> None:
    """Print the fingerprints of every target in the pinned release: what to write into an entry."""
    project = Project()
    releases = project.pinned_unsloth(), project.pinned_zoo()
    for patch in project.patches:
        for target in patch.targets:
            found = ", ".join(sorted(project.fingerprints(target, *releases)))
            console.print(f"{patch.name:28} {target.attribute:64} {found or 'no definition'}")


@app.command()
def test(
    files: Optional[List[str]] = typer.Argument(None, help = "test files of patches; default all"),
    form: str = typer.Option("import", "--form", help = " | ".join(FORMS)),
    jobs: int = typer.Option(1, "--jobs", help = "more than 1: a process a file, so many at a time"),
) -> None:
    """Run the patches' tests on Unsloth with the import hooks, on the fork, on stock, or as Unsloth's CI does."""
    with _scratch() as scratch:
        result = run_form(Project(), form, files or [], scratch, jobs)
    _print_results(result)
    raise typer.Exit(0 if result.ok else 1)


def _print_results(result: FormResult) -> None:
    rows = []
    for row in result.files:
        good = "ok"
        if result.form == "stock":
            missing = f" ({row.missing} for want of a module)" * bool(row.missing)
            good = "fails, as it must" + missing
        verdict = f"[red]{escape(row.verdict)}[/]" if row.verdict else f"[green]{good}[/]"
        counts = (str(count) for count in (row.passed, row.failed, row.skipped))
        rows.append((row.file, row.backend, *counts, verdict))
    columns = ("test file", "backend", "passed", "failed", "skipped", "verdict")
    _print_table(f"Form: {result.form}", columns, rows)
    for line in result.summaries:
        console.print(escape(line))


def _print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title = title, title_justify = "left")
    for column in columns:
        table.add_column(column, overflow = "fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight = False).print(table)


def main() -> int:
    try:
        app(standalone_mode = True)
    except (PatchesError, OSError) as error:
        errors.print(f"[red]error:[/] {escape(str(error))}")
        remedy = getattr(error, "remedy", "check the permissions and the space left there")
        errors.print(f"[yellow]remedy:[/] {escape(remedy)}" if remedy else "")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
