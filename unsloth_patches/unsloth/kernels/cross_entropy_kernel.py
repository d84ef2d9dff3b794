# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The Triton kernel behind ``cross_entropy_rows``: two passes over a row, gradients in place."""

import torch
import triton
import triton.language as tl

from ..cross_entropy_spec import padded_columns

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p(u):
    # log(1 + u) for u >= 0 without losing a small u (Kahan).
    v = 1.0 + u
    return tl.where(v == 1.0, u, tl.log(v) * (u / tl.where(v == 1.0, 1.0, v - 1.0)))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    # Through the negative exponential alone, which cannot overflow.
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def _transform(x, bias_ptr, columns, mask, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    HALF: tl.constexpr = x.dtype != tl.float32
    x = x.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask = mask, other = 0.0).to(tl.float32)
    if HAS_SCALE:
        x *= logit_scale
    if HAS_SOFTCAP:
        # softcap tanh(x / softcap), with exp2 and one reciprocal; saturates without overflow.
        x = 1.0 + tl.exp2(x * (2.0 * LOG2_E / softcap))
        if HALF:
            # 1 / x as rsqrt(x)^2: off by twice a division's last bit, at half its instructions.
            root = tl.rsqrt(x)
            x = softcap - 2.0 * softcap * root * root
        else:
            x = softcap - 2.0 * softcap / x
    return x


@triton.jit
def _read(logits_ptr, columns, VOCAB, COLUMNS, bias_ptr, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    # Transformed logits of a block. Only a row's last block is masked: columns behind the
    # vocabulary read as -inf there, those below COLUMNS from the row's padding, so that loads
    # stay vectors.
    if TAIL:
        valid = columns < VOCAB
        x = tl.load(logits_ptr + columns, mask = columns < COLUMNS, other = 0.0)
        x = _transform(
            x, bias_ptr, columns, valid, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
        )
        x = tl.where(valid, x, float("-inf"))
    else:
        x = tl.load(logits_ptr + columns)
        x = _transform(
            x, bias_ptr, columns, True, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
        )
    return x


@triton.jit
def _class_weights(weight_ptr, columns, VOCAB, HAS_WEIGHT: tl.constexpr, TAIL: tl.constexpr):
    # Weights of the classes in a block, or 1 for all of them.
    weight = 1.0
    if HAS_WEIGHT:
        if TAIL:
            weight = tl.load(weight_ptr + columns, mask = columns < VOCAB, other = 0.0)
        else:
            weight = tl.load(weight_ptr + columns)
    return weight


@triton.jit
def _sum_exponentials(x, columns, start, index, top, total, linear, weight_ptr, VOCAB, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    # Each lane's running maximum (in units of log 2), sum of exp2 below it without the label,
    # and weighted sum of logits.
    if HAS_SMOOTHING:
        weighted = x * _class_weights(weight_ptr, columns, VOCAB, HAS_WEIGHT, TAIL)
        if TAIL:
            weighted = tl.where(columns < VOCAB, weighted, 0.0)
        linear += tl.sum(weighted, 1)
    # Only the label's block compares its columns; float32 logits have no registers for the branch.
    if TAIL or not HALF or (index >= start) & (index < start + BLOCK):
        x = tl.where(columns != index, x, float("-inf"))
    higher = tl.maximum(top, tl.max(x, 1) * LOG2_E)
    total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x * LOG2_E - higher[:, None]), 1)
    return higher, total, linear


@triton.jit
def _gradient(gradient, x, weight, soft_each, scale, logit_scale, softcap, HAS_FACTOR: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    # From the hard label's gradient by the transformed logits x to all of it by the raw logits.
    if HAS_SMOOTHING:
        gradient -= soft_each * weight
    if HAS_SOFTCAP:
        part = x * (1.0 / softcap)
        gradient *= 1.0 - part * part
    if HAS_SCALE:
        gradient *= logit_scale
    if HAS_FACTOR:
        gradient *= scale
    return gradient


@triton.jit
def _cross_entropy_kernel(logits_ptr, logits_stride, grads_ptr, grads_stride, labels_ptr, losses_ptr, row_scale_ptr, bias_ptr, weight_ptr, weight_sum_ptr, ignore_index, smoothing, logit_scale, softcap, z_loss, VOCAB, COLUMNS, HAS_GRADS: tl.constexpr, NARROW: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_Z_LOSS: tl.constexpr, HAS_FACTOR: tl.constexpr, FROM_END: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    # One program a row. Each lane owns WIDTH neighbouring columns of a block and keeps its own
    # running maximum and sum, so nothing is exchanged between threads until the row's end.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    grads_ptr += row * grads_stride
    label = tl.load(labels_ptr + row)
    keep = label != ignore_index
    in_range = (label >= 0) & (label < VOCAB)
    index = tl.where(in_range, label, 0).to(tl.int32)
    target = tl.load(logits_ptr + index)
    target = _transform(
        target, bias_ptr, index, True, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
    )
    # A label whose logit is +inf makes its row NaN as one outside the vocabulary does.
    in_range = in_range & (target != float("inf"))
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    BLOCK: tl.constexpr = LANES * WIDTH
    HALF: tl.constexpr = logits_ptr.dtype.element_ty != tl.float32
    SOFT_WEIGHT: tl.constexpr = HAS_WEIGHT and HAS_SMOOTHING
    full = VOCAB // BLOCK * BLOCK

    # A finite floor: exp2(-inf - floor) is 0 where exp2(-inf + inf) would be NaN.
    top = tl.full((LANES,), -1e38, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    linear = tl.zeros((LANES,), tl.float32)
    for start in range(0, full, BLOCK):
        columns = start + tile
        x = _read(
            logits_ptr, columns, VOCAB, COLUMNS, bias_ptr, logit_scale, softcap,
            HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, False,
        )  # fmt: skip
        top, total, linear = _sum_exponentials(
            x, columns, start, index, top, total, linear, weight_ptr, VOCAB,
            HAS_WEIGHT, HAS_SMOOTHING, HALF, BLOCK, False,
        )  # fmt: skip
    columns = full + tile
    x = _read(
        logits_ptr, columns, VOCAB, COLUMNS, bias_ptr, logit_scale, softcap,
        HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, True,
    )  # fmt: skip
    top, total, linear = _sum_exponentials(
        x, columns, full, index, top, total, linear, weight_ptr, VOCAB,
        HAS_WEIGHT, HAS_SMOOTHING, HALF, BLOCK, True,
    )  # fmt: skip
    row_top = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp2(top - row_top), 0)
    others = (row_top + tl.log2(row_total)) * LN_2

    margin = others - target
    nll = _softplus(margin)
    lse = target + nll
    label_weight = 1.0
    if HAS_WEIGHT:
        label_weight = tl.load(weight_ptr + index)
    hard = (1.0 - smoothing) * label_weight
    soft_each = smoothing / VOCAB
    spread = 0.0
    loss = hard * nll
    if HAS_SMOOTHING:
        spread = soft_each * tl.load(weight_sum_ptr)
        loss += spread * lse - soft_each * tl.sum(linear, 0)
    if HAS_Z_LOSS:
        loss += z_loss * lse * lse
        spread += 2.0 * z_loss * lse
    loss = tl.where(in_range, loss, float("nan"))
    tl.store(losses_ptr + row, tl.where(keep, loss, 0.0))

    if HAS_GRADS:
        scale = 1.0
        if HAS_ROW_SCALE:
            scale = tl.load(row_scale_ptr + row)
        if HAS_FACTOR:
            scale = tl.where(keep, scale, 0.0)
        # A label outside the vocabulary makes the whole row NaN.
        known = in_range | (label == ignore_index)
        # exp2(x - row_top) times this is the softmax. exp2(x - lse) is it too, but a rounded lse would
        # be off by the same factor in the whole row.
        target2 = target * LOG2_E
        highest = tl.maximum(row_top, target2)
        below = tl.exp2(row_top - highest)
        softmax_scale = below / (row_total * below + tl.exp2(target2 - highest))
        softmax_scale = tl.where(known, softmax_scale, float("nan"))
        at_label = tl.where(known, tl.exp(-nll) * spread - hard * _sigmoid(margin), float("nan"))
        factor = (hard + spread) * softmax_scale
        for step in range(0, full, BLOCK):
            columns = (full - BLOCK - step if FROM_END else step) + tile
            x = _read(
                logits_ptr, columns, VOCAB, COLUMNS, bias_ptr, logit_scale, softcap,
                HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, False,
            )  # fmt: skip
            gradient = tl.exp2(x * LOG2_E - row_top) * factor
            gradient = _gradient(
                gradient, x, _class_weights(weight_ptr, columns, VOCAB, SOFT_WEIGHT, False),
                soft_each, scale, logit_scale, softcap,
                HAS_FACTOR, HAS_SMOOTHING, HAS_SCALE, HAS_SOFTCAP,
            )  # fmt: skip
            if NARROW:
                # The narrower gradients of this block lie over logits of earlier blocks:
                # every thread must have read those before any thread writes.
                tl.debug_barrier()
            tl.store(grads_ptr + columns, gradient.to(grads_ptr.dtype.element_ty))
        columns = full + tile
        x = _read(
            logits_ptr, columns, VOCAB, COLUMNS, bias_ptr, logit_scale, softcap,
            HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, True,
        )  # fmt: skip
        gradient = tl.exp2(x * LOG2_E - row_top) * factor
        gradient = _gradient(
            gradient, x, _class_weights(weight_ptr, columns, VOCAB, SOFT_WEIGHT, True),
            soft_each, scale, logit_scale, softcap,
            HAS_FACTOR, HAS_SMOOTHING, HAS_SCALE, HAS_SOFTCAP,
        )  # fmt: skip
        gradient = tl.where(columns < VOCAB, gradient, 0.0)
        if NARROW:
            tl.debug_barrier()
        tl.store(
            grads_ptr + columns, gradient.to(grads_ptr.dtype.element_ty), mask = columns < COLUMNS
        )
        # The label's own gradient replaces what its block wrote.
        at_label = _gradient(
            at_label, target, label_weight, soft_each, scale, logit_scale,
            softcap, HAS_FACTOR, HAS_SMOOTHING, HAS_SCALE, HAS_SOFTCAP,
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(grads_ptr + index, at_label.to(grads_ptr.dtype.element_ty))


def launch_shape(columns: int, dtype: torch.dtype):
    """(warps, lanes, neighbouring columns a lane reads at once) for rows this long.

    Swept on an H200: rows of 128k and 256k columns take 0.80 times as long with 32 warps of two
    lanes a thread, read from the end the second time, as with 16 warps of one. Fewer rows at once
    leave more of each in L2 for the second pass. Keeping them there by evict_last made this kernel
    10% faster alone and the step slower: the matrix product after it found the cache full.
    """
    width = 16 // dtype.itemsize
    num_warps = 4 if columns <= 4096 else 8 if columns <= 16384 else 32
    lanes = num_warps * 32 * (2 if num_warps == 32 else 1)
    return num_warps, min(lanes, triton.next_power_of_2(triton.cdiv(columns, width))), width


def triton_rows(logits, labels, spec, losses, grads, row_scale, bias, scratch) -> None:
    rows, vocab_size = logits.shape
    in_place = grads is not None and grads.data_ptr() == logits.data_ptr()
    padded = (
        scratch and (grads is None or in_place) and logits.stride(0) >= padded_columns(vocab_size)
    )
    columns = padded_columns(vocab_size) if padded else vocab_size
    num_warps, lanes, width = launch_shape(columns, logits.dtype)
    weight = spec.class_weight
    weight_sum = None
    if spec.label_smoothing:
        weight_sum = (
            torch.full((), float(vocab_size), device = logits.device)
            if weight is None
            else weight.sum(dtype = torch.float64).float()
        )
    out = logits if grads is None else grads
    narrow = in_place and grads.dtype != logits.dtype
    unused = losses
    # Plain rows need no multiplication; rows that may be ignored do.
    factor = row_scale is not None or weight is not None or spec.label_smoothing or spec.z_loss
    # What the first pass read last is still in L2. Narrow gradients lie over logits before them.
    from_end = not narrow
    _cross_entropy_kernel[(rows,)](
        logits, logits.stride(0), out, out.stride(0), labels, losses,
        unused if row_scale is None else row_scale,
        unused if bias is None else bias,
        unused if weight is None else weight,
        unused if weight_sum is None else weight_sum,
        spec.ignore_index, spec.label_smoothing, spec.logit_scale, spec.softcap, spec.z_loss,
        vocab_size, columns,
        HAS_GRADS = grads is not None, NARROW = narrow, HAS_ROW_SCALE = row_scale is not None,
        HAS_BIAS = bias is not None, HAS_WEIGHT = weight is not None,
        HAS_SMOOTHING = spec.label_smoothing != 0.0, HAS_SCALE = spec.logit_scale != 1.0,
        HAS_SOFTCAP = spec.softcap != 0.0, HAS_Z_LOSS = spec.z_loss != 0.0,
        HAS_FACTOR = bool(factor) or not scratch, FROM_END = from_end,
        LANES = lanes, WIDTH = width, num_warps = num_warps,
    )  # fmt: skip
