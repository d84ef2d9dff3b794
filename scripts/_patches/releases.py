# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What ``rebase`` found, in Markdown: a report on one release, and the matrix of docs/releases.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, List

from . import PatchesError
from .project import Project, read_text
from .rebase import CLEAN, MERGED, NEWER, REWIRED, STALE, Outcome

BEGIN = "<!-- matrix: written by scripts/patches.py rebase --all -->"
END = "<!-- end of matrix -->"
MARKS = {CLEAN: "yes", MERGED: "yes, merged", REWIRED: "yes, exported anew", NEWER: "-"}


def report(version: str, pinned: str, outcomes: List[Outcome]) -> str:
    """A release's outcomes as the text of an issue."""
    stale = [each for each in outcomes if each.state == STALE]
    rows = [(each.name, each.state, "; ".join(each.notes)) for each in outcomes]
    verdict = f"{len(stale)} of {len(outcomes)} are stale" if stale else "Nothing is stale"
    return "\n".join(
        [
            f"# The series on Unsloth {version}",
            "",
            f"{verdict}; the pinned release is {pinned}. `python scripts/patches.py rebase {version}` says the same.",
            "",
            *_table(("patch", "state", "where"), rows),
            "",
        ]
    )


def write_matrix(project: Project, found: Dict[str, List[Outcome]]) -> Path:
    """Put patch x release between the marks of docs/releases.md."""
    path = project.root / "docs" / "releases.md"
    text = read_text(path)
    inside = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not inside.search(text):
        raise PatchesError(f"{path} lacks the lines {BEGIN} and {END}", "restore it from git")
    by_name = {
        version: {outcome.name: outcome for outcome in rows} for version, rows in found.items()
    }
    rows = [
        (patch.name, *(_mark(outcomes[patch.name]) for outcomes in by_name.values()))
        for patch in project.patches
    ]
    table = "\n".join(_table(("patch", *by_name), rows))
    path.write_text(inside.sub(lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text), encoding = "utf-8")
    return path


def _mark(outcome: Outcome) -> str:
    reasons = [note for note in outcome.notes if not re.fullmatch(r"\S+:\d+", note)]
    return MARKS.get(outcome.state) or f"**stale**: {'; '.join(reasons)}"


def _table(columns, rows) -> List[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
