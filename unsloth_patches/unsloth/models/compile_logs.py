# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Reads Dynamo's logs of graph breaks and of recompilations, which Unsloth silences.

Nothing is printed by it: handlers of our own hear the loggers, whose levels come back afterwards.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import traceback
from typing import Callable, Dict, List, NamedTuple, Tuple

__all__ = [
    "BreakHandler",
    "GraphBreak",
    "Place",
    "RecompileHandler",
    "failure_place",
    "listen",
    "one_line",
    "reason_and_hint",
    "short_path",
]

_BREAKS = (
    "torch._dynamo.symbolic_convert.__graph_breaks",
    "torch._dynamo.convert_frame.__graph_breaks",
)
_RECOMPILES = ("torch._dynamo.guards.__recompiles",)
_IN_USER_CODE = re.compile(r"in user code at (?P<file>.+):(?P<line>\d+)\s*\n")
_STACK_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_REASON = re.compile(
    r"Graph Break Reason:\s*(?P<text>.*?)(?:\n\s*\n\s*For more|\n\nUser code|\Z)", re.S
)
_RECOMPILED = re.compile(r"Recompiling function \S+ in (?P<file>.+):(?P<line>\d+)\s*\n")
_GUARD = re.compile(r"(?m)^\s*- (?P<text>\d+/\d+: .+)$")
_NOISE = ("Encountered graph break when", "Failed to handle graph break gracefully")


class Place(NamedTuple):
    """A line of source; ``file`` is empty where torch did not say."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{short_path(self.file)}:{self.line}" if self.file else "place not reported"


class GraphBreak(NamedTuple):
    """A graph that ended early: where, why in torch's words, and torch's hint if it gave one."""

    place: Place
    reason: str
    hint: str


def short_path(file: str) -> str:
    """``file`` below site-packages, or below the working folder; else as it is."""
    for root in ("site-packages" + os.sep, "dist-packages" + os.sep, os.getcwd() + os.sep):
        if root in file:
            return file.rsplit(root, 1)[-1]
    return file


def _last_frame(text: str) -> Place:
    frames = [f for f in _STACK_FRAME.finditer(text) if os.sep + "torch" + os.sep not in f["file"]]
    return Place(frames[-1]["file"], int(frames[-1]["line"])) if frames else Place()


def failure_place(error: BaseException) -> Place:
    """The line of the traced code at which torch.compile gave up."""
    stack = getattr(error, "real_stack", None)
    if stack:
        return Place(stack[-1].filename, stack[-1].lineno or 0)
    _, told, text = str(error).partition("from user code:")
    if told:
        return _last_frame(text)
    return _last_frame("".join(traceback.format_tb(error.__traceback__)))


def reason_and_hint(text: str) -> Tuple[str, str]:
    """Torch's message in one line, and its first hint."""
    lines = [line.strip() for line in text.strip().splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    hint = next((line[len("Hint:") :].strip() for line in lines if line.startswith("Hint:")), "")
    told = [line for line in lines if not line.startswith(("Hint:", "Developer debug"))][:2]
    return " ".join(told)[:400] or "no reason given", hint[:300]


class BreakHandler(logging.Handler):
    """Turns records of Dynamo's graph-break log into GraphBreak entries."""

    def __init__(self, found: Dict[GraphBreak, int]):
        super().__init__(logging.DEBUG)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        try:
            found = _parse_break(record.getMessage())
            self._found[found] = self._found.get(found, 0) + 1
        except Exception:  # a log handler must not raise into a compilation
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        unread = GraphBreak(Place(), "unreadable entry of torch's graph-break log", "")
        self._found[unread] = self._found.get(unread, 0) + 1


class RecompileHandler(logging.Handler):
    """Keeps, by frame and in order, the guards that made Dynamo recompile it.

    The metrics name one failing guard, of the graph compiled last, which is often only that of the
    other gradient mode; the log has one for every graph that did not fit.
    """

    def __init__(self):
        super().__init__(logging.DEBUG)
        self._reasons: Dict[Place, List[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            where = _RECOMPILED.search(message)
        except Exception:  # as above; the metrics' own reason stays
            return
        if where is None:
            return
        guards = [one_line(found["text"]) for found in _GUARD.finditer(message)]
        telling = [guard for guard in guards if "grad_mode" not in guard] or guards
        place = Place(where["file"], int(where["line"]))
        self._reasons.setdefault(place, []).append("; ".join(telling[:3])[:400])

    def take(self, place: Place) -> str:
        """The reason of the frame's next recompilation; empty where the log had none."""
        waiting = self._reasons.get(place)
        return waiting.pop(0) if waiting else ""


def _parse_break(message: str) -> GraphBreak:
    where = _IN_USER_CODE.search(message)
    place = Place(where["file"], int(where["line"])) if where else _last_frame(message)
    told = _REASON.search(message)
    return GraphBreak(place, *reason_and_hint(told["text"] if told else message))


def listen(breaks: BreakHandler, recompiles: RecompileHandler) -> List[Callable[[], None]]:
    """Let the handlers hear Dynamo; returns what undoes it."""
    undo = _listen(_BREAKS, breaks) + _listen(_RECOMPILES, recompiles)
    return undo + _recompiles_on()


def _listen(names: Tuple[str, ...], handler: logging.Handler) -> List[Callable[[], None]]:
    """Let `handler` hear these loggers; returns what undoes it."""
    undo: List[Callable[[], None]] = []
    for logger in map(logging.getLogger, names):
        undo.append(functools.partial(_unlisten, logger, handler, logger.level, logger.propagate))
        wanted = logger.isEnabledFor(logging.DEBUG)
        logger.addHandler(handler)
        if not wanted:
            logger.setLevel(logging.DEBUG)
            logger.propagate = False  # nobody asked for this log: we read it, it is not printed
    return undo


def _unlisten(logger: logging.Logger, handler: logging.Handler, level: int, propagate: bool):
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


def _recompiles_on() -> List[Callable[[], None]]:
    """Dynamo writes its log of recompilations only where torch's own list of logs names it."""
    try:
        from torch._logging._internal import log_state

        names = log_state.artifact_names
        if "recompiles" in names:
            return []
        names.add("recompiles")
        return [functools.partial(names.discard, "recompiles")]
    except (ImportError, AttributeError):
        return []  # another torch: the metrics' own reason stays


def one_line(text: str) -> str:
    """The text without line breaks and runs of blanks, cut at 400 characters."""
    return " ".join(text.split())[:400]
