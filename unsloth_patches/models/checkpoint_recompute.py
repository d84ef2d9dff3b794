# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Tell a decoder block's MLP when its output is not read.

Reentrant gradient checkpointing runs a block twice: without grad for its output, and in the
backward pass with grad for what the block saves. The second output is handed to
``torch.autograd.backward``, which reads its graph and never its values. In a Llama block the MLP's
output only enters the last residual addition, which saves nothing, so the MLP may leave it out
(``kernels/lora_mlp_unread.py``).
"""

from __future__ import annotations

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import torch
import torch.utils.checkpoint
from torch.nn.modules import module as torch_module

from ..kernels.lora_mlp_unread import OUTPUT_UNREAD

__all__ = ["output_unread", "replace_LlamaDecoderLayer_fast_forward", "replace_wrap"]

_MARKS = "_unsloth_marks_unread_output"


@functools.lru_cache(maxsize = 64)
def _runs_without_grad(checkpoint: Callable) -> bool:
    """True if ``checkpoint(function, x)`` is reentrant: it runs function without grad at first, and
    with grad in the recompute only. Asked of the function itself, for a layer may hold Unsloth's,
    torch's (reentrant or not, by an argument or by default) or a partial of either."""
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return x

    def ask() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint(function, torch.zeros(()))  # wants no grad: nothing is saved or offloaded

    # In a thread: grad mode and hooks are as by default there, whatever this is called inside of.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask).result()
    return seen == [False]


def _reentrant(layer: torch.nn.Module) -> bool:
    try:
        checkpoint = layer._gradient_checkpointing_func
        return _tells_of_its_recompute(checkpoint) and _runs_without_grad(checkpoint)
    except Exception:  # unhashable, or it wants other arguments: unknown, so nothing is left out
        return False


def _tells_of_its_recompute(checkpoint: Callable) -> bool:
    """Unsloth's checkpoints say when they recompute; torch's own, which
    ``use_gradient_checkpointing = True`` brings back, does not, unless Unsloth's Function is in it.

    Asked because a trial run that leaves the output out, where the recompute then computes it, would
    compile one graph for nothing.
    """
    home = torch.utils.checkpoint
    checkpoint = getattr(checkpoint, "func", checkpoint)  # a partial's function
    return checkpoint.__module__ != home.__name__ or (
        home.CheckpointFunction.__module__ != home.__name__
    )


def _observed(module: torch.nn.Module) -> bool:
    """Something beside the block may look at the module's output: a hook or a replaced forward."""
    return bool(module._forward_hooks) or module.__dict__.get("_unsloth_forward") is not None


def output_unread(layer: torch.nn.Module) -> bool:
    """True if nobody reads what ``layer`` (a decoder block) returns where it runs with grad now.

    That is so in the recompute of the layer's own checkpoint, and, in a call without grad, for the
    trial run with grad by which block compile tests the layer and whose output it drops.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer
    from unsloth_zoo.gradient_checkpointing import in_gradient_checkpoint_recompute

    return (
        isinstance(layer, GradientCheckpointingLayer)
        and layer.training
        and layer.gradient_checkpointing
        and _reentrant(layer)
        and (in_gradient_checkpoint_recompute() or not torch.is_grad_enabled())
        and "forward" not in layer.__dict__
        and not torch_module._global_forward_hooks
        and not _observed(layer)
        and not _observed(layer.mlp)
    )


def _marking(forward: Callable) -> Callable:
    """``forward`` of a block, with its MLP's OUTPUT_UNREAD set while it runs."""

    @functools.wraps(forward)
    def marked(self, hidden_states, *args, **kwargs):
        # Traced, the caller has set it: the compiled block guards on the attribute's value.
        if torch.compiler.is_compiling():
            return forward(self, hidden_states, *args, **kwargs)
        state = self.mlp.__dict__
        before = state.get(OUTPUT_UNREAD, False)
        state[OUTPUT_UNREAD] = output_unread(self)
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            state[OUTPUT_UNREAD] = before

    setattr(marked, _MARKS, True)
    return marked


def replace_LlamaDecoderLayer_fast_forward(stock: Callable) -> Callable:
    """The block of Llama, Mistral, Qwen2 and Qwen3: residual + mlp(norm(...)) comes last in it."""
    return _marking(stock)


def replace_wrap(stock: Callable) -> Callable:
    """Block compile of a class: the compiled forward runs inside the marking too.

    The mark is made outside the graph, where the checkpoint's thread-local state can be read.
    """

    @functools.wraps(stock)
    def _wrap(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = stock(cls, *args, **kwargs)
        if getattr(cls.forward, _MARKS, False):
            cls.forward = _marking(cls.forward)
        return result

    return _wrap
