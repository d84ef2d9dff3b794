# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Log-probabilities of a head in chunks, the losses on them, and what all chunked losses share."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require
from loss_problems import problem

require("interpreter")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture
def losses():
    from unsloth.kernels import linear_loss
    return linear_loss


def test_linear_log_probs_passes_gradcheck(losses):
    """Log-probability, logsumexp and entropy have right gradients, alone and together."""
    hidden, weight, bias, labels = problem()

    def statistics(*tensors):
        return losses.linear_log_probs(
            *tensors[:2], labels, tensors[2], temperature = 0.7, softcap = 4.0, chunk_rows = 3
        )[:3]

    assert torch.autograd.gradcheck(statistics, (hidden, weight, bias))


@pytest.mark.parametrize("name", ["cross_entropy", "log_probs", "loss"])
def test_second_derivatives_are_refused(losses, name):
    """create_graph works for first derivatives; differentiating them raises instead of giving zeros."""
    hidden, weight, _, labels = problem()
    if name == "cross_entropy":
        value = losses.linear_cross_entropy(hidden, weight, labels)
    elif name == "log_probs":
        value = losses.linear_log_probs(hidden, weight, labels).log_probs.sum()
    else:
        value = losses.linear_loss(hidden, weight, lambda logits: logits.logsumexp(1).sum())
    scale = torch.ones((), dtype = value.dtype, device = DEVICE, requires_grad = True)
    (gradient,) = torch.autograd.grad(value * scale, hidden, create_graph = True)
    penalty = gradient.square().sum() + hidden.square().sum() + scale
    for by in (hidden, weight, scale):  # autograd runs only what leads to it
        with pytest.raises(RuntimeError, match = f"linear_{name} has no second derivative.*logits"):
            torch.autograd.grad(penalty, by, retain_graph = True, allow_unused = True)
    with pytest.raises(RuntimeError, match = "no second derivative"):
        penalty.backward()


def dense_statistics(hidden, weight, labels):
    log_p = torch.log_softmax(F.linear(hidden, weight), 1)
    chosen = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    return chosen, -(log_p.exp() * log_p).sum(1)


def grpo(log_probs, old, advantages):
    ratio = torch.exp(log_probs - old)
    clipped = ratio.clamp(0.8, 1.2)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def dpo(log_probs, reference):
    margin = (log_probs - reference).view(2, 2, -1).sum(-1)
    return -F.logsigmoid(0.1 * (margin[0] - margin[1])).mean()


def kl(log_probs, reference):
    delta = reference - log_probs
    return (torch.exp(delta) - delta - 1).mean()


@pytest.mark.parametrize("kind", ["grpo", "dpo", "kl"])
def test_training_on_log_probs_equals_training_on_dense_logits(losses, kind):
    """Five steps of GRPO, DPO and a KL penalty, with an entropy bonus, give the same weights."""
    torch.manual_seed(0)
    # Drawn on the CPU: with other numbers the penalty on KL can diverge.
    start = torch.randn(11, 5, dtype = torch.float64).to(DEVICE)
    inputs = torch.randn(16, 5, dtype = torch.float64).to(DEVICE)
    labels = torch.randint(0, 11, (16,)).to(DEVICE)
    old = torch.randn(16, dtype = torch.float64).to(DEVICE) - 2
    advantages = torch.randn(16, dtype = torch.float64).to(DEVICE)

    def train(statistics):
        weight = start.clone().requires_grad_()
        for _ in range(5):
            log_probs, entropy = statistics(torch.tanh(inputs), weight)
            if kind == "grpo":
                loss = grpo(log_probs, old, advantages)
            else:
                loss = (dpo if kind == "dpo" else kl)(log_probs, old)
            loss = loss - 0.1 * entropy.mean()
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                weight -= 0.5 * gradient
        return weight

    def ours(hidden, weight):
        found = losses.linear_log_probs(hidden, weight, labels, chunk_rows = 5)
        return found.log_probs, found.entropy

    dense = train(lambda hidden, weight: dense_statistics(hidden, weight, labels))
    torch.testing.assert_close(train(ours), dense, rtol = 1e-9, atol = 1e-9)
    assert not torch.allclose(dense, start)


def test_log_probs_of_ignored_rows_and_top1(losses):
    """Ignored rows hold 0 and -1; top1 is the argmax."""
    hidden, weight, bias, labels = problem()
    found = losses.linear_log_probs(hidden, weight, labels, bias)
    keep = labels != -100
    best = F.linear(hidden, weight, bias).argmax(1)
    assert torch.equal(found.top1, torch.where(keep, best, -1))
    for value in found[:3]:
        assert not value[~keep].any()
        assert value[keep].all()


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("vocab", [1, 37, 4097])
def test_log_probs_equal_dense_ones(logits_dtype, vocab):
    """Values and gradients of log-probability, logsumexp and entropy."""
    from unsloth.kernels.linear_loss import linear_log_probs

    hidden, weight, bias, targets = problem(6, 8, vocab, torch.float32, ignored = ())
    targets[2] = -100
    found = linear_log_probs(
        hidden,
        weight,
        targets,
        bias,
        temperature = 0.8,
        softcap = 6.0,
        chunk_rows = 4,
        logits_dtype = logits_dtype,
    )
    logits = torch.tanh(F.linear(hidden, weight, bias) / 6.0) * 6.0 / 0.8
    log_p = torch.log_softmax(logits, 1)
    keep = targets != -100
    dense = (
        log_p.gather(1, targets.clamp(min = 0).unsqueeze(1)).squeeze(1) * keep,
        logits.logsumexp(1) * keep,
        -(log_p.exp() * log_p).sum(1) * keep,
    )
    for a, b in zip(found, dense):
        torch.testing.assert_close(a, b, rtol = 1e-4, atol = 1e-5)
    assert torch.equal(found.top1, torch.where(keep, logits.argmax(1), -1))
    factors = [torch.randn_like(b) for b in dense]
    got = torch.autograd.grad(
        sum((a * f).sum() for a, f in zip(found, factors)), (hidden, weight, bias)
    )
    total = sum((b * f).sum() for b, f in zip(dense, factors))
    for a, b in zip(got, torch.autograd.grad(total, (hidden, weight, bias))):
        torch.testing.assert_close(a, b, rtol = 1e-3, atol = 1e-5)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"targets": [0] * 7}, TypeError, "targets must be a tensor of integers"),
        ({"targets": torch.zeros(7)}, TypeError, "targets must be a tensor of integers"),
        ({"temperature": 0}, ValueError, "temperature must be a positive number, got 0"),
        ({"temperature": "hot"}, ValueError, "got 'hot'"),
        ({"temperature": True}, ValueError, "got True"),
        ({"head_grad_dtype": torch.float16}, TypeError, "head_grad_dtype must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(losses, change, error, words):
    hidden, weight, _, labels = problem()
    with pytest.raises(error, match = words):
        losses.linear_log_probs(**{"hidden": hidden, "weight": weight, "targets": labels, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-2000.0, float("-inf")])
def test_a_class_without_probability_counts_for_nothing(losses, dtype, low):
    """Far below the others or masked: values and gradients are those without it."""
    hidden, weight, bias, labels = problem(dtype = dtype, ignored = ())
    labels, bias = labels.clamp(max = 9), torch.zeros_like(bias)
    bias[10] = low
    found = losses.linear_log_probs(hidden, weight, labels, bias)
    logits = F.linear(hidden, weight[:10])
    log_p = torch.log_softmax(logits, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    dense = (log_p.gather(1, labels.unsqueeze(1)).squeeze(1), logits.logsumexp(1), entropy)
    got, wanted = (
        torch.autograd.grad(sum((1 + i) * v.sum() for i, v in enumerate(values)), (hidden, weight))
        for values in (found[:3], dense)
    )
    for a, b in zip((*found[:3], *got), (*dense, *wanted)):
        torch.testing.assert_close(a, b, rtol = 1e-4, atol = 1e-5)


@pytest.mark.parametrize(
    "name", ["cross_entropy_spec", "kernels.loss_chunking", "kernels.log_probs_kernel"]
)
def test_without_triton_the_losses_are_torchs(monkeypatch, name):
    """A CPU build of torch may come without it: what a loss imports is there all the same."""
    known = importlib.import_module(f"unsloth.{name}")
    for missing in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, missing, None)
    name = f"{known.__package__}._without_triton"
    spec = importlib.util.spec_from_file_location(name, known.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.triton is None and known.triton is not None
