# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Cross entropy of a block of logits: losses out, and the logits overwritten by their gradients.

One row of the loss, with x the logits after bias, scale and soft cap, y the label, w the class
weights, e the label smoothing, V the vocabulary and lse = logsumexp(x):

    loss = (1 - e) w_y (lse - x_y) + e/V sum_c w_c (lse - x_c) + z_loss lse^2

The label is left out of the sum of exponentials, so lse - x_y = softplus(log(others) - x_y) and
1 - p_y = sigmoid(log(others) - x_y) keep their digits for a confident label, where log(sum(exp))
minus x_y rounds to 0 from 16.6 nats on. ``cross_entropy_rows`` runs a Triton kernel on CUDA and
the same arithmetic in plain torch everywhere else.
"""

from typing import Optional

import torch

from ..cross_entropy_spec import RowLoss, uses_triton

__all__ = ["cross_entropy_rows"]


def cross_entropy_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    spec: RowLoss,
    losses: torch.Tensor,
    grads: Optional[torch.Tensor] = None,
    row_scale: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    scratch: bool = False,
) -> None:
    """Writes each row's loss and, where ``grads`` is given, its gradient by the raw logits.

    logits: [rows, vocab], any float dtype, unit column stride. Before bias, scale and soft cap.
    labels: int64 [rows]. A label outside the vocabulary gives a NaN row, and reads nothing.
    losses: float32 (float64 for float64 logits) [rows], written.
    grads: [rows, vocab], written; may be ``logits`` itself, or a narrower dtype laid over the same
        rows' memory (`narrow_view`).
    row_scale: float32 [rows] that multiplies the gradients, not the losses.
    bias: [vocab], added to the logits.
    scratch: ``logits`` may be written over even where ``grads`` is None, its rows have the memory of
        `padded_columns(vocab)` columns, and no label is ``ignore_index``: the faster kernel.
    """
    if logits.shape[0] == 0:
        return
    if uses_triton(logits):
        from .cross_entropy_kernel import triton_rows as run
    else:
        from .cross_entropy_torch import torch_rows as run
    run(logits, labels, spec, losses, grads, row_scale, bias, scratch)
