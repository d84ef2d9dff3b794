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
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

__all__ = ["BlockRuns"]


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
        self.layers, self.arguments, self.keep = layers, arguments, list(keep)
        self.wants_input = wants_input
        # In a graph uncompiled blocks are nearly as fast, and cost no compilation of another form.
        self._forwards = [x.forward if compiled else _uncompiled(x) for x in layers]
        self.parameters = [[p for p in x.parameters() if p.requires_grad] for x in layers]
        self._marker = _recompute_marker()
        self._saved: List[Tuple[torch.Tensor, Optional[torch.Tensor]]] = []

    def _run(self, number: int, x: torch.Tensor) -> torch.Tensor:
        # forward, not the call: the layer's own checkpoint stays out, and hooks were asked for before.
        with torch.enable_grad():
            out = self._forwards[number](x, **self.arguments)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._saved = []
        for number in range(len(self.layers)):
            x = hidden.detach().requires_grad_(number > 0 or self.wants_input)
            y = self._run(number, x)
            self._saved.append((x, y if self.keep[number] else None))
            hidden = y.detach()
        return hidden

    def backward(
        self, grad: torch.Tensor
    ) -> Tuple[Optional[torch.Tensor], List[Optional[torch.Tensor]]]:
        """(the input's gradient or None, one gradient or None a trainable parameter, in order)"""
        grads: List[List[Optional[torch.Tensor]]] = []
        for number in reversed(range(len(self.layers))):
            x, y = self._saved.pop()
            if y is None:
                with self._marker():
                    y = self._run(number, x)
            inputs = ([x] if x.requires_grad else []) + self.parameters[number]
            found = list(torch.autograd.grad(y, inputs, grad, allow_unused = True)) if inputs else []
            grad = found.pop(0) if x.requires_grad else None
            grads.append(found)
            del x, y, found
        return grad, [g for layer in reversed(grads) for g in layer]

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
