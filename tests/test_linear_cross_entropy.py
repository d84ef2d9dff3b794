# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""nn.CrossEntropyLoss of a head, computed in chunks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require
from loss_problems import assert_same, problem

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture
def linear_cross_entropy():
    from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
    return linear_cross_entropy


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
def test_linear_cross_entropy_passes_gradcheck(linear_cross_entropy, reduction, options):
    """Analytic gradients by hidden, weight and bias equal numerical ones in float64."""
    options = dict(options)
    hidden, weight, bias, labels = problem()
    if options.pop("weighted", False):
        options["class_weight"] = torch.rand(weight.shape[0], dtype = torch.float64, device = DEVICE)

    def loss(*tensors):
        return linear_cross_entropy(
            *tensors[:2], labels, tensors[2], reduction = reduction, chunk_rows = 3, **options
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_class_probabilities_pass_gradcheck_also_by_the_probabilities(linear_cross_entropy):
    """Probability targets may be trained too, as in PyTorch."""
    hidden, weight, bias, _ = problem()
    targets = torch.rand(7, 11, dtype = torch.float64, device = DEVICE).requires_grad_()

    def loss(*tensors):
        return linear_cross_entropy(
            *tensors[:2], tensors[3], tensors[2], label_smoothing = 0.1, chunk_rows = 3
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias, targets))


def test_z_loss_of_class_probabilities_is_that_of_labels(linear_cross_entropy):
    hidden, weight, bias, labels = problem(ignored = ())
    targets = F.one_hot(labels, 11).to(hidden.dtype)
    for reduction in ("mean", "sum", "none"):
        options = {"z_loss": 0.1, "reduction": reduction, "chunk_rows": 3}
        ours, wanted = (
            linear_cross_entropy(hidden, weight, given, bias, **options)
            for given in (targets, labels)
        )
        assert_same(ours, wanted, (hidden, weight, bias))


def test_a_retained_graph_gives_the_same_gradients_twice(linear_cross_entropy):
    """The first backward hands its buffers out; the second computes them again."""
    hidden, weight, _, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows = 3)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph = True)
    expected = [g.clone() for g in first]
    for gradient in first:
        gradient.fill_(7.0)  # a layer may write over what it is given
    for gradient, wanted in zip(torch.autograd.grad(2 * loss, (hidden, weight)), expected):
        torch.testing.assert_close(gradient, 2 * wanted)


def test_any_shape_dtype_and_chunk_equals_dense():
    """Random rows 0 to 9, vocabularies from 1, all dtypes, strided inputs, any ignored rows."""
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from unsloth.kernels.linear_cross_entropy import linear_cross_entropy

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


def test_a_vocabulary_above_65536_and_odd(linear_cross_entropy):
    """One more than fits 16 bits, and no multiple of any tile."""
    hidden, weight, bias, labels = problem(rows = 3, vocab = 65537, dtype = torch.float32, ignored = ())
    labels[0] = 65536
    ours = linear_cross_entropy(hidden, weight, labels, bias)
    reference = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    assert_same(ours, reference, (hidden, weight, bias), tolerance = 1e-5)


def test_the_number_of_chunks_leaves_results_within_rounding(linear_cross_entropy):
    """Loss rows are equal bit for bit in float64; gradients summed over chunks within a few ulp."""
    hidden, weight, _, labels = problem(rows = 64, width = 16, vocab = 50, ignored = range(0, 64, 5))
    rows, gradients = {}, {}
    for chunk in (1, 7, 64):
        loss = linear_cross_entropy(hidden, weight, labels, reduction = "none", chunk_rows = chunk)
        rows[chunk] = loss.detach()
        mean = linear_cross_entropy(hidden, weight, labels, chunk_rows = chunk)
        gradients[chunk] = torch.autograd.grad(mean, (hidden, weight))
    ulp = torch.finfo(torch.float64).eps
    for chunk in (1, 7):
        torch.testing.assert_close(rows[chunk], rows[64], rtol = 8 * ulp, atol = 8 * ulp)
        for a, b in zip(gradients[chunk], gradients[64]):
            assert (a - b).abs().max() <= 64 * ulp * b.abs().max()


def test_float32_sums_of_the_head_gradient_do_not_drift_with_chunks(linear_cross_entropy):
    """In bfloat16 the sum over many chunks rounds every time; head_grad_dtype = float32 once."""
    hidden, weight, _, labels = problem(
        rows = 256, width = 32, vocab = 64, dtype = torch.bfloat16, ignored = ()
    )
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (reference,) = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels), exact[1])

    def error(**options):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_rows = 2, **options)
        (gradient,) = torch.autograd.grad(loss, weight)
        return ((gradient.double() - reference).norm() / reference.norm()).item()

    wide = error(head_grad_dtype = torch.float32)
    assert wide < 0.75 * error()
    assert error(head_grad_dtype = torch.float32, logits_dtype = torch.float32) <= wide


def test_a_compiled_model_breaks_its_graph_there_and_gets_right_gradients(linear_cross_entropy):
    """torch.compile around a model that calls the loss."""
    hidden, weight, _, labels = problem(rows = 9)

    def model(states):
        return 2 * linear_cross_entropy(torch.tanh(states), weight, labels, chunk_rows = 4)

    compiled = torch.compile(model, backend = "eager")(hidden)
    assert_same(
        compiled,
        2 * F.cross_entropy(F.linear(torch.tanh(hidden), weight), labels),
        (hidden, weight),
    )


def count_products(monkeypatch):
    from unsloth.kernels import loss_chunking

    seen = SimpleNamespace(forward_rows = 0, products = 0)
    project, multiply_ = loss_chunking.project, loss_chunking.multiply_

    def counted_project(hidden, weight, out):
        seen.forward_rows += hidden.shape[0]
        seen.products += 1
        assert torch.isfinite(hidden).all()
        project(hidden, weight, out)

    def counted_multiply(*args):
        seen.products += 1
        multiply_(*args)

    monkeypatch.setattr(loss_chunking, "project", counted_project)
    monkeypatch.setattr(loss_chunking, "multiply_", counted_multiply)
    return seen


@pytest.mark.parametrize("trained", [False, True])
def test_ignored_rows_never_reach_a_product(linear_cross_entropy, monkeypatch, trained):
    """Two products a chunk with a frozen head, three with a trained one, over labelled rows alone."""
    hidden, weight, _, labels = problem(rows = 12, ignored = (0, 3, 4, 11))
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    weight.requires_grad_(trained)
    seen = count_products(monkeypatch)
    linear_cross_entropy(hidden, weight, labels, chunk_rows = 8).backward()
    assert seen.forward_rows == 8
    assert seen.products == (3 if trained else 2)
    assert torch.equal(hidden.grad[labels == -100], torch.zeros_like(hidden.grad[labels == -100]))
    assert torch.isfinite(hidden.grad).all()


def test_the_index_of_the_labelled_rows_is_let_go_before_the_backward(linear_cross_entropy):
    """8 bytes a label, which a whole step would hold at its peak, in the model's own backward."""
    hidden, weight, bias, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert loss.grad_fn.job.plan.index is None


def test_a_batch_with_every_label_ignored(linear_cross_entropy, monkeypatch):
    """NaN as in PyTorch, or 0 where training wants it; zero gradients and no product either way."""
    hidden, weight, _, labels = problem()
    labels.fill_(-100)
    seen = count_products(monkeypatch)
    for options, expected in (
        ({}, float("nan")),
        ({"nan_if_empty": False}, 0.0),
        ({"n_items": 0}, 0.0),
    ):
        loss = linear_cross_entropy(hidden, weight, labels, **options)
        assert torch.equal(loss.isnan(), torch.tensor(expected != expected, device = loss.device))
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert not gradient.any()
    assert linear_cross_entropy(hidden, weight, labels, reduction = "sum").item() == 0.0
    assert seen.products == 0


def test_a_frozen_model_costs_one_product_and_holds_no_gradient(linear_cross_entropy, monkeypatch):
    """Evaluation computes the loss alone."""
    hidden, weight, _, labels = problem()
    seen = count_products(monkeypatch)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    assert seen.products == 1


def test_shift_scores_each_position_against_the_next_token(linear_cross_entropy):
    """As the causal language model loss of transformers."""
    hidden, weight, _, _ = problem(rows = 12)
    tokens = torch.randint(0, 11, (2, 6), device = DEVICE)
    tokens[0, 3] = -100
    states = hidden.view(2, 6, 5)
    ours = linear_cross_entropy(states, weight, tokens, shift = True)
    logits = F.linear(states, weight)
    reference = F.cross_entropy(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))
    assert_same(ours, reference, (hidden, weight))


def test_gradient_accumulation_with_n_items_equals_one_batch(linear_cross_entropy):
    """Micro-batches of different lengths, divided by the whole group's count."""
    hidden, weight, _, labels = problem(rows = 12)
    whole = linear_cross_entropy(hidden, weight, labels)
    expected = torch.autograd.grad(whole, (hidden, weight))
    count = (labels != -100).sum()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 12)):
        linear_cross_entropy(hidden[rows], weight, labels[rows], n_items = count).backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


def test_float16_gradients_survive_a_loss_scaler(linear_cross_entropy):
    """Gradients of 1e-9 do not underflow before the scaler's 65536 multiplies them."""
    hidden, weight, _, labels = problem(rows = 16, dtype = torch.float16, ignored = ())
    loss = linear_cross_entropy(hidden, weight, labels, n_items = 10**7)
    got = torch.autograd.grad(loss * 65536.0, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    dense = F.cross_entropy(F.linear(*exact), labels, reduction = "sum") / 10**7
    for a, b in zip(got, torch.autograd.grad(dense * 65536.0, exact)):
        assert ((a.double() - b).norm() / b.norm()) < 3e-3


def test_autocast_casts_as_a_linear_layer_does(linear_cross_entropy):
    """Under autocast float32 hidden states and weights meet in bfloat16; gradients come in float32."""
    hidden, weight, _, labels = problem(rows = 32, width = 16, dtype = torch.float32)
    with torch.autocast(DEVICE, dtype = torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels)
        dense = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, dense, rtol = 2e-3, atol = 2e-3)
    got = torch.autograd.grad(ours, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(dense, (hidden, weight))):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 1e-2


def test_a_tied_head_gets_both_gradients(linear_cross_entropy):
    """The embedding's and the head's gradient add up in the one weight."""
    weight = torch.randn(11, 5, dtype = torch.float64, device = DEVICE, requires_grad = True)
    tokens = torch.randint(0, 11, (9,), device = DEVICE)
    labels = tokens.roll(-1)

    def train(loss):
        return loss(torch.tanh(F.embedding(tokens, weight)))

    ours = train(lambda h: linear_cross_entropy(h, weight, labels, chunk_rows = 4))
    dense = train(lambda h: F.cross_entropy(F.linear(h, weight), labels))
    assert_same(ours, dense, (weight,))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": [[0.0] * 5] * 7}, TypeError, "hidden must be a tensor, got list"),
        ({"hidden": torch.zeros(7, 4)}, ValueError, "last dimension must be 5"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \[vocab, hidden\]"),
        ({"weight": torch.zeros(11, 5, dtype = torch.int8)}, TypeError, "dequantize"),
        ({"weight": torch.zeros(11, 5, dtype = torch.bfloat16)}, TypeError, "cast one of them"),
        ({"labels": [0] * 7}, TypeError, "labels must be a tensor, got list"),
        ({"labels": torch.zeros(6, dtype = torch.long)}, ValueError, "one label a row"),
        ({"labels": torch.zeros(7, dtype = torch.bool)}, TypeError, "labels must be integers"),
        ({"labels": torch.zeros(7, 9)}, ValueError, "class probabilities must have shape"),
        ({"labels": torch.zeros(7, 11), "shift": True}, ValueError, "shift is for integer labels"),
        (
            {"labels": torch.zeros(7, 11), "loss_weights": torch.ones(7)},
            ValueError,
            "loss_weights are for integer labels",
        ),
        ({"bias": torch.zeros(10)}, ValueError, r"bias must be \[11\]"),
        ({"class_weight": torch.zeros(10)}, ValueError, r"class_weight must be \[11\]"),
        ({"class_weight": torch.zeros(11, requires_grad = True)}, ValueError, "detach"),
        ({"label_smoothing": 1.5}, ValueError, "between 0 and 1"),
        ({"label_smoothing": float("nan")}, ValueError, "finite number"),
        ({"label_smoothing": True}, ValueError, "got True; give an int or a float"),
        ({"label_smoothing": "0.1"}, ValueError, "got '0.1'; give an int or a float"),
        ({"z_loss": torch.tensor(True)}, ValueError, r"z_loss .* got tensor\(True\)"),
        ({"softcap": "30"}, ValueError, "softcap must be a finite number, got '30'"),
        ({"logit_scale": False}, ValueError, "logit_scale must be a finite number, got False"),
        ({"n_items": True}, ValueError, "n_items must be a finite number, got True"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"reduction": "max"}, ValueError, "none, mean, sum"),
        ({"reduction": "sum", "n_items": 3}, ValueError, "leave n_items out"),
        ({"n_items": -1}, ValueError, "must not be negative"),
        ({"n_items": torch.zeros(0)}, ValueError, "hold one number"),
        ({"chunk_rows": 0}, ValueError, "positive number of rows"),
        ({"chunk_rows": 2.5}, ValueError, "positive number of rows"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer"),
        ({"logits_dtype": torch.float16}, TypeError, "logits_dtype must be"),
        (
            {
                "hidden": torch.zeros(7, 5, dtype = torch.float64),
                "weight": torch.zeros(11, 5, dtype = torch.float64),
                "logits_dtype": torch.float32,
            },
            TypeError,
            "narrower than the inputs' torch.float64",
        ),
        (
            {"hidden": torch.zeros(5), "labels": torch.tensor(3), "shift": True},
            ValueError,
            "shift needs a position",
        ),
        (
            {"labels": torch.zeros(7, dtype = torch.long).to("meta")},
            ValueError,
            r"\.to\(hidden\.device\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(linear_cross_entropy, change, error, words):
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
        linear_cross_entropy(**{**arguments, **moved})


@pytest.mark.parametrize("label", [11, -1, 10**12])
def test_labels_outside_the_vocabulary_never_read_out_of_bounds(
    linear_cross_entropy, monkeypatch, label
):
    """IndexError on a CPU; NaN for that row on a GPU, and an IndexError there on request."""
    hidden, weight, _, labels = problem()
    labels[1] = label
    if DEVICE == "cuda":
        rows = linear_cross_entropy(hidden, weight, labels, reduction = "none")
        assert rows.isnan().nonzero().flatten().tolist() == [1]
        monkeypatch.setenv("UNSLOTH_LOSS_CHECK_LABELS", "1")
    with pytest.raises(IndexError, match = f"label {label} is outside the vocabulary of 11"):
        linear_cross_entropy(hidden, weight, labels)


def test_z_loss_is_a_mean_over_the_labels_whatever_their_weights_are(linear_cross_entropy):
    """The cross entropy is divided by the weights of its labels, z_loss by their number."""
    hidden, weight, _, labels = problem()
    class_weight = torch.rand(weight.shape[0], dtype = torch.float64, device = DEVICE)
    options = {"class_weight": class_weight, "z_loss": 0.1}

    def dense(reduction):
        logits = F.linear(hidden, weight)
        square = logits[labels != -100].logsumexp(1) ** 2
        entropy = F.cross_entropy(logits, labels, weight = class_weight, reduction = reduction)
        return entropy + 0.1 * getattr(square, reduction)()

    ours = linear_cross_entropy(hidden, weight, labels, chunk_rows = 3, **options)
    assert_same(ours, dense("mean"), (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, labels, n_items = 20, **options)
    assert_same(ours, dense("sum") / 20, (hidden, weight))


def test_a_head_that_is_changed_before_the_backward_is_an_error(linear_cross_entropy):
    """As autograd does, although the gradients are there already."""
    for changed in (0, 1):
        hidden, weight, _, labels = problem()
        inputs = [hidden.clone(), weight.clone()]
        loss = linear_cross_entropy(*inputs, labels)
        with torch.no_grad():
            inputs[changed].add_(1.0)
        with pytest.raises(RuntimeError, match = "modified by an inplace operation"):
            loss.backward()


def test_an_infinite_logit_gives_nan_as_in_pytorch(linear_cross_entropy):
    """Of the label's own class and of another one."""
    hidden, weight, bias, labels = problem()
    for label in (3, 4):
        labels.fill_(label)
        with torch.no_grad():
            bias.zero_()[3] = float("inf")
        assert linear_cross_entropy(hidden, weight, labels, bias).isnan()
        assert F.cross_entropy(F.linear(hidden, weight, bias), labels).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_weights_multiply_rows_and_count_in_the_mean(
    linear_cross_entropy, reduction, weighted
):
    """A weight a row, beside class weights, shifted with the labels; gradients in float64."""
    hidden, weight, bias, labels = problem(rows = 8)
    make = torch.Generator().manual_seed(1)
    each = torch.rand(2, 4, generator = make, dtype = torch.float64).to(DEVICE)
    by_class = torch.rand(11, generator = make, dtype = torch.float64).to(DEVICE) if weighted else None
    states, tokens = hidden.view(2, 4, 5), labels.view(2, 4)
    ours = linear_cross_entropy(
        states,
        weight,
        tokens,
        bias,
        loss_weights = each,
        class_weight = by_class,
        reduction = reduction,
        shift = True,
        chunk_rows = 3,
    )
    logits = F.linear(states, weight, bias)[:, :-1].reshape(-1, 11)
    targets, scale = tokens[:, 1:].reshape(-1), each[:, 1:].reshape(-1)
    dense = F.cross_entropy(logits, targets, weight = by_class, reduction = "none") * scale
    if reduction == "none":
        dense = F.pad(dense.view(2, 3), (0, 1))
    elif reduction == "sum":
        dense = dense.sum()
    else:
        table = torch.ones(11, dtype = torch.float64, device = DEVICE) if by_class is None else by_class
        dense = dense.sum() / (table[targets.clamp(min = 0)] * scale * (targets != -100)).sum()
    assert_same(ours, dense, (hidden, weight, bias))


def test_the_weights_of_a_whole_group_divide_it(linear_cross_entropy):
    """Micro-batches with n_items and weight_items add up to the loss of one batch, z_loss included."""
    hidden, weight, _, labels = problem(rows = 12)
    by_class = torch.rand(11, dtype = torch.float64, device = DEVICE)
    keep = labels != -100
    options = {"class_weight": by_class, "z_loss": 0.1}
    whole = linear_cross_entropy(hidden, weight, labels, **options)
    options.update(n_items = keep.sum(), weight_items = by_class[labels[keep]].sum())
    parts = [
        linear_cross_entropy(hidden[rows], weight, labels[rows], **options)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 12))
    ]
    assert_same(sum(parts), whole, (hidden, weight))
    by_labels = linear_cross_entropy(
        hidden, weight, labels, class_weight = by_class, class_weight_mean = "labels"
    )
    summed = F.cross_entropy(F.linear(hidden, weight), labels, weight = by_class, reduction = "sum")
    assert_same(by_labels, summed / keep.sum(), (hidden, weight))
    del options["n_items"]  # the weights of a group divide only where there is one
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **options), whole)
    ignored = torch.full_like(labels, -100)
    assert linear_cross_entropy(hidden, weight, ignored, **options).isnan()
    assert linear_cross_entropy(hidden, weight, ignored, **options, nan_if_empty = False) == 0


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"loss_weights": torch.ones(7, dtype = torch.long)}, TypeError, "floating point tensor"),
        ({"loss_weights": torch.ones(6)}, ValueError, "one weight a label"),
        ({"loss_weights": torch.ones(7, requires_grad = True)}, ValueError, "detach"),
        ({"class_weight_mean": "sum"}, ValueError, '"weights" or "labels"'),
        ({"weight_items": -1.0, "n_items": 3}, ValueError, "weight_items must not be negative"),
        ({"weight_items": 3, "reduction": "sum"}, ValueError, "leave weight_items out"),
    ],
)
def test_weights_that_do_not_fit_are_named(linear_cross_entropy, change, error, words):
    hidden, weight, _, labels = problem(dtype = torch.float32)
    if "loss_weights" in change and DEVICE != "cpu":
        given = change["loss_weights"]
        change = {"loss_weights": given.detach().to(DEVICE).requires_grad_(given.requires_grad)}
    with pytest.raises(error, match = words):
        linear_cross_entropy(hidden, weight, labels, **change)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason = "this PyTorch has no linear_cross_entropy"
)
@pytest.mark.parametrize("shape, vocab", [((3,), 4), ((8, 3), 4), ((8,), 8), ((8, 8), 8)])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_samples_of_pytorchs_own_linear_cross_entropy(
    linear_cross_entropy, shape, vocab, probabilities, reduction
):
    """Values and gradients, float64, on the kinds of samples that PyTorch tests its function with.

    Without those whose head has more dimensions than a vocabulary.
    """
    make = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator = make, dtype = torch.float64).to(DEVICE).requires_grad_()

    hidden, weight, bias = draw(*shape), draw(vocab, shape[-1]), draw(vocab)
    class_weight = draw(vocab).detach().abs()
    if probabilities:
        labels = draw(*shape[:-1], vocab).detach().softmax(-1)
    else:
        labels = torch.randint(0, vocab, shape[:-1], generator = make).to(DEVICE)
    for settings in (
        {},
        {"label_smoothing": 0.5},
        {"weight": class_weight},
        {"weight": class_weight, "label_smoothing": 0.3, "linear_bias": bias},
        {} if probabilities else {"ignore_index": 1, "linear_bias": bias},
    ):
        theirs = F.linear_cross_entropy(hidden, weight, labels, reduction = reduction, **settings)
        renamed = {"weight": "class_weight", "linear_bias": "bias"}
        options = {renamed.get(name, name): value for name, value in settings.items()}
        ours = linear_cross_entropy(hidden, weight, labels, reduction = reduction, **options)
        torch.testing.assert_close(ours, theirs, rtol = 1e-10, atol = 1e-10, equal_nan = True)
        if not theirs.isnan().any():
            leaves = (hidden, weight) + ((bias,) if "bias" in options else ())
            assert_same(ours, theirs, leaves)
