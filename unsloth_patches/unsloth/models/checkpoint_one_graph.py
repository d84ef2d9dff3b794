# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Compile a checkpointed block once, not once for each of its two runs.

Reentrant gradient checkpointing runs a block without grad for its output, and again with grad for
what its backward pass reads. Dynamo guards on grad mode, so block compile traced and compiled each
block for both: a third of the seconds before the first step. Here the first run takes the graph of
the second. It runs with grad, and what it saves for a backward pass is dropped with its output's
graph; that is no more than the second run holds, and the kernels are the same.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator

import torch
from torch.utils import _pytree as pytree

__all__ = ["compiling_once", "one_graph_wanted", "runs_without_grad"]

VARIABLE = "UNSLOTH_CHECKPOINT_ONE_GRAPH"
_ADAPTER = "_unsloth_first_adapter"
_swapping = threading.Lock()


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


def one_graph_wanted(compile_options: Dict[str, Any]) -> bool:
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


def _reentrant(layer: torch.nn.Module) -> bool:
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
        and _reentrant(layer)
        and _adapters_work(layer)
        # What is saved would go through such hooks: to the CPU, or into another checkpoint.
        and not torch._C._autograd._top_saved_tensors_default_hooks(False)
    )


def _leaf_of(hidden_states: torch.Tensor) -> torch.Tensor:
    """A leaf that wants grad, as in the second run: the graph is guarded on that. Block compile has
    marked sizes as dynamic, on the tensor object."""
    leaf = hidden_states.detach().requires_grad_()
    for name, mark in vars(hidden_states).items():
        if name.startswith("_dynamo_"):
            setattr(leaf, name, mark)
    return leaf


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _first_run_with_grad(compiled: Callable) -> Callable:
    @functools.wraps(compiled, updated = ())
    def run(self, hidden_states, *args, **kwargs):
        if not _is_first_run(self, hidden_states):
            return compiled(self, hidden_states, *args, **kwargs)
        with torch.enable_grad():
            out = compiled(self, _leaf_of(hidden_states), *args, **kwargs)
        return pytree.tree_map(_detached, out)

    return run


@contextlib.contextmanager
def compiling_once() -> Iterator[None]:
    """While block compile sets a class up, what ``torch.compile`` makes of its forward runs the
    first pass of a checkpoint with grad."""
    with _swapping:
        plain = torch.compile

        def compile_once(function, *args, **options):
            return _first_run_with_grad(plain(function, *args, **options))

        torch.compile = compile_once
        try:
            yield
        finally:
            torch.compile = plain
