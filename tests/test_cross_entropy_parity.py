# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The loss kernels against torch.nn.CrossEntropyLoss, and the GPU models' losses on them.

Without a GPU the kernels run in Triton's interpreter.
"""

import itertools
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")

import unsloth  # noqa: F401, E402
import pytest  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA GPU")

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
    from unsloth.kernels.linear_loss import linear_cross_entropy

    return linear_cross_entropy


@pytest.fixture
def kernel():
    from unsloth.kernels import cross_entropy_rows

    return cross_entropy_rows


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


@pytest.mark.parametrize("vocab", [1, 3, 16, 37, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "logit_scale": 0.5}, {"label_smoothing": 0.1, "z_loss": 1e-3}]
)
def test_the_kernel_equals_its_torch_counterpart(kernel, vocab, dtype, options):
    """In place, out of place and over float32 logits; whatever stands behind the last column."""
    rows, columns = 3, kernel.padded_columns(vocab)
    make = torch.Generator().manual_seed(vocab)
    values = (torch.randn(rows, vocab, generator = make) * 3).to(DEVICE, dtype)
    labels = torch.randint(0, vocab, (rows,), generator = make).to(DEVICE)
    bias = torch.randn(vocab, generator = make).to(DEVICE, dtype)
    spec = kernel.RowLoss(torch.rand(vocab, generator = make).to(DEVICE), **options)
    scale = torch.rand(rows, generator = make).to(DEVICE)
    exact, expected = (
        torch.empty(s, dtype = torch.float64, device = DEVICE) for s in ((rows,), (rows, vocab))
    )
    kernel.cross_entropy_rows(values.double(), labels, spec, exact, expected, scale, bias)
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for held in (dtype, torch.float32):
        buffer = torch.full((rows, columns), float("nan"), dtype = held, device = DEVICE)
        logits = buffer[:, :vocab]
        logits.copy_(values)
        losses = torch.full((rows,), float("nan"), device = DEVICE)
        grads = kernel.narrow_view(logits, dtype)
        kernel.cross_entropy_rows(logits, labels, spec, losses, grads, scale, bias, scratch = True)
        torch.testing.assert_close(losses, exact.float(), rtol = 1e-4, atol = 1e-5)
        torch.testing.assert_close(grads.double(), expected, **tolerance)
    apart = torch.full_like(values, float("nan"))
    before = values.clone()
    kernel.cross_entropy_rows(values, labels, spec, losses, apart, scale, bias)
    torch.testing.assert_close(apart.double(), expected, **tolerance)
    assert torch.equal(values, before)


@pytest.mark.parametrize("scratch", [False, True])
def test_the_kernel_marks_labels_outside_the_vocabulary(kernel, scratch):
    """Loss and gradients of such a row are NaN, of others they are not; nothing else is read."""
    vocab = 20
    buffer = torch.zeros(4, kernel.padded_columns(vocab), device = DEVICE)
    logits = buffer[:, :vocab]
    labels = torch.tensor([3, 20, -7, 10**12], device = DEVICE)
    losses, grads = torch.zeros(4, device = DEVICE), torch.zeros(4, vocab, device = DEVICE)
    kernel.cross_entropy_rows(logits, labels, kernel.RowLoss(), losses, grads, scratch = scratch)
    assert losses.isnan().tolist() == [False, True, True, True]
    assert grads.isnan().all(1).tolist() == [False, True, True, True]
    assert not grads[0].isnan().any()


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("vocab", [1, 37, 4097])
def test_log_probs_equal_dense_ones(logits_dtype, vocab):
    """Values and gradients of log-probability, logsumexp and entropy."""
    from unsloth.kernels.linear_loss import linear_log_probs

    hidden, weight, bias, targets = inputs(vocab = vocab)
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


# --- the loss of dense logits ----------------------------------------------------------------


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


# --- the models' forwards --------------------------------------------------------------------


@pytest.fixture(scope = "module", params = ["llama", "mistral"])
def model_call(request):
    """(model, its loss as FastLanguageModel computes it, vocabulary)."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
    from unsloth.models.llama import CausalLM_fast_forward
    from unsloth.models.mistral import MistralForCausalLM_fast_forward

    config, model, forward = {
        "llama": (LlamaConfig, LlamaForCausalLM, CausalLM_fast_forward(None)),
        "mistral": (MistralConfig, MistralForCausalLM, MistralForCausalLM_fast_forward),
    }[request.param]
    torch.manual_seed(0)
    model = model(
        config(
            vocab_size = 48,
            hidden_size = 16,
            intermediate_size = 32,
            num_hidden_layers = 1,
            num_attention_heads = 2,
            num_key_value_heads = 2,
        )
    ).to(DEVICE)
    return model, lambda **arguments: forward(model, **arguments)


def tokens_and_targets():
    make = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 48, (2, 9), generator = make).to(DEVICE)
    labels = tokens.clone()
    labels[:, :3] = -100
    return tokens, labels, F.pad(labels[:, 1:], (0, 1), value = -100)


def plain_logits(model, tokens):
    with torch.no_grad():
        hidden = model.model(input_ids = tokens)[0]
        return F.linear(hidden, model.lm_head.weight, model.lm_head.bias).view(-1, 48)


@pytest.mark.parametrize("materialised", [False, True])
def test_model_arguments_reach_the_loss(model_call, monkeypatch, materialised):
    """label_smoothing, ignore_index, class_weight and shift_labels, also with UNSLOTH_RETURN_LOGITS=1."""
    from unsloth.fused_loss import calls

    if materialised:
        monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "1")
    model, call = model_call
    tokens, labels, targets = tokens_and_targets()
    logits = plain_logits(model, tokens)
    class_weight = torch.rand(48, device = DEVICE)
    counted = "dense" if materialised else "fused"
    before = calls().get(counted, 0)

    smoothed = call(input_ids = tokens, labels = labels, label_smoothing = 0.2)
    wanted = F.cross_entropy(logits, targets.view(-1), label_smoothing = 0.2)
    torch.testing.assert_close(
        smoothed.loss.float(), wanted, rtol = 1e-2 if materialised else 1e-4, atol = 1e-4
    )
    if materialised:
        assert smoothed.logits.shape == (2, 9, 48)

    renamed = call(input_ids = tokens, labels = labels.masked_fill(labels == -100, 7), ignore_index = 7)
    wanted = F.cross_entropy(logits, targets.view(-1).masked_fill(targets.view(-1) == 7, -100))
    torch.testing.assert_close(
        renamed.loss.float(), wanted, rtol = 1e-2 if materialised else 1e-4, atol = 1e-4
    )

    shifted = call(
        input_ids = tokens, shift_labels = targets, class_weight = class_weight, num_items_in_batch = 10
    )
    wanted = F.cross_entropy(logits, targets.view(-1), weight = class_weight, reduction = "sum") / 10
    torch.testing.assert_close(
        shifted.loss.float(), wanted, rtol = 1e-2 if materialised else 1e-4, atol = 1e-4
    )
    assert calls()[counted] - before == 3


def test_a_head_bias_and_options_set_once_reach_the_loss(model_call):
    """The head's bias is added; set_loss_options holds for every call until it is taken back."""
    from unsloth.fused_loss import LossOptions

    model, call = model_call
    tokens, labels, targets = tokens_and_targets()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(48, device = DEVICE))
    model._unsloth_loss_options = LossOptions(label_smoothing = 0.1)
    try:
        loss = call(input_ids = tokens, labels = labels).loss
        wanted = F.cross_entropy(plain_logits(model, tokens), targets.view(-1), label_smoothing = 0.1)
        torch.testing.assert_close(loss, wanted, rtol = 1e-4, atol = 1e-4)
        loss.backward()
        assert model.lm_head.bias.grad.abs().sum() > 0
    finally:
        model.lm_head.bias = None
        del model._unsloth_loss_options
        model.zero_grad()


def test_a_batch_with_every_label_ignored_trains_on(model_call):
    """Loss 0 and zero gradients, as with stock, from our loss."""
    from unsloth.fused_loss import calls

    model, call = model_call
    before = calls().get("fused", 0)
    tokens, labels, _ = tokens_and_targets()
    loss = call(input_ids = tokens, labels = torch.full_like(labels, -100)).loss
    assert loss.item() == 0.0
    loss.backward()
    assert not model.lm_head.weight.grad.any()
    assert calls()["fused"] == before + 1
    model.zero_grad()


def test_what_we_do_not_serve_goes_to_stock_or_is_refused():
    """A stock setting keeps stock; an option that stock would drop is an error."""
    from unsloth import fused_loss, loss_options
    from unsloth.models._utils import unsloth_fused_ce_loss

    hidden, weight, _, labels = inputs(rows = 5)
    arguments = {"hidden_states": hidden[None], "lm_head_weight": weight, "lm_head_bias": None}
    before = fused_loss.calls().get("stock: mask", 0)
    mask = torch.ones_like(labels[None])
    loss = unsloth_fused_ce_loss(
        None, labels = labels[None], mask = mask, torch_compile = False, **arguments
    )
    wanted = F.cross_entropy(F.linear(hidden, weight)[:-1], labels[1:])
    torch.testing.assert_close(loss, wanted, rtol = 1e-4, atol = 1e-4)
    assert fused_loss.calls()["stock: mask"] == before + 1
    with loss_options.using_options(fused_loss.LossOptions(z_loss = 0.1)):
        with pytest.raises(NotImplementedError, match = "z_loss cannot be honoured"):
            unsloth_fused_ce_loss(None, labels = labels[None], mask = mask, **arguments)


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
    """The programs of a row wait for each other, whatever else runs on the GPU meanwhile."""
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
