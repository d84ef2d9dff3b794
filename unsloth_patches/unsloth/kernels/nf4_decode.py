# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Triton functions that decode bitsandbytes' 4-bit words: NF4 and FP4, bit for bit.

    out[j] = T(CODE[nibble j] * scale)        (high nibble of a byte first)

The product is rounded to float32, subnormals flushed, and then to T, as in bitsandbytes' CUDA
kernel. Only 16 different values can come out of one scale. They are computed once for the 32
elements that a thread decodes, kept as bytes in registers, and picked by byte permutes: about
three integer instructions an element, and no table in memory.
"""

import struct

import triton
import triton.language as tl

# The constants of bitsandbytes' CUDA kernels, equal to get_4bit_type's float32 tables save for
# FP4's -0.0, which that table holds as +0.0.
NF4_CODE = tl.constexpr((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))  # fmt: skip
_FP4_MAGNITUDES = tuple(
    struct.unpack("f", struct.pack("f", value / 12))[0]
    for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)
FP4_CODE = tl.constexpr(_FP4_MAGNITUDES + tuple(-value for value in _FP4_MAGNITUDES))

# Two bytes of each of four products: their low bytes and their high bytes.
_SPLIT_BYTES = tl.constexpr("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")
# prmt picks a byte of eight by a nibble's low three bits; its fourth bit then chooses between
# the lower and the upper half of the table. Nibbles come in the order 1, 0, 3, 2 of elements.
_LOOK_UP = tl.constexpr(
    "{ "
    ".reg .b32 select, half, a, b, low, high; "
    "and.b32 select, $4, 0x77777777; "
    "shr.u32 half, $4, 1; "
    "and.b32 half, half, 0x44444444; "
    "or.b32 half, half, 0x32103210; "
    "prmt.b32 a, $5, $6, select; "
    "prmt.b32 b, $7, $8, select; "
    "prmt.b32 low, a, b, half; "
    "prmt.b32 a, $9, $10, select; "
    "prmt.b32 b, $11, $12, select; "
    "prmt.b32 high, a, b, half; "
    "prmt.b32 $0, low, high, 0x4051; "
    "prmt.b32 $1, low, high, 0x6273; "
    "shr.u32 select, select, 16; "
    "shr.u32 half, half, 16; "
    "prmt.b32 a, $5, $6, select; "
    "prmt.b32 b, $7, $8, select; "
    "prmt.b32 low, a, b, half; "
    "prmt.b32 a, $9, $10, select; "
    "prmt.b32 b, $11, $12, select; "
    "prmt.b32 high, a, b, half; "
    "prmt.b32 $2, low, high, 0x4051; "
    "prmt.b32 $3, low, high, 0x6273; "
    "}"
)


@triton.jit
def multiply(a, b, PTX: tl.constexpr):
    """a * b, rounded on its own (never part of an FMA) and flushed like bitsandbytes' FMUL.FTZ."""
    if PTX:
        MUL: tl.constexpr = "mul.rn.ftz.f32 $0, $1, $2;"
        return tl.inline_asm_elementwise(MUL, "=f,f,f", [a, b], tl.float32, is_pure = True, pack = 1)
    else:
        return a * b


@triton.jit
def _product(scale, I: tl.constexpr, CODE: tl.constexpr, PTX: tl.constexpr):
    """CODE[I] * scale."""
    if I == 8 and CODE[I] == 0.0:
        # FP4's -0.0, which Triton would write as the constant 0.0: the sign goes to the scale.
        negative = (scale.to(tl.uint32, bitcast = True) ^ 0x80000000).to(tl.float32, bitcast = True)
        return multiply(0.0, negative, PTX)
    else:
        return multiply(CODE[I], scale, PTX)


@triton.jit
def _pack_pair(a, b, T: tl.constexpr, HAS_CVT2: tl.constexpr):
    """Two float32 values as T (float16 or bfloat16) in one word, ``a`` in the low half."""
    if HAS_CVT2:
        CVT: tl.constexpr = (
            "cvt.rn.bf16x2.f32 $0, $2, $1;" if T == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
        )
        return tl.inline_asm_elementwise(CVT, "=r,f,f", [a, b], tl.uint32, is_pure = True, pack = 1)
    else:
        low = a.to(T).to(tl.uint16, bitcast = True).to(tl.uint32)
        high = b.to(T).to(tl.uint16, bitcast = True).to(tl.uint32)
        return low | (high << 16)


@triton.jit
def _half_word_pair(
    scale,
    I: tl.constexpr,
    PART: tl.constexpr,
    T: tl.constexpr,
    CODE: tl.constexpr,
    HAS_CVT2: tl.constexpr,
):
    """16 bits of the products of codes I and I + 1: all of a 16-bit T, else float32's half PART."""
    a = _product(scale, I, CODE, True)
    b = _product(scale, I + 1, CODE, True)
    if T == tl.float32:
        low = a.to(tl.uint32, bitcast = True)
        high = b.to(tl.uint32, bitcast = True)
        if PART == 0:
            return (low & 0xFFFF) | (high << 16)
        else:
            return (low >> 16) | (high & 0xFFFF0000)
    else:
        return _pack_pair(a, b, T, HAS_CVT2)


@triton.jit
def _byte_table(
    scale,
    I: tl.constexpr,
    PART: tl.constexpr,
    T: tl.constexpr,
    CODE: tl.constexpr,
    HAS_CVT2: tl.constexpr,
):
    """(low bytes, high bytes) of four half words, those of codes I to I + 3."""
    first = _half_word_pair(scale, I, PART, T, CODE, HAS_CVT2)
    second = _half_word_pair(scale, I + 2, PART, T, CODE, HAS_CVT2)
    return tl.inline_asm_elementwise(
        _SPLIT_BYTES,
        "=&r,=r,r,r",
        [first, second],
        dtype = (tl.uint32, tl.uint32),
        is_pure = True,
        pack = 1,
    )


@triton.jit
def _look_up(
    words, scale, PART: tl.constexpr, T: tl.constexpr, CODE: tl.constexpr, HAS_CVT2: tl.constexpr
):
    """Four words, each the half words of two of the eight elements of a packed word, in order."""
    low0, high0 = _byte_table(scale, 0, PART, T, CODE, HAS_CVT2)
    low1, high1 = _byte_table(scale, 4, PART, T, CODE, HAS_CVT2)
    low2, high2 = _byte_table(scale, 8, PART, T, CODE, HAS_CVT2)
    low3, high3 = _byte_table(scale, 12, PART, T, CODE, HAS_CVT2)
    return tl.inline_asm_elementwise(
        _LOOK_UP,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [words, low0, low1, low2, low3, high0, high1, high2, high3],
        dtype = (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure = True,
        pack = 1,
    )


@triton.jit
def _join4(a, b, c, d):
    """[...] x 4 -> [..., 2, 2], in the order a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def decode_ptx(
    words, scale, T: tl.constexpr, CODE: tl.constexpr, HAS_CVT2: tl.constexpr, CHUNKS: tl.constexpr
):
    """[CHUNKS, 4] packed words, [CHUNKS, 1] scales -> the output's memory as 32-bit words, flat."""
    if T == tl.float32:
        a0, b0, c0, d0 = _look_up(words, scale, 0, T, CODE, HAS_CVT2)
        a1, b1, c1, d1 = _look_up(words, scale, 1, T, CODE, HAS_CVT2)
        low = _join4(a0, b0, c0, d0)
        high = _join4(a1, b1, c1, d1)
        even = (low & 0xFFFF) | (high << 16)
        odd = (low >> 16) | (high & 0xFFFF0000)
        return tl.reshape(tl.join(even, odd), [CHUNKS * 32])
    else:
        a, b, c, d = _look_up(words, scale, 0, T, CODE, HAS_CVT2)
        return tl.reshape(_join4(a, b, c, d), [CHUNKS * 16])


@triton.jit
def decode_plain(words, scale, T: tl.constexpr, CODE: tl.constexpr, CHUNKS: tl.constexpr):
    """The same without PTX (Triton's interpreter, other backends): [CHUNKS * 32] elements of T."""
    element = tl.arange(0, 8)
    shift = (element // 2) * 8 + (1 - element % 2) * 4
    nibble = (words[:, :, None] >> shift[None, None, :].to(tl.uint32)) & 15
    values = tl.zeros([CHUNKS, 4, 8], dtype = tl.float32)
    for i in tl.static_range(16):
        values = tl.where(nibble == i, _product(scale, i, CODE, False)[:, :, None], values)
    if T == tl.bfloat16:
        # Rounded to nearest even by hand: the interpreter's conversion truncates.
        bits = values.to(tl.uint32, bitcast = True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        values = bits.to(tl.uint16).to(T, bitcast = True)
    return tl.reshape(values.to(T), [CHUNKS * 32])


@triton.jit
def elements(words, T: tl.constexpr):
    """Output memory as 32-bit words -> elements of T, for stores that may end inside a word."""
    if T == tl.float32:
        return words.to(tl.float32, bitcast = True)
    else:
        low = (words & 0xFFFF).to(tl.uint16).to(T, bitcast = True)
        high = (words >> 16).to(tl.uint16).to(T, bitcast = True)
        return tl.interleave(low, high)
