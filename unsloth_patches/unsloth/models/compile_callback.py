# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The compile report in SFTTrainer: recorded in silence, one table and one JSON file at the end.

UNSLOTH_COMPILE_REPORT=0 leaves it out, and so does UNSLOTH_BLOCK_FULLGRAPH=off.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, Callable, Dict, List, Optional

import torch
from transformers import TrainerCallback

from .compile_modes import fullgraph_mode
from .compile_report import CompileReport, batch_tokens, save
from .compile_strict import around_sft_init
from .compile_table import table

__all__ = ["CompileReportCallback", "add_compile_report", "report_compilation"]

SWITCH = "UNSLOTH_COMPILE_REPORT"


def _unharmed(method: Callable) -> Callable:
    """An error of the report ends the report, not the training."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if self.broken:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.broken = f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):
                self.close()
            print(f"Unsloth: the compile report stopped ({self.broken}); training goes on.")
            return None

    return guarded


class CompileReportCallback(TrainerCallback):
    """Records one ``train()`` and prints and saves its report when it ends."""

    def __init__(self):
        self.report: Optional[CompileReport] = None
        self.broken = ""
        self._hook: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.broken = ""  # an earlier train()'s
        self._begin(kwargs.get("model"))

    @_unharmed
    def _begin(self, model):
        self.close()  # of an earlier train() that was interrupted
        self.report = CompileReport(model)
        self.report.__enter__()
        if model is not None:
            self._hook = model.register_forward_pre_hook(self._count, with_kwargs = True)

    def _count(self, model, args, kwargs):
        try:
            if not model.training or not torch.is_grad_enabled() or self.report is None:
                return
            self.report.clock.add(batch_tokens(args, kwargs))
        except Exception as error:
            self.broken = f"{type(error).__name__}: {error}"

    @_unharmed
    def on_step_end(self, args, state, control, **kwargs):
        if self.report is not None:
            self.report.step()

    @_unharmed
    def on_evaluate(self, args, state, control, **kwargs):
        if self.report is not None:
            self.report.clock.interrupted()

    on_save = on_evaluate

    def on_train_end(self, args, state, control, **kwargs):
        if self.report is None and not self.broken:
            return
        try:
            # Collective, so every rank comes here, also one whose report stopped.
            summaries = _of_all_ranks(self._finish())
            if state.is_world_process_zero:
                _tell(summaries, args.output_dir)
        except Exception as error:
            print(f"Unsloth: no compile report ({type(error).__name__}: {error}).")

    def _finish(self) -> Dict[str, Any]:
        """This rank's summary, or what kept it from one."""
        try:
            if self.broken:
                return {"error": self.broken}
            return self.report.summary()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            with contextlib.suppress(Exception):
                self.close()

    def close(self) -> None:
        """Stop recording without a report."""
        hook, self._hook = self._hook, None
        report, self.report = self.report, None
        if hook is not None:
            hook.remove()
        if report is not None:
            report.__exit__()


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
    """``UNSLOTH_COMPILE_REPORT``: 1 (the default) or 0. Raises ValueError if it is none."""
    value = os.environ.get(SWITCH, "").strip().lower() or "1"
    if value not in ("1", "0"):
        raise ValueError(f"{SWITCH}={os.environ[SWITCH]!r}: choose one of 1, 0.")
    return value


def add_compile_report(trainer: Any) -> Optional[CompileReportCallback]:
    """Add the report to a Trainer, once; None where the environment switches it off."""
    if fullgraph_mode() == "off" or report_switch() == "0":
        return None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CompileReportCallback):
            return callback
    callback = CompileReportCallback()
    trainer.add_callback(callback)
    _close_after_training(type(trainer))
    return callback


def _close_after_training(trainer_class: type) -> None:
    """``train`` of the class ends the recording also where training raises. Once a class."""
    train = trainer_class.train
    if getattr(train, "_closes_compile_report", False):
        return

    @functools.wraps(train)
    def closing(self, *args, **kwargs):
        callbacks = self.callback_handler.callbacks
        found = [each for each in callbacks if isinstance(each, CompileReportCallback)]
        with contextlib.closing(found[0]) if found else contextlib.nullcontext():
            return train(self, *args, **kwargs)

    closing._closes_compile_report = True
    trainer_class.train = closing


def report_compilation(stock: Callable) -> Callable:
    """``_backwards_compatible_trainer`` of trainer.py: an SFTTrainer gets the compile report."""
    return around_sft_init(stock, report_switch, add_compile_report)
