# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Collects what torch.compile did: compilations, recompilations, graph breaks, and their reasons.

Sources, all read and none changed for others: Dynamo's compilation metrics (it keeps only the last
64, so they are drained every step and the limit is raised meanwhile) and its ``graph_breaks`` and
``recompiles`` logs, which Unsloth silences; handlers of our own read them and nothing is printed.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from .compile_failures import Place, last_frame, one_line, reason_and_hint

__all__ = ["Compilation", "CompileEvents", "GraphBreak"]

_BREAKS = (
    "torch._dynamo.symbolic_convert.__graph_breaks",
    "torch._dynamo.convert_frame.__graph_breaks",
)
_RECOMPILES = ("torch._dynamo.guards.__recompiles",)
_IN_USER_CODE = re.compile(r"in user code at (?P<file>.+):(?P<line>\d+)\s*\n")
_REASON = re.compile(
    r"Graph Break Reason:\s*(?P<text>.*?)(?:\n\s*\n\s*For more|\n\nUser code|\Z)", re.S
)
_RECOMPILED = re.compile(r"Recompiling function \S+ in (?P<file>.+):(?P<line>\d+)\s*\n")
_GUARD = re.compile(r"(?m)^\s*- (?P<text>\d+/\d+: .+)$")
_METRICS_KEPT = 4096  # between two drains; 126 layers that all recompile make some 500


class GraphBreak(NamedTuple):
    """A graph that ended early: where, why in torch's words, and torch's hint if it gave one."""

    place: Place
    reason: str
    hint: str


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
    place = Place(where["file"], int(where["line"])) if where else last_frame(message)
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
        undo.append(functools.partial(logger.removeHandler, handler))
        undo.append(functools.partial(logger.setLevel, logger.level))
        undo.append(functools.partial(setattr, logger, "propagate", logger.propagate))
        wanted = logger.isEnabledFor(logging.DEBUG)
        logger.addHandler(handler)
        if not wanted:
            logger.setLevel(logging.DEBUG)
            logger.propagate = False  # nobody asked for this log: we read it, it is not printed
    return undo


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


@dataclass(frozen = True)
class Compilation:
    """One entry of Dynamo's compilation metrics.

    part: ``forward``, ``backward`` (compiled at its first call) or ``runtime`` (autotuning).
    seconds: wall time. cached: the code came from a cache on disk; None where torch does not say.
    failure: why it gave no compiled code, empty if it did.
    """

    frame: str
    place: Place
    part: str
    seconds: float
    cached: Optional[bool]
    recompile_reason: str
    failure: str


def _total_graphs() -> int:
    from torch._dynamo.utils import counters
    return counters["stats"]["unique_graphs"] if "stats" in counters else 0


def _total_breaks() -> int:
    from torch._dynamo.utils import counters
    return sum(counters["graph_break"].values()) if "graph_break" in counters else 0


class _Tally:
    """How much a counter of Dynamo's grew, also where somebody resets it between two looks."""

    def __init__(self, read: Callable[[], int]):
        self._read, self._last, self.total = read, read(), 0

    def look(self) -> None:
        now = self._read()
        self.total += now - self._last if now >= self._last else now
        self._last = now


@dataclass
class CompileEvents:
    """Records torch.compile's events of this process between ``start`` and ``stop``.

    compilations: in the order in which they ended. breaks: GraphBreak -> how often.
    """

    compilations: List[Compilation] = field(default_factory = list)
    breaks: Dict[GraphBreak, int] = field(default_factory = dict)
    running: bool = False

    def start(self) -> None:
        """Begin to record. Raises RuntimeError if it records already."""
        from torch._dynamo import utils

        if self.running:
            raise RuntimeError("CompileEvents.start: it records already; call stop first.")
        kept = getattr(utils, "_compilation_metrics", None)
        self._limit = getattr(kept, "maxlen", None) or 64
        self._last = (utils.get_compilation_metrics() or [None])[-1]
        self._graphs, self._breaks = _Tally(_total_graphs), _Tally(_total_breaks)
        self._recompiles = RecompileHandler()
        self._restore = listen(BreakHandler(self.breaks), self._recompiles)
        self.running = True
        utils.set_compilation_metrics_limit(max(self._limit, _METRICS_KEPT))

    def drain(self) -> List[Compilation]:
        """Compilations that ended since the last call; ``compilations`` gets them too."""
        from torch._dynamo.utils import get_compilation_metrics

        self._graphs.look()
        self._breaks.look()
        fresh = []
        for entry in reversed(get_compilation_metrics()):
            if entry is self._last:
                break
            fresh.append(entry)
        if fresh:
            self._last = fresh[0]
        found = [_compilation(entry, self._recompiles) for entry in reversed(fresh)]
        self.compilations += found
        return found

    def stop(self) -> None:
        """Take the last events and give torch back its logger levels and its limit."""
        from torch._dynamo.utils import set_compilation_metrics_limit

        if not self.running:
            return
        self.running = False
        try:
            self.drain()
        finally:
            for undo in self._restore:
                undo()
            set_compilation_metrics_limit(self._limit)

    @property
    def graphs(self) -> int:
        """Graphs that reached the backend up to the last drain, counted by Dynamo itself."""
        return self._graphs.total

    @property
    def break_count(self) -> int:
        """Graph breaks: Dynamo's own count, or the log's where that was reset in between."""
        return max(self._breaks.total, sum(self.breaks.values()))

    @property
    def recompilations(self) -> List[Compilation]:
        return [c for c in self.compilations if c.recompile_reason]

    def seconds(self, cached: Optional[bool] = None) -> float:
        """Wall seconds in the compiler; with ``cached`` only those with (without) a disk cache."""
        chosen = self.compilations
        if cached is not None:
            chosen = [c for c in chosen if bool(c.cached) == cached]
        return sum(c.seconds for c in chosen)


def _compilation(entry: Any, recompiles: RecompileHandler) -> Compilation:
    known = lambda name: getattr(entry, name, None)
    part = "forward"
    if known("is_runtime"):
        part = "runtime"
    elif known("is_forward") is False or known("co_name") is None:
        part = "backward"
    place = Place(known("co_filename") or "", known("co_firstlineno") or 0)
    reason = one_line(known("recompile_reason") or "")
    failure = ""
    if known("fail_type"):
        failure = f"{known('fail_type')}: {reason_and_hint(known('fail_reason') or '')[0]}"
    return Compilation(
        frame = known("co_name") or str(known("compile_id") or "?"),
        place = place,
        part = part,
        seconds = (known("duration_us") or 0) / 1e6,
        cached = _from_cache(known),
        recompile_reason = (recompiles.take(place) or reason) if reason else "",
        failure = failure,
    )


def _from_cache(known: Any) -> Optional[bool]:
    kinds = ("aotautograd_local_cache", "inductor_fx_local_cache")
    hits = sum(known(f"{kind}_hit_count") or 0 for kind in kinds)
    misses = sum(known(f"{kind}_miss_count") or 0 for kind in kinds)
    return None if not hits + misses else hits > 0 and not misses
