# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Any loss of a head that treats rows by themselves, computed in chunks."""

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require
from loss_problems import assert_same, problem

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture
def linear_loss():
    from unsloth.kernels.linear_custom_loss import linear_loss
    return linear_loss


@pytest.mark.parametrize("per_row", [False, True])
def test_linear_loss_passes_gradcheck_also_by_row_arguments(linear_loss, per_row):
    """A loss given as a function gets its gradients from autograd, its row arguments' too."""
    hidden, weight, bias, _ = problem(ignored = ())
    teacher = torch.rand(7, 11, dtype = torch.float64, device = DEVICE).requires_grad_()

    def distance(logits, wanted):
        rows = ((logits.softmax(1) - wanted) ** 2).sum(1) + logits.logsumexp(1)
        return rows if per_row else rows.sum()

    def loss(*tensors):
        hidden, weight, bias, wanted = tensors
        return linear_loss(hidden, weight, distance, wanted, bias = bias, chunk_rows = 3)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias, teacher))


def test_linear_loss_serves_a_focal_loss_and_skips_rows(linear_loss):
    """A loss that PyTorch lacks, on the rows that count."""
    hidden, weight, bias, labels = problem()
    keep = labels != -100

    def focal(logits, targets):
        log_p = torch.log_softmax(logits, 1).gather(1, targets.unsqueeze(1)).squeeze(1)
        return -((1 - log_p.exp()) ** 2 * log_p)

    ours = linear_loss(hidden, weight, focal, labels, bias = bias, keep = keep, chunk_rows = 2)
    dense = focal(F.linear(hidden, weight, bias), labels.clamp(min = 0)) * keep
    assert_same(ours, dense, (hidden, weight, bias))
    none = linear_loss(hidden, weight, focal, labels, bias = bias, keep = torch.zeros_like(keep))
    assert none.shape == labels.shape and not none.any()


def test_linear_loss_refuses_what_it_would_get_wrong(linear_loss):
    """Means over rows, lost gradients and wrong shapes are errors, not wrong numbers."""
    hidden, weight, _, labels = problem(ignored = ())
    with pytest.raises(ValueError, match = "not separable over rows"):
        linear_loss(hidden, weight, F.cross_entropy, labels)
    temperature = torch.ones((), dtype = torch.float64, device = DEVICE, requires_grad = True)
    for reduce in (torch.sum, lambda rows: rows):
        with pytest.raises(ValueError, match = "its gradient would be lost"):
            linear_loss(hidden, weight, lambda logits: reduce((logits * temperature).logsumexp(1)))
    with pytest.raises(ValueError, match = "one loss a row or their sum"):
        linear_loss(hidden, weight, lambda logits: logits)
    with pytest.raises(TypeError, match = "row argument 0 must be a tensor"):
        linear_loss(hidden, weight, F.cross_entropy, 3)
    for keep in (torch.ones(7), torch.ones(6, dtype = torch.bool)):
        with pytest.raises(ValueError, match = r"keep must be a bool tensor of shape \(7,\)"):
            linear_loss(hidden, weight, F.cross_entropy, labels, keep = keep.to(DEVICE))
    with pytest.raises(ValueError, match = "must begin with hidden's"):
        linear_loss(hidden, weight, F.cross_entropy, labels[:-1])


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_rows_may_be_fewer_or_more_than_a_row_is_wide(linear_loss, rows):
    """The rows that a loss is tried on are rows of these hidden states."""
    hidden, weight, bias, labels = problem(rows = rows, width = 16, ignored = ())

    def loss(logits, targets):
        return F.cross_entropy(logits, targets, reduction = "none")

    ours = linear_loss(hidden, weight, loss, labels, bias = bias)
    assert_same(ours, loss(F.linear(hidden, weight, bias), labels), (hidden, weight, bias))


@pytest.mark.parametrize("rows, scale", [(2, 1.0), (7, 0.01)])
def test_a_mean_over_rows_is_refused_for_two_rows_and_for_small_values(linear_loss, rows, scale):
    """Also where the halves differ by little."""
    hidden, weight, _, labels = problem(rows = rows, ignored = ())
    with pytest.raises(ValueError, match = "not separable over rows"):
        linear_loss(hidden, weight, lambda *given: scale * F.cross_entropy(*given), labels)
