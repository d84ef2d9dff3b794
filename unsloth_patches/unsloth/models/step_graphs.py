# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Replay a model's decoder blocks as CUDA graphs while it trains.

With short sequences the GPU waits for Python: a step of small batches launches thousands of kernels.
Here the stack of decoder blocks is captured as two CUDA graphs for each length of a grid, one for the
forward pass and one for the backward pass, and later batches of that length are two launches.
Embedding, loss, optimizer and trainer are outside and as they were.

``UNSLOTH_STEP_GRAPHS``: ``auto`` (the default) captures a length when it is seen a second time, if
the host is what the GPU waits for there; ``1`` captures every length; ``0`` leaves everything as it
was. What cannot be captured runs as before; ``summary(model)`` says what was replayed and why the rest
was not.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Callable, Dict

import torch

from .step_graphs_stack import Stack, checkpointing_layer, mode
from .step_graphs_state import global_hooks, why_not_capturable

__all__ = ["choose_padding_free", "replay_decoder_blocks", "summary"]

_PARAMETERS = (
    "input_ids causal_mask attention_mask position_ids past_key_values inputs_embeds use_cache "
    "output_attentions output_hidden_states return_dict"
).split()
_stacks: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def _why_not_here(model: torch.nn.Module) -> str:
    """A reason in this process' or this call's state, or ''. No reason is counted for evaluation."""
    if torch.is_anomaly_enabled():
        return "anomaly mode"
    if global_hooks():
        return "global module hooks"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a dispatch mode"
    if torch._C._autograd._top_saved_tensors_default_hooks(False):
        return "saved-tensor hooks"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            return "several processes"
    if not isinstance(model.layers[0], checkpointing_layer()):
        return "blocks that are no GradientCheckpointingLayer"
    if getattr(model.layers, "_unsloth_block_swap", None) is not None:
        return "swapped blocks"
    return ""


def _argument(name: str, args: tuple, kwargs: dict) -> Any:
    """An argument of LlamaModel_fast_forward, however it was given."""
    place = _PARAMETERS.index(name)
    return args[place] if place < len(args) else kwargs.get(name)


def _tokens(args: tuple, kwargs: dict) -> int:
    """How many tokens the call is given, at least a prompt; 0 for one more of a text."""
    if _argument("past_key_values", args, kwargs) is not None:
        return 0
    ids, embedded = (_argument(name, args, kwargs) for name in ("input_ids", "inputs_embeds"))
    if ids is not None:
        return ids.numel()
    return 0 if embedded is None else embedded.shape[0] * embedded.shape[1]


def _wanted(model: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
    """A training pass that could be replayed, as far as its arguments say."""
    return (
        model.training
        and torch.is_grad_enabled()
        and mode() != "0"
        and _argument("past_key_values", args, kwargs) is None
    )


def replay_decoder_blocks(stock: Callable) -> Callable:
    """``LlamaModel_fast_forward`` with its loop over the decoder blocks replayed where that is exact.

    While it runs, ``self.layers`` is one layer that stands for all of them.
    """

    @functools.wraps(stock)
    def LlamaModel_fast_forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return stock(self, *args, **kwargs)
        stack = _stacks.get(self)
        if not _wanted(self, args, kwargs):
            if stack is not None:
                stack.make_room(_tokens(args, kwargs))
            return stock(self, *args, **kwargs)
        if stack is None:
            stack = _stacks[self] = Stack(self)
        reason = stack.off or _why_not_here(self)
        for name in ("output_hidden_states", "output_attentions"):
            asked = _argument(name, args, kwargs)
            if asked or (asked is None and getattr(self.config, name, False)):
                reason = name
        if reason:
            stack.reasons[reason] += 1
            stack.make_room(_tokens(args, kwargs))
            return stock(self, *args, **kwargs)
        try:
            self.__dict__["layers"] = stack.stand_in()  # before the module of that name
            return stock(self, *args, **kwargs)
        finally:
            self.__dict__.pop("layers", None)

    LlamaModel_fast_forward._replays_blocks = True
    return LlamaModel_fast_forward


def choose_padding_free(stock: Callable) -> Callable:
    """``decide_auto_padding_free``: rows stay free of padding where the blocks will be replayed.

    Stock pads where the host is waited for, since blocks of padded rows compile. Replayed blocks
    wait for no host and are not compiled, and a graph takes a padding-free row's documents as rows
    of its own, so padding would only add the collator's. A choice of the user's is stock's to follow.
    """

    @functools.wraps(stock)
    def decide_auto_padding_free(model, *args, **kwargs):
        chosen, reason = stock(model, *args, **kwargs)
        if chosen or reason.startswith("UNSLOTH_PADDING_CHOICE") or mode() == "0":
            return chosen, reason
        replayed = (
            m for m in model.modules() if getattr(type(m).forward, "_replays_blocks", False)
        )
        layers = getattr(next(replayed, None), "layers", ())
        if not len(layers) or why_not_capturable(layers):
            return chosen, reason
        return True, f"step graphs replay padding-free rows; otherwise {reason}"

    return decide_auto_padding_free


def summary(model: torch.nn.Module) -> Dict[str, Any]:
    """What was replayed of ``model``'s training, and why the rest was not; {} if nothing was asked."""
    stack = next((_stacks[m] for m in model.modules() if m in _stacks), None)
    if stack is None:
        return {}
    ordinary = sum(stack.reasons.values())
    return {
        "replayed": stack.replayed,
        "share": stack.replayed / max(1, stack.replayed + ordinary),
        "buckets": [key[:2] for key in stack.buckets],
        "captures": stack.captures,
        "dropped": stack.drops,
        "changes": dict(stack.changes),
        "pool_bytes": stack.pool.bytes if stack.pool else 0,
        "padding": stack.padded / stack.real - 1 if stack.real else 0.0,
        "reasons": dict(stack.reasons),
    }
