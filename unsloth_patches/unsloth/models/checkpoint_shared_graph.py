# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Compile a checkpointed block once, not once for each of its two runs.

Reentrant gradient checkpointing runs a block without grad for its output, and again with grad for
what its backward pass reads. Dynamo guards on grad mode, so block compile traced and compiled each
block for both: a third of the seconds before the first step. Here the first run takes the graph of
the second. It runs with grad, and what it saves for a backward pass is dropped with its output's
graph; that is no more than the second run holds, and the kernels are the same.

The host works longer for it (0.1 to 1 ms a block). Where the GPU turns out to wait for the host, as
with short sequences, first runs go without grad after all, in a graph of their own. So they do where
a training scores without grad, too, as DPO and GRPO do: what is compared is rounded alike then.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict

import torch
from torch.utils import _pytree as pytree

from .compile_wrapping import torch_compile_as

__all__ = [
    "AROUND_COMPILED",
    "reentrant",
    "share_graph_between_checkpoint_runs",
    "shared_graph_wanted",
]

VARIABLE = "UNSLOTH_CHECKPOINT_ONE_GRAPH"
# Attribute of a block's forward: around(forward, shared) is put around it once it is compiled;
# shared: True if both runs of a checkpoint take one graph.
AROUND_COMPILED = "_unsloth_around_compiled"
_ADAPTER, _EXPERTS = "_unsloth_first_adapter", "_unsloth_has_experts"
# By how many more of its first runs the GPU was waiting than not, until a block's class has two graphs.
# A second one takes about as long to compile as some thousand runs lose, and short trainings end before.
WAITED_RUNS = 1000
# How Dynamo marks a tensor, beside the attributes that begin with _dynamo_: PyTorch 2.13 and newer.
_MARKS = ("_has_dynamo_dim_marking", "_specialize_on")


@functools.lru_cache(maxsize = 64)
def runs_without_grad(checkpoint: Callable) -> bool:
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


def shared_graph_wanted(compile_options: Dict[str, Any]) -> bool:
    """False with UNSLOTH_CHECKPOINT_ONE_GRAPH=0, and with CUDA graphs: those wait for a backward
    pass after every forward pass with grad."""
    return os.environ.get(VARIABLE, "1") != "0" and not compile_options.get("triton.cudagraphs")


def _adapters_work(layer: torch.nn.Module) -> bool:
    """False while the layer's adapters are disabled or merged, as for the reference model of DPO:
    nothing will be recomputed with grad then. PEFT switches all of them at once, so one is asked."""
    if _ADAPTER not in layer.__dict__:
        found = (module for module in layer.modules() if hasattr(module, "disable_adapters"))
        layer.__dict__[_ADAPTER] = (next(found, None),)  # in a tuple: no submodule of the layer
    adapter = layer.__dict__[_ADAPTER][0]
    return adapter is None or not (adapter.disable_adapters or adapter.merged)


def _has_experts(layer: torch.nn.Module) -> bool:
    """True for a mixture of experts. What its functions save depends on which run of a checkpoint they
    are in, so its runs keep a graph each."""
    if _EXPERTS not in layer.__dict__:
        layer.__dict__[_EXPERTS] = any(
            name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
            for name, module in layer.named_modules()
        )
    return layer.__dict__[_EXPERTS]


def reentrant(layer: torch.nn.Module) -> bool:
    """True if the layer's own checkpoint function is known to be reentrant."""
    try:
        return runs_without_grad(layer._gradient_checkpointing_func)
    except Exception:  # none there, unhashable, or it wants other arguments
        return False


def _is_first_run(layer: torch.nn.Module, hidden_states: torch.Tensor) -> bool:
    """True in the first run of the layer's own reentrant checkpoint, if a second will follow."""
    return (
        not torch.is_grad_enabled()
        and hidden_states.requires_grad
        and layer.training
        and getattr(layer, "gradient_checkpointing", False)
        and reentrant(layer)
        and _adapters_work(layer)
        and not _has_experts(layer)
        # What is saved would go through such hooks: to the CPU, or into another checkpoint.
        and not torch._C._autograd._top_saved_tensors_default_hooks(False)
    )


def _as_leaf(hidden_states: torch.Tensor) -> torch.Tensor:
    """A leaf that wants grad, as in the second run: the graph is guarded on that. Block compile has
    marked sizes as dynamic, on the tensor object."""
    leaf = hidden_states.detach().requires_grad_()
    for name, mark in vars(hidden_states).items():
        if name.startswith("_dynamo_") or name in _MARKS:
            setattr(leaf, name, copy.copy(mark))
    return leaf


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _scores(layer: torch.nn.Module, hidden_states: torch.Tensor) -> bool:
    """True in a pass of a model in training that no gradient will come from, as a reference model's."""
    return layer.training and not torch.is_grad_enabled() and not hidden_states.requires_grad


def _gpu_waits(hidden_states: torch.Tensor) -> bool:
    """True if the GPU has finished all that the host gave it so far."""
    return hidden_states.is_cuda and torch.cuda.current_stream(hidden_states.device).query()


def _capturing(hidden_states: torch.Tensor) -> bool:
    return hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()


def _first_run_with_grad(compiled: Callable) -> Callable:
    waited = 0

    @functools.wraps(compiled, updated = ())
    def run(self, hidden_states, *args, **kwargs):
        nonlocal waited
        if not _is_first_run(self, hidden_states):
            if waited > -math.inf and _scores(self, hidden_states):
                waited = WAITED_RUNS
            return compiled(self, hidden_states, *args, **kwargs)
        # Not while a CUDA graph is captured: nothing can be asked then.
        if waited < WAITED_RUNS and not _capturing(hidden_states):
            waited = max(min(waited, 0), waited + (1 if _gpu_waits(hidden_states) else -1))
        if waited >= WAITED_RUNS:
            try:
                return compiled(self, hidden_states, *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # block compile's own fallback was for the first step
                waited = -math.inf  # for good
                warnings.warn(
                    f"Unsloth: {type(self).__name__} keeps one graph: {error}", stacklevel = 2
                )
        with torch.enable_grad():
            out = compiled(self, _as_leaf(hidden_states), *args, **kwargs)
        return pytree.tree_map(_detached, out)

    return run


def _compile_with_grad(compile: Callable, function: Callable, **options: Any) -> Callable:
    return _first_run_with_grad(compile(function, **options))


def share_graph_between_checkpoint_runs(stock: Callable) -> Callable:
    """``_wrap`` of block compile: the compiled forward of a class runs the first pass of a checkpoint
    with grad. Blocks with CUDA graphs keep a graph for each run.
    """

    @functools.wraps(stock)
    def _wrap(cls: type, compile_options: Dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        around = getattr(cls.forward, AROUND_COMPILED, None)
        shared = shared_graph_wanted(compile_options)
        with torch_compile_as(_compile_with_grad) if shared else contextlib.nullcontext():
            result = stock(cls, compile_options, *args, **kwargs)
        if around is not None:
            cls.forward = around(cls.forward, shared)
        return result

    return _wrap
