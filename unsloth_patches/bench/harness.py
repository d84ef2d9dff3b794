# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What every benchmark shares: environment, timing, peak memory, JSON, tables and plots.

Candidates are timed interleaved in one process (each round runs every candidate once, in an order
of its own), so that drift of clock and temperature falls on all of them alike, and none always
follows the same other one: after a power-hungry candidate the next runs at lower clocks.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import platform
import random
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence

_PACKAGES = ("unsloth_patches", "unsloth", "unsloth_zoo", "torch", "triton", "bitsandbytes")
_PACKAGES += ("transformers", "trl", "peft", "liger-kernel", "cut_cross_entropy")
FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU


def _version(package: str) -> Optional[str]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A source tree on PYTHONPATH has no metadata, but may know its version.
        return getattr(sys.modules.get(package), "__version__", None)


def environment(command: Optional[str] = None) -> dict:
    """GPU, versions, date (UTC) and command of this process: the head of every results file.

    command: how to repeat the figures; by default this process's own command line.
    """
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.machine(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec = "seconds"),
        "command": command or " ".join(["python", *sys.argv]),
    }


def slug() -> str:
    """The GPU's short name in file names."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return gpu_slug(torch.cuda.get_device_name())


def gpu_slug(name: str) -> str:
    """``h200`` of "NVIDIA H200": how results files are named."""
    return name.replace("NVIDIA", "").strip().split()[0].lower().replace("-", "_")


def gpu_available(what: str) -> bool:
    """True with a CUDA GPU; otherwise says on stderr that ``what`` cannot run here."""
    import torch

    if torch.cuda.is_available():
        return True
    print(f"bench: {what} needs a CUDA GPU, and torch sees none; not run.", file = sys.stderr)
    return False


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of values, linear between neighbours (as numpy's default)."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Sequence[float]) -> dict:
    """{median, q1, q3, min, n} of samples, in the samples' unit."""
    return {
        "median": quantile(samples, 0.5),
        "q1": quantile(samples, 0.25),
        "q3": quantile(samples, 0.75),
        "min": min(samples),
        "n": len(samples),
    }


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    if not values:
        raise ValueError("geometric_mean: no values.")
    return math.exp(sum(math.log(value) for value in values) / len(values))


def shuffled_rounds(names: Iterable[str], rounds: int) -> Iterator[List[str]]:
    """The names once a round, each round in another random order, the same in every process."""
    order, shuffle = list(names), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        yield list(order)


class _L2Flush:
    """Overwrites the L2 cache, then keeps the GPU busy while the host enqueues what is timed."""

    def __init__(self, flush: bool, lead_cycles: int):
        import torch

        self._torch, self._lead_cycles = torch, lead_cycles
        self._buffer = None
        if flush:
            self._buffer = torch.empty(FLUSH_BYTES // 4, dtype = torch.int32, device = "cuda")

    def __call__(self) -> None:
        if self._buffer is not None:
            self._buffer.zero_()
        if self._lead_cycles:
            self._torch.cuda._sleep(self._lead_cycles)


def measure(
    candidates: Dict[str, Callable[[], object]],
    rounds: int = 100,
    warmup: int = 10,
    flush: bool = True,
    lead_cycles: int = 200_000,
) -> Dict[str, dict]:
    """GPU time of each candidate in microseconds, by CUDA events, interleaved in one process.

    candidates: name -> function of no arguments that enqueues work on the current stream.
    flush: overwrite the L2 cache before every timed call, so that inputs come from memory.
    lead_cycles: GPU clock cycles of idling before every timed call. They let the host enqueue the
        whole call before the GPU reaches it, so host time stays out (`host_time` measures that).
    Returns name -> {median, q1, q3, min, n}. Raises RuntimeError without a CUDA GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("measure: no CUDA GPU here; run the benchmark where torch sees one.")
    prepare = _L2Flush(flush, lead_cycles)
    for function in candidates.values():
        for _ in range(warmup):
            function()
    torch.cuda.synchronize()

    events = {name: [] for name in candidates}
    for round_index, order in enumerate(shuffled_rounds(candidates, rounds)):
        for name in order:
            start = torch.cuda.Event(enable_timing = True)
            stop = torch.cuda.Event(enable_timing = True)
            prepare()
            start.record()
            candidates[name]()
            stop.record()
            events[name].append((start, stop))
        if round_index % 8 == 7:
            torch.cuda.synchronize()  # the queue must never fill up, or the host waits in a launch
    torch.cuda.synchronize()
    return {
        name: summarize([start.elapsed_time(stop) * 1e3 for start, stop in pairs])
        for name, pairs in events.items()
    }


def host_time(
    candidates: Dict[str, Callable[[], object]],
    calls: int = 100,
    rounds: int = 30,
) -> Dict[str, dict]:
    """Host microseconds a call takes to return, interleaved; GPU work is drained between batches.

    Works without a GPU too. ``calls`` times the launches of one call must stay well under the
    queue's 1024 entries, or the figure turns into GPU time.
    """
    import torch

    gpu = torch.cuda.is_available()
    samples = {name: [] for name in candidates}
    for name, function in candidates.items():
        for _ in range(10):
            function()
    for order in shuffled_rounds(candidates, rounds):
        for name in order:
            function = candidates[name]
            if gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            samples[name].append((time.perf_counter() - begin) / calls * 1e6)
    if gpu:
        torch.cuda.synchronize()
    return {name: summarize(values) for name, values in samples.items()}


def wall_time(
    candidates: Dict[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
) -> Dict[str, dict]:
    """Seconds from call to finished GPU work, interleaved: what a user waits for."""
    import torch

    drain = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    samples = {name: [] for name in candidates}
    for function in candidates.values():
        for _ in range(warmup):
            function()
    for order in shuffled_rounds(candidates, rounds):
        for name in order:
            drain()
            begin = time.perf_counter()
            candidates[name]()
            drain()
            samples[name].append(time.perf_counter() - begin)
    return {name: summarize(values) for name, values in samples.items()}


def peak_memory(function: Callable[[], object]) -> dict:
    """{peak_bytes, allocated_bytes}: what a call adds, at its peak and still held after it.

    Both are above what the process held before the call, by torch's CUDA allocator. The call's
    result is alive when allocated_bytes is read. Raises RuntimeError without a CUDA GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("peak_memory: no CUDA GPU here; run it where torch sees one.")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return {"peak_bytes": peak - before, "allocated_bytes": after - before}


def save_json(
    path: Path,
    payload: dict,
    command: Optional[str] = None,
) -> Path:
    """Writes ``{"environment": ..., **payload}`` to path, making its folder; returns path."""
    path = Path(path)
    path.parent.mkdir(parents = True, exist_ok = True)
    document = {"environment": environment(command), **payload}
    path.write_text(json.dumps(document, indent = 1) + "\n", encoding = "utf-8")
    return path


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows under columns; numbers are aligned right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title = title, title_justify = "left")
    for index, column in enumerate(columns):
        table.add_column(column, justify = "left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(_cell, row))
    # A pipe has no width of its own; rich would fold the table at 80 columns.
    console = Console()
    Console(width = None if console.is_terminal else 160).print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


WIDTH = 8  # inches of a picture: a README on GitHub is 830 pixels wide, so 7 points are 10 pixels
COLORS = {
    "ours": "#0f766e",
    "upstream": "#b45309",
    "peer": "#6d28d9",
    "baseline": "#94a3b8",
    "extra": "#be123c",
}


@contextlib.contextmanager
def plot_style():
    """matplotlib with the one look of all result plots, off screen. Yields pyplot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {
        "figure.dpi": 130,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#e2e8f0",
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with plt.rc_context(look):
        yield plt
        plt.close("all")


def draw(bench: str, plot: Callable, *arguments: object) -> None:
    """Calls plot; a picture is no reason to fail where matplotlib is not installed."""
    try:
        plot(*arguments)
    except ImportError:
        print(f"bench {bench}: no matplotlib here; the figures are in the JSON file.")


def grouped_bars(
    axes,
    labels: Sequence[str],
    series: Dict[str, Sequence[float]],
    unit: str,
    colors: Dict[str, str],
    number: str = "{:.2f}",
) -> None:
    """Grouped bars, values above, upright where they are many. series: name -> values;
    colors: name -> key of COLORS."""
    upright = len(labels) * len(series) > 24
    width = 0.84 / len(series)
    for position, (name, values) in enumerate(series.items()):
        places = [i - 0.42 + width * (position + 0.5) for i in range(len(labels))]
        bars = axes.bar(places, values, width * 0.94, color = COLORS[colors[name]], label = name)
        axes.bar_label(
            bars,
            [number.format(v) for v in values],
            fontsize = 7,
            padding = 2,
            rotation = 90 if upright else 0,
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(unit)
    axes.margins(y = 0.36 if upright else 0.2)
    axes.legend(ncols = len(series), loc = "upper left")
