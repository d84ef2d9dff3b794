# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The shapes that step graphs are captured at, and how a batch is laid out in one of them.

A graph's shapes are fixed, so a batch's rows are padded on the right to the next length of a grid.
Causal attention never looks to the right and the padding's gradient is zero, so neither the real
tokens' values nor any gradient knows of it; what leaves the blocks has the batch's own shape again.
A packed row (packing, padding-free batches) is laid out as one row of the bucket a document.
"""

from __future__ import annotations

import bisect
from typing import Any, List, Optional, Sequence, Tuple

import torch

__all__ = [
    "PaddedRows",
    "SeparatedDocuments",
    "bucket_length",
    "split_documents",
    "lay_out",
    "unknown_argument",
]

SHORT = 512
WASTE = 0.12  # of a row's tokens at most, beyond SHORT
STEP = 16
MAX_PADDING = 2.5  # of a packed row: tokens of the bucket for each real one
_IGNORED = ("num_items_in_batch", "n_items")  # arguments of a block that it does not read
_KNOWN = ("causal_mask", "position_ids", "position_embeddings", "packed_seq_lengths")
_grid: List[int] = [64, 128, 192, 256, 384, SHORT]


def bucket_length(length: int) -> int:
    """The smallest length of the grid that holds ``length`` tokens.

    Beyond 512 each is the longest multiple of STEP that wastes no more than WASTE, or the power of two
    before that. Shorter rows leave even less for the GPU to do, and have fewer lengths.
    """
    while _grid[-1] < length:
        last = _grid[-1]
        longest = int((1 + WASTE) * (last + 1)) // STEP * STEP
        _grid.append(min(longest, 1 << last.bit_length()))
    return _grid[bisect.bisect_left(_grid, length)]


class PaddedRows:
    """``rows`` sequences of ``length`` tokens, each at the start of a row of ``bucket`` tokens."""

    def __init__(self, rows: int, length: int, bucket: int):
        self.rows, self.length, self.bucket = rows, length, bucket
        self.real = rows * length

    def write(self, values: torch.Tensor, buffer: torch.Tensor) -> None:
        """[rows, length, ...] into [rows, bucket, ...], zeros behind it."""
        buffer[:, : self.length].copy_(values)
        if self.length < self.bucket:
            buffer[:, self.length :].zero_()

    def read(self, buffer: torch.Tensor) -> torch.Tensor:
        """[rows, bucket, ...] -> [rows, length, ...], a copy."""
        return buffer[:, : self.length].clone(memory_format = torch.contiguous_format)


class SeparatedDocuments:
    """The documents of one packed row, each at the start of a row of ``bucket`` tokens."""

    def __init__(self, documents: Sequence[int], bucket: int, device: torch.device):
        self.rows, self.bucket, self.real = len(documents), bucket, sum(documents)
        places = torch.cat([torch.arange(n) + row * bucket for row, n in enumerate(documents)])
        if device.type == "cuda":  # pinned: a pageable copy would wait for the GPU
            places = places.pin_memory().to(device, non_blocking = True)
        self.places = places

    def write(self, values: torch.Tensor, buffer: torch.Tensor) -> None:
        """[1, tokens, ...] into [documents, bucket, ...], zeros elsewhere."""
        buffer.zero_()
        buffer.view(-1, *buffer.shape[2:]).index_copy_(0, self.places, values[0].to(buffer.dtype))

    def read(self, buffer: torch.Tensor) -> torch.Tensor:
        """[documents, bucket, ...] -> [1, tokens, ...], a copy."""
        return buffer.view(-1, *buffer.shape[2:]).index_select(0, self.places).unsqueeze(0)


def split_documents(lengths: torch.Tensor, tokens: int) -> Optional[Tuple[int, ...]]:
    """The lengths of a packed row's documents; what they leave of the row is one more. None if they
    overrun it."""
    found = [n for n in lengths.reshape(-1).tolist() if n > 0]
    rest = tokens - sum(found)
    if rest < 0:
        return None
    return tuple(found + [rest] if rest else found)


def unknown_argument(kwargs: dict) -> str:
    """A reason why a block's arguments are not those of causal attention alone, or ''."""
    for name, value in kwargs.items():
        if name in _IGNORED or name in _KNOWN or value is None or value is False:
            continue
        return "an attention mask" if name == "attention_mask" else f"the argument {name}"
    mask = kwargs.get("causal_mask")
    if mask is not None and type(mask).__name__ != "LowerTriangularMask":
        return f"a {type(mask).__name__}"
    return ""


def lay_out(
    hidden: torch.Tensor,
    kwargs: dict,
    longer: int = 0,
) -> Tuple[str, Any]:
    """('', layout), or (reason, None). hidden: [rows, tokens, width]; kwargs: a block's.

    longer: the length of a row, if not the next of the grid.
    """
    batch, tokens = hidden.shape[:2]
    lengths, rope = kwargs.get("packed_seq_lengths"), kwargs.get("position_embeddings")
    longest, documents = tokens, ()
    if lengths is not None:
        documents = split_documents(lengths, tokens) if batch == 1 else None
        if not documents:
            return "packed lengths that are not those of one row", None
        longest = max(documents)
    bucket = longer or bucket_length(longest)
    if rope:  # beyond its tables a block would make larger ones
        bucket = min(bucket, rope[0].shape[0])
    if bucket < longest:
        return "rows longer than the rope tables", None
    padded = bucket * (len(documents) or batch)
    if not documents:
        return "", PaddedRows(batch, tokens, bucket)
    if padded > MAX_PADDING * tokens and padded > 2 * SHORT:
        return "packed documents of too different lengths", None
    return "", SeparatedDocuments(documents, bucket, hidden.device)
