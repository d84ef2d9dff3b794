# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Run a stack of decoder blocks forward, and backward by hand, block by block.

What a step graph records. Each block is checkpointed or kept on its own: a kept block holds what its
backward pass reads, another holds its input only and runs again. No autograd graph spans two blocks,
and no gradient is accumulated here, so nothing of a captured run reaches ``.grad`` or a hook.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

__all__ = ["BlockRuns", "own_leaves"]


def _recompute_marker() -> Callable:
    """Unsloth's mark of a checkpoint's second run, in which a block may leave out what is not read."""
    try:
        from unsloth_zoo.gradient_checkpointing import _gradient_checkpoint_recompute_marker as mark
    except ImportError:
        return contextlib.nullcontext
    return mark


def _uncompiled(layer: torch.nn.Module) -> Callable:
    forward = type(layer).forward
    return functools.partial(getattr(forward, "_unsloth_block_original", forward), layer)


def _kind(layer: torch.nn.Module) -> tuple:
    """What decides which kernels a block launches; blocks of one kind need one warm-up."""
    parameters = tuple((n, p.dtype, p.shape, p.requires_grad) for n, p in layer.named_parameters())
    modules = tuple((type(m), m.training) for m in layer.modules())
    return modules, parameters, getattr(layer, "gradient_checkpointing", None)


@contextlib.contextmanager
def own_leaves(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Trainable parameters are, meanwhile, others over the same memory, which autograd has not seen.

    A parameter's hooks would run in the graph, and then again outside. And while somebody holds an
    earlier loss, the parameter has a node on that pass's stream, which a capture must not wait for.
    """
    tables = [m._parameters for x in layers for m in x.modules()]
    places = [(t, n, p) for t in tables for n, p in t.items() if p is not None and p.requires_grad]
    leaves = {id(p): torch.nn.Parameter(p.detach()) for _, _, p in places}
    try:
        for table, name, parameter in places:
            leaf = table[name] = leaves[id(parameter)]
            leaf.__dict__.update(parameter.__dict__)
        yield
    finally:
        for table, name, parameter in places:
            table[name] = parameter


class BlockRuns:
    """forward() and backward() of ``layers``, called in turn; arguments is what each layer is given.

    keep: for each layer, True if it keeps its activations. wants_input: the input's gradient is asked.
    compiled: run the layers as block compile has left them, where it did.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        arguments: Dict[str, Any],
        keep: Sequence[bool],
        wants_input: bool,
        compiled: bool = True,
    ):
        self.layers, self.arguments, self.keep = layers, arguments, list(map(bool, keep))
        self.wants_input = wants_input
        # In a graph uncompiled blocks are nearly as fast, and cost no compilation of another form.
        self._forwards = [x.forward if compiled else _uncompiled(x) for x in layers]
        self._marker = _recompute_marker()
        self._saved: List[Tuple[torch.Tensor, Optional[torch.Tensor]]] = []

    def _run(
        self,
        number: int,
        x: torch.Tensor,
        kept: bool = True,
    ) -> torch.Tensor:
        # forward, not the call: the layer's own checkpoint stays out, and hooks were asked for before.
        with torch.set_grad_enabled(kept):  # else activations stay until the next block has its own
            out = self._forwards[number](x, **self.arguments)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._saved = []
        for number in range(len(self.layers)):
            x = hidden.detach().requires_grad_(number > 0 or self.wants_input)
            y = self._run(number, x, self.keep[number])
            self._saved.append((x, y if self.keep[number] else None))
            hidden = y.detach()
        return hidden

    def backward(
        self, grad: torch.Tensor
    ) -> Tuple[Optional[torch.Tensor], List[Optional[torch.Tensor]]]:
        """(the input's gradient or None, one gradient or None a trainable parameter, in order)"""
        torch.clear_autocast_cache()  # casts of weights that were made without gradients
        grads: List[List[Optional[torch.Tensor]]] = []
        for number in reversed(range(len(self.layers))):
            x, y = self._saved.pop()
            if y is None:
                with self._marker():
                    y = self._run(number, x)
            trained = [p for p in self.layers[number].parameters() if p.requires_grad]
            inputs = ([x] if x.requires_grad else []) + trained
            # In this thread: another has a cuBLAS handle of its own, whose workspace a graph would keep.
            with torch.autograd.set_multithreading_enabled(False):
                found = (
                    list(torch.autograd.grad(y, inputs, grad, allow_unused = True)) if inputs else []
                )
            grad = found.pop(0) if x.requires_grad else None
            grads.append(found)
            del x, y, found
        return grad, [g for layer in reversed(grads) for g in layer]

    def warm_up(self, hidden: torch.Tensor) -> torch.Tensor:
        """One block of each kind forward, and backward as it will be; returns the last one's output."""
        kinds = {(_kind(x), keep): n for n, (x, keep) in enumerate(zip(self.layers, self.keep))}
        for number in kinds.values():
            one = BlockRuns([self.layers[number]], self.arguments, [self.keep[number]], True)
            one._forwards = [self._forwards[number]]
            output = one.forward(hidden)
            one.backward(torch.zeros_like(output))
            if number == len(self.layers) - 1:  # the last of its kind
                last = output
        return last

    def activation_bytes(self, like: torch.Tensor, recorder: Any) -> int:
        """Bytes that one block keeps, its output among them."""
        x = torch.zeros_like(like).requires_grad_()
        self._run(-1, x)  # compiles it
        before = recorder.memory()[0]
        y = self._run(-1, x)
        used = recorder.memory()[0] - before
        del y
        return used

    def clear(self) -> None:
        self._saved = []
