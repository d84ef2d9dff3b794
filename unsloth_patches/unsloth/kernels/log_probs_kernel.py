# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Log-probability, logsumexp, entropy and most likely class of rows of logits, and their gradients.

With x the transformed logits, p their softmax, y the target and H the entropy:

    d log p_y / dx = onehot(y) - p      d lse / dx = p      d H / dx = -p (log p + H)
"""

from typing import Optional, Tuple

import torch

from ..cross_entropy_spec import RowLoss, padded_columns, uses_triton
from .cross_entropy_torch import transform_logits, transform_slope

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def log_prob_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    spec: RowLoss,
    inverse_temperature: float,
    bias: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """([3, rows]: log-probability, logsumexp, entropy; [rows]: most likely class) of a chunk.

    logits: [rows, vocab], a view of rows `padded_columns(vocab)` long. targets: int64 [rows]; one
    outside the vocabulary gives NaN as its log-probability.
    """
    if uses_triton(logits):
        return _triton_rows(logits, targets, spec, inverse_temperature, bias)
    x = transform_logits(logits, spec, bias) * inverse_temperature
    index, in_range = _safe(targets, logits.shape[1])
    target = x.gather(1, index)
    others = torch.logsumexp(x.scatter(1, index, float("-inf")), 1, keepdim = True)
    log_probs = -torch.nn.functional.softplus(others - target, threshold = 50.0)
    lse = target - log_probs
    log_p = x - lse
    entropy = -torch.where(log_p == float("-inf"), 0.0, log_p.exp() * log_p).sum(1)
    known = in_range & (target != float("inf")).squeeze(1)
    log_probs = torch.where(known, log_probs.squeeze(1), float("nan"))
    return torch.stack((log_probs, lse.squeeze(1), entropy)), x.argmax(1)


def log_prob_gradients(
    logits: torch.Tensor,
    targets: torch.Tensor,
    spec: RowLoss,
    inverse_temperature: float,
    bias: Optional[torch.Tensor],
    values: torch.Tensor,
    upstream: torch.Tensor,
    grads: torch.Tensor,
) -> None:
    """Writes the gradient by the raw logits into ``grads``, which may lie over ``logits``.

    values: [3, rows] of `log_prob_rows`. upstream: [3, rows], the gradients by them.
    """
    if uses_triton(logits):
        _triton_gradients(logits, targets, spec, inverse_temperature, bias, values, upstream, grads)
        return
    untempered = transform_logits(logits, spec, bias)
    index, in_range = _safe(targets, logits.shape[1])
    log_prob, lse, entropy = (row.to(untempered.dtype).unsqueeze(1) for row in values)
    by_log_prob, by_lse, by_entropy = (row.to(untempered.dtype).unsqueeze(1) for row in upstream)
    log_p = untempered * inverse_temperature - lse
    p = log_p.exp()
    gradient = p * (by_lse - by_log_prob)
    # 1 - p_y from log p_y, which keeps a confident target's digits.
    at_target = log_prob.exp() * by_lse - torch.expm1(log_prob) * by_log_prob
    gradient.scatter_(1, index, at_target)
    gradient -= torch.where(p == 0, 0.0, p * (log_p + entropy)) * by_entropy
    gradient.mul_(transform_slope(untempered, spec) * inverse_temperature)
    known = in_range.unsqueeze(1) & ~log_prob.isnan()
    grads.copy_(torch.where(known, gradient, float("nan")))


def _safe(targets: torch.Tensor, vocab_size: int):
    in_range = (targets >= 0) & (targets < vocab_size)
    return torch.where(in_range, targets, torch.zeros_like(targets)).unsqueeze(1), in_range


if triton is not None:
    from .cross_entropy_kernel import _softplus, _transform, launch_shape

    @triton.jit
    def _one_minus_exp(x):
        # 1 - exp(x) for x <= 0; a short series where the difference would lose its digits.
        series = -x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666668)))
        return tl.where(x > -0.01, series, 1.0 - tl.exp(x))

    @triton.jit
    def _log_probs_kernel(logits_ptr, logits_stride, targets_ptr, values_ptr, top1_ptr, bias_ptr, rows, logit_scale, softcap, inverse_temperature, VOCAB, COLUMNS, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * logits_stride
        target_id = tl.load(targets_ptr + row)
        in_range = (target_id >= 0) & (target_id < VOCAB)
        index = tl.where(in_range, target_id, 0).to(tl.int32)
        target = tl.load(logits_ptr + index)
        target = _transform(
            target, bias_ptr, index, True, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
        )
        target *= inverse_temperature
        tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

        top = tl.full((LANES,), -1e38, tl.float32)
        best = tl.full((LANES,), 2147483647, tl.int32)
        total = tl.zeros((LANES,), tl.float32)
        moment = tl.zeros((LANES,), tl.float32)  # sum of exp(x - top) (x - top)
        for start in range(0, COLUMNS, LANES * WIDTH):
            columns = start + tile
            x = tl.load(logits_ptr + columns, mask = columns < COLUMNS, other = 0.0)
            valid = columns < VOCAB
            x = _transform(
                x, bias_ptr, columns, valid, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
            )
            x = tl.where(valid, x * inverse_temperature, float("-inf"))
            high = tl.max(x, 1)
            first = tl.min(tl.where(x == high[:, None], columns, 2147483647), 1)
            best = tl.where(high > top, first, best)
            higher = tl.maximum(top, high)
            shrink = tl.exp(top - higher)
            moment = shrink * (moment + total * (top - higher))
            total = total * shrink
            delta = x - higher[:, None]
            # The target waits until the end, so that the rest keeps its digits next to it.
            e = tl.where(columns == index, 0.0, tl.exp(delta))
            total += tl.sum(e, 1)
            moment += tl.sum(tl.where(e > 0.0, e * delta, 0.0), 1)
            top = higher
        row_top = tl.max(top, 0)
        shrink = tl.exp(top - row_top)
        moment = tl.sum(shrink * (moment + total * (top - row_top)), 0)
        total = tl.sum(total * shrink, 0)
        top1 = tl.min(tl.where(top == row_top, best, 2147483647), 0)
        log_prob = -_softplus(row_top + tl.log(total) - target)
        lse = target - log_prob
        # H = lse - E[x]; E[x] - row_top = (moment + the target's share) / sum.
        whole = tl.exp(lse - row_top)
        target_share = tl.exp(target - row_top)
        moment += tl.where(target_share > 0.0, target_share * (target - row_top), 0.0)
        entropy = (lse - row_top) - moment / whole
        known = in_range & (target != float("inf"))
        tl.store(values_ptr + row, tl.where(known, log_prob, float("nan")))
        tl.store(values_ptr + rows + row, lse)
        tl.store(values_ptr + 2 * rows + row, entropy)
        tl.store(top1_ptr + row, top1.to(tl.int64))

    @triton.jit
    def _log_probs_gradient_kernel(logits_ptr, logits_stride, grads_ptr, grads_stride, targets_ptr, values_ptr, upstream_ptr, bias_ptr, rows, logit_scale, softcap, inverse_temperature, VOCAB, COLUMNS, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NARROW: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * logits_stride
        grads_ptr += row * grads_stride
        target_id = tl.load(targets_ptr + row)
        in_range = (target_id >= 0) & (target_id < VOCAB)
        log_prob = tl.load(values_ptr + row)
        lse = tl.load(values_ptr + rows + row)
        entropy = tl.load(values_ptr + 2 * rows + row)
        by_log_prob = tl.load(upstream_ptr + row)
        by_lse = tl.load(upstream_ptr + rows + row)
        by_entropy = tl.load(upstream_ptr + 2 * rows + row)
        known = in_range & (log_prob == log_prob)
        share = tl.where(known, by_lse - by_log_prob, float("nan"))
        at_target = tl.exp(log_prob) * by_lse + _one_minus_exp(log_prob) * by_log_prob
        tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        for start in range(0, COLUMNS, LANES * WIDTH):
            columns = start + tile
            inside = columns < COLUMNS
            valid = columns < VOCAB
            x = tl.load(logits_ptr + columns, mask = inside, other = 0.0)
            x = _transform(
                x, bias_ptr, columns, valid, logit_scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
            )
            log_p = x * inverse_temperature - lse
            p = tl.exp(log_p)
            gradient = tl.where(columns == target_id, at_target, p * share)
            gradient -= tl.where(p > 0.0, p * (log_p + entropy), 0.0) * by_entropy
            gradient *= inverse_temperature
            if HAS_SCALE:
                gradient *= logit_scale
            if HAS_SOFTCAP:
                gradient *= 1.0 - (x / softcap) * (x / softcap)
            gradient = tl.where(valid, gradient, 0.0)
            if NARROW:
                tl.debug_barrier()  # as in _cross_entropy_kernel
            tl.store(grads_ptr + columns, gradient.to(grads_ptr.dtype.element_ty), mask = inside)


def _shape(logits):
    columns = padded_columns(logits.shape[1])
    num_warps, lanes, width = launch_shape(columns, logits.dtype)
    return columns, num_warps, {"LANES": lanes, "WIDTH": width}


def _transform_flags(spec: RowLoss, bias) -> dict:
    return {
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": spec.logit_scale != 1.0,
        "HAS_SOFTCAP": spec.softcap != 0.0,
    }


def _triton_rows(logits, targets, spec, inverse_temperature, bias):
    rows, vocab_size = logits.shape
    columns, num_warps, blocks = _shape(logits)
    values = torch.empty((3, rows), dtype = torch.float32, device = logits.device)
    top1 = torch.empty(rows, dtype = torch.int64, device = logits.device)
    _log_probs_kernel[(rows,)](
        logits, logits.stride(0), targets, values, top1, values if bias is None else bias, rows,
        spec.logit_scale, spec.softcap, inverse_temperature, vocab_size, columns,
        **_transform_flags(spec, bias), **blocks, num_warps = num_warps,
    )  # fmt: skip
    return values, top1


def _triton_gradients(logits, targets, spec, inverse_temperature, bias, values, upstream, grads):
    rows, vocab_size = logits.shape
    columns, num_warps, blocks = _shape(logits)
    _log_probs_gradient_kernel[(rows,)](
        logits, logits.stride(0), grads, grads.stride(0), targets, values.contiguous(),
        upstream.contiguous(), values if bias is None else bias, rows, spec.logit_scale,
        spec.softcap, inverse_temperature, vocab_size, columns, **_transform_flags(spec, bias),
        NARROW = grads.dtype != logits.dtype, **blocks, num_warps = num_warps,
    )  # fmt: skip
