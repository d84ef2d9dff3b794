# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""linear_cross_entropy on the Triton kernel against torch.nn.CrossEntropyLoss."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, GPU, require

require("interpreter")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)
on_gpu = pytest.mark.skipif(not GPU, reason = "needs a CUDA GPU")

COMBINATIONS = list(
    itertools.product(
        (False, True),  # class weights
        (0.0, 0.1, 1.0),  # label smoothing
        (-100, 3),  # ignore_index, also one within the vocabulary
        ("none", "mean", "sum"),
        (False, True),  # bias
    )
)


@pytest.fixture
def linear_cross_entropy():
    from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
    return linear_cross_entropy


def inputs(
    rows = 6,
    width = 8,
    vocab = 37,
    dtype = torch.float32,
    seed = 0,
):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator = make)
    weight = torch.randn(vocab, width, generator = make)
    bias = torch.randn(vocab, generator = make)
    labels = torch.randint(0, vocab, (rows,), generator = make)
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in (hidden, weight, bias)]
    return (*tensors, labels.to(DEVICE))


@pytest.mark.parametrize("weighted, smoothing, ignore_index, reduction, biased", COMBINATIONS)
def test_every_combination_equals_cross_entropy_loss(
    linear_cross_entropy, weighted, smoothing, ignore_index, reduction, biased
):
    """Loss and all gradients equal nn.CrossEntropyLoss on the dense logits."""
    hidden, weight, bias, labels = inputs()
    bias = bias if biased else None
    labels[::4] = ignore_index
    class_weight = torch.rand(weight.shape[0], device = DEVICE) if weighted else None
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    module = torch.nn.CrossEntropyLoss(weight = class_weight, **options)
    dense = module(F.linear(hidden, weight, bias), labels)
    ours = linear_cross_entropy(
        hidden, weight, labels, bias, class_weight = class_weight, chunk_rows = 4, **options
    )
    torch.testing.assert_close(ours, dense, rtol = 1e-5, atol = 1e-5)
    trained = (hidden, weight, bias)[: 3 if biased else 2]
    upstream = torch.randn_like(dense)
    got = torch.autograd.grad(ours, trained, upstream)
    for a, b in zip(got, torch.autograd.grad(dense, trained, upstream)):
        torch.testing.assert_close(a, b, rtol = 1e-4, atol = 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_class_probabilities_equal_cross_entropy_loss(
    linear_cross_entropy, weighted, smoothing, reduction
):
    """Targets may be class probabilities."""
    hidden, weight, bias, _ = inputs()
    targets = (
        torch.rand(hidden.shape[0], weight.shape[0], device = DEVICE).softmax(1).requires_grad_()
    )
    class_weight = torch.rand(weight.shape[0], device = DEVICE) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    dense = torch.nn.CrossEntropyLoss(weight = class_weight, **options)(
        F.linear(hidden, weight, bias), targets
    )
    ours = linear_cross_entropy(
        hidden, weight, targets, bias, class_weight = class_weight, chunk_rows = 4, **options
    )
    torch.testing.assert_close(ours, dense, rtol = 1e-5, atol = 1e-5)
    trained = (hidden, weight, bias, targets)
    upstream = torch.randn_like(dense)
    got = torch.autograd.grad(ours, trained, upstream)
    for a, b in zip(got, torch.autograd.grad(dense, trained, upstream)):
        torch.testing.assert_close(a, b, rtol = 1e-4, atol = 1e-5)


@pytest.mark.parametrize(
    "labels, class_weight",
    [("ignored", None), ("ignored", "ones"), ("random", "zeros"), ("none", None)],
)
def test_nan_where_pytorch_gives_nan(linear_cross_entropy, labels, class_weight):
    """Means over no labels and over weights of zero."""
    hidden, weight, _, target = inputs(rows = 0 if labels == "none" else 6)
    if labels == "ignored":
        target.fill_(-100)
    if class_weight is not None:
        class_weight = getattr(torch, class_weight)(weight.shape[0], device = DEVICE)
    dense = F.cross_entropy(F.linear(hidden, weight), target, weight = class_weight)
    ours = linear_cross_entropy(hidden, weight, target, class_weight = class_weight)
    assert dense.isnan() and ours.isnan()
    got = torch.autograd.grad(ours, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(dense, (hidden, weight))):
        assert torch.equal(a.isnan().any(), b.isnan().any())


@pytest.mark.parametrize("lead", [10.0, 20.0, 40.0, 80.0])
def test_a_confident_label_keeps_its_digits(linear_cross_entropy, lead):
    """Past a lead of 16.6 nats log-sum-exp minus logit rounds to 0 in float32; the loss here does not."""
    vocab = 33
    weight = torch.eye(vocab, device = DEVICE)
    hidden = torch.zeros(1, vocab, device = DEVICE)
    hidden[0, 5] = lead
    hidden.requires_grad_()
    label = torch.tensor([5], device = DEVICE)
    exact = hidden.detach().double().requires_grad_()
    others = torch.cat((exact[:, :5], exact[:, 6:]), 1).logsumexp(1)
    reference = F.softplus(others - exact[:, 5]).sum()
    loss = linear_cross_entropy(hidden, weight, label)
    assert loss.item() == pytest.approx(reference.item(), rel = 1e-5)
    (gradient,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(reference, exact)
    torch.testing.assert_close(gradient, wanted.float(), rtol = 1e-4, atol = 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precise", [False, True])
def test_half_precision_error_is_that_of_dense_autograd_at_most(
    linear_cross_entropy, dtype, precise
):
    """Against float64, relative to what dense autograd reaches in the same dtype."""
    hidden, weight, _, labels = inputs(rows = 32, width = 32, vocab = 203, dtype = dtype, seed = 3)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference = F.cross_entropy(F.linear(*exact), labels)
    wanted = torch.autograd.grad(reference, exact)
    dense = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    logits_dtype = torch.float32 if precise else None
    ours = linear_cross_entropy(hidden, weight, labels, chunk_rows = 20, logits_dtype = logits_dtype)

    def errors(loss):
        found = torch.autograd.grad(loss, (hidden, weight))
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]

    for ours_error, dense_error in zip(errors(ours), errors(dense)):
        assert ours_error < 1.1 * dense_error


@on_gpu
def test_random_shapes_on_the_gpu_against_float64(linear_cross_entropy):
    """Memory full of NaN beforehand: every element that counts is written."""
    generator = torch.Generator().manual_seed(0)
    for vocab, width, rows in ((1, 8, 3), (50257, 64, 129), (128256, 64, 33), (70001, 130, 65)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            hidden, weight, bias, labels = inputs(rows, width, vocab, dtype, seed = vocab)
            labels[torch.rand(rows, generator = generator).to(DEVICE) < 0.3] = -100
            junk = [torch.full((1 << 20,), float("nan"), device = DEVICE) for _ in range(8)]
            del junk
            ours = linear_cross_entropy(hidden, weight, labels, bias, chunk_rows = 32)
            exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
            reference = F.cross_entropy(F.linear(*exact), labels)
            dense = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)
            trained = (hidden, weight, bias)
            wanted = torch.autograd.grad(reference, exact)
            plain = torch.autograd.grad(dense, trained)
            for a, b, c in zip(torch.autograd.grad(ours, trained), wanted, plain):
                size = b.norm() + 1e-12
                allowed = 1.5 * (c.double() - b).norm() / size + torch.finfo(dtype).eps
                assert (a.double() - b).norm() / size <= allowed


@on_gpu
def test_losses_on_several_streams_at_once(linear_cross_entropy):
    """They share no buffers: every result is as alone."""
    problems = [inputs(256, 64, 128256, torch.bfloat16, seed = seed) for seed in range(4)]

    def gradients(problem):
        hidden, weight, bias, labels = problem
        loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_rows = 64)
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias)))

    alone = [gradients(problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(3):
        together = []
        for stream, problem in zip(streams, problems):
            with torch.cuda.stream(stream):
                together.append(gradients(problem))
        torch.cuda.synchronize()
        for found, wanted in zip(together, alone):
            for a, b in zip(found, wanted):
                torch.testing.assert_close(a, b)
