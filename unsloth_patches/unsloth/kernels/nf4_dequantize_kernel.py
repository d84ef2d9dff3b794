# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The Triton kernel that decodes a bitsandbytes 4-bit weight in one launch, and that launch.

    scale[k] = code2[absmax[k]] * absmax2[k // blocksize2] + offset      (double quantized)
    out[j]   = T(CODE[nibble j] * scale[j // blocksize])

The product and the sum are rounded one after the other, as in bitsandbytes' kDequantizeBlockwise
followed by PyTorch's add. The unit of work is a chunk of 32 elements: 16 packed bytes, one 128-bit
load a thread. No blocksize served is below 32, so a chunk has one scale.
"""

import functools
from contextlib import nullcontext
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .nf4_decode import FP4_CODE, NF4_CODE, decode_plain, decode_ptx, elements, multiply

CHUNK = 32  # elements of a chunk, and so the smallest blocksize served
# One chunk a thread and few warps, so that there is little to wait for at a tile's end: the fastest
# of 29 settings on an H200 (1024 x 4096 to 8192 x 28672; torch 2.11, triton 3.6).
CHUNKS, WARPS = 64, 2  # of a program

# min(index, anything | 255) is index, which has 8 bits; ptxas cannot know it.
_AFTER = tl.constexpr(
    "{ .reg .b32 t; or.b32 t, $2, $3; or.b32 t, t, $4; or.b32 t, t, 255; min.u32 $0, $1, t; }"
)


@triton.jit
def _load(pointers, inside, GUARDED: tl.constexpr, POLICY: tl.constexpr):
    if GUARDED:
        return tl.load(pointers, mask = inside, other = 0, eviction_policy = POLICY)
    else:
        return tl.load(pointers, eviction_policy = POLICY)


@triton.jit
def _issue_first(index, words, scale2, offset):
    """index, not before the loads of the others were issued.

    ptxas sinks the load of the packed words below the dependent chain absmax -> code2, which
    puts two trips to memory one after the other. This false dependence keeps them abreast.
    """
    return tl.inline_asm_elementwise(
        _AFTER,
        "=r,r,r,r,r",
        [
            index,
            tl.max(words, 1),
            scale2.to(tl.int32, bitcast = True),
            offset.to(tl.int32, bitcast = True),
        ],
        dtype = tl.int32,
        is_pure = True,
        pack = 1,
    )


@triton.jit
def _block_scale(
    absmax,
    code2,
    absmax2,
    offset,
    block,
    inside,
    words,
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    GUARDED: tl.constexpr,
    PTX: tl.constexpr,
):
    """float32 scale of each absmax block in ``block``; 0 where ``inside`` is false."""
    if NESTED:
        scale2 = _load(absmax2 + (block >> BLOCK2_SHIFT), inside, GUARDED, "evict_last")
        shift = tl.load(offset)
        index = _load(absmax + block, inside, GUARDED, "").to(tl.int32)
        if PTX:
            index = _issue_first(index, words, scale2, shift)
        return multiply(tl.load(code2 + index, eviction_policy = "evict_last"), scale2, PTX) + shift
    else:
        return _load(absmax + block, inside, GUARDED, "")


@triton.jit
def _load_bytes(W, first, left, CHUNKS: tl.constexpr):
    """[CHUNKS, 4] packed words from any address, byte by byte; ``left`` bytes, zeros after them."""
    byte = tl.arange(0, CHUNKS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    W = W.to(tl.pointer_type(tl.uint8)) + first * 16
    values = tl.load(W + byte, mask = byte < left, other = 0).to(tl.uint32)
    shift = (tl.arange(0, 4) * 8).to(tl.uint32)
    return tl.sum(tl.reshape(values, [CHUNKS, 4, 4]) << shift[None, None, :], 2)


@triton.jit
def _last_word(W, left):
    """The last, incomplete word of ``left`` bytes: 0 to 3 of them, zeros after them."""
    start = left // 4 * 4
    word = tl.zeros([], dtype = tl.uint32)
    for i in tl.static_range(3):
        byte = tl.load(W + start + i, mask = start + i < left, other = 0).to(tl.uint32)
        word = word | (byte << (8 * i))
    return word


@triton.jit
def _load_words(
    W, first, n_elements, ALIGN: tl.constexpr, CHUNKS: tl.constexpr, GUARDED: tl.constexpr
):
    """[CHUNKS, 4] packed words from chunk ``first`` on; zeros past the end, if GUARDED."""
    # The launch tells Triton nothing of the addresses: these hints make the loads 128 bits wide.
    words = tl.multiple_of(W.to(tl.pointer_type(tl.uint32)) + first * 4, ALIGN)
    column = tl.max_contiguous(tl.arange(0, 4), 4)
    index = tl.arange(0, CHUNKS)[:, None] * 4 + column[None, :]
    if GUARDED:
        left = (n_elements + 1) // 2 - first * 16
        if ALIGN < 4:
            return _load_bytes(W, first, left, CHUNKS)
        values = tl.load(words + index, mask = index < left // 4, other = 0)
        last = _last_word(words.to(tl.pointer_type(tl.uint8)), left)
        return tl.where(index == left // 4, last, values)
    else:
        return tl.load(words + index, eviction_policy = "evict_first")


@triton.jit
def _store(
    out, values, first, n_elements, ALIGN: tl.constexpr, CHUNKS: tl.constexpr, GUARDED: tl.constexpr
):
    """values: 32-bit words (uint32) or elements of out's dtype, from chunk ``first`` on."""
    T: tl.constexpr = out.dtype.element_ty
    start = out + first * 32
    if GUARDED:
        lane = tl.arange(0, CHUNKS * 32)
        if values.dtype == tl.uint32:
            values = elements(values, T)
        tl.store(start + lane, values, mask = lane < n_elements - first * 32)
    else:
        start = tl.multiple_of(start.to(tl.pointer_type(values.dtype)), ALIGN)
        lane = tl.max_contiguous(tl.arange(0, values.shape[0]), values.shape[0])
        tl.store(start + lane, values)


@triton.jit
def _decode_tile(
    W,
    absmax,
    code2,
    absmax2,
    offset,
    out,
    first,
    n_elements,
    CHUNKS: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    FP4: tl.constexpr,
    ALIGN: tl.constexpr,
    GUARDED: tl.constexpr,
    PTX: tl.constexpr,
    HAS_CVT2: tl.constexpr,
):
    """Decodes CHUNKS chunks from chunk ``first`` (int64) on."""
    T: tl.constexpr = out.dtype.element_ty
    CODE: tl.constexpr = FP4_CODE if FP4 else NF4_CODE
    words = _load_words(W, first, n_elements, ALIGN, CHUNKS, GUARDED)
    chunk = first + tl.arange(0, CHUNKS)
    scale = _block_scale(
        absmax,
        code2,
        absmax2,
        offset,
        chunk >> BLOCK_SHIFT,
        chunk * 32 < n_elements,
        words,
        BLOCK2_SHIFT,
        NESTED,
        GUARDED,
        PTX,
    )[:, None]
    if PTX:
        values = decode_ptx(words, scale, T, CODE, HAS_CVT2, CHUNKS)
    else:
        values = decode_plain(words, scale, T, CODE, CHUNKS)
    _store(out, values, first, n_elements, ALIGN, CHUNKS, GUARDED)


# Nothing is specialized on: a launch passes plain addresses, and ALIGN says what they allow.
@triton.jit(do_not_specialize = ["W", "absmax", "code2", "absmax2", "offset", "out", "n_elements"])
def dequantize_kernel(
    W,
    absmax,
    code2,
    absmax2,
    offset,
    out,
    n_elements,
    CHUNKS: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    FP4: tl.constexpr,
    ALIGN: tl.constexpr,
    ON_GRID: tl.constexpr,
    PTX: tl.constexpr,
    HAS_CVT2: tl.constexpr,
):
    """Decodes a weight; grid: (its tiles of CHUNKS * 32 elements,).

    W: packed bytes in any dtype. absmax: uint8 (NESTED) or float32, one per block of
    32 << BLOCK_SHIFT elements. code2 [256], absmax2 (one per 1 << BLOCK2_SHIFT blocks) and
    offset [1]: float32, read only if NESTED. out: float16, bfloat16 or float32, n_elements long.
    ALIGN: bytes that the addresses of W and out are multiples of: 16, 4, or 1 for anything.
    ON_GRID: n_elements is a multiple of the tile, so that no guard is compiled at all; otherwise
    only the last tile is guarded.
    """
    first = tl.program_id(0).to(tl.int64) * CHUNKS
    if ALIGN >= 4 and (ON_GRID or (first + CHUNKS) * 32 <= n_elements):
        _decode_tile(
            W, absmax, code2, absmax2, offset, out, first, n_elements,
            CHUNKS, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, FP4, ALIGN, False, PTX, HAS_CVT2,
        )  # fmt: skip
    else:
        _decode_tile(
            W, absmax, code2, absmax2, offset, out, first, n_elements,
            CHUNKS, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, FP4, ALIGN, True, PTX, HAS_CVT2,
        )  # fmt: skip


# TRITON_INTERPRET=1 makes @triton.jit return another class, which runs on CPU tensors.
INTERPRETED = not isinstance(dequantize_kernel, triton.runtime.JITFunction)
HIP = torch.version.hip is not None
current_device = getattr(torch._C, "_cuda_getDevice", None)


class DequantizeUnavailable(RuntimeError):
    """The kernel cannot run: a device it was never tested on, or Triton failed to compile it."""


class Launch:
    """The kernel for weights of one format and size on one device.

    Each alignment's first launch goes through Triton, which compiles. Later ones repeat it by
    Unsloth's ``relaunch`` with plain addresses, which spare the launcher a driver query for each
    pointer; the kernel is specialized on none of its arguments, so they may differ.
    """

    def __init__(
        self, quant_type: str, blocksize: int, blocksize2: int, numel: int, index: Optional[int]
    ):
        capability = (0, 0) if index is None else torch.cuda.get_device_capability(index)
        if index is not None and capability < (7, 0):
            raise DequantizeUnavailable(
                f"dequantize_4bit: compute capability {capability[0]}.{capability[1]} has no cache "
                "eviction policies; 7.0 or newer is needed. Use "
                "bitsandbytes.functional.dequantize_4bit."
            )
        self.index, self.numel = index, numel
        self.grid = (-(-numel // (CHUNKS * CHUNK)),)
        self.constants = {
            "CHUNKS": CHUNKS,
            "BLOCK_SHIFT": (blocksize // CHUNK).bit_length() - 1,
            "BLOCK2_SHIFT": max(blocksize2.bit_length() - 1, 0),
            "NESTED": blocksize2 > 0,
            "FP4": quant_type == "fp4",
            "ON_GRID": numel % (CHUNKS * CHUNK) == 0,
            "PTX": not (INTERPRETED or HIP),
            "HAS_CVT2": capability >= (8, 0),
        }
        self.entries = {}  # alignment -> what relaunch takes, or None
        # They obey UNSLOTH_TRITON_FAST_LAUNCH and step aside for profilers that hook Triton.
        from unsloth.kernels.triton_launch import launch, relaunch

        self.launch, self.relaunch = launch, relaunch

    def run(
        self, W: torch.Tensor, address: int, scales: Tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> None:
        """Decodes W, which lies at ``address``, with (absmax, code2, absmax2, offset) into out."""
        out_address = out.data_ptr()
        bits = address | out_address
        align = 16 if not bits & 15 else 4 if not bits & 3 else 1
        entry = self.entries.get(align)
        if entry is not None and current_device() == self.index:
            # The scales' addresses are read anew: a storage may have been freed and filled again.
            absmax, code2, absmax2, offset = scales
            arguments = (
                address, absmax.data_ptr(), code2.data_ptr(), absmax2.data_ptr(),
                offset.data_ptr(), out_address, self.numel,
            )  # fmt: skip
            try:
                if self.relaunch(entry, self.grid, self.index, arguments):
                    return
            except TypeError:
                pass  # a Triton whose launcher takes other arguments, which launch() finds out, too
        self.entries[align] = self._through_triton(W, scales, out, align)

    def _through_triton(self, W, scales, out, align):
        # Packed bytes are bytes to the kernel: one compiled kernel serves every storage dtype.
        arguments = (W.view(torch.uint8), *scales, out, self.numel)
        constants = {**self.constants, "ALIGN": align}
        try:
            with nullcontext() if self.index is None else torch.cuda.device(self.index):
                return self.launch(
                    dequantize_kernel, self.grid, arguments, 6, constants, self.index,
                    num_warps = WARPS,
                )  # fmt: skip
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            raise DequantizeUnavailable(
                f"dequantize_4bit: Triton {triton.__version__} could not run the kernel "
                f"({type(error).__name__}: {error}). Use bitsandbytes.functional.dequantize_4bit."
            ) from error


@functools.lru_cache(maxsize = None)
def launch_for(
    quant_type: str,
    blocksize: int,
    blocksize2: int,
    numel: int,
    index: Optional[int],
    dtype: torch.dtype,
) -> Launch:
    """The one Launch of weights of this format, size and output dtype on a device."""
    return Launch(quant_type, blocksize, blocksize2, numel, index)


def _dequantize_into(
    out: torch.Tensor,
    W: torch.Tensor,
    absmax: torch.Tensor,
    code2: torch.Tensor,
    absmax2: torch.Tensor,
    offset: torch.Tensor,
    quant_type: str,
    blocksize: int,
    blocksize2: int,
) -> None:
    if out.numel():
        launch = launch_for(
            quant_type, blocksize, blocksize2, out.numel(), out.device.index, out.dtype
        )
        launch.run(W, W.data_ptr(), (absmax, code2, absmax2, offset), out)


# Opaque: as a triton_op, Inductor parsed, analysed and compiled the kernel anew for each weight of each
# graph, 7 s of the first step of a Llama, and its launch costs the host no less than ours. By Library
# and not custom_op, for a call of that costs the host 20 us.
_library = torch.library.Library("unsloth", "FRAGMENT")  # collected, it takes its operators with it
_schema = torch.library.infer_schema(_dequantize_into, mutates_args = ("out",))
_library.define("dequantize_4bit_" + _schema)
_library.impl("dequantize_4bit_", _dequantize_into, "CompositeExplicitAutograd")
torch.library.register_fake("unsloth::dequantize_4bit_", lambda *_: None, lib = _library)
