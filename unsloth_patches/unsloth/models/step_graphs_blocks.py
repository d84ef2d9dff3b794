# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Run a stack of decoder blocks forward, and backward by hand, block by block.

What a step graph records. Each block is checkpointed or kept on its own: a kept block holds what its
backward pass reads, another holds its input only and runs again. Where memory is short, inputs wait in
the host's, and blocks that run again do so some rows at a time. No autograd graph spans two blocks, and
nothing of a captured run reaches ``.grad`` or a hook.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

__all__ = ["BlockRuns", "HostInputs", "own_leaves"]

BlockGradients = List[Optional[torch.Tensor]]  # of a block's trainable parameters, in order
PAGE = 16 << 20  # bytes of host memory that are pinned at once


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


def _joined(parts: List[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum(a: Optional[torch.Tensor], b: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return b if a is None else a if b is None else a + b


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


class HostInputs:
    """Pinned host memory in which blocks' inputs wait for the backward pass, as Unsloth's own checkpoints
    do. Copies run beside the blocks: ``wait()`` before what they read or write is used or freed.
    """

    def __init__(self):
        self._pages: List[torch.Tensor] = []
        self._stream: Optional[torch.cuda.Stream] = None

    def reserve(self, nbytes: int, device: torch.device) -> None:
        """For inputs on that device. Raises RuntimeError where the host has no such memory."""
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        while len(self._pages) * PAGE < nbytes:
            pinned = self._stream is not None
            self._pages.append(torch.empty(PAGE, dtype = torch.uint8, pin_memory = pinned))

    def _beside(self) -> Any:
        """Where copies are queued: after what was queued until now, beside what is from now on."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _pieces(self, start: int, x: torch.Tensor) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """(host, device) bytes of x, which lies there from ``start`` on."""
        flat = x.detach().view(-1).view(torch.uint8)
        while flat.numel():
            number, offset = divmod(start, PAGE)
            page = self._pages[number][offset : offset + flat.numel()]
            yield page, flat[: page.numel()]
            flat, start = flat[page.numel() :], start + page.numel()

    def put(self, start: int, x: torch.Tensor) -> None:
        with self._beside():
            for page, piece in self._pieces(start, x):
                page.copy_(piece, non_blocking = True)

    def take(self, start: int, x: torch.Tensor) -> None:
        """Into x."""
        with self._beside():
            for page, piece in self._pieces(start, x):
                piece.copy_(page, non_blocking = True)

    def wait(self) -> None:
        """What is queued from now on waits for the copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class BlockRuns:
    """forward() and backward() of ``layers``, called in turn; arguments is what each layer is given.

    keep: for each layer, True if it keeps its activations. wants_input: the input's gradient is asked.
    compiled: run the layers as block compile has left them, where it did.
    """

    rows: Optional[int] = None  # of the batch at once, where blocks run again; None: all
    host: Optional[HostInputs] = None
    input_bytes = 0  # of a block's input, at most; known once ``activation_bytes`` was asked

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

    def some_rows_at_once(self, rows: int) -> None:
        """Uncompiled: block compile's code is for as many rows as the batch has."""
        self.rows, self._forwards = rows, list(map(_uncompiled, self.layers))

    def _parts(self, x: torch.Tensor) -> List[slice]:
        step = self.rows or len(x)
        return [slice(start, start + step) for start in range(0, len(x), step)]

    def _run(
        self,
        number: int,
        x: torch.Tensor,
        kept: bool = True,
        rows: slice = slice(None),
    ) -> torch.Tensor:
        arguments = self.arguments
        if self.rows and arguments.get("position_ids") is not None:
            arguments = {**arguments, "position_ids": arguments["position_ids"][rows]}
        # forward, not the call: the layer's own checkpoint stays out, and hooks were asked for before.
        with torch.set_grad_enabled(kept):  # else activations stay until the next block has its own
            out = self._forwards[number](x, **arguments)
        return out[0] if isinstance(out, tuple) else out

    def _leaf(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return x.detach().requires_grad_(number > 0 or self.wants_input)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._saved = []
        for number in range(len(self.layers)):
            x, y = self._leaf(number, hidden), None
            if self.keep[number]:
                y = self._run(number, x)
                hidden = y.detach()
            elif self.host is not None:
                if x.nbytes > self.input_bytes:
                    raise RuntimeError(f"block {number}'s input takes more than the first and last")
                self.host.put(number * self.input_bytes, x)
                try:
                    hidden = self._without_grad(number, x)
                finally:  # a capture cannot end while copies are not waited for
                    self.host.wait()
                x = (x.shape, x.dtype)
            else:
                hidden = self._without_grad(number, x)
            self._saved.append((x, y))
        return hidden

    def _without_grad(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return _joined([self._run(number, x[rows], False, rows) for rows in self._parts(x)])

    def _input(self, number: int, device: torch.device) -> torch.Tensor:
        """A block's; what comes from the host is there after a wait."""
        x = self._saved[number][0]
        if not isinstance(x, torch.Tensor):
            x = torch.empty(x[0], dtype = x[1], device = device)
            self.host.take(number * self.input_bytes, x)
            x = self._leaf(number, x)
        return x

    def backward(
        self, grad: torch.Tensor, take: Callable[[int, BlockGradients], None]
    ) -> Optional[torch.Tensor]:
        """The input's gradient or None. take(number, gradients): of that layer's trainable parameters, in
        order; at once, since those of all layers need as much memory as they."""
        try:
            return self._backward(grad, take)
        finally:
            if self.host is not None:
                self.host.wait()

    def _backward(
        self, grad: torch.Tensor, take: Callable[[int, BlockGradients], None]
    ) -> Optional[torch.Tensor]:
        torch.clear_autocast_cache()  # casts of weights that were made without gradients
        before = self._input(len(self.layers) - 1, grad.device)
        for number in reversed(range(len(self.layers))):
            if self.host is not None:
                self.host.wait()
            x, y = before, self._saved.pop()[1]
            before = self._input(number - 1, grad.device) if number else None
            if y is None:
                grad, found = self._run_again(number, x, grad)
            else:
                grad, found = self._gradients(number, x, y, grad)
            take(number, found)
            del x, y, found
        return grad

    def _run_again(
        self, number: int, x: torch.Tensor, grad: torch.Tensor
    ) -> Tuple[Optional[torch.Tensor], BlockGradients]:
        grads, found = [], []
        for rows in self._parts(x):
            part = x[rows].detach().requires_grad_(x.requires_grad)
            with self._marker():
                y = self._run(number, part, rows = rows)
            part_grad, more = self._gradients(number, part, y, grad[rows])
            grads.append(part_grad)
            found = [_sum(*pair) for pair in zip(found, more)] if found else more
        return _joined(grads) if x.requires_grad else None, found

    def _gradients(
        self, number: int, x: torch.Tensor, y: torch.Tensor, grad: torch.Tensor
    ) -> Tuple[Optional[torch.Tensor], BlockGradients]:
        trained = [p for p in self.layers[number].parameters() if p.requires_grad]
        inputs = ([x] if x.requires_grad else []) + trained
        if not inputs:
            return None, []
        # In this thread: another has a cuBLAS handle of its own, whose workspace a graph would keep.
        with torch.autograd.set_multithreading_enabled(False):
            found = list(torch.autograd.grad(y, inputs, grad, allow_unused = True))
        return found.pop(0) if x.requires_grad else None, found

    def warm_up(self, hidden: torch.Tensor) -> torch.Tensor:
        """One block of each kind forward, and backward as it will be; returns the last one's output."""
        kinds = {(_kind(x), keep): n for n, (x, keep) in enumerate(zip(self.layers, self.keep))}
        for number in kinds.values():
            one = BlockRuns([self.layers[number]], self.arguments, [self.keep[number]], True)
            one._forwards, one.rows = [self._forwards[number]], self.rows
            output = one.forward(hidden)
            one.backward(torch.zeros_like(output), lambda *_: None)
            if number == len(self.layers) - 1:  # the last of its kind
                last = output
        return last

    def activation_bytes(self, like: torch.Tensor, recorder: Any) -> int:
        """Bytes that one block keeps, its output among them."""
        x = torch.zeros_like(like).requires_grad_()
        self._run(-1, x)  # compiles it
        before = recorder.memory()[0]
        y = self._run(-1, x)
        self.input_bytes = max(x.nbytes, y.nbytes)
        return recorder.memory()[0] - before

    def clear(self) -> None:
        self._saved = []
