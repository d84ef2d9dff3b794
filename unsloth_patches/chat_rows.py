# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Rows of conversations: read from files and folders, the chat and the tools in one, written again."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, TextIO

COLUMNS = ("messages", "conversations", "conversation", "chat")
FIRST_LINES = 3  # where none of them is JSON, a file of another ending is no jsonl file


class Unreadable(Exception):
    """The data cannot be read at all; the text says why and what to do."""


# ---------------------------------------------------------------- read


def read_rows(data: Path) -> Iterator[Any]:
    """Rows of a jsonl, json or parquet file, of a folder that ``save_to_disk`` wrote, or of a folder
    of such files."""
    if data.is_dir():
        if (data / "state.json").is_file() or (data / "dataset_dict.json").is_file():
            yield from _saved_dataset(data)
            return
        files = sorted(p for p in data.rglob("*") if p.suffix in (".jsonl", ".json", ".parquet"))
        if not files:
            raise Unreadable(
                f"{data} has no jsonl, json or parquet files; name a file or folder of data"
            )
        for file in files:
            yield from read_rows(file)
        return
    if not data.is_file():
        raise Unreadable(f"{data} is not there; name a jsonl, json or parquet file, or a folder")
    if data.suffix == ".parquet":
        yield from _parquet_rows(data)
        return
    with open(data, encoding = "utf-8") as text:
        try:
            yield from _json_rows(text, data)
        except UnicodeDecodeError as error:
            raise _no_data_file(data, f"it is not UTF-8 text ({error.reason})") from None


def _no_data_file(data: Path, reason: str) -> Unreadable:
    return Unreadable(
        f"{data} is no jsonl, json or parquet file: {reason}; name one, with that ending"
    )


def _parquet_rows(data: Path) -> Iterator[Any]:
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(data)
    except ValueError as error:
        raise _no_data_file(data, str(error)) from None
    for batch in file.iter_batches(batch_size = 1000):
        yield from batch.to_pylist()


def _json_rows(file: TextIO, data: Path) -> Iterator[Any]:
    if data.suffix == ".json":
        try:
            rows = json.load(file)
        except ValueError as error:
            raise Unreadable(f"{data} is not JSON: {error}") from None
        yield from rows if isinstance(rows, list) else [rows]
        return
    rows = (_json_row(line) for line in file if line.strip())
    first = list(itertools.islice(rows, FIRST_LINES))
    unknown = data.suffix != ".jsonl"  # there each bad line is told, and the others can be kept
    if unknown and first and all(isinstance(row, Unreadable) for row in first):
        raise _no_data_file(data, f"none of its first lines is JSON ({first[0].__cause__})")
    yield from itertools.chain(first, rows)


def _json_row(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        row = Unreadable(f"the line is not JSON: {error}")
        row.__cause__ = error
        return row


def _saved_dataset(data: Path) -> Iterator[Any]:
    from datasets import load_from_disk
    found = load_from_disk(str(data))
    for part in found.values() if isinstance(found, dict) else [found]:
        yield from part


def chat_of(row: Any, column: Optional[str]) -> Any:
    if isinstance(row, Unreadable):
        raise ValueError(str(row))
    if isinstance(row, list):
        return row
    names = [column] if column else COLUMNS
    for name in names:
        if isinstance(row, dict) and row.get(name) is not None:
            return row[name]
    is_dict = isinstance(row, dict)
    has = f"its columns: {', '.join(row)}" if is_dict else f"it is a {type(row).__name__}"
    raise ValueError(
        f"the row has no chat under the column {' or '.join(names)} ({has}); name it with --messages"
    )


def tools_of(row: Any, column: str, notices: List[str]) -> Any:
    """The row's tools; None where the column holds names, which a script has to look up."""
    tools = row.get(column) if isinstance(row, dict) else None
    names = isinstance(tools, list) and all(isinstance(t, str) and t[:1] != "{" for t in tools)
    if names and tools:
        notices.append(
            f"{column} holds names and no schemas, so the row is rendered without tools here. Give "
            "apply_chat_template the tools that they name."
        )
    return None if names else tools


# ---------------------------------------------------------------- written


def as_stored(messages: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Arguments as JSON text, which Arrow keeps as it is."""
    stored = json.loads(json.dumps(messages, ensure_ascii = False))
    for message in stored:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii = False)
    return stored


@contextlib.contextmanager
def written_whole(path: Optional[Path]) -> Iterator[Optional[TextIO]]:
    """A file that stands at ``path`` once all of it is written. Until then, and after an error, what was
    there stays: it may be the data that is being read. None for None."""
    if path is None:
        yield None
        return
    is_plain = path.is_file() or not path.exists()  # no pipe, say
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise Unreadable(
            f"--fix {path}: there is no folder {target.parent}; name a file in one that is"
        )
    partial = target.with_name(target.name + ".part") if is_plain else target
    try:
        with open(partial, "w", encoding = "utf-8") as out:
            yield out
        if is_plain:
            partial.replace(target)
    except BaseException:
        if is_plain:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise
