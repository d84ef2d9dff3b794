# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Triton kernels behind nf4_dequantize: one launch for a weight, or for several.

    scale[k] = code2[absmax[k]] * absmax2[k // blocksize2] + offset      (double quantized)
    out[j]   = T(CODE[nibble j] * scale[j // blocksize])

The product and the sum are rounded one after the other, as in bitsandbytes' kDequantizeBlockwise
followed by PyTorch's add. The unit of work is a chunk of 32 elements: 16 packed bytes, one 128-bit
load a thread. No blocksize served is below 32, so a chunk has one scale.
"""

import triton
import triton.language as tl

from .nf4_decode import FP4_CODE, NF4_CODE, decode_plain, decode_ptx, elements, multiply

CHUNK = 32  # elements of a chunk, and so the smallest blocksize served
MANY = 4  # weights that one launch of dequantize_many_kernel takes

# (chunks a program decodes, warps) by compute capability.
#   (9, 0): H200, torch 2.11, triton 3.6: the fastest of 29 settings on 1024 x 4096 to
#           8192 x 28672. One chunk a thread, few warps: little to wait for at the tile's end.
#   others: not measured; the same shape of work.
LAUNCH_SETTINGS = {(9, 0): (64, 2)}
DEFAULT_SETTINGS = (64, 2)

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
    W,
    first,
    n_elements,
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
    GUARDED: tl.constexpr,
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
    out,
    values,
    first,
    n_elements,
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
    GUARDED: tl.constexpr,
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


@triton.jit
def _decode_guarded_tile(
    W,
    absmax,
    code2,
    absmax2,
    offset,
    out,
    tile,
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
    """Tile ``tile`` of a weight; without masks where all of it lies inside the weight.

    ALIGN: bytes that the addresses of W and out are multiples of: 16, 4, or 1 for anything.
    ON_GRID: n_elements is a multiple of the tile, so that no guard is compiled at all.
    """
    first = tile.to(tl.int64) * CHUNKS
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


_SINGLE = ["W", "absmax", "code2", "absmax2", "offset", "out", "n_elements"]


# Nothing is specialized on: a launch passes plain addresses, and ALIGN says what they allow.
@triton.jit(do_not_specialize = _SINGLE)
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
    """One weight; grid: (its tiles of CHUNKS * 32 elements,).

    W: packed bytes in any dtype. absmax: uint8 (NESTED) or float32, one per block of
    32 << BLOCK_SHIFT elements. code2 [256], absmax2 (one per 1 << BLOCK2_SHIFT blocks) and
    offset [1]: float32, read only if NESTED. out: float16, bfloat16 or float32, n_elements long.
    """
    _decode_guarded_tile(
        W, absmax, code2, absmax2, offset, out, tl.program_id(0), n_elements,
        CHUNKS, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, FP4, ALIGN, ON_GRID, PTX, HAS_CVT2,
    )  # fmt: skip


# A slot of dequantize_many_kernel: what it is given for each weight, beside the common out.
SLOT = ("W", "absmax", "code2", "absmax2", "offset", "n_elements", "first_tile", "out_start")


@triton.jit(do_not_specialize = ["out"] + [f"{name}_{i}" for i in range(MANY) for name in SLOT])
def dequantize_many_kernel(
    out,
    W_0, absmax_0, code2_0, absmax2_0, offset_0, n_elements_0, first_tile_0, out_start_0,
    W_1, absmax_1, code2_1, absmax2_1, offset_1, n_elements_1, first_tile_1, out_start_1,
    W_2, absmax_2, code2_2, absmax2_2, offset_2, n_elements_2, first_tile_2, out_start_2,
    W_3, absmax_3, code2_3, absmax2_3, offset_3, n_elements_3, first_tile_3, out_start_3,
    CHUNKS: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    FP4: tl.constexpr,
    ALIGN: tl.constexpr,
    ON_GRID: tl.constexpr,
    PTX: tl.constexpr,
    HAS_CVT2: tl.constexpr,
):  # fmt: skip
    """Up to MANY weights of one format into one buffer; grid: (the tiles of all weights,).

    Weight i takes the tiles from first_tile_i on and the elements of out from out_start_i on; the
    rest of its arguments are those of dequantize_kernel. A slot that is not used repeats another
    weight's, with a first_tile that no program reaches.
    """
    # From the last tile to the first: 3% faster on an H200 (Q, K and V of Llama-8B, twice each among
    # six variants in random order; why is not known).
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    # Sums and casts, not the bare arguments: Inductor makes constants of those that are 1.
    if tile >= first_tile_3:
        W, absmax, code2, absmax2, offset = W_3, absmax_3, code2_3, absmax2_3, offset_3
        tile -= first_tile_3
        n_elements, start = tl.cast(n_elements_3, tl.int64), tl.cast(out_start_3, tl.int64)
    elif tile >= first_tile_2:
        W, absmax, code2, absmax2, offset = W_2, absmax_2, code2_2, absmax2_2, offset_2
        tile -= first_tile_2
        n_elements, start = tl.cast(n_elements_2, tl.int64), tl.cast(out_start_2, tl.int64)
    elif tile >= first_tile_1:
        W, absmax, code2, absmax2, offset = W_1, absmax_1, code2_1, absmax2_1, offset_1
        tile -= first_tile_1
        n_elements, start = tl.cast(n_elements_1, tl.int64), tl.cast(out_start_1, tl.int64)
    else:
        W, absmax, code2, absmax2, offset = W_0, absmax_0, code2_0, absmax2_0, offset_0
        tile -= first_tile_0
        n_elements, start = tl.cast(n_elements_0, tl.int64), tl.cast(out_start_0, tl.int64)
    _decode_guarded_tile(
        W, absmax, code2, absmax2, offset, out + start, tile, n_elements,
        CHUNKS, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, FP4, ALIGN, ON_GRID, PTX, HAS_CVT2,
    )  # fmt: skip
