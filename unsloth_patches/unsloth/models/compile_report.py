# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""CompileReport: what of a training run was compiled, what was not and why, and what it cost."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Union

import torch

from .compile_events import CompileEvents, Compilation, compiler_version
from .compile_modes import BlockRegion, fullgraph_mode, layers_by_state, regions_of
from .compile_speed import StepClock, Work, memory_peaks, model_flops, peak_tflops
from .compile_table import table

__all__ = ["CompileReport", "blocks_uncompiled", "loss_state"]

FILE_NAME = "compile_report.json"


class CompileReport:
    """Records a training run and sums it up.

        with CompileReport(model) as report:
            for batch in batches:
                train_step(batch)
                report.step(tokens = batch["input_ids"].numel())
        print(report.table())
        report.save("outputs")

    model: the model that is trained; without it the report cannot say how many layers are compiled,
        nor the FLOP utilisation. bf16, fp16: the training's precision, for the peak of the device.
    Nothing is printed while it records. Entering it twice raises RuntimeError, and so does a
    summary before it was entered.
    """

    def __init__(
        self,
        model: Optional[torch.nn.Module] = None,
        bf16: bool = False,
        fp16: bool = False,
    ):
        self.model = model
        self.clock = StepClock()
        self.eager_loss: Optional[Dict[str, Any]] = None
        self._precision = {"bf16": bf16, "fp16": fp16}
        self._events: Optional[CompileEvents] = None

    def __enter__(self) -> "CompileReport":
        if self._events is not None:
            raise RuntimeError("CompileReport: it records already, or has; make a new one.")
        self._events = CompileEvents()
        self._memory_before = memory_peaks()
        self._calls_before = {id(r): (r.compiled_calls, Counter(r.outside)) for r in regions_of()}
        self._events.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._events.stop()

    def step(self, tokens: Any = None) -> None:
        """An optimizer step ended. tokens: of all its micro-batches, for the tokens a second."""
        if tokens is not None:
            self.clock.add(Work(tokens))
        self.clock.step(compiled = bool(self._events.drain()))

    # --- summing up ------------------------------------------------------------------------------

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
            "versions": compiler_version(),
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
            "memory": self._memory(),
            "speed": self._speed(),
            "eager_loss": self.eager_loss,
        }

    def _regions(self) -> List[Dict[str, Any]]:
        return [self._region(region) for region in regions_of(self.model)]

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

    def _speed(self) -> Dict[str, Any]:
        found: Dict[str, Any] = dict(self.clock.figures())
        if self.model is None or "tokens_per_second" not in found:
            return found
        flops = model_flops(self.model, Work(found["tokens"], found["pairs"]))
        peak = peak_tflops(self.model, **self._precision)
        if flops:
            found["model_tflops"] = flops / found["seconds"] / 1e12
        if flops and peak:
            found["peak_tflops"] = peak
            found["mfu"] = found["model_tflops"] / peak
        return found

    def table(self) -> str:
        """The summary as lines of plain text."""
        return table([self.summary()])

    def save(self, folder: Union[str, os.PathLike]) -> Path:
        """Write ``compile_report.json`` into `folder`, making it. Raises OSError naming it."""
        return save([self.summary()], folder)

    # --- the loss beside eager -----------------------------------------------------------------

    def compare_with_eager(self, batch: Dict[str, Any]) -> Dict[str, float]:
        """The loss of `batch` (the model's keyword arguments) with compiled and with eager blocks.

        Returns and keeps {compiled, eager, relative_difference}. The model is in training mode for
        it; that, the random state and the layers are as before afterwards, and no gradient is
        computed. Raises ValueError without a model, if the model returns no loss, and if no block
        of it runs compiled.
        """
        if self.model is None:
            raise ValueError("CompileReport: compare_with_eager needs CompileReport(model).")
        with _probing(self.model):
            before = sum(region.entered for region in regions_of(self.model))
            losses = {"compiled": self._probe_loss(batch)}
            if sum(region.entered for region in regions_of(self.model)) == before:
                raise ValueError("CompileReport: no block ran compiled: nothing to compare.")
            with blocks_uncompiled(self.model):
                losses["eager"] = self._probe_loss(batch)
        gap = abs(losses["compiled"] - losses["eager"]) / max(abs(losses["eager"]), 1e-30)
        self.eager_loss = {**losses, "relative_difference": gap}
        return self.eager_loss

    def _probe_loss(self, batch: Dict[str, Any]) -> float:
        devices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices = sorted(devices)), torch.enable_grad():
            loss = getattr(self.model(**batch), "loss", None)
        if loss is None:
            raise ValueError("CompileReport: the probe batch gives no loss; it needs labels.")
        return float(loss.detach())


def save(summaries: List[Dict[str, Any]], folder: Union[str, os.PathLike]) -> Path:
    """Write the ranks' summaries into `folder`; returns the file. Raises OSError naming it."""
    path = Path(folder) / FILE_NAME
    try:
        path.parent.mkdir(parents = True, exist_ok = True)
        path.write_text(json.dumps({"ranks": summaries}, indent = 1) + "\n", encoding = "utf-8")
    except OSError as error:
        raise OSError(
            f"the compile report cannot be written to {path} ({error.strerror or error}); "
            "make output_dir writable"
        ) from error
    return path


@contextlib.contextmanager
def blocks_uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Run the model's decoder blocks eagerly inside the block, uncounted; then all is as before."""
    regions = regions_of(model)
    classes = {region.layer_class for region in regions}
    layers = [module for module in model.modules() if type(module) in classes]
    states = [layer.__dict__.get("_unsloth_block_mode") for layer in layers]
    stricts = [region.mode for region in regions]
    for layer in layers:
        layer.__dict__["_unsloth_block_mode"] = 0
    for region in regions:
        region.mode = "auto"
    try:
        with _counts_kept(model):
            yield
    finally:
        for region, mode in zip(regions, stricts):
            region.mode = mode
        for layer, state in zip(layers, states):
            if state is None:
                layer.__dict__.pop("_unsloth_block_mode", None)
            else:
                layer.__dict__["_unsloth_block_mode"] = state


@contextlib.contextmanager
def _counts_kept(model: torch.nn.Module) -> Iterator[None]:
    """What runs inside is no training: its calls are not counted."""
    counts = [(r, r.compiled_calls, Counter(r.outside)) for r in regions_of(model)]
    try:
        yield
    finally:
        for region, compiled, outside in counts:
            region.compiled_calls, region.outside = compiled, outside


@contextlib.contextmanager
def _probing(model: torch.nn.Module) -> Iterator[None]:
    """Training mode, in which alone blocks compile; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with _counts_kept(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def loss_state() -> str:
    """How the loss ran: by hand-written kernels, compiled by upstream, or demoted by it."""
    calls = _fused_loss_calls()
    if calls and not any(name.startswith("stock") for name in calls):
        return "hand-written kernels, nothing to compile"
    zoo = sys.modules.get("unsloth_zoo.fused_losses.cross_entropy_loss")
    compiled = getattr(zoo, "_FUSED_CE_COMPILE_SUPPORTED", None)
    names = {True: "compiled with fullgraph = True", False: "demoted to eager: it does not compile"}
    return names.get(compiled, "not seen")


def _fused_loss_calls() -> Dict[str, int]:
    try:
        from unsloth.fused_loss import calls
    except ImportError:
        return {}
    return {name: count for name, count in calls().items() if count}


def _grouped(compilations: List[Compilation], reason: Any) -> List[Dict[str, Any]]:
    # Upstream's wrapper of a block's forward is called `gated` in Dynamo's metrics.
    names = {region.place: region.name for region in regions_of()}
    counted = Counter((names.get(c.place, c.frame), str(c.place), reason(c)) for c in compilations)
    return [
        {"frame": frame, "where": where, "why": why, "count": count}
        for (frame, where, why), count in counted.most_common()
    ]
