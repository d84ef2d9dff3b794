# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What ``status``, ``doctor`` and the demo print: lists whose names stay whole in 80 columns."""

from __future__ import annotations

from collections import Counter
from typing import Dict, Iterable, List, Sequence, Tuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import __version__

STATE_STYLE = {
    "applied": "green",
    "upstreamed": "green",
    "pending": "cyan",
    "off": "yellow",
    "late": "yellow",
    "skipped": "yellow",
    "failed": "red",
    "ok": "green",
    "note": "cyan",
    "problem": "red",
}
Entry = Tuple[str, str, Sequence[str], Sequence[str]]


def _style(state: str) -> str:
    return STATE_STYLE.get(state, "white")


def listing(title: str, entries: Iterable[Entry]) -> Group:
    """Entries of (name, state, texts, names): name and state on one line, the rest below where it is long.

    No table: in a terminal of 80 columns its four columns broke the names of functions, which are
    up to 60 characters long.
    """
    entries = list(entries)
    widest = max([24, *(len(name) for name, *_ in entries)])
    parts: List[RenderableType] = [Text(title, "italic")]
    for name, state, texts, names in entries:
        head = Text(f"{name:<{widest}}  ", "bold")
        head.append(f"{state:<8}", f"not bold {_style(state)}")
        texts = [text for text in texts if text]
        if len(texts) == 1 and len(head) + len(texts[0]) < 78:
            head.append(f"  {texts.pop()}", "not bold")
        head.rstrip()
        below = [Text(text) for text in texts] + [Text(f"- {each}", "dim") for each in names]
        parts += [head, *(Padding(text, (0, 0, 0, 4), expand = False) for text in below)]
    return Group(*parts)


def status_listing(rows: Sequence) -> Group:
    """``status()``: each patch with its state and what it gives, and below each reason why patches are
    not in, once."""
    table = Table.grid(padding = (0, 2, 0, 0))
    table.add_column("patch", no_wrap = True)
    table.add_column("state", no_wrap = True)
    table.add_column("what it gives", overflow = "fold")
    for row in rows:
        table.add_row(Text(row.name, "bold"), Text(_state(row), _style(row.state)), Text(row.title))
    parts = [Text(f"unsloth_patches {__version__}", "italic"), table, *_reasons(rows)]
    if any("/" in _state(row) for row in rows):
        meaning = (
            "n/m, as in 1/3: n of the patch's m functions are replaced now; the other functions' modules "
            "are not imported, or not in this release (--verbose says which)"
        )
        parts += [Text(""), Text(meaning, "dim")]
    return Group(*parts)


def _state(row) -> str:
    """With the share of its functions that are replaced, where the others' modules are not imported."""
    total = len(row.replaces)
    return f"{row.state} {row.replaced}/{total}" if 0 < row.replaced < total else row.state


def _reasons(rows: Sequence) -> List[RenderableType]:
    """Why patches are not in, and what is wrong with those that are; the names where it is not all of
    that state."""
    groups: Dict[Tuple[str, str], List[str]] = {}
    for row in rows:
        if row.brief and row.brief != f"{row.replaced} of {len(row.replaces)} targets":
            groups.setdefault((row.state, row.brief), []).append(row.name)
    parts: List[RenderableType] = []
    for (state, brief), names in groups.items():
        text = Text(f"{state}: ", _style(state))
        text.append(brief, "default")
        if len(names) < sum(row.state == state for row in rows):
            text.append(f" ({', '.join(names)})", "dim")
        parts.append(text)
    return [Text(""), *parts] if parts else []


def verbose_status_listing(rows: Sequence) -> Group:
    """``status()``: each patch with its state, the whole reason, and what it replaces."""
    return listing(f"unsloth_patches {__version__}", map(_status_entry, rows))


def _status_entry(row) -> Entry:
    names = [name.replace(":", ".") for name in row.replaces]
    return row.name, row.state, [row.title, row.reason], names


def doctor_listing(findings: Iterable) -> Group:
    """``doctor``: each check with what was found, the verdict and the remedy."""
    findings = list(findings)
    count = Counter(finding.verdict for finding in findings)
    verdict = (
        Text(f"{count['problem']} of {len(findings)} checks found a problem", "red")
        if count["problem"]
        else Text(f"ready; notes: {count['note']}", "green")
    )
    entries = map(_doctor_entry, findings)
    return Group(listing(f"unsloth_patches {__version__} doctor", entries), Text(""), verdict)


def _doctor_entry(finding) -> Entry:
    return finding.check, finding.verdict, [finding.found, finding.remedy], ()
