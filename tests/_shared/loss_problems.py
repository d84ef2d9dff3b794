# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Heads, hidden states and labels for tests of losses, and the comparison with a dense reference."""

import torch
from backend import DEVICE


def problem(
    rows = 7,
    width = 5,
    vocab = 11,
    dtype = torch.float64,
    ignored = (2, 5),
    seed = 0,
):
    """(hidden, weight, bias), all with gradients, and labels of which those of ``ignored`` are -100."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator = make, dtype = torch.float64)
    weight = torch.randn(vocab, width, generator = make, dtype = torch.float64)
    bias = torch.randn(vocab, generator = make, dtype = torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator = make)
    for row in ignored:
        labels[row] = -100
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in (hidden, weight, bias)]
    return (*tensors, labels.to(DEVICE))


def assert_same(
    ours,
    reference,
    inputs,
    tolerance = 1e-10,
):
    """Equal values, and equal gradients for a random upstream gradient."""
    torch.testing.assert_close(ours, reference.to(ours.dtype), rtol = tolerance, atol = tolerance)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(reference, inputs, upstream.to(reference.dtype))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol = tolerance, atol = tolerance)
