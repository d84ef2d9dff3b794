# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Unsloth's fused loss on linear_cross_entropy, and where the stock loss stays."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require
from loss_problems import problem

require("interpreter")
import unsloth  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def call():
    """(the fused loss of a small head, hidden states, weight, labels)."""
    from unsloth.models._utils import unsloth_fused_ce_loss

    hidden, weight, bias, labels = problem(rows = 6, dtype = torch.float32)

    def loss(**options):
        arguments = {"labels": labels[None], "lm_head_bias": None, **options}
        return unsloth_fused_ce_loss(None, hidden[None], weight, **arguments)

    return loss, hidden, weight, bias, labels


@pytest.mark.parametrize(
    "options, ours",
    [
        ({}, {}),
        ({"n_items": 9}, {}),
        ({"label_smoothing": 0.2, "ignore_index": 3}, {"label_smoothing": 0.2, "ignore": 3}),
        ({"logit_softcapping": 2.0, "logit_scale_multiply": 0.5}, {"softcap": 2.0, "scale": 0.5}),
        ({"logit_scale_divide": 4.0}, {"scale": 0.25}),
        ({"lm_head_bias": True}, {}),
    ],
)
def test_the_fused_loss_equals_cross_entropy_of_the_logits(call, options, ours):
    """Values and gradients; the counter proves that ours ran."""
    from unsloth.loss_calls import calls

    loss, hidden, weight, bias, labels = call
    if options.pop("lm_head_bias", False):
        options["lm_head_bias"] = bias
    before = calls().get("fused", 0)
    found = loss(**options)
    assert calls()["fused"] == before + 1
    logits = F.linear(hidden, weight, options.get("lm_head_bias"))[:-1] * ours.get("scale", 1.0)
    if "softcap" in ours:
        logits = torch.tanh(logits / ours["softcap"]) * ours["softcap"]
    targets = labels[1:].masked_fill(labels[1:] == ours.get("ignore", -100), -100)
    smoothing = ours.get("label_smoothing", 0.0)
    if "n_items" in options:
        wanted = F.cross_entropy(logits, targets, reduction = "sum") / options["n_items"]
    else:
        wanted = F.cross_entropy(logits, targets, label_smoothing = smoothing)
    torch.testing.assert_close(found, wanted, rtol = 1e-4, atol = 1e-4)
    got = torch.autograd.grad(found, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(wanted, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol = 1e-3, atol = 1e-5)


def test_options_that_the_stock_loss_lacks(call):
    """Class weights, z_loss, weights of tokens, reductions and a loss of one's own, as keywords."""
    loss, hidden, weight, _, labels = call
    logits, targets = F.linear(hidden, weight)[:-1], labels[1:]
    by_class = torch.rand(11, device = DEVICE)
    keep = targets != -100
    rows = F.cross_entropy(logits, targets, weight = by_class, reduction = "none")
    found = loss(class_weight = by_class, z_loss = 0.1, reduction = "sum")
    square = logits[keep].logsumexp(1).square().sum()
    torch.testing.assert_close(found, rows.sum() + 0.1 * square, rtol = 1e-4, atol = 1e-4)
    each = torch.rand(1, 6, device = DEVICE)
    found = loss(loss_weights = each, reduction = "none")
    plain = F.cross_entropy(logits, targets, reduction = "none") * each[0, 1:]
    torch.testing.assert_close(found[0, :-1], plain, rtol = 1e-4, atol = 1e-4)

    def focal(logits, labels):
        log_p = F.log_softmax(logits, 1).gather(1, labels.unsqueeze(1)).squeeze(1)
        return -((1 - log_p.exp()) ** 2) * log_p

    found = loss(loss_fn = focal, logit_scale_multiply = 0.5)
    wanted = focal(0.5 * logits[keep], targets[keep]).mean()
    torch.testing.assert_close(found, wanted, rtol = 1e-4, atol = 1e-4)
    with pytest.raises(ValueError, match = "loss_fn must return each token's loss"):
        loss(loss_fn = lambda logits, labels: logits)
    with pytest.raises(TypeError, match = "'class_weights' would be ignored; 'class_weight'"):
        loss(class_weights = by_class)


def test_a_mask_and_a_bias_of_the_logits(call):
    """What the compiled forwards of FastModel's models pass: labels that do not count, Bart's bias."""
    from unsloth.loss_calls import calls

    loss, hidden, weight, bias, labels = call
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]], device = DEVICE)
    extra = torch.randn(1, 11, device = DEVICE)
    before = calls().get("fused", 0)
    found = loss(mask = mask, logits_bias = extra, lm_head_bias = bias)
    assert calls()["fused"] == before + 1
    targets = labels[1:].masked_fill(mask[0, 1:] == 0, -100)
    wanted = F.cross_entropy(F.linear(hidden, weight, bias + extra[0])[:-1], targets)
    torch.testing.assert_close(found, wanted, rtol = 1e-4, atol = 1e-4)
    got = torch.autograd.grad(found, (hidden, weight, bias))
    for a, b in zip(got, torch.autograd.grad(wanted, (hidden, weight, bias))):
        torch.testing.assert_close(a, b, rtol = 1e-3, atol = 1e-5)


def test_what_a_forward_hands_on_is_no_reason_for_the_stock_loss(call):
    """A forward of transformers gives its loss all its keyword arguments, a packed batch's too."""
    from unsloth.loss_calls import calls

    loss, hidden, weight, _, labels = call
    before = calls().get("fused", 0)
    handed = {"packed_seq_lengths": torch.tensor([4, 2]), "max_length_q": 4, "is_causal": True}
    found = loss(**handed, z_loss = 0.1)
    logits = F.linear(hidden, weight)[:-1]
    squares = torch.logsumexp(logits, 1).square()[labels[1:] != -100].mean()
    wanted = F.cross_entropy(logits, labels[1:]) + 0.1 * squares
    torch.testing.assert_close(found, wanted, rtol = 1e-4, atol = 1e-4)
    assert calls()["fused"] == before + 1


@pytest.mark.parametrize(
    "cause, reason",
    [
        ({"mask": True}, "a mask that is not shaped as the labels"),
        ({"target_gb": 1}, "memory target of the stock loss"),
        ({"something_new": 1}, "keyword something_new"),
        ("UNSLOTH_CE_LOSS_N_CHUNKS", "memory target of the stock loss"),
    ],
)
def test_what_we_do_not_serve_goes_to_stock_or_is_refused(call, monkeypatch, cause, reason):
    """A stock setting keeps stock; an option that stock would drop is an error."""
    from unsloth.loss_calls import calls

    loss, hidden, weight, _, labels = call
    if isinstance(cause, str):
        monkeypatch.setenv(cause, "2")
        cause = {}
    elif "mask" in cause:
        if unsloth.__version__ < "2026.10.9":
            pytest.skip("the stock loss of this release takes no such mask either")
        cause = {"mask": torch.ones_like(labels[None, None])}
    before = calls().get(f"stock: {reason}", 0)
    found = loss(torch_compile = False, **cause)
    wanted = F.cross_entropy(F.linear(hidden, weight)[:-1], labels[1:])
    torch.testing.assert_close(found, wanted, rtol = 1e-4, atol = 1e-4)
    assert calls()[f"stock: {reason}"] == before + 1
    for name, value in (
        ("z_loss", 0.1),
        ("class_weight", torch.ones(11)),
        ("loss_weights", torch.ones(1, 6)),
        ("loss_fn", F.cross_entropy),
        ("reduction", "sum"),
    ):
        with pytest.raises(NotImplementedError, match = f"{name} cannot be honoured .*{reason}"):
            loss(**cause, **{name: value})
    loss(torch_compile = False, **cause, z_loss = 0.0, reduction = "mean", chunk_rows = 4)


def test_a_loss_that_is_ours_already_stays_as_it_is():
    """A name that was imported after the replacement is not replaced again."""
    from unsloth.fused_cross_entropy import on_linear_cross_entropy
    from unsloth.models._utils import unsloth_fused_ce_loss

    again = on_linear_cross_entropy(inspect.unwrap(unsloth_fused_ce_loss))
    for ours in (unsloth_fused_ce_loss, again):
        assert on_linear_cross_entropy(ours) is ours
