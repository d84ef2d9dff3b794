# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Where a training step's GPU time goes: a profiler trace, summed by kind of work."""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from typing import Dict, Iterable, List, Tuple

LOSS_RANGE = "loss of the head"  # the name of the range that train_worker puts around the loss
KINDS = (
    "base GEMMs",
    "LoRA",
    "loss",
    "attention",
    "dequantize",
    "norms, elementwise, optimizer",
    "copies",
)
# A matrix product with a side this short is an adapter's: ranks are far below any hidden size.
LONGEST_LORA_SIDE = 64
_DEQUANTIZE = re.compile("dequant", re.IGNORECASE)
_ATTENTION = re.compile("flash|fmha|attention|sdpa|cudnn", re.IGNORECASE)
_LORA = re.compile("lora", re.IGNORECASE)
_PRODUCT = re.compile("gemm|nvjet|cutlass|xmma|splitKreduce|gemv", re.IGNORECASE)
_PRODUCT_OPS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
_COPY = re.compile("copy_kernel|CatArray", re.IGNORECASE)
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}


def classify(event: dict, op: dict, in_loss: bool) -> str:
    """The kind of work of an event on the GPU. op: the operator that launched it, or {}."""
    name = event["name"]
    if event["cat"] != "kernel":
        return "copies"
    if in_loss:
        return "loss"
    if _DEQUANTIZE.search(name):
        return "dequantize"
    if _ATTENTION.search(name):
        return "attention"
    if _LORA.search(name):
        return "LoRA"
    if op.get("name") in _PRODUCT_OPS or _PRODUCT.search(name):
        shortest = min(_sides(op), default = LONGEST_LORA_SIDE + 1)
        return "LoRA" if shortest <= LONGEST_LORA_SIDE else "base GEMMs"
    return "copies" if _COPY.search(name) else "norms, elementwise, optimizer"


def _sides(op: dict) -> Iterable[int]:
    """Lengths of the sides of the matrices that an operator multiplies."""
    for shape in op.get("args", {}).get("Input Dims", ()):
        if len(shape) >= 2 and all(isinstance(side, int) for side in shape):
            yield from shape[-2:]


def _loss_ranges(events: List[dict]) -> Dict[object, List[Tuple[float, float]]]:
    """thread -> [start, end] of each call of the loss, in order."""
    ranges = defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] == LOSS_RANGE:
            ranges[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    return {thread: sorted(spans) for thread, spans in ranges.items()}


def _inside(spans: List[Tuple[float, float]], moment: float) -> bool:
    place = bisect.bisect_right(spans, (moment, float("inf"))) - 1
    return place >= 0 and spans[place][0] <= moment <= spans[place][1]


def _union(spans: Iterable[Tuple[float, float]]) -> List[Tuple[float, float]]:
    merged: List[Tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _length(spans: Iterable[Tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def breakdown(events: List[dict], steps: int) -> dict:
    """Milliseconds a step from a Chrome trace of ``steps`` steps.

    Returns {ms: kind -> milliseconds in which it ran, busy_ms: in which anything ran,
    hidden_copies_ms: copies that ran beside other work and so cost no time of their own,
    top: the longest kernels of each kind, for a reader to judge the sorting}.
    """
    ops = {e["args"]["External id"]: e for e in events if e.get("cat") == "cpu_op"}
    launches = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})
    }
    ranges = _loss_ranges(events)
    spans, top = defaultdict(list), defaultdict(lambda: defaultdict(float))
    for event in events:
        if event.get("cat") not in _ON_GPU:
            continue
        launch = launches.get(event["args"].get("correlation"), {})
        in_loss = _inside(ranges.get(launch.get("tid"), []), launch.get("ts", -1.0))
        kind = classify(event, ops.get(event["args"].get("External id"), {}), in_loss)
        spans[kind].append((event["ts"], event["ts"] + event["dur"]))
        top[kind][event["name"][:90]] += event["dur"] / 1e3 / steps
    work = _union(span for kind in KINDS if kind != "copies" for span in spans[kind])
    everything = _length(_union([*work, *spans["copies"]]))
    copies = _length(_union(spans["copies"]))
    seen_copies = everything - _length(work)
    to_ms = 1 / 1e3 / steps  # a trace counts microseconds
    ms = {kind: _length(spans[kind]) * to_ms for kind in KINDS}
    ms["copies"] = seen_copies * to_ms
    return {
        "steps": steps,
        "ms": ms,
        "busy_ms": everything * to_ms,
        "hidden_copies_ms": (copies - seen_copies) * to_ms,
        "top": {
            kind: dict(sorted(names.items(), key = lambda item: -item[1])[:6])
            for kind, names in top.items()
        },
    }
