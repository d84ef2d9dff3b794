# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What the demo shows: tables, the loss curve as a picture and in the terminal, a JSON record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from rich.table import Table
from rich.text import Text

from .evaluate import Answer, count_right

# Two hues of a colour-blind-safe palette (Okabe and Ito): one for before, one for after.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#8a8a8a"


def smooth(losses: Sequence[float], window: int = 10) -> List[float]:
    """Mean of each loss and up to ``window - 1`` before it."""
    return [
        sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]


def plot_loss(
    losses: Sequence[float],
    before: Dict[str, List[Answer]],
    after: Dict[str, List[Answer]],
    path: Path,
) -> None:
    """Loss per step, and held-out prompts answered right before and (if known) after, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize = (9, 3.6), layout = "constrained")
    FigureCanvasAgg(figure)
    curve, bars = figure.subplots(1, 2, width_ratios = (2, 1))
    steps = range(1, len(losses) + 1)
    curve.plot(steps, losses, color = GREY, linewidth = 0.7, alpha = 0.6, label = "each step")
    curve.plot(steps, smooth(losses), color = BLUE, linewidth = 2, label = "mean of 10 steps")
    curve.set(xlabel = "optimizer step", ylabel = "loss of the responses", title = "Training loss")
    curve.set_ylim(bottom = 0)
    curve.legend(frameon = False)
    _plot_scores(bars, before, after)
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi = 150)


def _plot_scores(axes, before: Dict[str, List[Answer]], after: Dict[str, List[Answer]]) -> None:
    kinds = list(before)
    for shift, answers, colour, label in (
        (-0.2, before, ORANGE, "before training"),
        (0.2, after, BLUE, "after training"),
    ):
        if not answers:
            continue
        shares = [100 * count_right(answers[kind]) / len(answers[kind]) for kind in kinds]
        bars = axes.bar(
            [i + shift for i in range(len(kinds))], shares, 0.38, color = colour, label = label
        )
        texts = [f"{count_right(answers[kind])}/{len(answers[kind])}" for kind in kinds]
        axes.bar_label(bars, texts, padding = 2, fontsize = 9)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylim = (0, 128), yticks = range(0, 101, 20))
    axes.set(ylabel = "right calls, %", title = "Held-out prompts")
    axes.legend(frameon = False, loc = "upper left", fontsize = 8)


def _round_step(count: int) -> int:
    """1, 2 or 5 times a power of ten, such that at most eight of them make ``count``."""
    return next(s * 10**e for e in range(9) for s in (1, 2, 5) if 8 * s * 10**e >= count)


def terminal_plot(
    losses: Sequence[float],
    width: int = 90,
    height: int = 16,
    color: bool = True,
) -> Text:
    """The smoothed loss curve as text, ``width`` columns wide; plain characters without ``color``."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("simple" if color else "colorless")
    figure.plot_size(width, height)
    figure.title("training loss (mean of 10 steps)")
    figure.label("optimizer step")
    steps = range(1, len(losses) + 1)
    ticks = [1, *(step for step in steps if step % _round_step(len(steps)) == 0 and step > 1)]
    figure.ruler("x").ticks(ticks, list(map(str, ticks)))
    figure.draw(figure.signal(list(steps), smooth(losses)))
    return Text.from_ansi(str(figure.build()))


def score_table(before: Dict[str, List[Answer]], after: Optional[Dict[str, List[Answer]]]) -> Table:
    """Right answers per kind of prompt, before and after training."""
    table = Table(
        title = "held-out prompts answered with exactly the right calls", title_justify = "left"
    )
    table.add_column("prompt")
    for name in ("before", "after"):
        table.add_column(f"{name} training", justify = "right")
    for kind, answers in before.items():
        cells = [
            f"{count_right(group)} of {len(group)}"
            for group in (answers, (after or {}).get(kind, []))
        ]
        table.add_row(f"needs {kind}", cells[0], cells[1] if after else "not measured")
    return table


def answers_table(
    kind: str,
    answers: List[Answer],
    limit: int = 6,
) -> Table:
    """Prompts with what the model replied: wrong ones first, so that none of them hides."""
    shown = sorted(answers, key = lambda answer: answer.right)[:limit]
    title = f"needs {kind}: {len(shown)} of {len(answers)} replies, the wrong ones first"
    table = Table(title = title, title_justify = "left", show_lines = True)
    table.add_column("", no_wrap = True)
    table.add_column("prompt", overflow = "fold", ratio = 2)
    table.add_column("reply", overflow = "fold", ratio = 3)
    for answer in shown:
        mark = Text("right", style = "green") if answer.right else Text("wrong", style = "red")
        table.add_row(mark, Text(answer.example.prompt), Text(answer.text))
    return table


def call_table(kind: str, answer: Answer, executed: List[Dict[str, Any]]) -> Table:
    """One prompt, the reply, the calls parsed from it and what each tool returned."""
    mark = "" if answer.right else " (wrong)"
    table = Table(
        title = f"{kind}, generated and executed{mark}", title_justify = "left", show_header = False
    )
    table.add_column(no_wrap = True)
    table.add_column(overflow = "fold")
    table.add_row("prompt", Text(answer.example.prompt))
    table.add_row("tools on offer", Text(", ".join(answer.example.tools)))
    table.add_row("generated", Text(answer.text))
    for call in executed:
        arguments = ", ".join(f"{name} = {value!r}" for name, value in call["arguments"].items())
        table.add_row("call", Text(f"{call['name']}({arguments})"))
        table.add_row("result", Text(json.dumps(call["result"], ensure_ascii = False)))
    if not executed:
        table.add_row("no call", Text(answer.reason or "the reply is plain text"))
    return table


def files_table(out: Path, model: Path) -> Table:
    """What the run left behind."""
    table = Table(show_header = False, title = "files", title_justify = "left")
    table.add_column(no_wrap = True)
    table.add_column(overflow = "fold")
    for path, what in (
        (model, "base model"),
        (out / "adapter", "the trained adapter and its tokenizer"),
        (out / "loss.png", "loss curve and scores"),
        (out / "report.json", "settings, losses, held-out prompts and replies"),
    ):
        table.add_row(what, Text(str(path)))
    return table


def settings_table(rows: Dict[str, Any]) -> Table:
    """Two columns: what, and its value."""
    table = Table(show_header = False, title = "this run", title_justify = "left")
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def write(
    out: Path,
    settings: Dict[str, Any],
    losses: Sequence[float],
    before: Dict[str, List[Answer]],
    after: Dict[str, List[Answer]],
) -> None:
    """Write ``out``/loss.png and ``out``/report.json.

    report.json has the settings, the loss of each step, and every held-out prompt with expected and
    given calls. ``after`` may be empty: not measured.
    """
    document = {
        "settings": settings,
        "losses": [round(loss, 5) for loss in losses],
        "before": {kind: [answer.as_dict() for answer in group] for kind, group in before.items()},
        "after": {kind: [answer.as_dict() for answer in group] for kind, group in after.items()},
    }
    text = json.dumps(document, indent = 1, default = str)
    (out / "report.json").write_text(text, encoding = "utf-8")
    plot_loss(losses, before, after, out / "loss.png")
