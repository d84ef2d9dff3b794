# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Collects what torch.compile did: compilations, recompilations, graph breaks, and their reasons.

Sources, all read and none changed for others: Dynamo's compilation metrics (it keeps only the last
64, so they are drained every step and the limit is raised meanwhile) and its ``graph_breaks`` and
``recompiles`` logs, which Unsloth silences; handlers of our own read them and nothing is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional

import torch

from .compile_logs import (
    BreakHandler,
    GraphBreak,
    Place,
    RecompileHandler,
    listen,
    one_line,
    reason_and_hint,
)

__all__ = ["Compilation", "CompileEvents", "compiler_version"]

_METRICS_KEPT = 4096  # between two drains; 126 layers that all recompile make some 500


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

    @property
    def is_graph(self) -> bool:
        return self.part == "forward" and not self.failure


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
        utils.set_compilation_metrics_limit(max(self._limit, _METRICS_KEPT))
        self._last = (utils.get_compilation_metrics() or [None])[-1]
        self._graphs, self._breaks = _Tally(_total_graphs), _Tally(_total_breaks)
        self._recompiles = RecompileHandler()
        self._restore = listen(BreakHandler(self.breaks), self._recompiles)
        self.running = True

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


def compiler_version() -> Dict[str, str]:
    """Versions that decide what compiles: torch and, where it is there, triton."""
    found = {"torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found
