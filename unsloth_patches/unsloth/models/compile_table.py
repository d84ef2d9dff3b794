# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The compile report as plain text: what a user reads after training."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Tuple

__all__ = ["table"]

_FIRST_OF_MANY = 5  # of one kind; the JSON has them all
_WIDTH = 22
GIB = 2**30


def table(summaries: List[Dict[str, Any]]) -> str:
    """One line a fact: those of rank 0, the first summary; other ranks where they differ."""
    own = summaries[0]
    if "error" in own:
        return f"Unsloth: no compile report ({own['error']})"
    lines = [f"{name:<{_WIDTH}}{text}" for name, text in _rows(own)]
    title = f"Unsloth: what was compiled (mode {own['mode']}, torch {own['versions']['torch']})"
    return "\n".join([title, *("  " + line for line in lines + list(_other_ranks(summaries)))])


def _rows(summary: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    if not summary["regions"]:
        yield "decoder blocks", "none is set up for compiling"
    for region in summary["regions"]:
        yield from _region_rows(region)
    yield "loss", summary["loss"]
    yield "graphs, breaks", f"{summary['graphs']} graphs, {summary['graph_breaks']} graph breaks"
    yield from _several("graph break", [_told(b) for b in summary["breaks"]])
    yield "recompilations", str(summary["recompilations"])
    yield from _several("recompiled", [_told(r) for r in summary["recompiled"]])
    yield from _several("did not compile", [_told(f) for f in summary["failed"]])
    seconds = summary["compile_seconds"]
    split = f" ({seconds['cold']:.1f} cold, {seconds['cached']:.1f} from a cache)"
    yield "compiling", f"{seconds['total']:.1f} s{split if seconds['cached'] else ''}"
    yield from _step_graph_rows(summary["step_graphs"])
    yield from _memory_rows(summary["memory"])
    yield from _speed_rows(summary["speed"])


def _region_rows(region: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    layers = ", ".join(f"{count} {state}" for state, count in region["layers"].items())
    graph = " with fullgraph = True" if region["fullgraph"] else ""
    calls = f"{region['compiled_calls']} training calls compiled{graph}"
    yield region["region"], f"{layers}; {calls}" if layers else calls
    for reason, count in region["uncompiled_calls"].items():
        yield "", f"{count} calls not compiled: {reason}"
    yield from _several("did not compile", [_told(f) for f in region["failures"]])


def _told(entry: Dict[str, Any]) -> str:
    times = f" ({entry['count']} times)" if entry.get("count", 1) > 1 else ""
    frame = f"{entry['frame']}, " if entry.get("frame") else ""
    hint = f"; hint: {entry['hint']}" if entry.get("hint") else ""
    return f"{frame}{entry['where']}: {entry['why']}{times}{hint}"


def _several(name: str, texts: List[str]) -> Iterator[Tuple[str, str]]:
    for text in texts[:_FIRST_OF_MANY]:
        yield name, text
    if len(texts) > _FIRST_OF_MANY:
        yield "", f"and {len(texts) - _FIRST_OF_MANY} more, all in the JSON file"


def _step_graph_rows(found: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    if not found:
        return
    text = f"{found['share']:.0%} of micro-batches replayed ({found['replayed']}), "
    text += f"{len(found['buckets'])} buckets, pool {found['pool_bytes'] / 2**20:.0f} MiB, "
    yield "step graphs", text + f"{found['padding']:.0%} padding"
    for reason, count in found["reasons"].items():
        yield "", f"{count} not replayed: {reason}"
    for change, count in found["changes"].items():
        yield "", f"dropped {count} times: {change}"


def _memory_rows(memory: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    if not memory:
        return
    parts = []
    for kind in ("allocated", "reserved"):
        bound = "" if memory[f"{kind}_in_training"] else "at most "
        parts.append(f"{bound}{memory[kind] / GIB:.2f} GiB {kind}")
    yield "peak memory", ", ".join(parts)


def _speed_rows(speed: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    if not speed["steps"]:
        yield "speed", "no training step was recorded"
    elif "tokens_per_second" not in speed:
        yield "speed", f"no step of {speed['steps']} ran without compiling"
    else:
        steps = f"{speed['warm_steps']} of {speed['steps']} steps, warm-up left out"
        yield "speed", f"{speed['tokens_per_second']:.0f} tokens/s ({steps})"


def _other_ranks(summaries: List[Dict[str, Any]]) -> Iterator[str]:
    own = summaries[0]
    for rank, other in enumerate(summaries[1:], 1):
        if "error" in other:
            yield f"{f'rank {rank}':<{_WIDTH}}no report: {other['error']}"
        elif _state(other) != _state(own):
            figures = f"{other['graphs']} graphs, {other['graph_breaks']} graph breaks, "
            figures += f"{other['recompilations']} recompilations"
            yield f"{f'rank {rank} differs':<{_WIDTH}}{figures}"
    if len(summaries) > 1:
        total = max(s["compile_seconds"]["total"] for s in summaries if "error" not in s)
        yield f"{'ranks':<{_WIDTH}}{len(summaries)}; the slowest compiled for {total:.1f} s"


def _state(summary: Dict[str, Any]) -> Tuple:
    demoted = [sorted(region["layers"].items()) for region in summary["regions"]]
    return summary["graphs"], summary["graph_breaks"], summary["recompilations"], demoted
