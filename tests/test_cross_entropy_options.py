# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""fast_cross_entropy_loss with the options of nn.CrossEntropyLoss."""

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require

require("interpreter")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"ignore_index": 4},
        {"class_weight": True},
        {"class_weight": True, "label_smoothing": 0.2, "ignore_index": 4},
    ],
)
def test_fast_cross_entropy_loss_takes_the_options_of_cross_entropy_loss(options):
    """Smoothing, class weights and ignore_index on dense logits, which stay as they were."""
    from unsloth.kernels import fast_cross_entropy_loss

    make = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 37, generator = make).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 37, (2, 5), generator = make).to(DEVICE)
    labels[0, 1] = options.get("ignore_index", -100)
    options = dict(options)
    if options.pop("class_weight", False):
        options["class_weight"] = torch.rand(37, generator = make).to(DEVICE)
    ours = fast_cross_entropy_loss(logits, labels, **options)
    renamed = dict(options)
    renamed["weight"] = renamed.pop("class_weight", None)
    dense = F.cross_entropy(logits.reshape(-1, 37), labels.reshape(-1), **renamed)
    torch.testing.assert_close(ours, dense, rtol = 1e-5, atol = 1e-5)
    (got,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(got, torch.autograd.grad(dense, logits)[0], rtol = 1e-4, atol = 1e-6)


def test_a_label_whose_logit_is_infinite_gives_nan_as_in_pytorch():
    """Loss and gradient of such a row, on the kernel and in float64, and of no other one."""
    from unsloth.kernels.dense_cross_entropy import dense_cross_entropy
    for dtype in (torch.float32, torch.float64):
        logits = torch.zeros(2, 9, dtype = dtype, device = DEVICE)
        logits[0, 4] = float("inf")
        logits.requires_grad_()
        labels = torch.tensor([4, 4], device = DEVICE)
        loss = dense_cross_entropy(logits, labels, label_smoothing = 0.0)
        dense = F.cross_entropy(logits, labels)
        assert loss.isnan() and dense.isnan()
        got, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, dense))
        assert torch.equal(got.isnan(), wanted.isnan()) and not got[1].isnan().any()


def test_z_loss_is_a_mean_over_the_labels_whatever_their_weights_are():
    """The cross entropy is divided by the weights of its labels, z_loss by their number."""
    from unsloth.kernels import fast_cross_entropy_loss

    logits = torch.randn(1, 6, 9, device = DEVICE, requires_grad = True)
    labels = torch.tensor([[1, 2, -100, 4, 5, 6]], device = DEVICE)
    weight = torch.rand(9, device = DEVICE)
    ours = fast_cross_entropy_loss(logits, labels, class_weight = weight, z_loss = 0.1)
    flat, keep = logits[0], labels[0] != -100
    dense = F.cross_entropy(flat, labels[0], weight = weight)
    dense = dense + 0.1 * (flat[keep].logsumexp(1) ** 2).mean()
    torch.testing.assert_close(ours, dense, rtol = 1e-5, atol = 1e-5)
    got, wanted = (torch.autograd.grad(value, logits)[0] for value in (ours, dense))
    torch.testing.assert_close(got, wanted, rtol = 1e-4, atol = 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_rows_and_reductions_of_dense_logits(reduction):
    """loss_weights beside class weights, and what the mean is over."""
    from unsloth.kernels import fast_cross_entropy_loss

    logits = torch.randn(2, 4, 9, device = DEVICE, requires_grad = True)
    labels = torch.tensor([[1, 2, -100, 4], [5, 6, 7, -100]], device = DEVICE)
    weight, each = torch.rand(9, device = DEVICE), torch.rand(2, 4, device = DEVICE)
    options = {"class_weight": weight, "loss_weights": each, "reduction": reduction}
    ours = fast_cross_entropy_loss(logits, labels, **options)
    rows = F.cross_entropy(logits.view(-1, 9), labels.view(-1), weight = weight, reduction = "none")
    rows, keep = rows.view(2, 4) * each, labels != -100
    by_weights = (weight[labels.clamp(min = 0)] * each * keep).sum()
    dense = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / by_weights}[reduction]
    torch.testing.assert_close(ours, dense, rtol = 1e-5, atol = 1e-5)
    upstream = torch.randn_like(dense)
    got, wanted = (torch.autograd.grad(value, logits, upstream)[0] for value in (ours, dense))
    torch.testing.assert_close(got, wanted, rtol = 1e-4, atol = 1e-6)
    if reduction == "mean":
        by_labels = fast_cross_entropy_loss(logits, labels, **options, class_weight_mean = "labels")
        torch.testing.assert_close(by_labels, rows.sum() / keep.sum(), rtol = 1e-5, atol = 1e-5)
        group = fast_cross_entropy_loss(logits, labels, n_items = 9, **options, weight_items = 4.0)
        torch.testing.assert_close(group, rows.sum() / 4, rtol = 1e-5, atol = 1e-5)


def test_a_second_derivative_of_dense_logits_is_refused():
    """By the logits and by the upstream gradient, which a weighted loss reaches."""
    from unsloth.kernels.dense_cross_entropy import dense_cross_entropy

    logits = torch.randn(3, 5, device = DEVICE, requires_grad = True)
    scale = torch.ones((), device = DEVICE, requires_grad = True)
    loss = dense_cross_entropy(logits, torch.tensor([0, 4, 2], device = DEVICE)) * scale
    (gradient,) = torch.autograd.grad(loss, logits, create_graph = True)
    penalty = gradient.square().sum() + logits.square().sum() + scale
    for by in (logits, scale):
        with pytest.raises(RuntimeError, match = "no second derivative.*whole logits"):
            torch.autograd.grad(penalty, by, retain_graph = True)


def test_arguments_of_dense_logits_that_do_not_fit_are_named():
    from unsloth.kernels import fast_cross_entropy_loss
    logits, labels = torch.zeros(1, 3, 9, device = DEVICE), torch.zeros(1, 3, device = DEVICE).long()
    for options, error, words in (
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[9\]"),
        ({"label_smoothing": 1.5}, ValueError, "between 0 and 1"),
        ({"reduction": "max"}, ValueError, "none, mean or sum"),
        ({"loss_weights": torch.ones(3)}, ValueError, "loss_weights have shape"),
        ({"weight": torch.ones(9)}, TypeError, "weight"),
    ):
        with pytest.raises(error, match = words):
            fast_cross_entropy_loss(logits, labels, **options)


@pytest.mark.parametrize("option", ["z_loss", "class_weight", "loss_weights"])
def test_dense_logits_with_nothing_to_score_have_loss_zero(option):
    """Every label ignored, or of weight 0: zero and zero gradients, where PyTorch has NaN."""
    from unsloth.kernels import fast_cross_entropy_loss

    logits = torch.randn(1, 4, 9, device = DEVICE, requires_grad = True)
    labels = torch.full((1, 4), -100 if option == "z_loss" else 3, device = DEVICE)
    values = {"class_weight": torch.ones(9), "loss_weights": torch.zeros(1, 4), "z_loss": 0.1}
    values["class_weight"][3] = 0.0
    value = values[option] if option == "z_loss" else values[option].to(DEVICE)
    loss = fast_cross_entropy_loss(logits, labels, **{option: value})
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()
