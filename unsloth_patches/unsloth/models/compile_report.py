# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""CompileReport: what of a training run was compiled, what was not and why, and what it cost."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from .compile_events import Compilation, CompileEvents
from .compile_modes import BlockRegion, fullgraph_mode, layers_by_state, watched_regions
from .compile_strict import loss_state
from .compile_table import table

__all__ = ["CompileReport", "batch_tokens", "save"]

FILE_NAME = "compile_report.json"


class CompileReport:
    """Records a training run and sums it up.

        with CompileReport(model) as report:
            for batch in batches:
                train_step(batch)
                report.step(tokens = batch["input_ids"].numel())
        print(report.table())
        report.save("outputs")

    model: the model that is trained; without it the report cannot say how many layers are compiled.
    Nothing is printed while it records. Entering it twice raises RuntimeError, and so does a
    summary before it was entered.
    """

    def __init__(self, model: Optional[torch.nn.Module] = None):
        self.model = model
        self.clock = StepClock()
        self._events: Optional[CompileEvents] = None

    def __enter__(self) -> "CompileReport":
        if self._events is not None:
            raise RuntimeError("CompileReport: it records already, or has; make a new one.")
        self._events = CompileEvents()
        self._memory_before, self._graphs_before = memory_peaks(), step_graphs(self.model)
        self._calls_before = {
            id(r): (r.compiled_calls, Counter(r.outside)) for r in watched_regions()
        }
        self._events.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._events.stop()

    def step(self, tokens: Any = None) -> None:
        """An optimizer step ended. tokens: of all its micro-batches, for the tokens a second."""
        if tokens is not None:
            self.clock.add(tokens)
        self.clock.step(compiled = bool(self._events.drain()))

    def summary(self) -> Dict[str, Any]:
        """Everything recorded so far, ready for JSON; memory in bytes, times in seconds."""
        if self._events is None:
            raise RuntimeError(
                "CompileReport: nothing was recorded; use it as a context manager around training."
            )
        events = self._events
        if events.running:
            events.drain()
        return {
            "mode": fullgraph_mode(),
            "versions": {
                "torch": torch.__version__,
                "triton": getattr(sys.modules.get("triton"), "__version__", "none"),
            },
            "regions": self._regions(),
            "loss": loss_state(),
            "graphs": events.graphs,
            "graph_breaks": events.break_count,
            "breaks": [
                {"where": str(b.place), "why": b.reason, "hint": b.hint, "count": count}
                for b, count in sorted(events.breaks.items(), key = lambda item: -item[1])
            ],
            "recompilations": len(events.recompilations),
            "recompiled": _grouped(events.recompilations, lambda c: c.recompile_reason),
            "failed": _grouped([c for c in events.compilations if c.failure], lambda c: c.failure),
            "compile_seconds": {
                "total": events.seconds(),
                "cached": events.seconds(cached = True),
                "cold": events.seconds(cached = False),
            },
            "step_graphs": step_graphs(self.model, self._graphs_before),
            "memory": self._memory(),
            "speed": self.clock.figures(),
        }

    def _regions(self) -> List[Dict[str, Any]]:
        return [self._region(region) for region in watched_regions(self.model)]

    def _region(self, region: BlockRegion) -> Dict[str, Any]:
        compiled, outside = self._calls_before.get(id(region), (0, Counter()))
        return {
            "region": region.name,
            "fullgraph": region.mode == "strict",
            "layers": layers_by_state(self.model, region) if self.model is not None else {},
            "compiled_calls": region.compiled_calls - compiled,
            "uncompiled_calls": dict(Counter(region.outside) - outside),
            "failures": [
                {"where": str(f.place), "why": f.reason, "hint": f.hint} for f in region.failures
            ],
        }

    def _memory(self) -> Dict[str, Any]:
        peaks = memory_peaks()
        # A peak that training did not raise is the model's loading: an upper bound, and said so.
        raised = {f"{k}_in_training": v > self._memory_before.get(k, 0) for k, v in peaks.items()}
        return {**peaks, **raised}

    def table(self) -> str:
        """The summary as lines of plain text."""
        return table([self.summary()])

    def save(self, folder: Union[str, os.PathLike]) -> Path:
        """Write ``compile_report.json`` into `folder`, making it. Raises OSError naming it."""
        return save([self.summary()], folder)


def save(summaries: List[Dict[str, Any]], folder: Union[str, os.PathLike]) -> Path:
    """Write the ranks' summaries into `folder`; returns the file. Raises OSError naming it.

    The file is whole: where the disk does not take it, an earlier one stays.
    """
    path = Path(folder) / FILE_NAME
    partial = path.with_name(f".{FILE_NAME}.part")
    try:
        path.parent.mkdir(parents = True, exist_ok = True)
        partial.write_text(json.dumps({"ranks": summaries}, indent = 1) + "\n", encoding = "utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(
            f"the compile report cannot be written to {path} ({error.strerror or error}); "
            "make output_dir writable"
        ) from error
    return path


def _grouped(compilations: List[Compilation], reason: Any) -> List[Dict[str, Any]]:
    # Upstream's wrapper of a block's forward is called `gated` in Dynamo's metrics.
    names = {region.place: region.name for region in watched_regions()}
    counted = Counter((names.get(c.place, c.frame), str(c.place), reason(c)) for c in compilations)
    return [
        {"frame": frame, "where": where, "why": why, "count": count}
        for (frame, where, why), count in counted.most_common()
    ]


class StepClock:
    """Times whole optimizer steps, from the end of one to the end of the next.

    Warm-up does not count: the first step, steps in which something compiled, and steps with an
    evaluation or a checkpoint in them. On a GPU the host runs ahead of the work by less than a
    step, so a sum over many steps is exact to one part in their number.
    """

    def __init__(self):
        self._warm: List[Tuple[float, Any]] = []  # seconds and tokens of each warm step
        self._steps, self._tokens = 0, 0
        self._last: Optional[float] = None
        self._interrupted = False

    def add(self, tokens: Any) -> None:
        """A micro-batch's tokens; tensors stay on their device and are not waited for."""
        self._tokens = self._tokens + tokens

    def interrupted(self) -> None:
        """Something other than training takes place in this step."""
        self._interrupted = True

    def step(self, compiled: bool) -> None:
        """A step ended; `compiled`: something was compiled in it."""
        now = time.perf_counter()
        if self._last is not None and not (compiled or self._interrupted):
            self._warm.append((now - self._last, self._tokens))
        self._steps += 1
        self._last, self._tokens, self._interrupted = now, 0, False

    def figures(self) -> Dict[str, float]:
        """{steps, warm_steps, seconds, tokens, tokens_per_second}: all but the first of warm steps
        only, and the last only where there are any."""
        seconds = sum(seconds for seconds, _ in self._warm)
        tokens = float(sum(tokens for _, tokens in self._warm))
        found = {"steps": self._steps, "warm_steps": len(self._warm)}
        found.update(seconds = seconds, tokens = tokens)
        if seconds > 0 and tokens > 0:
            found["tokens_per_second"] = tokens / seconds
        return found


def batch_tokens(args: tuple, kwargs: Dict[str, Any]) -> Any:
    """The tokens that are no padding of a model call with these arguments; 0 where it cannot be told."""
    lengths, mask = kwargs.get("packed_seq_lengths"), kwargs.get("attention_mask")
    ids = kwargs.get("input_ids", args[0] if args and torch.is_tensor(args[0]) else None)
    if torch.is_tensor(lengths):
        return lengths.sum()
    if torch.is_tensor(mask) and mask.dim() == 2:
        return mask.sum()
    return ids.numel() if torch.is_tensor(ids) and ids.dim() == 2 else 0


def step_graphs(model: Optional[torch.nn.Module], before: Optional[dict] = None) -> Dict[str, Any]:
    """What step graphs replayed of the model's micro-batches, since ``before``; {} without any."""
    graphs = sys.modules.get(f"{__package__}.step_graphs")  # a patch of its own
    found = graphs.summary(model) if graphs is not None and model is not None else {}
    if found and before:
        reasons = Counter(found["reasons"]) - Counter(before["reasons"])
        replayed = found["replayed"] - before["replayed"]
        share = replayed / max(1, replayed + sum(reasons.values()))
        found.update(replayed = replayed, share = share, reasons = dict(reasons))
    return found


def memory_peaks() -> Dict[str, int]:
    """{allocated, reserved}: the process's peaks in bytes on the current GPU; empty without one.

    The peaks are read, never reset: a script that prints them itself still sees its own.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }
