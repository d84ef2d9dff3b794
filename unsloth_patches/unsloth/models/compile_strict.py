# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Strict mode in a Trainer: what is not one compiled graph stops it before a weight changes."""

from __future__ import annotations

import functools
import sys
from typing import Callable, Dict, Optional

import torch
from transformers import TrainerCallback

from .compile_modes import (
    VARIABLE,
    FullgraphError,
    fullgraph_mode,
    layers_by_state,
    watched_regions,
)

__all__ = [
    "FullgraphCallback",
    "around_sft_init",
    "loss_state",
    "require_compiled_blocks",
    "require_full_graphs",
]


class FullgraphCallback(TrainerCallback):
    """Raises FullgraphError before the first step if blocks are not set up for full graphs, and
    before a weight changes if the loss is not one."""

    def on_train_begin(
        self,
        args,
        state,
        control,
        model = None,
        **kwargs,
    ):
        if fullgraph_mode() == "strict":
            require_compiled_blocks(model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if fullgraph_mode() == "strict" and loss_state().startswith("demoted"):
            raise FullgraphError(
                f"Unsloth: the fused loss is not one compiled graph, and {VARIABLE}=strict; "
                "Unsloth fell back to its eager loss. UNSLOTH_COMPILE_DEBUG=1 shows the error."
            )


def require_compiled_blocks(model: Optional[torch.nn.Module]) -> None:
    """Strict mode, before the first step: raise FullgraphError unless blocks are set up for it."""
    regions = watched_regions(model) if model is not None else []
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


def loss_state() -> str:
    """How the loss ran: by hand-written kernels, compiled by unsloth_zoo, or demoted by it."""
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


def around_sft_init(stock: Callable, before: Callable, after: Callable) -> Callable:
    """``_backwards_compatible_trainer`` of trainer.py: an SFTTrainer's ``__init__`` runs between
    ``before()``, which tells a wrong value before any work is done, and ``after(trainer)``."""

    @functools.wraps(stock)
    def _backwards_compatible_trainer(trainer_class, config_class):
        init = stock(trainer_class, config_class)
        if not trainer_class.__name__.endswith("SFTTrainer"):
            return init

        @functools.wraps(init)
        def wrapped_init(self, *args, **kwargs):
            before()
            init(self, *args, **kwargs)
            after(self)

        return wrapped_init

    return _backwards_compatible_trainer


def require_full_graphs(stock: Callable) -> Callable:
    """``_backwards_compatible_trainer``: an SFTTrainer refuses a mode that does not exist, and holds to
    strict mode."""

    def add_callback(trainer):
        present = trainer.callback_handler.callbacks
        if not any(isinstance(callback, FullgraphCallback) for callback in present):
            trainer.add_callback(FullgraphCallback())

    return around_sft_init(stock, fullgraph_mode, add_callback)
