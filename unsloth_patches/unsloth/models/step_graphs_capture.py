# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One captured bucket: fixed buffers, and two CUDA graphs that read and write them.

All buckets share a memory pool, so what a forward graph leaves there for its backward graph lives
until any graph of the pool is replayed again. ``Pool.owner`` says whose it is; a backward pass that
finds another there replays its forward pass first, from the input that autograd has kept.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from .step_graphs_blocks import BlockRuns, own_leaves
from .step_graphs_pool import Gradients, Pool, tell_losses

__all__ = ["Bucket", "replay_blocks"]

GROWTH = 1.25  # memory is reserved for lengths that need so much more
WORK = 1.75  # times what a block's backward pass reads is what it holds
WORKSPACE = 32 << 20  # cuBLAS', on Hopper


def _decoded_bytes(weight: torch.Tensor) -> int:
    """Of a 4-bit weight; 0 of another."""
    state = getattr(weight, "quant_state", None)
    return 0 if state is None else math.prod(state.shape) * state.dtype.itemsize


class Bucket:
    """The graphs of one shape and their buffers: input, positions, output and gradients.

    shape: [rows, length, width] of the blocks' input; like: hidden states of its dtype and device.
    arguments: a block's, but for the positions, which are the bucket's own [rows, length].
    """

    def __init__(
        self,
        pool: Pool,
        layers: Sequence[torch.nn.Module],
        shape: Sequence[int],
        arguments: Dict[str, Any],
        like: torch.Tensor,
        has_positions: bool,
        compiled: bool = True,
    ):
        self.pool, self.wants_input, self._compiled = pool, like.requires_grad, compiled
        self._layers = list(layers)
        trained = [[p for p in x.parameters() if p.requires_grad] for x in layers]
        self.parameters = [p for each in trained for p in each]
        self._first = [0, *itertools.accumulate(map(len, trained))]  # parameter of a layer
        # Its own until it is captured.
        self.input = torch.zeros(shape, dtype = like.dtype, device = like.device)
        # What comes out: the output, and in the backward pass the gradient of first that, then the input.
        self.output: Optional[torch.Tensor] = None  # its dtype is known after the first run
        self.positions = None
        if has_positions:
            self.positions = torch.zeros(shape[:2], dtype = torch.int32, device = like.device)
            arguments = {**arguments, "position_ids": self.positions}
        self.frozen = False  # whether a replay met a weight of it that wants no gradient now
        self._runs = BlockRuns(layers, arguments, [False] * len(layers), self.wants_input, compiled)
        self.gradients: Optional[Gradients] = None
        self._unused: List[int] = []  # parameters that get no gradient
        self.block_bytes = 0
        self.split = False  # whether some rows run at once
        # Known once captured: until then nothing holds itself, and a pool that is given up is free.
        self.forward: Optional[Callable[[], None]] = None
        self.backward: Optional[Callable[[], None]] = None

    def _forward(self) -> None:
        self._tell(self._runs.forward(self.input))

    def _tell(self, output: torch.Tensor) -> None:
        if self.output is None:
            self.output = self.pool.buffer("output", output.shape, output.dtype, output.device)
        self.output.copy_(output)

    def _backward(self) -> None:
        self._unused = []
        input_grad = self._runs.backward(self.output, self._take_gradients)
        if self.wants_input:
            self.output.copy_(input_grad)

    def _take_gradients(self, layer: int, grads: Sequence[Optional[torch.Tensor]]) -> None:
        numbered = list(enumerate(grads, self._first[layer]))
        self._unused += [number for number, grad in numbered if grad is None]
        used = [
            (self.gradients.views[number], grad) for number, grad in numbered if grad is not None
        ]
        if used:
            torch._foreach_copy_(*map(list, zip(*used)))

    def read_gradients(self) -> List[Optional[torch.Tensor]]:
        """One a parameter, in order; None for what takes no part."""
        found: List[Optional[torch.Tensor]] = list(self.gradients.read())
        for number in self._unused:
            found[number] = None
        return found

    def tokens(self) -> int:
        return self.input.shape[0] * self.input.shape[1]

    def keep_last(self, count: int) -> None:
        """Lets the last ``count`` blocks keep their activations; the others run again."""
        keep = self._runs.keep
        self._runs.keep = [number >= len(keep) - count for number in range(len(keep))]

    def measure(self) -> None:
        """What one block keeps for its backward pass, which is 0 where that cannot be measured."""
        self.block_bytes = self._runs.activation_bytes(self.input, self.pool.recorder)

    def outside_bytes(self) -> int:
        """Of what no graph frees: input, output and gradients, of the pool or of one that is long enough."""
        tokens, longest = self.tokens(), self.pool.tokens
        if tokens > longest:
            longest = int(GROWTH * tokens)
        buffers = 2 * self._runs.input_bytes * longest // tokens
        return buffers + sum(p.nbytes for p in self.parameters)

    def graph_bytes(self) -> int:
        """What the graphs are expected to hold at most: kept activations, other blocks' inputs, of those
        on the host three at a time, and one block's work."""
        runs, rows = self._runs, self.input.shape[0]
        inputs = 3 if runs.host is not None else runs.keep.count(False)
        work = WORK * (runs.rows or rows) / rows + sum(runs.keep)
        weights = (p for layer in self._layers for p in layer.parameters())
        fixed = 2 * max(map(_decoded_bytes, weights), default = 0) + WORKSPACE
        return inputs * runs.input_bytes + int(work * self.block_bytes) + fixed

    def fit_into(self, room: float, keeping: float) -> bool:
        """Chooses where the graphs hold what, so that they are expected to fit; False where they do not.

        First all of it on the GPU, and activations that need no second run in what they leave of
        ``keeping`` bytes; then inputs on the host; then half the rows at once, and so on.
        """
        if self.graph_bytes() <= room:
            spare = keeping - self.graph_bytes()
            if spare > 0 and self.block_bytes:
                self.keep_last(min(len(self._layers), int(spare // self.block_bytes)))
            return True
        self.inputs_on_host()
        rows = self.input.shape[0]
        while self.graph_bytes() > room and rows > 1:
            rows = -(-rows // 2)
            self.some_rows_at_once(rows)
        return self.graph_bytes() <= room

    def inputs_on_host(self) -> None:
        self._runs.host = self.pool.host

    def host_has_room(self) -> bool:
        """For the inputs that are to be there; takes it."""
        try:
            if self._runs.host is not None:
                nbytes = len(self._layers) * self._runs.input_bytes
                self._runs.host.reserve(nbytes, self.input.device)
        except RuntimeError:
            return False
        return True

    def some_rows_at_once(self, rows: int) -> None:
        self._runs.some_rows_at_once(rows)
        self._compiled, self.split = False, True

    def _warm_up(self) -> None:
        """Runs uncaptured, so that everything is compiled and tuned.

        Of uncompiled blocks, once all have run, one of each kind says all about another length.
        Compiled ones have guards of their own, so they all run.
        """
        if self.pool.warmed and not self._compiled:
            self._tell(self._runs.warm_up(self.input))  # the buffer must not be the graph's
        else:
            self._forward()
            self._backward()
            self.pool.warmed = self.pool.warmed or not self._compiled

    def seconds(self) -> Tuple[float, float]:
        """The host's and the GPU's for one uncaptured block of a kind: it takes little memory."""
        with own_leaves(self._layers):
            torch.clear_autocast_cache()
            self._runs.warm_up(self.input)  # compiles
            return self.pool.recorder.timed(lambda: self._runs.warm_up(self.input))

    def capture(self, reserve: int = 0) -> None:
        """Runs uncaptured, then captures both passes, in a pool of which so many bytes are reserved."""
        self.pool.owner = None  # its input is written over from here on
        self._use_buffers()
        try:
            with own_leaves(self._layers):
                torch.clear_autocast_cache()
                self._warm_up()
            torch.clear_autocast_cache()  # casts made here would be read by the graphs, grow old
            if reserve:  # not before: what the blocks need outside of it is free again
                self.pool.reserve(reserve)
            with own_leaves(self._layers):  # others: those have met the stream of the first run
                before = self.pool.recorder.reserved()
                self.forward = self.pool.recorder(self._forward)
                self.backward = self.pool.recorder(self._backward)
                self.pool.bytes += max(0, self.pool.recorder.reserved() - before)
            tell_losses(self.pool)
        finally:
            self.close()

    def _use_buffers(self) -> None:
        like, pool = self.input, self.pool
        self.input = pool.buffer("input", like.shape, like.dtype, like.device)
        if self.positions is not None:
            shape = self.positions.shape
            self.positions = pool.buffer("positions", shape, torch.int32, like.device)
            self._runs.arguments["position_ids"] = self.positions
        self.gradients = pool.gradients(self.parameters)

    def close(self) -> None:
        """Lets go of all that is needed until it is captured, or is not."""
        torch.clear_autocast_cache()
        self.pool.owner = None
        if self._runs is not None:
            self._runs.clear()
        self._runs = self._layers = None

    def run_forward(self, layout: Any, hidden: torch.Tensor, positions: Any) -> object:
        """Replays the forward pass; returns the new owner of the pool."""
        layout.write(hidden, self.input)
        if self.positions is not None:
            layout.write(positions, self.positions)
        self.forward()
        self.pool.owner = owner = object()
        return owner


class _Replay(torch.autograd.Function):
    """hidden states -> hidden states, by a bucket's graphs."""

    @staticmethod
    def forward(ctx, bucket, layout, state, positions, hidden, *parameters):
        ctx.layout, ctx.state = layout, state
        ctx.owner = bucket.run_forward(layout, hidden, positions)
        bucket.frozen = not all(ctx.needs_input_grad[5:])
        holder = torch.empty(0)  # goes with the backward pass, while a loss that is kept holds ctx
        holder.bucket = bucket
        ctx.save_for_backward(hidden, positions, holder)
        return layout.read(bucket.output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, positions, holder = ctx.saved_tensors
        bucket, layout = holder.bucket, ctx.layout
        held = ctx.state.readable()
        if held:
            # Another pass came between, or this is the second.
            if bucket.pool.owner is not ctx.owner:
                bucket.run_forward(layout, hidden, positions)
            bucket.pool.owner = None
            layout.write(grad, bucket.output)
            bucket.backward()
        if not held or ctx.state.moved():  # asked while the GPU is at work
            raise RuntimeError(
                "Unsloth: weights of the decoder blocks were moved or replaced between a forward "
                "pass and its backward pass. Run the backward pass first, or set "
                "UNSLOTH_STEP_GRAPHS=0."
            )
        input_grad = layout.read(bucket.output) if ctx.needs_input_grad[4] else None
        return (None, None, None, None, input_grad, *bucket.read_gradients())


def replay_blocks(
    bucket: Bucket, layout: Any, hidden: torch.Tensor, positions: Optional[torch.Tensor], state: Any
) -> torch.Tensor:
    """What the blocks make of ``hidden`` [rows, tokens, width]. state: their BlockState."""
    return _Replay.apply(bucket, layout, state, positions, hidden, *bucket.parameters)
