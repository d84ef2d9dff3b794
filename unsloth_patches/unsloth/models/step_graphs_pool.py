# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The memory that the CUDA graphs of a stack share, and what captures graphs in it."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import time
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from .step_graphs_blocks import HostInputs

__all__ = ["Gradients", "Pool", "apart", "make_recorder", "tell_losses"]

_peaks: Dict[torch.device, Tuple[int, int]] = {}  # what passes took at most, what was read last
CLOCK = 2e9  # cycles a second of a GPU, about; a slower one sleeps longer


class CudaRecorder:
    """recorder(function) -> replay: captures what function launches, in the recorder's pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._handle: Any = None
        self._graphs: weakref.WeakSet = weakref.WeakSet()
        self._reserved: Any = None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # what a collection frees, other graphs say, may call what no capture allows
        try:
            if not self._graphs:  # the allocator takes no handle again whose graphs are all gone
                self._handle = torch.cuda.graph_pool_handle()
            recording = torch.cuda.graph(
                graph, pool = self._handle, stream = self.stream, capture_error_mode = "thread_local"
            )
            # Its own way back to this stream is skipped where the capture's end raises.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), recording:
                function()
        finally:
            if collects:
                gc.enable()
        self._graphs.add(graph)
        return graph.replay

    def peak(self) -> int:
        """Bytes that this process had allocated, at most, but for what ran `apart`. Of times before a reset
        of the statistic, what was read then."""
        known, last = _peaks.get(self.device, (0, 0))
        now = torch.cuda.max_memory_allocated(self.device)
        if now != last:
            known = max(known, now)
            _peaks[self.device] = known, now
        return known

    def reserve(self, nbytes: int) -> None:
        """In one piece, of which captures take theirs: pieces of each length's own sizes would fit no
        other's. Not where the allocator is told to split none of that size."""
        variables = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
        if any("max_split_size_mb" in os.environ.get(name, "") for name in variables):
            return

        def take():
            torch.empty(nbytes, dtype = torch.uint8, device = self.device)[:1].zero_()

        self._reserved = self(take)  # the pool is there as long as a graph is

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
        """(the host's, the GPU's) seconds, of three the least. The GPU starts when all is launched."""
        hosts, gpus = [], []
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing = True) for _ in range(2))
            for _ in range(3):
                torch.cuda.synchronize()
                began = time.perf_counter()
                function()
                hosts.append(time.perf_counter() - began)
                torch.cuda.synchronize()
                torch.cuda._sleep(int(2 * hosts[-1] * CLOCK))
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                gpus.append(start.elapsed_time(end) / 1e3)
        return min(hosts), min(gpus)


@contextlib.contextmanager
def apart(recorder: Any) -> Iterator[None]:
    """What is allocated meanwhile is no pass's: else each pool would let the next one be larger."""
    before, device = recorder.peak(), recorder.device
    del recorder  # it holds a pool
    try:
        yield
    finally:
        _peaks[device] = before, torch.cuda.max_memory_allocated(device)


def make_recorder(device: torch.device) -> Optional[Any]:
    """What captures on this device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" and torch.version.hip is None else None


class Pool:
    """The memory that the graphs of a stack share, and the buffers by which they are told and tell.

    A buffer holds something of one pass only: the owner's, or what is copied out at once.
    """

    def __init__(
        self,
        recorder: Any,
        share: float,
        tokens: int = 1024,
    ):
        """share: of the device's memory that is free; tokens: of the largest bucket."""
        self.recorder, self.tokens, self.host = recorder, tokens, HostInputs()
        self.budget = self.room = share * recorder.memory()[1]  # room: what lengths are fitted into
        self.owner: Optional[object] = None  # the forward pass whose activations are there
        self.bytes = self.size = 0  # size: of what was reserved for captures
        self.warmed = False  # whether uncompiled blocks ran, all of them
        self._buffers: Dict[tuple, torch.Tensor] = {}
        self._gradients: Dict[tuple, Gradients] = {}

    def reserve(self, nbytes: int) -> None:
        before = self.recorder.reserved()
        self.recorder.reserve(nbytes)
        self.size = nbytes
        self.bytes += max(0, self.recorder.reserved() - before)

    def buffer(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Zeros of this shape, [rows, length, ...], at the start of the buffer ``name``."""
        count, key = math.prod(shape), (name, dtype)
        flat = self._buffers.get(key)
        if flat is None or flat.numel() < count:
            size = max(count, self.tokens * math.prod(shape[2:]))
            flat = self._buffers[key] = torch.zeros(size, dtype = dtype, device = device)
            self.bytes += flat.nbytes
        return flat[:count].view(*shape).zero_()

    def gradients(self, parameters: Sequence[torch.Tensor]) -> "Gradients":
        """Buffers for these parameters' gradients, those of another bucket where they are alike."""
        key = tuple((p.dtype, p.shape) for p in parameters)
        if key not in self._gradients:
            self._gradients[key] = made = Gradients(parameters)
            self.bytes += sum(flat.nbytes for flat in made.flat.values())
        return self._gradients[key]


class Gradients:
    """Fixed buffers for parameters' gradients, one flat buffer a dtype."""

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self.groups: Dict[torch.dtype, List[int]] = {}
        for number, parameter in enumerate(parameters):
            self.groups.setdefault(parameter.dtype, []).append(number)
        self.like = [torch.empty_like(p, device = "meta") for p in parameters]
        self.flat = {
            dtype: parameters[numbers[0]].new_zeros(sum(parameters[n].numel() for n in numbers))
            for dtype, numbers in self.groups.items()
        }
        self.views = self._views(self.flat)

    def _views(self, flat: Dict[torch.dtype, torch.Tensor]) -> List[torch.Tensor]:
        """A view for each parameter."""
        views: List[Any] = [None] * len(self.like)
        for dtype, numbers in self.groups.items():
            like = [self.like[n] for n in numbers]
            for number, view in zip(
                numbers, torch._utils._unflatten_dense_tensors(flat[dtype], like)
            ):
                views[number] = view
        return views

    def read(self) -> List[torch.Tensor]:
        """Copies: autograd keeps a first gradient as ``.grad``, and the next replay writes here."""
        return self._views({dtype: flat.clone() for dtype, flat in self.flat.items()})


def tell_losses(pool: Pool) -> None:
    """Chunked losses, which are a patch of their own, hold fewer logits beside a pool."""
    package = __package__.rpartition(".")[0]
    chunk_size = sys.modules.get(f"{package}.kernels.loss_chunk_size")
    if chunk_size is not None:
        chunk_size.graph_pools.add(pool)
