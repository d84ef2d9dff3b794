# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""linear_cross_entropy with the shapes and options that other fused losses are tested with."""

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require

require("interpreter")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture
def linear_cross_entropy():
    from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
    return linear_cross_entropy


def inputs(rows, width, vocab):
    make = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (vocab, width), (vocab,))
    tensors = [torch.randn(shape, generator = make).to(DEVICE).requires_grad_() for shape in shapes]
    return (*tensors, torch.randint(0, vocab, (rows,), generator = make).to(DEVICE))


# Shapes and options that the tests of Liger Kernel and of Apple's CCE go through, small: rows, widths and
# vocabularies that are no multiple of a tile, some labels ignored, ignore_index in the vocabulary,
# upstream gradients other than 1.
PEERS_OPTIONS = [
    {},
    {"reduction": "sum", "softcap": 20.0},
    {"softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1, "bias": True},
    {"ignore_index": 42, "weight": True, "bias": True},
    {
        "ignore_index": 42,
        "weight": True,
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
        "reduction": "sum",
    },
    {"reduction": "none", "softcap": 20.0, "z_loss": 1e-4, "weight": True},
    {"logit_scale": 0.125, "softcap": 20.0, "weight": True, "z_loss": 1e-2},
]


@pytest.mark.parametrize(
    "batch, length, width, vocab, shift", [(3, 11, 31, 123, False), (4, 8, 64, 257, True)]
)
@pytest.mark.parametrize("options", PEERS_OPTIONS)
def test_what_ligers_and_apples_losses_are_tested_with(
    linear_cross_entropy, batch, length, width, vocab, shift, options
):
    """Loss and gradients beside dense logits in float64: caps, scales, smoothing, weights, z-loss, bias."""
    options = dict(options)
    reduction, scale = options.pop("reduction", "mean"), options.pop("logit_scale", 1.0)
    cap, z_loss = options.pop("softcap", 0.0), options.pop("z_loss", 0.0)
    hidden, weight, bias, labels = inputs(batch * length, width, vocab)
    bias = bias if options.pop("bias", False) else None
    class_weight = torch.rand(vocab, device = DEVICE) if options.pop("weight", False) else None
    ignored = options.get("ignore_index", -100)
    labels[::3] = ignored
    labels = labels.reshape(batch, length)
    found = linear_cross_entropy(
        hidden.reshape(batch, length, width),
        weight,
        labels,
        bias,
        class_weight = class_weight,
        reduction = reduction,
        logit_scale = scale,
        softcap = cap,
        z_loss = z_loss,
        shift = shift,
        chunk_rows = 10,
        **options,
    )
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = F.linear(*leaves) * scale
    logits = cap * torch.tanh(logits / cap) if cap else logits
    wanted = labels.clone()
    if shift:
        wanted = F.pad(labels[:, 1:], (0, 1), value = ignored)
    wanted = wanted.reshape(-1)
    table = None if class_weight is None else class_weight.double()
    expected = F.cross_entropy(logits, wanted, weight = table, reduction = reduction, **options)
    square = torch.where(wanted != ignored, logits.logsumexp(1).square(), 0.0)
    whole = square.sum() / (wanted != ignored).sum() if reduction == "mean" else square.sum()
    expected = expected + z_loss * (square if reduction == "none" else whole)
    found = found.reshape(expected.shape)
    torch.testing.assert_close(found.double(), expected, rtol = 1e-4, atol = 1e-5)
    make = torch.Generator().manual_seed(5)
    upstream = torch.randn(expected.shape, generator = make).to(DEVICE)
    found.backward(upstream)
    expected.backward(upstream.double())
    for got, leaf in zip((t for t in (hidden, weight, bias) if t is not None), leaves):
        torch.testing.assert_close(got.grad.double(), leaf.grad, rtol = 1e-3, atol = 1e-5)
