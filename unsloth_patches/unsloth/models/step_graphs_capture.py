# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One captured bucket: fixed buffers, and two CUDA graphs that read and write them.

All buckets share a memory pool, so what a forward graph leaves there for its backward graph lives
until any graph of the pool is replayed again. ``Pool.owner`` says whose it is; a backward pass that
finds another there replays its forward pass first, from the input that autograd has kept.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from .step_graphs_blocks import BlockRuns, own_leaves

__all__ = ["Bucket", "Pool", "make_recorder", "replay_blocks"]


class CudaRecorder:
    """recorder(function) -> replay: captures what function launches, in the recorder's pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._handle: Any = None
        self._graphs: weakref.WeakSet = weakref.WeakSet()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # what a collection frees, other graphs say, may call what no capture allows
        try:
            if not self._graphs:  # the allocator takes no handle again whose graphs are all gone
                self._handle = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(
                graph, pool = self._handle, stream = self.stream, capture_error_mode = "thread_local"
            ):
                function()
        finally:
            if collects:
                gc.enable()
        self._graphs.add(graph)
        return graph.replay

    def memory(self) -> Tuple[int, int]:
        """(bytes allocated, bytes free on the device: cached ones are what a pass needs at its peak)"""
        return torch.cuda.memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[0]

    def room(self) -> int:
        """Bytes that no tensor has; those of a pool between two replays are among them."""
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return cached + torch.cuda.mem_get_info(self.device)[0]

    def reserved(self) -> int:
        """Bytes that are taken, but for what the allocator could give back."""
        torch.cuda.empty_cache()  # a capture does so, too: else its pool would seem smaller by that
        return torch.cuda.memory_reserved(self.device)

    def timed(self, function: Callable[[], None]) -> Tuple[float, float]:
        """(the host's, the GPU's) seconds; the GPU's include its waits for the host."""
        start, end = (torch.cuda.Event(enable_timing = True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        began = time.perf_counter()
        function()
        host = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize(self.device)
        return host, start.elapsed_time(end) / 1e3


def make_recorder(device: torch.device) -> Optional[Any]:
    """What captures on this device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" and torch.version.hip is None else None


class Pool:
    """The memory that the graphs of a stack share, and the buffers by which they are told and tell.

    A buffer holds something of one pass only: the owner's, or what is copied out at once.
    """

    def __init__(self, recorder: Any, share: float):
        self.recorder = recorder
        self.budget = share * recorder.memory()[1]
        self.owner: Optional[object] = None  # the forward pass whose activations are there
        self.bytes = 0
        self.warmed = False  # whether uncompiled blocks ran, all of them
        self._buffers: Dict[tuple, torch.Tensor] = {}
        self._gradients: Dict[tuple, "_Gradients"] = {}

    def buffer(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Zeros of this shape at the start of the buffer ``name``; buckets that have an older, smaller
        one keep it."""
        count, key = math.prod(shape), (name, dtype)
        flat = self._buffers.get(key)
        if flat is None or flat.numel() < count:
            size = max(count, 2 * flat.numel() if flat is not None else 0)
            flat = self._buffers[key] = torch.zeros(size, dtype = dtype, device = device)
            self.bytes += flat.nbytes
        return flat[:count].view(*shape).zero_()

    def gradients(self, grads: Sequence[Optional[torch.Tensor]]) -> "_Gradients":
        """Buffers for these gradients, those of another bucket where they are alike."""
        key = tuple(None if g is None else g.dtype for g in grads)
        if key not in self._gradients:
            self._gradients[key] = made = _Gradients(grads)
            self.bytes += 2 * sum(flat.nbytes for flat in made.flat.values())  # one is read
        return self._gradients[key]


def _tell_losses(pool: Pool) -> None:
    """Chunked losses, which are a patch of their own, hold fewer logits beside a pool."""
    package = __package__.rpartition(".")[0]
    chunk_size = sys.modules.get(f"{package}.kernels.loss_chunk_size")
    if chunk_size is not None:
        chunk_size.graph_pools.add(pool)


class _Gradients:
    """Fixed buffers for parameters' gradients, one flat buffer a dtype."""

    def __init__(self, grads: Sequence[Optional[torch.Tensor]]):
        self.groups: Dict[torch.dtype, List[int]] = {}
        for number, grad in enumerate(grads):
            if grad is not None:
                self.groups.setdefault(grad.dtype, []).append(number)
        self.count = len(grads)
        self.like = [None if g is None else torch.empty_like(g, device = "meta") for g in grads]
        device = next((g.device for g in grads if g is not None), None)
        self.flat = {
            dtype: torch.zeros(sum(grads[n].numel() for n in numbers), dtype = dtype, device = device)
            for dtype, numbers in self.groups.items()
        }

    def _views(self, dtype: torch.dtype, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        like = [self.like[n] for n in self.groups[dtype]]
        return torch._utils._unflatten_dense_tensors(flat, like)

    def write(self, grads: Sequence[Optional[torch.Tensor]]) -> None:
        for dtype, numbers in self.groups.items():
            views = self._views(dtype, self.flat[dtype])
            torch._foreach_copy_(list(views), [grads[n] for n in numbers])

    def read(self) -> List[Optional[torch.Tensor]]:
        """Copies: autograd keeps a first gradient as ``.grad``, and the next replay writes here."""
        found: List[Optional[torch.Tensor]] = [None] * self.count
        for dtype, numbers in self.groups.items():
            for number, view in zip(numbers, self._views(dtype, self.flat[dtype].clone())):
                found[number] = view
        return found


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
        pool.owner = None  # its input is written over from here on
        self.pool, self.wants_input, self._compiled = pool, like.requires_grad, compiled
        self._layers = list(layers)
        self.parameters = [p for x in layers for p in x.parameters() if p.requires_grad]
        self.input = pool.buffer("input", shape, like.dtype, like.device)
        # What comes out: the output, and in the backward pass the gradient of first that, then the input.
        self.output: Optional[torch.Tensor] = None  # its dtype is known after the first run
        self.positions = None
        if has_positions:
            self.positions = pool.buffer("positions", shape[:2], torch.int32, like.device)
            arguments = {**arguments, "position_ids": self.positions}
        self.frozen = False  # whether a replay met a weight of it that wants no gradient now
        self._runs = BlockRuns(layers, arguments, [False] * len(layers), self.wants_input, compiled)
        self.gradients: Optional[_Gradients] = None
        self.forward: Callable[[], None] = self._forward
        self.backward: Callable[[], None] = self._backward

    def _forward(self) -> None:
        self._tell(self._runs.forward(self.input))

    def _tell(self, output: torch.Tensor) -> None:
        if self.output is None:
            self.output = self.pool.buffer("output", output.shape, output.dtype, output.device)
        self.output.copy_(output)

    def _backward(self) -> None:
        input_grad, grads = self._runs.backward(self.output)
        if self.gradients is None:
            self.gradients = self.pool.gradients(grads)
        self.gradients.write(grads)
        if self.wants_input:
            self.output.copy_(input_grad)

    def keep_last(self, count: int) -> None:
        """Lets the last ``count`` blocks keep their activations; the others run again."""
        keep = self._runs.keep
        self._runs.keep = [number >= len(keep) - count for number in range(len(keep))]

    def held_bytes(self) -> int:
        """Bytes of all blocks' inputs, and of gradients with the copy that is read."""
        inputs = len(self._layers) * self.input.nbytes
        return inputs + 2 * sum(p.nbytes for p in self.parameters)

    def activation_bytes(self) -> int:
        """What one block keeps for its backward pass; 0 where that cannot be measured."""
        return self._runs.activation_bytes(self.input, self.pool.recorder)

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

    def capture(self, bound: Optional[float] = None) -> bool:
        """Runs uncaptured, then captures both passes.

        bound: do so only if the GPU takes no longer than that times the host; True if it was done.
        """
        try:
            with own_leaves(self._layers):
                torch.clear_autocast_cache()
                if bound is not None:  # asked of one block of a kind: it takes little memory

                    def one_of_each():
                        self._runs.warm_up(self.input)

                    one_of_each()  # compiles
                    host, gpu = self.pool.recorder.timed(one_of_each)
                    if gpu > bound * host:
                        return False
                self._warm_up()
            with own_leaves(self._layers):  # others: those have met the stream of the first run
                torch.clear_autocast_cache()  # casts made here would be read by the graphs, grow old
                before = self.pool.recorder.reserved()
                self.forward = self.pool.recorder(self._forward)
                self.backward = self.pool.recorder(self._backward)
                self.pool.bytes += max(0, self.pool.recorder.reserved() - before)
            _tell_losses(self.pool)
        finally:
            torch.clear_autocast_cache()
            self.pool.owner = None
            self._runs.clear()
            self._runs = self._layers = None
        return True

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
        ctx.bucket, ctx.layout, ctx.state = bucket, layout, state
        ctx.owner = bucket.run_forward(layout, hidden, positions)
        bucket.frozen = not all(ctx.needs_input_grad[5:])
        ctx.save_for_backward(hidden, positions)
        return layout.read(bucket.output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, positions = ctx.saved_tensors
        bucket, layout = ctx.bucket, ctx.layout
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
        return (None, None, None, None, input_grad, *bucket.gradients.read())


def replay_blocks(
    bucket: Bucket, layout: Any, hidden: torch.Tensor, positions: Optional[torch.Tensor], state: Any
) -> torch.Tensor:
    """What the blocks make of ``hidden`` [rows, tokens, width]. state: their BlockState."""
    return _Replay.apply(bucket, layout, state, positions, hidden, *bucket.parameters)
