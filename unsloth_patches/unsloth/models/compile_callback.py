# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The compile report in SFTTrainer: recorded in silence, one table and one JSON file at the end.

UNSLOTH_COMPILE_REPORT=0 leaves it out, UNSLOTH_COMPILE_REPORT=probe adds the loss of the first
batch with compiled and with eager blocks; UNSLOTH_PATCHES_FULLGRAPH=off leaves out everything.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, Callable, Dict, List, Optional

import torch
from transformers import TrainerCallback

from .compile_modes import VARIABLE, FullgraphError, fullgraph_mode, layers_by_state, regions_of
from .compile_report import CompileReport, loss_state, save
from .compile_speed import batch_work
from .compile_table import table

__all__ = ["CompileReportCallback", "add_compile_report", "replace_backwards_compatible_trainer"]

SWITCH = "UNSLOTH_COMPILE_REPORT"
_CHOICES = ("1", "0", "probe")


def _unharmed(method: Callable) -> Callable:
    """An error of the report ends the report, not the training; strict mode's own error passes."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if self.broken:
            return None
        try:
            return method(self, *args, **kwargs)
        except FullgraphError:
            raise
        except Exception as error:
            self.broken = f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):
                self.close()
            print(f"Unsloth: the compile report stopped ({self.broken}); training goes on.")
            return None

    return guarded


class CompileReportCallback(TrainerCallback):
    """Records one ``train()`` and prints and saves its report when it ends.

    probe: keep the first training batch and compare its loss with that of eager blocks at the end.
    """

    def __init__(self, probe: bool = False):
        self.probe = probe
        self.report: Optional[CompileReport] = None
        self.broken = ""
        self._hook: Any = None
        self._first_batch: Optional[Dict[str, Any]] = None

    def on_train_begin(
        self,
        args,
        state,
        control,
        model = None,
        **kwargs,
    ):
        self.broken = ""  # an earlier train()'s
        self._begin(args, model)

    @_unharmed
    def _begin(self, args, model):
        self.close()  # of an earlier train() that was interrupted
        if fullgraph_mode() == "strict":
            require_compiled_blocks(model)
        self.report = CompileReport(model, bf16 = bool(args.bf16), fp16 = bool(args.fp16))
        self.report.__enter__()
        if model is not None:
            self._hook = model.register_forward_pre_hook(self._count, with_kwargs = True)

    def _count(self, model, args, kwargs):
        try:
            if not model.training or not torch.is_grad_enabled() or self.report is None:
                return
            self.report.clock.add(batch_work(args, kwargs))
            if self.probe and self._first_batch is None and not args:
                self._first_batch = dict(kwargs)
        except Exception as error:
            self.broken = f"{type(error).__name__}: {error}"

    @_unharmed
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if fullgraph_mode() == "strict" and loss_state().startswith("demoted"):
            raise FullgraphError(
                f"Unsloth: the fused loss is not one compiled graph, and {VARIABLE}=strict; "
                "upstream fell back to its eager loss. UNSLOTH_COMPILE_DEBUG=1 shows the error."
            )

    @_unharmed
    def on_step_end(self, args, state, control, **kwargs):
        if self.report is not None:
            self.report.step()

    @_unharmed
    def on_evaluate(self, args, state, control, **kwargs):
        self._interrupted()

    @_unharmed
    def on_save(self, args, state, control, **kwargs):
        self._interrupted()

    def _interrupted(self):
        if self.report is not None:
            self.report.clock.interrupted()

    def on_train_end(self, args, state, control, **kwargs):
        if self.report is None and not self.broken:
            return
        try:
            # Collective, so every rank comes here, also one whose report stopped.
            summaries = _of_all_ranks(self._finish())
            if _rank() == 0:
                _tell(summaries, args.output_dir)
        except Exception as error:
            print(f"Unsloth: no compile report ({type(error).__name__}: {error}).")

    def _finish(self) -> Dict[str, Any]:
        """This rank's summary, or what kept it from one."""
        try:
            self._unhook()
            if self.broken:
                return {"error": self.broken}
            if self.probe and self._first_batch is not None:
                self._compare()
            return self.report.summary()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            with contextlib.suppress(Exception):
                self.close()

    def _compare(self):
        try:
            self.report.compare_with_eager(self._first_batch)
        except Exception as error:
            self.report.eager_loss = {"error": f"{type(error).__name__}: {error}"}

    def _unhook(self):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def close(self) -> None:
        """Stop recording without a report."""
        self._unhook()
        report, self.report, self._first_batch = self.report, None, None
        if report is not None:
            report.__exit__()


def require_compiled_blocks(model: Optional[torch.nn.Module]) -> None:
    """Strict mode, before the first step: raise FullgraphError unless blocks are set up for it."""
    regions = regions_of(model) if model is not None else []
    if not regions:
        raise FullgraphError(
            f"Unsloth: {VARIABLE}=strict, but no decoder block of this model is set up for "
            "compiling. That needs a CUDA GPU, torch 2.11 or newer, LoRA by "
            "FastLanguageModel.get_peft_model, and neither UNSLOTH_BLOCK_COMPILE=0 nor "
            f"UNSLOTH_COMPILE_DISABLE; set {VARIABLE} before the model is loaded."
        )
    for region in regions:
        if region.mode != "strict":
            raise FullgraphError(
                f"Unsloth: {VARIABLE}=strict was set after {region.name} had been set up for "
                "compiling; set it before the model is loaded."
            )
        if layers_by_state(model, region).get("eager"):
            why = "; ".join(map(str, region.failures)) or "by Unsloth"
            raise region.error(None, f"layers are demoted already: {why}")


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _of_all_ranks(mine: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Every rank's summary in the order of ranks. Collective where there are several."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    gathered: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _tell(summaries: List[Dict[str, Any]], folder: str) -> None:
    print(table(summaries))
    try:
        save(summaries, folder)
    except OSError as error:
        print(f"Unsloth: {error}.")


def report_switch() -> str:
    """``UNSLOTH_COMPILE_REPORT``: 1 (the default), 0 or probe. Raises ValueError if it is none."""
    value = os.environ.get(SWITCH, "").strip().lower() or "1"
    if value not in _CHOICES:
        raise ValueError(f"{SWITCH}={os.environ[SWITCH]!r}: choose one of {', '.join(_CHOICES)}.")
    return value


def add_compile_report(trainer: Any) -> Optional[CompileReportCallback]:
    """Add the report to a Trainer, once; None where the environment switches it off.

    Raises ValueError for a mode or a switch that does not exist.
    """
    mode, switch = fullgraph_mode(), report_switch()
    if mode == "off" or switch == "0":
        return None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CompileReportCallback):
            return callback
    callback = CompileReportCallback(probe = switch == "probe")
    trainer.add_callback(callback)
    return callback


def replace_backwards_compatible_trainer(stock: Callable) -> Callable:
    """``_backwards_compatible_trainer`` of trainer.py: an SFTTrainer gets the compile report."""

    @functools.wraps(stock)
    def _backwards_compatible_trainer(trainer_class, config_class):
        init = stock(trainer_class, config_class)
        if not trainer_class.__name__.endswith("SFTTrainer"):
            return init

        @functools.wraps(init)
        def reporting_init(self, *args, **kwargs):
            fullgraph_mode(), report_switch()  # a wrong value is told before any work is done
            init(self, *args, **kwargs)
            add_compile_report(self)

        return reporting_init

    return _backwards_compatible_trainer
