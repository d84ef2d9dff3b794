# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Chunked losses of a language model's head, and SFTTrainer on them."""

import os
from types import SimpleNamespace

import unsloth  # noqa: F401
import pytest
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def losses():
    from unsloth.kernels import linear_loss

    return linear_loss


@pytest.fixture
def inside():
    """Modules behind the public functions."""
    from unsloth.kernels import chunk_rows, linear_chunks, linear_cross_entropy

    return SimpleNamespace(
        chunk_rows = chunk_rows, chunks = linear_chunks, cross_entropy = linear_cross_entropy
    )


def problem(
    rows = 7,
    width = 5,
    vocab = 11,
    dtype = torch.float64,
    ignored = (2, 5),
    seed = 0,
):
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


# --- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"softcap": 2.0, "logit_scale": 0.7},
        {"z_loss": 0.05, "logit_scale": -1.5},
        {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.01, "weighted": True},
    ],
)
def test_linear_cross_entropy_passes_gradcheck(losses, reduction, options):
    """Analytic gradients by hidden, weight and bias equal numerical ones in float64."""
    options = dict(options)
    hidden, weight, bias, labels = problem()
    if options.pop("weighted", False):
        options["class_weight"] = torch.rand(weight.shape[0], dtype = torch.float64, device = DEVICE)

    def loss(*tensors):
        return losses.linear_cross_entropy(
            *tensors[:2], labels, tensors[2], reduction = reduction, chunk_rows = 3, **options
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_linear_log_probs_passes_gradcheck(losses):
    """Log-probability, logsumexp and entropy have right gradients, alone and together."""
    hidden, weight, bias, labels = problem()

    def statistics(*tensors):
        return losses.linear_log_probs(
            *tensors[:2], labels, tensors[2], temperature = 0.7, softcap = 4.0, chunk_rows = 3
        )[:3]

    assert torch.autograd.gradcheck(statistics, (hidden, weight, bias))


@pytest.mark.parametrize("per_row", [False, True])
def test_linear_loss_passes_gradcheck_also_by_row_arguments(losses, per_row):
    """A loss given as a function gets its gradients from autograd, its row arguments' too."""
    hidden, weight, bias, _ = problem(ignored = ())
    teacher = torch.rand(7, 11, dtype = torch.float64, device = DEVICE).requires_grad_()

    def distance(logits, wanted):
        rows = ((logits.softmax(1) - wanted) ** 2).sum(1) + logits.logsumexp(1)
        return rows if per_row else rows.sum()

    def loss(*tensors):
        hidden, weight, bias, wanted = tensors
        return losses.linear_loss(hidden, weight, distance, wanted, bias = bias, chunk_rows = 3)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias, teacher))


def test_class_probabilities_pass_gradcheck_also_by_the_probabilities(losses):
    """Probability targets may be trained too, as in PyTorch."""
    hidden, weight, bias, _ = problem()
    targets = torch.rand(7, 11, dtype = torch.float64, device = DEVICE).requires_grad_()

    def loss(*tensors):
        return losses.linear_cross_entropy(
            *tensors[:2], tensors[3], tensors[2], label_smoothing = 0.1, chunk_rows = 3
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias, targets))


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
    (gradient,) = torch.autograd.grad(value, hidden, create_graph = True)
    with pytest.raises(RuntimeError, match = "no second derivative"):
        gradient.sum().backward()


def test_a_retained_graph_gives_the_same_gradients_twice(losses):
    """The first backward hands its buffers out; the second computes them again."""
    hidden, weight, _, labels = problem()
    loss = losses.linear_cross_entropy(hidden, weight, labels, chunk_rows = 3)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph = True)
    expected = [g.clone() for g in first]
    for gradient in first:
        gradient.fill_(7.0)  # a layer may write over what it is given
    for gradient, wanted in zip(torch.autograd.grad(2 * loss, (hidden, weight)), expected):
        torch.testing.assert_close(gradient, 2 * wanted)


# --- shapes, dtypes, chunks ------------------------------------------------------------------


def test_any_shape_dtype_and_chunk_equals_dense():
    """Random rows 0 to 9, vocabularies from 1, all dtypes, strided inputs, any ignored rows."""
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st
    from unsloth.kernels.linear_loss import linear_cross_entropy

    @settings(max_examples = 60, deadline = None, derandomize = True)
    @given(
        rows = st.integers(0, 9),
        width = st.integers(1, 9),
        vocab = st.sampled_from([1, 2, 3, 16, 17, 33, 257]),
        dtype = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        chunk = st.integers(1, 10),
        ignored = st.floats(0, 1),
        strided = st.booleans(),
        reduction = st.sampled_from(["mean", "sum", "none"]),
        seed = st.integers(0, 99),
    )
    def check(rows, width, vocab, dtype, chunk, ignored, strided, reduction, seed):
        make = torch.Generator().manual_seed(seed)
        hidden = torch.randn(rows, width * 2, generator = make)[:, :: 2 if strided else 1]
        hidden = hidden[:, :width].to(DEVICE, dtype).requires_grad_()
        weight = (
            torch.randn(width, vocab, generator = make).t()
            if strided
            else torch.randn(vocab, width, generator = make)
        )
        weight = weight.to(DEVICE, dtype).requires_grad_()
        labels = torch.randint(0, vocab, (rows,), generator = make)
        labels[torch.rand(rows, generator = make) < ignored] = -100
        labels = labels.to(DEVICE)
        ours = linear_cross_entropy(hidden, weight, labels, reduction = reduction, chunk_rows = chunk)
        wide = torch.float64
        exact = [t.detach().to(wide).requires_grad_() for t in (hidden, weight)]
        reference = F.cross_entropy(F.linear(*exact), labels, reduction = reduction)
        rounded = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 6e-2)
        torch.testing.assert_close(
            ours.to(wide), reference, rtol = rounded, atol = rounded, equal_nan = True
        )
        upstream = torch.ones_like(ours)
        got = torch.autograd.grad(ours, (hidden, weight), upstream)
        expected = torch.autograd.grad(reference, exact, upstream.to(wide))
        for a, b in zip(got, expected):
            torch.testing.assert_close(a.to(wide), b, rtol = rounded, atol = rounded)

    check()


def test_a_vocabulary_above_65536_and_odd(losses):
    """One more than fits 16 bits, and no multiple of any tile."""
    hidden, weight, bias, labels = problem(rows = 3, vocab = 65537, dtype = torch.float32, ignored = ())
    labels[0] = 65536
    ours = losses.linear_cross_entropy(hidden, weight, labels, bias)
    reference = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    assert_same(ours, reference, (hidden, weight, bias), tolerance = 1e-5)


def test_the_number_of_chunks_leaves_results_within_rounding(losses):
    """Loss rows are equal bit for bit in float64; gradients summed over chunks within a few ulp."""
    hidden, weight, _, labels = problem(rows = 64, width = 16, vocab = 50, ignored = range(0, 64, 5))
    rows, gradients = {}, {}
    for chunk in (1, 7, 64):
        loss = losses.linear_cross_entropy(
            hidden, weight, labels, reduction = "none", chunk_rows = chunk
        )
        rows[chunk] = loss.detach()
        mean = losses.linear_cross_entropy(hidden, weight, labels, chunk_rows = chunk)
        gradients[chunk] = torch.autograd.grad(mean, (hidden, weight))
    ulp = torch.finfo(torch.float64).eps
    for chunk in (1, 7):
        torch.testing.assert_close(rows[chunk], rows[64], rtol = 8 * ulp, atol = 8 * ulp)
        for a, b in zip(gradients[chunk], gradients[64]):
            assert (a - b).abs().max() <= 64 * ulp * b.abs().max()


def test_float32_sums_of_the_head_gradient_do_not_drift_with_chunks(losses):
    """In bfloat16 the sum over many chunks rounds every time; head_grad_dtype = float32 once."""
    hidden, weight, _, labels = problem(
        rows = 256, width = 32, vocab = 64, dtype = torch.bfloat16, ignored = ()
    )
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (reference,) = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels), exact[1])

    def error(**options):
        loss = losses.linear_cross_entropy(hidden, weight, labels, chunk_rows = 2, **options)
        (gradient,) = torch.autograd.grad(loss, weight)
        return ((gradient.double() - reference).norm() / reference.norm()).item()

    wide = error(head_grad_dtype = torch.float32)
    assert wide < 0.75 * error()
    assert error(head_grad_dtype = torch.float32, logits_dtype = torch.float32) <= wide


def test_a_compiled_model_breaks_its_graph_there_and_gets_right_gradients(losses):
    """torch.compile around a model that calls the loss."""
    hidden, weight, _, labels = problem(rows = 9)

    def model(states):
        return 2 * losses.linear_cross_entropy(torch.tanh(states), weight, labels, chunk_rows = 4)

    compiled = torch.compile(model, backend = "eager")(hidden)
    assert_same(
        compiled,
        2 * F.cross_entropy(F.linear(torch.tanh(hidden), weight), labels),
        (hidden, weight),
    )


# --- what reaches a product ------------------------------------------------------------------


def count_products(monkeypatch, inside):
    seen = SimpleNamespace(forward_rows = 0, products = 0)
    project, multiply_ = inside.chunks.project, inside.chunks.multiply_

    def counted_project(hidden, weight, out):
        seen.forward_rows += hidden.shape[0]
        seen.products += 1
        assert torch.isfinite(hidden).all()
        project(hidden, weight, out)

    def counted_multiply(*args):
        seen.products += 1
        multiply_(*args)

    monkeypatch.setattr(inside.chunks, "project", counted_project)
    monkeypatch.setattr(inside.chunks, "multiply_", counted_multiply)
    return seen


@pytest.mark.parametrize("trained", [False, True])
def test_ignored_rows_never_reach_a_product(losses, inside, monkeypatch, trained):
    """Two products a chunk with a frozen head, three with a trained one, over labelled rows alone."""
    hidden, weight, _, labels = problem(rows = 12, ignored = (0, 3, 4, 11))
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    weight.requires_grad_(trained)
    seen = count_products(monkeypatch, inside)
    losses.linear_cross_entropy(hidden, weight, labels, chunk_rows = 8).backward()
    assert seen.forward_rows == 8
    assert seen.products == (3 if trained else 2)
    assert torch.equal(hidden.grad[labels == -100], torch.zeros_like(hidden.grad[labels == -100]))
    assert torch.isfinite(hidden.grad).all()


def test_a_batch_with_every_label_ignored(losses, inside, monkeypatch):
    """NaN as in PyTorch, or 0 where training wants it; zero gradients and no product either way."""
    hidden, weight, _, labels = problem()
    labels.fill_(-100)
    seen = count_products(monkeypatch, inside)
    for options, expected in (
        ({}, float("nan")),
        ({"nan_if_empty": False}, 0.0),
        ({"n_items": 0}, 0.0),
    ):
        loss = losses.linear_cross_entropy(hidden, weight, labels, **options)
        assert torch.equal(loss.isnan(), torch.tensor(expected != expected, device = loss.device))
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert not gradient.any()
    assert losses.linear_cross_entropy(hidden, weight, labels, reduction = "sum").item() == 0.0
    assert seen.products == 0


def test_a_frozen_model_costs_one_product_and_holds_no_gradient(losses, inside, monkeypatch):
    """Evaluation computes the loss alone."""
    hidden, weight, _, labels = problem()
    seen = count_products(monkeypatch, inside)
    with torch.no_grad():
        losses.linear_cross_entropy(hidden, weight, labels)
    assert seen.products == 1


# --- training conditions ---------------------------------------------------------------------


def test_shift_scores_each_position_against_the_next_token(losses):
    """As the causal language model loss of transformers."""
    hidden, weight, _, _ = problem(rows = 12)
    tokens = torch.randint(0, 11, (2, 6), device = DEVICE)
    tokens[0, 3] = -100
    states = hidden.view(2, 6, 5)
    ours = losses.linear_cross_entropy(states, weight, tokens, shift = True)
    logits = F.linear(states, weight)
    reference = F.cross_entropy(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))
    assert_same(ours, reference, (hidden, weight))


def test_gradient_accumulation_with_n_items_equals_one_batch(losses):
    """Micro-batches of different lengths, divided by the whole group's count."""
    hidden, weight, _, labels = problem(rows = 12)
    whole = losses.linear_cross_entropy(hidden, weight, labels)
    expected = torch.autograd.grad(whole, (hidden, weight))
    count = (labels != -100).sum()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 12)):
        losses.linear_cross_entropy(hidden[rows], weight, labels[rows], n_items = count).backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


def test_float16_gradients_survive_a_loss_scaler(losses):
    """Gradients of 1e-9 do not underflow before the scaler's 65536 multiplies them."""
    hidden, weight, _, labels = problem(rows = 16, dtype = torch.float16, ignored = ())
    loss = losses.linear_cross_entropy(hidden, weight, labels, n_items = 10**7)
    got = torch.autograd.grad(loss * 65536.0, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    dense = F.cross_entropy(F.linear(*exact), labels, reduction = "sum") / 10**7
    for a, b in zip(got, torch.autograd.grad(dense * 65536.0, exact)):
        assert ((a.double() - b).norm() / b.norm()) < 3e-3


def test_autocast_casts_as_a_linear_layer_does(losses):
    """Under autocast float32 hidden states and weights meet in bfloat16; gradients come in float32."""
    hidden, weight, _, labels = problem(rows = 32, width = 16, dtype = torch.float32)
    with torch.autocast(DEVICE, dtype = torch.bfloat16):
        ours = losses.linear_cross_entropy(hidden, weight, labels)
        dense = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, dense, rtol = 2e-3, atol = 2e-3)
    got = torch.autograd.grad(ours, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(dense, (hidden, weight))):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 1e-2


def test_a_tied_head_gets_both_gradients(losses):
    """The embedding's and the head's gradient add up in the one weight."""
    weight = torch.randn(11, 5, dtype = torch.float64, device = DEVICE, requires_grad = True)
    tokens = torch.randint(0, 11, (9,), device = DEVICE)
    labels = tokens.roll(-1)

    def train(loss):
        return loss(torch.tanh(F.embedding(tokens, weight)))

    ours = train(lambda h: losses.linear_cross_entropy(h, weight, labels, chunk_rows = 4))
    dense = train(lambda h: F.cross_entropy(F.linear(h, weight), labels))
    assert_same(ours, dense, (weight,))


# --- losses on log-probabilities -------------------------------------------------------------


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


# --- linear_loss -----------------------------------------------------------------------------


def test_linear_loss_serves_a_focal_loss_and_skips_rows(losses):
    """A loss that PyTorch lacks, on the rows that count."""
    hidden, weight, bias, labels = problem()
    keep = labels != -100

    def focal(logits, targets):
        log_p = torch.log_softmax(logits, 1).gather(1, targets.unsqueeze(1)).squeeze(1)
        return -((1 - log_p.exp()) ** 2 * log_p)

    ours = losses.linear_loss(
        hidden, weight, focal, labels.clamp(min = 0), bias = bias, keep = keep, chunk_rows = 2
    )
    dense = focal(F.linear(hidden, weight, bias), labels.clamp(min = 0)) * keep
    assert_same(ours, dense, (hidden, weight, bias))


def test_linear_loss_refuses_what_it_would_get_wrong(losses):
    """Means over rows, lost gradients and wrong shapes are errors, not wrong numbers."""
    hidden, weight, _, labels = problem(ignored = ())
    with pytest.raises(ValueError, match = "not separable over rows"):
        losses.linear_loss(hidden, weight, F.cross_entropy, labels)
    temperature = torch.ones((), dtype = torch.float64, device = DEVICE, requires_grad = True)
    for reduce in (torch.sum, lambda rows: rows):
        with pytest.raises(ValueError, match = "its gradient would be lost"):
            losses.linear_loss(
                hidden, weight, lambda logits: reduce((logits * temperature).logsumexp(1))
            )
    with pytest.raises(ValueError, match = "one loss a row or their sum"):
        losses.linear_loss(hidden, weight, lambda logits: logits)
    with pytest.raises(TypeError, match = "row argument 0 must be a tensor"):
        losses.linear_loss(hidden, weight, F.cross_entropy, 3)
    with pytest.raises(ValueError, match = "must begin with hidden's"):
        losses.linear_loss(hidden, weight, F.cross_entropy, labels[:-1])


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": torch.zeros(7, 4)}, ValueError, "last dimension must be 5"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \[vocab, hidden\]"),
        ({"weight": torch.zeros(11, 5, dtype = torch.int8)}, TypeError, "dequantize"),
        ({"weight": torch.zeros(11, 5, dtype = torch.bfloat16)}, TypeError, "cast one of them"),
        ({"labels": torch.zeros(6, dtype = torch.long)}, ValueError, "one label a row"),
        ({"labels": torch.zeros(7, dtype = torch.bool)}, TypeError, "labels must be integers"),
        ({"labels": torch.zeros(7, 9)}, ValueError, "class probabilities must have shape"),
        ({"bias": torch.zeros(10)}, ValueError, r"bias must be \[11\]"),
        ({"class_weight": torch.zeros(10)}, ValueError, r"class_weight must be \[11\]"),
        ({"class_weight": torch.zeros(11, requires_grad = True)}, ValueError, "detach"),
        ({"label_smoothing": 1.5}, ValueError, "between 0 and 1"),
        ({"label_smoothing": float("nan")}, ValueError, "finite number"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"reduction": "max"}, ValueError, "none, mean, sum"),
        ({"reduction": "sum", "n_items": 3}, ValueError, "leave n_items out"),
        ({"n_items": -1}, ValueError, "must not be negative"),
        ({"chunk_rows": 0}, ValueError, "positive number of rows"),
        ({"chunk_rows": 2.5}, ValueError, "positive number of rows"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer"),
        ({"logits_dtype": torch.float16}, TypeError, "logits_dtype must be"),
        (
            {"labels": torch.zeros(7, dtype = torch.long).to("meta")},
            ValueError,
            r"\.to\(hidden\.device\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(losses, change, error, words):
    """Every error names the argument, its value and the way out."""
    hidden, weight, _, labels = problem(dtype = torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels}
    moved = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for k, v in change.items()
    }
    if "class_weight" in change and change["class_weight"].requires_grad:
        moved["class_weight"] = moved["class_weight"].detach().requires_grad_()
    with pytest.raises(error, match = words):
        losses.linear_cross_entropy(**{**arguments, **moved})


@pytest.mark.parametrize("label", [11, -1, 10**12])
def test_labels_outside_the_vocabulary_never_read_out_of_bounds(losses, monkeypatch, label):
    """IndexError on a CPU; NaN for that row on a GPU, and an IndexError there on request."""
    hidden, weight, _, labels = problem()
    labels[1] = label
    if DEVICE == "cuda":
        rows = losses.linear_cross_entropy(hidden, weight, labels, reduction = "none")
        assert rows.isnan().nonzero().flatten().tolist() == [1]
        monkeypatch.setenv("UNSLOTH_LOSS_CHECK_LABELS", "1")
    with pytest.raises(IndexError, match = f"label {label} is outside the vocabulary of 11"):
        losses.linear_cross_entropy(hidden, weight, labels)


def test_chunk_rows_come_from_caller_environment_and_store(inside, monkeypatch, tmp_path):
    """Explicit value, then the environment, then the stored choice; never more than the rows."""
    choose = inside.chunk_rows.choose_chunk_rows
    cpu = torch.device("cpu")
    assert choose(100, 1000, 2, cpu, 7) == 7
    assert choose(5, 1000, 2, cpu, 7) == 5
    assert choose(0, 1000, 2, cpu) == 1
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_ROWS", "9")
    assert choose(100, 1000, 2, cpu) == 9
    assert choose(100, 1000, 2, cpu, 7) == 7
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_ROWS", "many")
    with pytest.raises(ValueError, match = "UNSLOTH_LOSS_CHUNK_ROWS must be a positive number"):
        choose(100, 1000, 2, cpu)
    monkeypatch.delenv("UNSLOTH_LOSS_CHUNK_ROWS")
    large = choose(10**6, 128256, 2, cpu)
    assert large * 128256 * 2 <= 64 << 20 < (large + 1) * 128256 * 2
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_FILE", str(tmp_path / "chunk.json"))
    assert inside.chunk_rows.stored_budget("A GPU") is None
    inside.chunk_rows.store_budget("A GPU", 384)
    assert inside.chunk_rows.stored_budget("A GPU") == 384
    fitted = {most: inside.chunk_rows.fit_rows(most) for most in (1, 20, 130, 300, 511, 700, 1308)}
    assert fitted == {1: 16, 20: 20, 130: 128, 300: 256, 511: 384, 700: 512, 1308: 1280}


def test_chunk_rows_follow_the_memory_that_is_free(inside, monkeypatch):
    """A quarter of what is free at most; a roomy GPU is not asked before every loss."""
    chunk_rows = inside.chunk_rows
    gpu, asked = torch.device("cuda", 0), []
    free = {"driver": 100 << 30, "held": 0}

    def ask(index):
        asked.append(index)
        return free["driver"], 0

    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    monkeypatch.setattr(chunk_rows, "_held_bytes", lambda index: free["held"])
    monkeypatch.setattr(chunk_rows, "_architecture_budget", lambda index: 320)
    monkeypatch.setattr(chunk_rows, "_room", {})
    rows = [chunk_rows.choose_chunk_rows(10**6, 128256, 2, gpu) for _ in range(70)]
    assert set(rows) == {1280} and len(asked) == 3
    # A trained head takes as much as its gradient has, up to 1 GiB.
    assert chunk_rows.choose_chunk_rows(10**6, 128256, 2, gpu, None, 1 << 40) == 4096
    free.update(driver = 100 << 20, held = 300 << 20)
    chunk_rows._room.clear()
    assert chunk_rows.choose_chunk_rows(10**6, 128256, 2, gpu) == 384  # 100 MiB of logits
    free["driver"] = 100 << 30
    assert chunk_rows.choose_chunk_rows(10**6, 128256, 2, gpu) == 1280  # a tight GPU is asked again


# --- SFTTrainer, on the CPU backend or on a GPU --------------------------------------------------

ON_GPU = torch.cuda.is_available()
# `calls` counts the loss that the backend has; a GPU's model computes in bfloat16.
COUNTED, EXACT = ("fused", 5e-2) if ON_GPU else ("cpu", 2e-4)


@pytest.fixture(scope = "module")
def checkpoint(tmp_path_factory):
    """A two-layer Llama with random weights and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size = 64,
        hidden_size = 64,
        intermediate_size = 64,
        num_hidden_layers = 2,
        num_attention_heads = 4,
        num_key_value_heads = 2,
        # Logits large enough that every option moves the loss far more than rounding does.
        initializer_range = 0.3,
        pad_token_id = 2,
        bos_token_id = 0,
        eos_token_id = 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object = tokenizer, **special).save_pretrained(folder)
    return folder


def load(checkpoint):
    from unsloth import FastLanguageModel

    # Only now, as loading patches the trainers.
    return FastLanguageModel.from_pretrained(
        checkpoint,
        max_seq_length = 32,
        load_in_4bit = False,
        dtype = torch.bfloat16 if ON_GPU else torch.float32,
    )


def rows_of_tokens():
    make = torch.Generator().manual_seed(0)
    rows = []
    for row in range(4):
        tokens = torch.randint(3, 64, (12,), generator = make).tolist()
        ignored = 12 if row == 3 else 3 * row
        rows.append({"input_ids": tokens, "labels": [-100] * ignored + tokens[ignored:]})
    return rows


def train(
    checkpoint,
    prepare = lambda model: None,
    rows = None,
    **config,
):
    """First losses of SFTTrainer, one row a step, and the model."""
    from datasets import Dataset
    from transformers import default_data_collator
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(checkpoint)
    if ON_GPU:  # where FastLanguageModel trains adapters; new ones leave the losses as they are
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(model, r = 4, target_modules = ["q_proj", "v_proj"])
    prepare(model)
    rows = rows or rows_of_tokens()
    settings = SFTConfig(
        output_dir = os.path.join(checkpoint, "out"),
        per_device_train_batch_size = 1,
        gradient_accumulation_steps = 1,
        max_steps = len(rows),
        logging_steps = 1,
        learning_rate = 1e-9,
        report_to = "none",
        save_strategy = "no",
        max_length = 32,
        remove_unused_columns = False,
        dataset_kwargs = {"skip_prepare_dataset": True},
        train_sampling_strategy = "sequential",
        bf16 = ON_GPU,
        **config,
    )
    trainer = SFTTrainer(
        model = model,
        processing_class = tokenizer,
        train_dataset = Dataset.from_list(rows),
        args = settings,
        data_collator = default_data_collator,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def reference_losses(checkpoint, **options):
    """Cross entropy of transformers' own logits for each row, in order."""
    from transformers import LlamaForCausalLM

    # Unsloth's rotary embedding, which transformers' own model uses too by now, lives on the GPU.
    # In training's dtype: a bfloat16 model's loss of 6.87 is 0.07 off the float32 model's.
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype = dtype).to(device)
    found = []
    for row in rows_of_tokens():
        tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(input_ids = tokens.to(device)).logits[0, :-1].cpu().float()
        count = (labels != -100).sum()
        found.append(
            F.cross_entropy(
                logits, labels, reduction = "sum" if not count else "mean", **options
            ).item()
        )
    return found


def test_sft_trainer_trains_on_our_loss(checkpoint):
    """Losses are right, a batch without labels trains on with loss 0, and the counter proves use."""
    from unsloth.fused_loss import calls

    before = calls().get(COUNTED, 0)
    found, model = train(checkpoint)
    assert calls().get(COUNTED, 0) - before == 4
    assert found == pytest.approx(reference_losses(checkpoint), abs = EXACT)
    assert found[3] == 0.0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_label_smoothing_factor_reaches_the_chunked_loss(checkpoint):
    """SFTConfig(label_smoothing_factor) smooths without asking the model for logits."""
    from unsloth.fused_loss import calls

    before = calls().get(COUNTED, 0)
    found, _ = train(checkpoint, label_smoothing_factor = 0.5)
    assert calls().get(COUNTED, 0) - before == 4
    assert abs(found[1] - reference_losses(checkpoint)[1]) > 5 * EXACT
    assert found == pytest.approx(reference_losses(checkpoint, label_smoothing = 0.5), abs = EXACT)


def test_class_weights_through_sft_trainer(checkpoint):
    """set_loss_options gives every step its class weights; the sum is over the number of labels."""
    from unsloth.fused_loss import set_loss_options

    weight = torch.linspace(0.0, 2.0, 64)
    found, _ = train(checkpoint, lambda model: set_loss_options(model, class_weight = weight))
    sums = reference_losses(checkpoint, weight = weight)
    # transformers divides by the number of labels, torch's mean by their weights' sum.
    for loss, mean, row in zip(found, sums, rows_of_tokens()):
        labels = torch.tensor(
            [label for label in row["labels"][1:] if label != -100], dtype = torch.long
        )
        scale = (weight[labels].sum() / len(labels)).item() if len(labels) else 0.0
        assert loss == pytest.approx(mean * scale, abs = EXACT)
    plain = reference_losses(checkpoint)
    assert all(abs(loss / other - 1) > 4e-2 for loss, other in zip(found[:3], plain))


def test_model_arguments_that_stock_drops_are_honoured(checkpoint):
    """label_smoothing, ignore_index and shift_labels in a plain call of the model."""
    model, _ = load(checkpoint)
    row = rows_of_tokens()[1]
    tokens = torch.tensor([row["input_ids"]], device = DEVICE)
    labels = torch.tensor([row["labels"]], device = DEVICE)
    shifted = F.pad(labels[:, 1:], (0, 1), value = -100)
    with torch.no_grad():
        logits = model(input_ids = tokens).logits[0].float()
        smoothed = model(input_ids = tokens, labels = labels, label_smoothing = 0.5).loss
        renamed = model(
            input_ids = tokens, labels = labels.masked_fill(labels == -100, 5), ignore_index = 5
        ).loss
        moved = model(input_ids = tokens, shift_labels = shifted, label_smoothing = 0.5).loss
    expected = F.cross_entropy(logits, shifted[0], label_smoothing = 0.5).item()
    assert abs(expected - F.cross_entropy(logits, shifted[0]).item()) > 5 * EXACT
    assert smoothed.item() == pytest.approx(expected, abs = EXACT)
    assert moved.item() == pytest.approx(expected, abs = EXACT)
    other = shifted[0].masked_fill(shifted[0] == 5, -100)
    assert renamed.item() == pytest.approx(F.cross_entropy(logits, other).item(), abs = EXACT)


def test_set_loss_options_names_what_is_wrong(checkpoint):
    """Unknown options, wrong shapes and models with another loss."""
    from unsloth.fused_loss import set_loss_options

    model, _ = load(checkpoint)
    with pytest.raises(TypeError, match = "no option 'smoothing'"):
        set_loss_options(model, smoothing = 0.1)
    with pytest.raises(ValueError, match = r"class_weight must be \[64\]"):
        set_loss_options(model, class_weight = torch.ones(3))
    with pytest.raises(ValueError, match = "FastLanguageModel"):
        set_loss_options(torch.nn.Linear(2, 2), label_smoothing = 0.1)


@pytest.mark.parametrize("where", ["fused_loss", "fused_loss_cpu"])
def test_a_loss_of_an_unknown_zoo_stays_stock_and_drops_no_option(monkeypatch, where):
    """unsloth_zoo is released apart from Unsloth: one that we do not know must not break an import."""
    import importlib

    from unsloth import fused_loss, loss_options

    module = importlib.import_module(f"unsloth.{where}")
    names = {
        "fused_loss": ["replace_unsloth_fused_ce_loss"],
        "fused_loss_cpu": [
            "replace_chunked_linear_cross_entropy",
            "replace_patch_chunked_causal_lm_loss",
        ],
    }

    def newer(hidden, something_new):
        return ("stock", hidden, something_new)

    for name in names[where]:
        monkeypatch.setattr(fused_loss, "_IN_UNSLOTH", False)
        with pytest.raises(NotImplementedError, match = "something_new"):
            getattr(module, name)(newer)
        monkeypatch.setattr(fused_loss, "_IN_UNSLOTH", True)
        with pytest.warns(UserWarning, match = "something_new"):
            kept = getattr(module, name)(newer)
        assert kept(1, something_new = 2) == ("stock", 1, 2)
        with loss_options.using_options(fused_loss.LossOptions(z_loss = 0.1)):
            with pytest.raises(NotImplementedError, match = "z_loss cannot be honoured"):
                kept(1, 2)
