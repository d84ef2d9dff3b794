# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Check a data set of conversations before training: ``python -m unsloth_patches check-chats DATA``."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set

from rich.console import Console
from rich.progress import track
from rich.text import Text

from .chat_rows import COLUMNS, Unreadable, as_stored, chat_of, read_rows, tools_of, written_whole

DONE, BAD_ROWS, MISUSE = 0, 1, 2
TOOLS_COLUMN = "tools"
SHOWN_ROWS = 8
BINS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_PLACE = re.compile(r"^(?:Unsloth: )?(?:messages\[\d+\](?:, call \d+(?: \('.*?'\))?)?: )?")
_VALUE = re.compile(r"""'[^']*'|"[^"]*"|\[[^]]*\]|\([^)]*\)|-?\d[\d.]*""")


@dataclass
class BadRow:
    row: int
    reason: str


@dataclass
class Report:
    """What was found. Reasons that differ in places and values only are one kind, which goes by the
    first of them."""

    rows: int = 0
    bad: int = 0
    template: str = ""
    bad_rows: List[BadRow] = field(default_factory = list)
    kinds: Dict[str, List[int]] = field(default_factory = dict)  # reason -> rows
    notices: Dict[str, List[int]] = field(default_factory = dict)
    first_rendered: str = ""
    unit: str = "characters"
    lengths: Counter = field(default_factory = Counter)
    longest: int = 0

    def as_json(self) -> Dict[str, Any]:
        return {**vars(self), "bad_rows": [vars(bad) for bad in self.bad_rows]}


# ---------------------------------------------------------------- checking


def _tokenizer(template: str, mode: str, model: Optional[Path]):
    """A tokenizer with that template: the model's, or one that can only render."""
    from unsloth.chat_templates import CHAT_TEMPLATES, get_chat_template

    if template not in CHAT_TEMPLATES:
        raise ValueError(f"no template {template!r}; there are {', '.join(CHAT_TEMPLATES)}")
    if model is not None and not model.is_dir():  # the Hub would be asked for it
        raise ValueError(
            f"--model {model}: there is no such folder; name a checkpoint's or tokenizer's"
        )
    if model is not None:
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    else:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        special = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
        }
        backend = Tokenizer(models.BPE({"a": 0}, []))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object = backend, **special)
    options = {} if mode == "error" else {"parallel_tool_calls": mode}
    return get_chat_template(tokenizer, template, map_eos_token = False, **options)


def check(
    rows: Iterator[Any], tokenizer, column: Optional[str], tools: str, count: bool
) -> Iterator:
    """Yields (report so far, messages in OpenAI's form or None) for each row; the report is one object."""
    from transformers import PreTrainedTokenizerBase

    from .unsloth.tool_calls.checks import Checks
    from .unsloth.tool_calls.messages import is_clean, is_declared, prepare_conversation
    from .unsloth.tool_calls.schemas import Schemas, prepare_tools

    checks = getattr(tokenizer, "_tool_call_checks", Checks(tokenizer.chat_template))
    render = PreTrainedTokenizerBase.apply_chat_template
    report = Report(unit = "tokens" if count else "characters")
    first_of_kind = _FirstOfKind()

    def keep(turn, results, builtin_tools, warn):
        checks.arrange(turn, results, builtin_tools, warn)  # raises where it cannot be rendered
        return [turn.message, *filter(None, results)]

    for number, row in enumerate(rows):
        report.rows += 1
        notices: List[str] = []
        try:
            messages = chat_of(row, column)
            own = prepare_tools(tools_of(row, tools, notices))
            given, schemas = messages, Schemas(own, is_prepared = True)
            clean = type(messages) is list and is_clean(messages, (), checks.mode == "join")
            if not (clean and is_declared(messages, schemas)):
                given = prepare_conversation(
                    messages,
                    tools = schemas,
                    arrange = checks.arrange,
                    warn = lambda where, notice: notices.append(
                        where.replace("Unsloth: ", "", 1) + notice
                    ),
                )
                messages = prepare_conversation(messages, tools = schemas, arrange = keep)
            text = render(tokenizer, given, tools = own, tokenize = False)
        except Exception as error:
            report.bad += 1
            reason = str(error).replace("Unsloth: ", "", 1)
            report.bad_rows.append(BadRow(number, reason))
            report.kinds.setdefault(first_of_kind(reason), []).append(number)
            yield report, None
            continue
        for notice in {first_of_kind(notice) for notice in notices}:
            report.notices.setdefault(notice, []).append(number)
        report.first_rendered = report.first_rendered or text
        length = len(tokenizer(text, add_special_tokens = False).input_ids) if count else len(text)
        report.longest = max(report.longest, length)
        report.lengths[next((b for b in BINS if length <= b), "more")] += 1
        yield report, messages


class _FirstOfKind(Dict[str, str]):
    """Reason -> the first one seen that differs from it in places and values only."""

    def __call__(self, reason: str) -> str:
        return self.setdefault(_VALUE.sub("…", _PLACE.sub("", reason)), reason)


# ---------------------------------------------------------------- the command


def run(
    data: Path,
    template: str = "llama-3.1",
    mode: str = "error",
    messages: Optional[str] = None,
    tools: str = TOOLS_COLUMN,
    model: Optional[Path] = None,
    as_json: bool = False,
    fix: Optional[Path] = None,
) -> int:
    """Check every row, say what is wrong with which. Returns the exit code: 0, 1 for bad rows, 2.

    mode: ``parallel_tool_calls`` that training will use.
    messages, tools: columns; the first is found by its usual names.
    model: folder of a tokenizer, to count tokens; without it characters are counted.
    fix: a jsonl file to write: the rows that can be read, in OpenAI's form, arguments as JSON text.
    """
    console = Console(stderr = as_json)
    try:
        tokenizer = _tokenizer(template, mode, model)
    except (KeyError, ValueError, OSError, NotImplementedError) as error:
        console.print(f"[red]check-chats:[/] {error}", highlight = False, soft_wrap = True)
        return MISUSE
    report = Report()
    kept: List[Any] = []
    columns: Set[str] = set()
    try:
        with written_whole(fix) as out:
            rows = track(
                _keep_rows(data, kept, columns),
                "checking",
                console = console,
                disable = not console.is_terminal,
            )
            for report, good in check(rows, tokenizer, messages, tools, model is not None):
                if out and good is not None:
                    row = kept[0] if isinstance(kept[0], dict) else {}
                    name = messages or next((c for c in COLUMNS if c in row), "messages")
                    row = {**row, name: as_stored(good)}
                    print(json.dumps(row, ensure_ascii = False, default = str), file = out)
            if not report.rows:
                raise Unreadable(f"{data} has no rows; name the data that training will use")
            if tools != TOOLS_COLUMN and tools not in columns:
                raise Unreadable(
                    f"--tools {tools}: no row has that column; the rows have "
                    f"{', '.join(sorted(columns)) or 'none'}. Name the tools' column, or leave it out"
                )
    except (Unreadable, OSError) as error:
        console.print(f"[red]check-chats:[/] {error}", highlight = False, soft_wrap = True)
        return MISUSE
    report.template = template
    if as_json:
        json.dump(report.as_json(), sys.stdout, indent = 2, ensure_ascii = False)
        print()
    else:
        _print(report, console, fix)
    return BAD_ROWS if report.bad else DONE


def _keep_rows(data: Path, kept: List[Any], columns: Set[str]) -> Iterator[Any]:
    for row in read_rows(data):
        kept[:] = [row]
        columns.update(row if isinstance(row, dict) else ())
        yield row


def _print(report: Report, console: Console, fix: Optional[Path]) -> None:
    """What was found comes last, where it stays on the screen."""
    if report.first_rendered:
        console.print(Text("\nthe first row that renders", "bold"))
        console.print(Text(report.first_rendered[:2000]))
    if report.lengths:
        console.print(Text(f"\n{report.unit} of a row", "bold"))
        most = max(report.lengths.values())
        for bound in (*BINS, "more"):
            if report.lengths[bound]:
                count = report.lengths[bound]
                bar = "█" * max(1, round(40 * count / most))
                console.print(
                    Text(f"{'≤ ' if bound != 'more' else ''}{bound!s:>6} {count:>8}  {bar}")
                )
        console.print(f"longest: {report.longest}", highlight = False)
    for title, kinds in (("errors", report.kinds), ("rendered, but unusual", report.notices)):
        if kinds:
            console.print(Text(f"\n{title}", "bold"))
        for reason, rows in sorted(kinds.items(), key = lambda item: -len(item[1])):
            places = ", ".join(map(str, rows[:SHOWN_ROWS]))
            if len(rows) > SHOWN_ROWS:
                places += ", … (--json lists all)"
            console.print(Text(f"{len(rows)} x {reason}"))
            of = f"; the text is of row {rows[0]}" if len(rows) > 1 else ""
            console.print(Text(f"    row{'s' * (len(rows) > 1)} {places}{of}", "dim"))
    if any("pass parallel_tool_calls" in reason for reason in report.kinds):
        console.print(Text("Here: --parallel-tool-calls split, or join, as in training", "dim"))
    if report.kinds or report.notices:
        console.print(Text("Rows count from 0, as in a data set", "dim"))
    good = report.rows - report.bad
    written = f"; {good} written to {fix}" if fix else ""
    style = "red" if report.bad else "green"
    console.print(
        Text(
            f"\n{good} of {report.rows} rows can be trained on with {report.template}{written}",
            style,
        )
    )
