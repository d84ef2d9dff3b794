# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What the chunked losses share: checked inputs, blocks of logits, the head's gradients.

A loss of ``hidden @ weight.T`` is computed a few hundred to a few thousand rows at a time. One
buffer holds the logits of a chunk and then, in place, their gradients; two or three matrix
products a chunk are all that happens beside it.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import Iterator, Optional, Tuple

import torch

from ..cross_entropy_spec import narrow_view, padded_columns, uses_triton
from .loss_chunk_size import choose_chunk_rows

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_HALF = (torch.float16, torch.bfloat16)


# ------------------------------------------------------------------------------- inputs


@dataclass
class HeadInputs:
    """hidden [rows, width], weight [vocab, width] and bias [vocab] as the products take them.

    shape: hidden's leading dimensions, which per-row results are given back in.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: Optional[torch.Tensor]
    shape: torch.Size


def prepare_head(
    name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
) -> HeadInputs:
    """Checks a head's tensors, and casts them as ``torch.autocast`` would for a linear layer.

    Raises TypeError for dtypes and ValueError for shapes and devices that do not fit together.
    """
    given = (("hidden", hidden), ("weight", weight), ("bias", bias))
    for label, tensor in given if bias is not None else given[:2]:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: {label} must be a tensor, got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name}: {label} must hold floating point numbers, got {tensor.dtype}; "
                "dequantize a quantized head first."
            )
    weight = _whole(weight)
    bias = None if bias is None else _whole(bias)
    if weight.dim() != 2:
        raise ValueError(
            f"{name}: weight must be [vocab, hidden], got shape {tuple(weight.shape)}."
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden has shape {tuple(hidden.shape)}, whose last dimension must be "
            f"{weight.shape[1]}, as weight is {tuple(weight.shape)} ([vocab, hidden])."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}."
        )
    check_device(name, hidden, weight = weight, bias = bias)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{name}: hidden is {hidden.dtype} and weight {weight.dtype}; cast one of them "
            "(hidden.to(weight.dtype)) or run under torch.autocast."
        )
    flat = hidden.reshape(-1, hidden.shape[-1])
    return HeadInputs(flat, weight, bias, hidden.shape[:-1])


def check_device(name: str, hidden: torch.Tensor, **tensors: Optional[torch.Tensor]) -> None:
    """Raises ValueError when one of ``tensors`` is elsewhere than hidden."""
    for label, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name}: {label} is on {tensor.device} and hidden on {hidden.device}; "
                f"move {label} with .to(hidden.device)."
            )


class _GatherShards(torch.autograd.Function):
    """A sharded parameter whole; its gradient averaged over the ranks and sharded again.

    FSDP2 does the same around a module's forward. It is for heads whose weight is read without
    calling the module.
    """

    @staticmethod
    def forward(ctx, parameter):
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        return parameter.full_tensor()

    @staticmethod
    def backward(ctx, gradient):
        from torch.distributed.tensor import DTensor, Partial

        shares = gradient / ctx.mesh.size()
        everyone = [Partial("sum")] * ctx.mesh.ndim
        summed = DTensor.from_local(shares, ctx.mesh, everyone, run_check = False)
        return summed.redistribute(placements = ctx.placements)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return _GatherShards.apply(parameter) if hasattr(parameter, "full_tensor") else parameter


def active_rows(keep: torch.Tensor) -> Tuple[Optional[torch.Tensor], int]:
    """(indices of the rows to keep, how many); the indices are None when all are kept.

    The count has to reach the host: the one wait for the GPU in a loss.
    """
    index = keep.nonzero().squeeze(1)
    count = index.shape[0]
    return (None if count == keep.shape[0] else index), count


def without_autocast(kind: str):
    """Inside, matrix products keep their inputs' dtypes; free where autocast is off anyway."""
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled = False)
    return contextlib.nullcontext()


# ------------------------------------------------------------------------------- products


def project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = hidden @ weight.T, in out's dtype."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out = out)
    elif hidden.is_cuda and hidden.dtype in _HALF and out.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out_dtype = torch.float32, out = out)
    else:
        wide = hidden.to(out.dtype)
        for start in range(0, weight.shape[0], 8192):  # no second copy of the whole head
            part = slice(start, start + 8192)
            torch.mm(wide, weight[part].to(out.dtype).t(), out = out[:, part])


def multiply_(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, accumulate: bool
) -> None:
    """out = alpha * left @ right, plus out where ``accumulate``; otherwise out is not read."""
    beta = 1 if accumulate else 0
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta = beta, alpha = alpha, out = out)
    elif left.is_cuda and left.dtype in _HALF and out.dtype == torch.float32:
        torch.addmm(out, left, right, out_dtype = torch.float32, beta = beta, alpha = alpha, out = out)
    else:
        wide = (left.to(out.dtype), right.to(out.dtype))
        torch.addmm(out, *wide, beta = beta, alpha = alpha, out = out)


if triton is not None:

    @triton.jit
    def _scale_kernel(values_ptr, factor_ptr, size, BLOCK: tl.constexpr):
        factor = tl.load(factor_ptr)
        # Nearly every backward starts with a gradient of exactly 1: then nothing is touched.
        if factor != 1.0:
            offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < size
            values = tl.load(values_ptr + offsets, mask = inside).to(tl.float32)
            tl.store(
                values_ptr + offsets, (values * factor).to(values_ptr.dtype.element_ty), mask = inside
            )


def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """tensor *= factor (0-dim), in float32 at least and without waiting for the GPU."""
    if tensor.numel() == 0:
        return tensor
    if tensor.is_cuda and uses_triton(tensor):
        block = 4096
        size = tensor.numel()
        _scale_kernel[(triton.cdiv(size, block),)](tensor, factor.float(), size, BLOCK = block)
        return tensor
    value = factor.item()
    return tensor if value == 1.0 else tensor.mul_(value)


# ------------------------------------------------------------------------------- chunks


@dataclass
class Chunk:
    """Rows ``start:stop`` of those that take part, their hidden states and logits.

    index: their places among all rows, or None where they are rows start:stop themselves.
    logits: [rows, vocab], raw; a view of the one buffer, which the next chunk overwrites.
    """

    start: int
    stop: int
    index: Optional[torch.Tensor]
    hidden: torch.Tensor
    logits: torch.Tensor

    def take_rows(
        self,
        tensor: torch.Tensor,
        dim: int = 0,
    ) -> torch.Tensor:
        """These rows of a tensor whose dimension ``dim`` has all rows."""
        if self.index is None:
            return tensor.narrow(dim, self.start, self.stop - self.start)
        return tensor.index_select(dim, self.index)

    def place(
        self,
        part: torch.Tensor,
        whole: torch.Tensor,
        dim: int = 0,
    ) -> None:
        """Writes ``part`` where ``take_rows(whole, dim)`` reads."""
        if self.index is None:
            self.take_rows(whole, dim).copy_(part)
        else:
            whole.index_copy_(dim, self.index, part.to(whole.dtype))

    def gradients(self, dtype: torch.dtype) -> torch.Tensor:
        """Where the gradients by the logits go: over them, in the dtype that the products take."""
        return narrow_view(self.logits, dtype)


@dataclass(frozen = True)
class ChunkPlan:
    """Which rows take part, how many at once, and the dtype the logits are held in."""

    index: Optional[torch.Tensor]
    count: int
    rows: int
    logits_dtype: torch.dtype

    @staticmethod
    def make(
        head: HeadInputs,
        keep: Optional[torch.Tensor],
        chunk_rows: Optional[int],
        logits_dtype: Optional[torch.dtype] = None,
        bytes_per_logit: int = 0,
    ) -> "ChunkPlan":
        """keep: bool [rows], the rows that take part, or None for all.

        bytes_per_logit: what the loss holds for each logit, where that is more than the logits.
        """
        dtype = logits_dtype or head.hidden.dtype
        vocab_size = head.weight.shape[0]
        size = bytes_per_logit or dtype.itemsize
        device, rows = head.hidden.device, head.hidden.shape[0]
        trained = head.weight.requires_grad and torch.is_grad_enabled()
        gradient = head.weight.numel() * head.weight.element_size() if trained else 0
        frozen = head.hidden.requires_grad and torch.is_grad_enabled() and not trained
        tried = dtype == head.hidden.dtype and dtype in _HALF and frozen
        products = (head.hidden, head.weight) if tried else None
        # Before the rows are counted, while the GPU still works on what comes before the loss.
        at_once = choose_chunk_rows(rows, vocab_size, size, device, chunk_rows, gradient, products)
        index, count = (None, rows) if keep is None else active_rows(keep)
        return ChunkPlan(index, count, max(1, min(at_once, count)), dtype)

    def of_rows(self, keep: torch.Tensor) -> "ChunkPlan":
        """This plan with the indices of ``keep``, which it was made with: they need not be held until then."""
        return self if self.count == keep.shape[0] else replace(self, index = active_rows(keep)[0])


def _logits_buffer(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device):
    """[rows or fewer, padded vocab]: half the rows again and again while the memory is not there."""
    while True:
        try:
            return torch.empty((rows, padded_columns(vocab_size)), dtype = dtype, device = device)
        except torch.OutOfMemoryError:
            if rows <= 16:
                raise
            rows //= 2


def iterate_chunks(hidden: torch.Tensor, weight: torch.Tensor, plan: ChunkPlan) -> Iterator[Chunk]:
    """The logits of the rows that take part, chunk after chunk, in one buffer."""
    if plan.count == 0:
        return
    vocab_size = weight.shape[0]
    buffer = _logits_buffer(plan.rows, vocab_size, plan.logits_dtype, hidden.device)
    step = buffer.shape[0]
    for start in range(0, plan.count, step):
        stop = min(start + step, plan.count)
        index = None if plan.index is None else plan.index[start:stop]
        rows = hidden[start:stop] if index is None else hidden.index_select(0, index)
        logits = buffer[: stop - start, :vocab_size]
        project(rows, weight, logits)
        yield Chunk(start, stop, index, rows, logits)


class HeadGradients:
    """Gradients by hidden, weight and bias, summed up chunk by chunk.

    wanted: (hidden, weight, bias). Rows that take no part get zeros.
    accumulate_dtype: what the weight's gradient is summed in; float16 is always summed in float32,
        as its sums may pass 65504.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        wanted: Tuple[bool, bool, bool],
        plan: ChunkPlan,
        accumulate_dtype: Optional[torch.dtype] = None,
    ):
        self._weight = weight
        self._began = False
        self.hidden = self.weight = self.bias = None
        if wanted[0]:
            whole = plan.index is None and plan.count > 0
            self.hidden = torch.empty_like(hidden) if whole else torch.zeros_like(hidden)
            if not self.hidden.is_contiguous():
                self.hidden = torch.zeros(hidden.shape, dtype = hidden.dtype, device = hidden.device)
        if wanted[1]:
            half = weight.dtype == torch.float16
            dtype = torch.float32 if half else accumulate_dtype or weight.dtype
            make = torch.empty if plan.count else torch.zeros
            self.weight = make(weight.shape, dtype = dtype, device = weight.device)
        if wanted[2]:
            dtype = torch.float64 if bias.dtype == torch.float64 else torch.float32
            self.bias = torch.zeros(bias.shape, dtype = dtype, device = bias.device)

    def add(
        self,
        chunk: Chunk,
        logit_grads: torch.Tensor,
        alpha: float = 1.0,
    ) -> None:
        """Adds alpha times what a chunk's logit gradients, in the head's dtype, give."""
        if self.hidden is not None:
            whole = chunk.index is None
            part = chunk.take_rows(self.hidden) if whole else torch.empty_like(chunk.hidden)
            multiply_(part, logit_grads, self._weight, alpha, False)
            if not whole:
                chunk.place(part, self.hidden)
        if self.weight is not None:
            multiply_(self.weight, logit_grads.t(), chunk.hidden, alpha, self._began)
        if self.bias is not None:
            self.bias.add_(logit_grads.sum(0, dtype = self.bias.dtype), alpha = alpha)
        self._began = True

    def scaled(self, factor: torch.Tensor, bias: Optional[torch.Tensor]):
        """(hidden, weight, bias) gradients times factor, in the inputs' dtypes; uses up the sums."""
        pairs = ((self.hidden, self.hidden), (self.weight, self._weight), (self.bias, bias))
        self.hidden = self.weight = self.bias = None
        return tuple(None if s is None else scale_(s, factor).to(like.dtype) for s, like in pairs)
