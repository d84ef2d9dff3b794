# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Compile decoder blocks for packed rows too: packing, and SFTTrainer's padding-free batches.

Unsloth's fast forward pass reads the documents' lengths on the host inside the attention, which
cannot be traced, so packed batches left every block uncompiled. What needs the host is made here
before the block is entered: the documents' offsets as a tensor, and the longest length as the size
of an empty tensor, so that neither becomes a constant of the graph. In the graph PyTorch's flash
attention reads them.

Only where that kernel runs, which is tried once: CUDA capability 8.0 or newer, float16 or bfloat16.
Elsewhere packed batches run as before, and so do blocks with experts: compiled, those took a
quarter more memory and no less time. ``UNSLOTH_BLOCK_COMPILE_PACKED=0`` switches this off.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch

__all__ = [
    "PackedRow",
    "attend_to_packed_rows",
    "compile_packed_rows",
    "prepare_packed_rows",
    "prepared_packed_rows",
]

VARIABLE = "UNSLOTH_BLOCK_COMPILE_PACKED"
LENGTHS, ROW = "packed_seq_lengths", "packed_row"  # keyword arguments of a decoder layer
# What may be given beside packed lengths only in cases that stay uncompiled.
_OTHERS = ("attention_mask", "past_key_value", "past_key_values", "prefix_seg_info", "padding_mask")
# Their packed attention is causal, without a soft cap, and takes its lengths from _PACKED_INFO.
_ATTENTION = (
    "LlamaAttention_fast_forward",
    "MistralAttention_fast_forward",
    "Qwen3Attention_fast_forward",
)
_prepared = "_unsloth_packed_rows"
_last: dict = {}  # the last batch's row: all layers, and their recomputes, share it


class PackedRow(NamedTuple):
    """The documents of one packed row, as inputs of a graph.

    lengths: as the caller gave them, for a block that runs uncompiled after all. offsets:
    [documents + 1] int32 on the device, from 0 to the row's length (padding at the end counts as a
    document). longest: an empty [longest document, 0] tensor; only its size is read.
    """

    lengths: torch.Tensor
    offsets: torch.Tensor
    longest: torch.Tensor


def prepare_packed_rows(layers: Sequence[torch.nn.Module]) -> None:
    """Let these decoder layers, which block compile has wrapped, compile for packed rows."""
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        name = getattr(getattr(type(attention), "forward", None), "__name__", "")
        if name in _ATTENTION and _prepared not in layer.__dict__ and not _has_experts(layer):
            layer.__dict__[_prepared] = True
            layer.register_forward_pre_hook(_prepare, with_kwargs = True)


def _has_experts(layer: torch.nn.Module) -> bool:
    return any(
        name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
        for name, module in layer.named_modules()
    )


def compile_packed_rows(stock: Callable) -> Callable:
    """``FastLlamaModel.patch_peft_model``: the decoder blocks that it compiles take packed rows."""
    plain = stock.__func__ if isinstance(stock, staticmethod) else stock

    @functools.wraps(plain)
    def patch_peft_model(*args, **kwargs):
        model = plain(*args, **kwargs)
        try:
            block_compile = importlib.import_module("unsloth.models._block_compile")
            layers, mark = block_compile._layers(model), block_compile._MARK
            prepare_packed_rows([x for x, _ in layers if getattr(type(x).forward, mark, False)])
        except Exception as error:  # as where block compile fails: the model trains without
            warnings.warn(f"Unsloth: packed rows stay uncompiled: {error}", stacklevel = 2)
        return model

    return staticmethod(patch_peft_model) if isinstance(stock, staticmethod) else patch_peft_model


def _prepare(layer: torch.nn.Module, args: tuple, kwargs: dict):
    """Forward pre-hook: a PackedRow in place of the lengths, where the block compiles with it."""
    if torch.compiler.is_compiling() or kwargs.get(LENGTHS) is None or not layer.training:
        return None
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if not _plain(hidden_states, args, kwargs):
        return None
    row = _row(layer.self_attn, hidden_states, kwargs)
    if row is None:
        return None
    return args, {**{k: v for k, v in kwargs.items() if k != LENGTHS}, ROW: row}


def _plain(hidden_states: Any, args: tuple, kwargs: dict) -> bool:
    """One row, and nothing that asks for another attention than causal within documents."""
    # Under checkpointing: hidden_states, causal_mask, attention_mask, position_ids by position.
    others = [kwargs.get(name) for name in _OTHERS] + list(args[2:3]) + list(args[4:5])
    mask = kwargs.get("causal_mask", args[1] if len(args) > 1 else None)
    return (
        isinstance(hidden_states, torch.Tensor)
        and hidden_states.dim() == 3
        and hidden_states.shape[0] == 1
        and all(value is None for value in others)
        and (mask is None or type(mask).__name__ == "LowerTriangularMask")
        and isinstance(kwargs[LENGTHS], torch.Tensor)
        and not getattr(
            kwargs[LENGTHS], "_unsloth_uncompiled", False
        )  # this batch's caller says so
        and os.environ.get(VARIABLE, "1") != "0"
    )


def _row(attention: Any, hidden_states: torch.Tensor, kwargs: dict) -> Optional[PackedRow]:
    lengths = kwargs[LENGTHS]
    total, device = hidden_states.shape[1], hidden_states.device
    key = (
        lengths._version,
        total,
        device,
        hidden_states.dtype,
        torch.is_autocast_enabled(),
        torch.is_inference_mode_enabled(),  # whose tensors no training may keep
        id(attention.config),  # another model's heads, whose attention may be another
    )
    if _last.get("lengths") is lengths and _last["key"] == key:
        return _last["row"]
    row = None
    if _varlen_runs(attention, hidden_states, lengths.numel() + 1):
        row = _make_row(lengths, kwargs, total, device)
    _last.update(lengths = lengths, key = key, row = row)
    return row


def _make_row(lengths, kwargs: dict, total: int, device: torch.device) -> Optional[PackedRow]:
    packing = importlib.import_module("unsloth.utils.packing")
    info = packing.get_packed_info_from_kwargs(kwargs, device)
    if sum(packing.packed_segment_lengths(info, total)) != total:
        return None  # lengths that overrun the row: upstream's own error
    offsets, longest = packing.cover_padded_cu_seqlens(info, total)
    if longest < 2 or offsets.numel() < 3:
        return None  # sizes of 0 and 1 are constants to Dynamo; one document needs no packing
    offsets = offsets.to(device = device, dtype = torch.int32)
    sized = torch.empty(int(longest), 0)
    torch._dynamo.maybe_mark_dynamic(offsets, 0)
    torch._dynamo.maybe_mark_dynamic(sized, 0)
    return PackedRow(lengths, offsets, sized)


def _varlen_runs(attention: Any, hidden_states: torch.Tensor, documents: int) -> bool:
    """True where the kernel takes this attention, forward and backward, and is the one to take."""
    dispatch = importlib.import_module("unsloth.utils.attention_dispatch")
    device, config = hidden_states.device, attention.config
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    if (
        device.type != "cuda"
        or torch.version.hip is not None
        or dispatch.get_cp_manager() is not None
        or not torch.backends.cuda.flash_sdp_enabled()
        or torch.are_deterministic_algorithms_enabled()
        or os.environ.get("UNSLOTH_TORCH_VARLEN", "1").lower() in ("0", "false", "no", "off")
        # There upstream prefers cuDNN on each document for itself.
        or torch.cuda.get_device_capability(device)[0] in dispatch._VARLEN_CUDNN_ARCH_MAJORS
        or dispatch._varlen_backward_overflows_int32(
            documents, hidden_states.shape[1], heads, attention.head_dim
        )
    ):
        return False
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    window = getattr(config, "sliding_window", None) or None
    return _kernel_runs(device.index, dtype, attention.head_dim, heads, keys, window)


@functools.lru_cache(maxsize = None)
def _kernel_runs(index, dtype, head_dim: int, heads: int, keys: int, window) -> bool:
    """Tries documents of one and three tokens, forward and backward: builds and GPUs differ."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    allows = importlib.import_module("unsloth.utils.flash_impl").flash_impl_allows
    device = torch.device("cuda", index)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            Q, K, V = (
                torch.zeros(4, n, head_dim, dtype = dtype, device = device, requires_grad = True)
                for n in (heads, keys, keys)
            )
            offsets = torch.tensor([0, 1, 4], dtype = torch.int32, device = device)
            flash_varlen(Q, K, V, offsets, 3, None, window).sum().backward()
        return bool(allows(head_dim, window, device))
    except (RuntimeError, NotImplementedError):
        return False


# ------------------------------------------------------------------------- inside the block


def prepared_packed_rows(stock: Callable) -> Callable:
    """``get_packed_info_from_kwargs``: a PackedRow as itself in a trace, else as its lengths."""

    @functools.wraps(stock)
    def get_packed_info_from_kwargs(
        kwargs,
        device,
        position_ids = None,
    ):
        row = kwargs.get(ROW)
        if row is None:
            return stock(kwargs, device, position_ids)
        if torch.compiler.is_compiling():
            return row
        return stock({**kwargs, LENGTHS: row.lengths}, device, position_ids)

    return get_packed_info_from_kwargs


def flash_varlen(Q, K, V, offsets, longest, scale, window):
    """Causal attention within documents. Q [T, heads, head_dim], K and V [T, key heads, head_dim]
    -> Q's shape.

    PyTorch's own flash kernel: traceable, with a derivative, and with fewer key heads than heads.
    window: a token sees itself and the window - 1 before it; None for all before it.
    """
    return torch.ops.aten._flash_attention_forward(
        Q,
        K,
        V,
        offsets,
        offsets,
        longest,
        longest,
        0.0,  # dropout
        window is None,  # causal; a window says so by its right side
        False,  # no debug mask
        scale = scale,
        window_size_left = None if window is None else window - 1,
        window_size_right = None if window is None else 0,
    )[0]


def attend_to_packed_rows(stock: Callable) -> Callable:
    """``_run_attention``: for a PackedRow in a trace, attention within its documents.

    Q [1, heads, T, head_dim], K and V [1, key heads, T, head_dim] -> [1, T, heads, head_dim].
    """

    @functools.wraps(stock)
    def _run_attention(*, config, context, Q, K, V):
        row = context.seq_info
        if not (isinstance(row, PackedRow) and torch.compiler.is_compiling()):
            return stock(config = config, context = context, Q = Q, K = K, V = V)
        window = context.sliding_window
        out = flash_varlen(
            *(x.squeeze(0).transpose(0, 1) for x in (Q, K, V)),
            row.offsets,
            row.longest.shape[0],
            (config.sdpa_kwargs or {}).get("scale"),
            window if window and window > 0 else None,
        )
        return out.unsqueeze(0)

    return _run_attention
