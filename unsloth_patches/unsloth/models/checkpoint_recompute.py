# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tell a decoder block's MLP when its output is not read.

Reentrant gradient checkpointing runs a block twice: without grad for its output, and in the
backward pass with grad for what the block saves. The second output is handed to
``torch.autograd.backward``, which reads its graph and never its values. In a Llama block the MLP's
output only enters the last residual addition, which saves nothing, so the MLP may leave it out
(``kernels/lora_mlp_recompute.py``). A compiled block takes one graph for both runs
(``checkpoint_shared_graph.py``), to which the MLP tells it by a tensor.
"""

from __future__ import annotations

import functools
from typing import Callable

import torch
import torch.utils.checkpoint
from torch.nn.modules import module as torch_module

from ..kernels.lora_mlp_recompute import DOWN_PROJ_NEEDED, SKIP_DOWN_PROJ
from .checkpoint_shared_graph import AROUND_COMPILED, reentrant

__all__ = ["output_unread", "skip_down_proj_where_unread"]


def _tells_of_its_recompute(layer: torch.nn.Module) -> bool:
    """Unsloth's checkpoints say when they recompute; torch's own, which
    ``use_gradient_checkpointing = True`` brings back, does not, unless Unsloth's Function is in it.

    Asked because a trial run that leaves the output out, where the recompute then computes it, would
    compile one graph for nothing.
    """
    home = torch.utils.checkpoint
    checkpoint = layer._gradient_checkpointing_func
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
        and reentrant(layer)  # unknown: nothing is left out
        and _tells_of_its_recompute(layer)
        and (in_gradient_checkpoint_recompute() or not torch.is_grad_enabled())
        and "forward" not in layer.__dict__
        and not torch_module._global_forward_hooks
        and not _observed(layer)
        and not _observed(layer.mlp)
    )


def _marking(forward: Callable) -> Callable:
    """``forward`` of a block, with its MLP's SKIP_DOWN_PROJ set while it runs."""

    @functools.wraps(forward)
    def marked(self, hidden_states, *args, **kwargs):
        # Traced, the caller has set it: the compiled block guards on the attribute's value.
        if torch.compiler.is_compiling():
            return forward(self, hidden_states, *args, **kwargs)
        state = self.mlp.__dict__
        try:  # from before it is set: Ctrl-C may come at any line
            state[SKIP_DOWN_PROJ] = output_unread(self)
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            state[SKIP_DOWN_PROJ] = False

    return marked


def _telling_the_graph(forward: Callable) -> Callable:
    """``forward`` of a compiled block, with its MLP's DOWN_PROJ_NEEDED False where nobody reads it.

    The tensor stays and is True at all other times, so that no graph has to guard on it.
    """

    @functools.wraps(forward)
    def told(self, hidden_states, *args, **kwargs):
        if torch.compiler.is_compiling() or not self.training:
            return forward(self, hidden_states, *args, **kwargs)
        needed = self.mlp.__dict__.get(DOWN_PROJ_NEEDED)
        if needed is None:
            with torch.inference_mode(False):  # the first run may be GRPO's scoring; others fill it
                needed = torch.tensor(True, device = "cpu")
            self.mlp.__dict__[DOWN_PROJ_NEEDED] = needed
        if not torch.is_grad_enabled() or not output_unread(self):
            needed.fill_(True)  # where Ctrl-C came right before it was, below
            return forward(self, hidden_states, *args, **kwargs)
        try:
            needed.fill_(False)
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            needed.fill_(True)

    return told


def skip_down_proj_where_unread(stock: Callable) -> Callable:
    """``LlamaDecoderLayer_fast_forward``, of Llama, Mistral, Qwen2 and Qwen3, where residual +
    mlp(norm(...)) comes last: its MLP is told in which run of a checkpoint it is.

    Of a compiled block that is done outside the graph, where the checkpoint's thread-local state can
    be read.
    """

    def around_compiled(forward: Callable, shared: bool) -> Callable:
        return (_telling_the_graph if shared else _marking)(forward)

    marked = _marking(stock)
    setattr(marked, AROUND_COMPILED, around_compiled)
    return marked
