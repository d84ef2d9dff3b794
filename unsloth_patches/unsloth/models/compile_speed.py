# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Tokens a second without warm-up, model FLOP utilisation and peak memory of a training run."""

from __future__ import annotations

import time
from typing import Any, Dict, List, NamedTuple, Optional

import torch

__all__ = ["StepClock", "Work", "batch_work", "memory_peaks", "model_flops", "peak_tflops"]


class Work(NamedTuple):
    """Tokens that are no padding, and their causal (query, key) pairs; ints or 0-d tensors."""

    tokens: Any = 0
    pairs: Any = 0


class _Interval(NamedTuple):
    seconds: float
    work: Work
    warm: bool


class StepClock:
    """Times whole optimizer steps, from the end of one to the end of the next.

    Warm-up does not count: the first step, steps in which something compiled, and steps with an
    evaluation or a checkpoint in them. On a GPU the host runs ahead of the work by less than a
    step, so a sum over many steps is exact to one part in their number.
    """

    def __init__(self):
        self.intervals: List[_Interval] = []
        self._work = Work()
        self._last: Optional[float] = None
        self._interrupted = False

    def add(self, work: Work) -> None:
        """A micro-batch's work; tensors stay on their device and are not waited for."""
        self._work = Work(self._work.tokens + work.tokens, self._work.pairs + work.pairs)

    def interrupted(self) -> None:
        """Something other than training takes place in this step."""
        self._interrupted = True

    def step(self, compiled: bool) -> None:
        """A step ended; `compiled`: something was compiled in it."""
        now = time.perf_counter()
        if self._last is not None:
            warm = not compiled and not self._interrupted
            self.intervals.append(_Interval(now - self._last, self._work, warm))
        self._last, self._work, self._interrupted = now, Work(), False

    def figures(self) -> Dict[str, float]:
        """{steps, warm_steps, seconds, tokens, pairs, tokens_per_second}: all but the first of warm
        steps only, and the last only where there are any."""
        warm = [i for i in self.intervals if i.warm]
        seconds = sum(i.seconds for i in warm)
        tokens = float(sum(i.work.tokens for i in warm))
        found = {"steps": len(self.intervals) + (self._last is not None), "warm_steps": len(warm)}
        found.update(seconds = seconds, tokens = tokens)
        found["pairs"] = float(sum(i.work.pairs for i in warm))
        if seconds > 0 and tokens > 0:
            found["tokens_per_second"] = tokens / seconds
        return found


def batch_work(args: tuple, kwargs: Dict[str, Any]) -> Work:
    """The work of a model call with these arguments; Work() where it cannot be told."""
    lengths, mask = kwargs.get("packed_seq_lengths"), kwargs.get("attention_mask")
    tokens = kwargs.get("input_ids", args[0] if args and torch.is_tensor(args[0]) else None)
    if not torch.is_tensor(lengths) and torch.is_tensor(mask) and mask.dim() == 2:
        lengths = mask.sum(-1)
    if torch.is_tensor(lengths):
        lengths = lengths.to(torch.int64)
        return Work(lengths.sum(), (lengths * (lengths + 1) // 2).sum())
    if torch.is_tensor(tokens) and tokens.dim() == 2:
        rows, length = tokens.shape
        return Work(rows * length, rows * (length * (length + 1) // 2))
    return Work()


def model_flops(model: torch.nn.Module, work: Work) -> Optional[float]:
    """FLOPs that training on `work` needs, as Unsloth's own MFU log counts them: every linear
    layer's forward and input gradient, weight gradients of what is trained, causal attention;
    recomputation under checkpointing is left out. None where Unsloth has no such count.
    """
    try:
        from unsloth.utils.mfu import count_attention_flops_per_pair, count_linear_flops_per_token
    except ImportError:
        return None
    linear = count_linear_flops_per_token(model, False)[0] * work.tokens
    config = getattr(model, "config", None)
    return float(linear + count_attention_flops_per_pair(config, False) * work.pairs)


def peak_tflops(model: torch.nn.Module, bf16: bool, fp16: bool) -> Optional[float]:
    """The vendor's dense 16-bit peak of the model's GPU in TFLOP/s, from the table in Unsloth's
    utils/mfu.py (datasheets; UNSLOTH_PEAK_TFLOPS overrides it); None where it is unknown.
    """
    try:
        from unsloth.utils.mfu import get_peak_tflops
    except ImportError:
        return None
    dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    return None if device is None else get_peak_tflops(device.index, dtype)


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
