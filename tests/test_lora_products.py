# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Fused LoRA with fewer passes: the same mathematics, no less exact, and fewer products.

Every function is checked through the class that fast_lora.py calls: LoRA_QKV, LoRA_W, LoRA_MLP.
"""

import contextlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from backend import DEVICE, require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

require("interpreter")

KINDS = ("LoRA_QKV", "LoRA_W", "LoRA_MLP")


@pytest.fixture(scope = "module")
def fast_lora():
    import unsloth  # noqa: F401
    return importlib.import_module("unsloth.kernels.fast_lora")


@contextlib.contextmanager
def memory_of_nan():
    """What is allocated holds NaN, so that a product which adds to it is seen."""
    torch.use_deterministic_algorithms(True, warn_only = True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def activation(e, g):
    return torch.nn.functional.silu(e) * g


def activation_backward(dh, e, g):
    """(h, d up, d gate), as swiglu_DWf_DW_dfg_kernel returns them; rounded once, as autograd does."""
    wide = torch.promote_types(e.dtype, torch.float32)
    h, dh, e, g = activation(e, g), dh.to(wide), e.to(wide), g.to(wide)
    sigmoid = torch.sigmoid(e)
    d_gate = dh * g * sigmoid * (1 + e * (1 - sigmoid))
    return h, (dh * e * sigmoid).to(h.dtype), d_gate.to(h.dtype)


def make_projections(
    kind,
    dtype,
    K = 32,
    widths = (48, 16, 24),
    ranks = (4, 4, 4),
    scalings = (2.0, 2.0, 2.0),
    seed = 0,
    lora_dtype = None,
):
    """[W, W_quant, A, B, S] of each projection of a kind, with A and B that want gradients."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape, std, to):
        return (torch.randn(*shape, generator = make, dtype = torch.float64) * std).to(DEVICE, to)

    if kind == "LoRA_W":
        shapes = [(widths[0], K)]
    elif kind == "LoRA_QKV":
        shapes = [(width, K) for width in widths]
    else:
        shapes = [(widths[0], K), (widths[0], K), (K, widths[0])]
    found = []
    for (n, k), rank, scaling in zip(shapes, ranks, scalings):
        W = draw(n, k, std = k**-0.5, to = dtype)
        A = draw(rank, k, std = k**-0.5, to = lora_dtype or dtype).requires_grad_()
        B = draw(n, rank, std = 0.3, to = lora_dtype or dtype).requires_grad_()
        found.append([W, None, A, B, scaling])
    return found


def make_X(
    dtype,
    K = 32,
    rows = (2, 5),
    seed = 1,
):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(*rows, K, generator = make, dtype = torch.float64).to(DEVICE, dtype)


def call(fast_lora, kind, X, projections, *rest):
    """Outputs of the fused function, as a tuple."""
    arguments = [item for projection in projections for item in projection]
    if kind == "LoRA_MLP":
        arguments += [activation, activation_backward]
    out = fast_lora._apply(getattr(fast_lora, kind), X, *arguments, *rest)
    return out if isinstance(out, tuple) else (out,)


def plain(kind, X, projections):
    """The same in plain PyTorch: what autograd and the dtype give."""

    def project(x, projection):
        W, _, A, B, S = projection
        A, B = A.to(x.dtype), B.to(x.dtype)
        return x @ W.t() + (x @ A.t()) @ B.t() * S

    if kind != "LoRA_MLP":
        return tuple(project(X, projection) for projection in projections)
    gate, up, down = projections
    return (project(activation(project(X, gate), project(X, up)), down),)


def backward(run, X, projections):
    """[outputs, dX, dA, dB, ...] of ``run(X)``, with the same random dY for every caller."""
    X = X.detach().clone().requires_grad_()
    for _, _, A, B, _ in projections:
        A.grad = B.grad = None
    # The fused functions may write into X: the leaf must not be what they get.
    outputs = run(X * 1)
    make = torch.Generator().manual_seed(3)
    dYs = [torch.randn(*o.shape, generator = make, dtype = torch.float64) for o in outputs]
    kept = [o.detach().clone() for o in outputs]
    torch.autograd.backward(outputs, [dY.to(o) for dY, o in zip(dYs, outputs)])
    return [*kept, X.grad, *(t.grad for p in projections for t in (p[2], p[3]))]


def to_float64(projections):
    return [
        [
            W.double(),
            None,
            A.detach().double().requires_grad_(),
            B.detach().double().requires_grad_(),
            S,
        ]
        for W, _, A, B, S in projections
    ]


def error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


class Products(TorchDispatchMode):
    """Records (inner dimension, reads what it adds to) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(
        self,
        func,
        types,
        args = (),
        kwargs = None,
    ):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            inner = args[-1].shape[0]
            self.seen.append((inner, name != "mm" and (kwargs or {}).get("beta", 1) != 0))
        return func(*args, **(kwargs or {}))


# Forward and backward: base products, X A^T, LoRA's part of Y; dY B, dA, dB, LoRA's part of dX.
EXPECTED = {"LoRA_W": 2 + 1 + 1 + 4, "LoRA_QKV": 6 + 1 + 3 + 3 + 1 + 3 + 1}
# gate and up share theirs; h A^T of down is computed in both passes.
EXPECTED["LoRA_MLP"] = 6 + (1 + 2 + 2 + 1 + 2 + 1) + (2 + 1 + 4)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_products_and_no_second_pass(fast_lora, kind):
    """LoRA's part is written, never added to a finished product; projections of one X share theirs."""
    projections = make_projections(kind, torch.float32)
    with Products() as products:
        backward(
            lambda X: call(fast_lora, kind, X, projections), make_X(torch.float32), projections
        )
    assert len(products.seen) == EXPECTED[kind]
    rank = projections[0][2].shape[0]
    assert not [seen for seen in products.seen if seen == (rank, True)]


@settings(
    max_examples = 40,
    deadline = None,
    derandomize = True,
    suppress_health_check = [HealthCheck.function_scoped_fixture],
)
@given(data = st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_dense_lora(fast_lora, kind, data):
    """Any shape, a rank and a scaling of its own for each projection: dense LoRA to 1e-12."""
    size = st.integers(1, 33)
    K = data.draw(size)
    projections = make_projections(
        kind,
        torch.float64,
        K,
        data.draw(st.tuples(size, size, size)),
        data.draw(st.tuples(*[st.integers(1, 9)] * 3)),
        data.draw(st.tuples(*[st.sampled_from((0.5, 2.0, 3**0.5))] * 3)),
    )
    X = make_X(torch.float64, K, data.draw(st.tuples(st.integers(1, 3), st.integers(1, 7))))
    with memory_of_nan():
        result = backward(lambda x: call(fast_lora, kind, x, projections), X, projections)
    expected = backward(lambda x: plain(kind, x, projections), X, projections)
    torch.testing.assert_close(result, expected, rtol = 1e-10, atol = 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(fast_lora, kind):
    """Numerical derivatives in float64, for X and every A and B."""
    projections = make_projections(kind, torch.float64, 6, (5, 4, 3), (2, 1, 2), (2.0, 0.5, 0.5))
    factors = [t for p in projections for t in (p[2], p[3])]

    def run(X, *factors):
        replaced = [
            [p[0], None, factors[2 * i], factors[2 * i + 1], p[4]]
            for i, p in enumerate(projections)
        ]
        # A copy, and inplace off: gradcheck calls backward more than once for one forward.
        rest = () if kind == "LoRA_W" else (False,)
        return call(fast_lora, kind, X * 1, replaced, *rest)

    X = make_X(torch.float64, 6, (2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(run, (X, *factors))


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_right_or_refused(fast_lora, kind, inplace):
    """What the forward keeps has no history: computed again, except the MLP's, behind a kernel."""
    projections = make_projections(kind, torch.float64)
    leaves = [make_X(torch.float64).requires_grad_(), *(t for p in projections for t in p[2:4])]
    rest = () if kind == "LoRA_W" else (inplace,)

    def second(run):
        outputs = run(leaves[0] * 1)
        first = torch.autograd.grad(sum((o**3).sum() for o in outputs), leaves, create_graph = True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    if kind == "LoRA_MLP":
        with pytest.raises(RuntimeError, match = "LoRA_MLP has no second derivative.*target_modules"):
            second(lambda x: call(fast_lora, kind, x, projections, *rest))
        return
    found = second(lambda x: call(fast_lora, kind, x, projections, *rest))
    torch.testing.assert_close(found, second(lambda x: plain(kind, x, projections)))


@pytest.mark.parametrize("lora_dtype", (torch.float32, None))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", KINDS)
def test_no_less_exact_than_adding_afterwards(fast_lora, kind, dtype, lora_dtype):
    """Against float64: outputs are no further off than base + LoRA rounded one after the other."""
    sizes = {"K": 256, "widths": (320, 64, 64), "ranks": (16, 16, 16), "lora_dtype": lora_dtype}
    ours, theirs = [], []
    for seed in range(6):
        projections = make_projections(kind, dtype, seed = seed, **sizes)
        X = make_X(dtype, 256, (2, 64), seed = 100 + seed)
        exact = backward(
            lambda x: plain(kind, x, exact_p), X.double(), exact_p := to_float64(projections)
        )
        result = backward(lambda x: call(fast_lora, kind, x, projections), X, projections)
        same = backward(lambda x: plain(kind, x, projections), X, projections)
        ours.append([error(a, e) for a, e in zip(result, exact)])
        theirs.append([error(a, e) for a, e in zip(same, exact)])
    for ours_of_one, theirs_of_one in zip(zip(*ours), zip(*theirs)):
        assert sum(ours_of_one) <= 1.02 * sum(theirs_of_one)


@pytest.mark.parametrize("kind", ("LoRA_QKV", "LoRA_MLP"))
def test_X_is_overwritten_only_where_it_may_be(fast_lora, kind):
    """dX goes into X where stock put it there too: not with inplace off, not into a marked X."""
    for inplace, saved in ((True, False), (False, False), (True, True)):
        projections = make_projections(kind, torch.float32)
        X = make_X(torch.float32).requires_grad_()
        x = X * 1
        before = x.detach().clone()
        norm = importlib.import_module("unsloth.kernels.rms_layernorm")
        keep = norm._SAVE_OUTPUT
        norm._SAVE_OUTPUT, x._unsloth_rmsnorm_saved = saved, saved
        try:
            outputs = call(fast_lora, kind, x, projections, inplace)
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        finally:
            norm._SAVE_OUTPUT = keep
        assert torch.equal(x.detach(), before) == (not inplace or saved)


@pytest.mark.parametrize("kind", KINDS)
def test_4bit_weights(fast_lora, kind):
    """bitsandbytes' NF4: outputs and gradients of the dequantized weights, to the bit."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    if DEVICE == "cpu" and importlib.util.find_spec("unsloth.kernels.nf4_dequantize") is None:
        pytest.skip("stock decodes on a GPU only")
    dense = make_projections(kind, torch.bfloat16, 64, (128, 64, 64), lora_dtype = torch.float32)
    packed = []
    for W, _, *rest in dense:
        data, state = bnb.quantize_4bit(W, compress_statistics = True, quant_type = "nf4")
        packed.append([data, state, *rest])
    for projection, (data, state, *_) in zip(dense, packed):
        projection[0] = bnb.dequantize_4bit(data, state)
    X = make_X(torch.bfloat16, 64)
    result = backward(lambda x: call(fast_lora, kind, x, packed), X, packed)
    expected = backward(lambda x: call(fast_lora, kind, x, dense), X, dense)
    assert all(torch.equal(a, b) for a, b in zip(result, expected))


def test_dropout_and_bias_stay_with_stock(fast_lora):
    """Outside plain LoRA the former function runs, with its arguments as they came."""
    projections = make_projections("LoRA_W", torch.float32)
    bias = torch.ones(48, device = DEVICE, requires_grad = True)
    X = make_X(torch.float32)
    (out,) = call(fast_lora, "LoRA_W", X, projections, None, bias)
    (base,) = call(fast_lora, "LoRA_W", X, projections)
    torch.testing.assert_close(out, base + projections[0][4])
    torch.manual_seed(0)
    (dropped,) = call(fast_lora, "LoRA_W", X, projections, 0.5, None)
    assert not torch.allclose(dropped, base)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters_without_grad(fast_lora, kind):
    """A, B and S of None (DPO's reference pass): the base alone."""
    projections = [[W, None, None, None, None] for W, *_ in make_projections(kind, torch.float32)]
    X = make_X(torch.float32)
    with torch.no_grad():
        result = call(fast_lora, kind, X, projections)
    zero = [[W, None, W[:1] * 0, W[:, :1] * 0, 1.0] for W, *_ in projections]
    torch.testing.assert_close(result, plain(kind, X, zero))


def test_weights_of_another_kind_stay_with_stock(fast_lora):
    """A quant state that is neither bitsandbytes' nor a class below it (FSDP2's sharded one), or a
    dtype that is not X's, is not touched.
    """
    functions = importlib.import_module("unsloth.kernels.lora_functions")
    X = make_X(torch.bfloat16)
    (W, _, A, B, S), *_ = make_projections("LoRA_W", torch.bfloat16)

    def handled(*projection):
        return functions._handles(X, [functions.Projection(*projection)], ())

    assert handled(W, None, A, B, S)
    assert not handled(W.float(), None, A, B, S)
    assert not handled(W, SimpleNamespace(dtype = torch.bfloat16), A, B, S)
    assert not handled(W, torch.ones(1), A, B, S)
    if functions._QuantState is not None:
        below = type("Below", (functions._QuantState,), {"__init__": lambda self: None})()
        below.dtype = torch.bfloat16
        assert handled(W, below, A, B, S)
    assert not functions._handles(X[0], [functions.Projection(W, None, A, B, S)], ())


def test_without_bitsandbytes(fast_lora, monkeypatch):
    """Dense weights are handled, quantized ones of every kind stay with stock; nothing raises."""
    import sys

    from unsloth.kernels import lora_functions, lora_products

    class LoRA_W(torch.autograd.Function):
        __module__ = fast_lora.__name__

    for name in ("_LoRAParallel", "_LoRAMLP", "_QuantState"):
        monkeypatch.setattr(lora_functions, name, None)
    monkeypatch.setattr(lora_products, "fast_lora", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    lora_functions.add_lora_before_product(LoRA_W)
    assert lora_products.fast_lora is fast_lora and lora_functions._QuantState is None
    X = make_X(torch.bfloat16)
    (W, _, A, B, S), *_ = make_projections("LoRA_W", torch.bfloat16)
    for state, expected in ((None, True), (SimpleNamespace(dtype = torch.bfloat16), False)):
        projection = lora_functions.Projection(W, state, A, B, S)
        assert lora_functions._handles(X, [projection], ()) is expected


@pytest.mark.parametrize("kind", KINDS)
def test_fullgraph(fast_lora, kind):
    """Traces into one graph, forward and backward; no less exact than eager code, against float64."""
    if not fast_lora.TRACE_LORA_FUNCTIONS:
        pytest.skip("this torch does not trace fused LoRA")
    from torch._dynamo.utils import counters

    projections = make_projections(kind, torch.float32, ranks = (4, 8, 2), scalings = (2.0, 3.0, 3.0))
    X = make_X(torch.float32)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda x: call(fast_lora, kind, x, projections), fullgraph = True)
    result = backward(compiled, X, projections)
    assert counters["stats"]["unique_graphs"] == 1
    eager = backward(lambda x: call(fast_lora, kind, x, projections), X, projections)
    exact_p = to_float64(projections)
    exact = backward(lambda x: plain(kind, x, exact_p), X.double(), exact_p)
    if DEVICE == "cpu":
        torch.testing.assert_close(result, eager)
    # On a GPU Inductor's sigmoid is some units in the last place off that of eager code.
    for compiled_one, eager_one, e in zip(result, eager, exact):
        assert error(compiled_one, e) <= 2 * error(eager_one, e) + 1e-5
    torch._dynamo.reset()


# Each kind, and ranks that fuse and do not fuse.
@pytest.mark.parametrize("kind, rank", (("LoRA_W", 3), ("LoRA_QKV", 8), ("LoRA_MLP", 3)))
def test_graphs_show_no_product_that_padding_could_change(fast_lora, kind, rank):
    """Inductor guards on the number of rows, of which there may be any, where it considers to pad a product:
    one whose width is no multiple of 8. Of other ranks it sees the products, and may fuse."""
    if not fast_lora.TRACE_LORA_FUNCTIONS:
        pytest.skip("this torch does not trace fused LoRA")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    widths = []

    def seen(graph, example_inputs):
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                widths.append(node.meta["val"].shape[-1])
        return make_boxed_func(graph.forward)

    projections = make_projections(kind, torch.float32, ranks = (rank,) * 3)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: call(fast_lora, kind, x, projections),
        backend = aot_autograd(fw_compiler = seen, bw_compiler = seen),
        fullgraph = True,
    )

    def run(X):
        torch._dynamo.mark_dynamic(X, 1)
        return compiled(X)

    X = make_X(torch.float32)
    with memory_of_nan():
        result = backward(run, X, projections)
    assert all(width % 8 == 0 for width in widths) and bool(widths) == (rank == 8)
    eager = backward(lambda x: call(fast_lora, kind, x, projections), X, projections)
    torch.testing.assert_close(result, eager, rtol = 1e-4, atol = 1e-4)
    torch._dynamo.reset()


def test_the_recompute_has_the_output_where_it_is_needed(fast_lora):
    """Its own LoRA_MLP takes a tensor that says so in the place of the dropout, or None: left out."""
    from unsloth.kernels import lora_mlp_recompute

    projections, X = make_projections("LoRA_MLP", torch.float32), make_X(torch.float32)
    arguments = [*(item for p in projections for item in p), activation, activation_backward, True]

    def recompute(needed):
        given = (*arguments, needed, None, None, None)
        return fast_lora._apply(lora_mlp_recompute.function, X, *given)

    (whole,) = call(fast_lora, "LoRA_MLP", X, projections)
    torch.testing.assert_close(recompute(torch.tensor(True)), whole)
    assert not recompute(None).any() and recompute(None).shape == whole.shape


def test_non_reentrant_checkpoint(fast_lora):
    """torch's own checkpoint unpacks what was saved once only."""
    from torch.utils import checkpoint

    run = getattr(checkpoint, "_unsloth_pristine_checkpoint", checkpoint.checkpoint)
    for kind in KINDS:
        projections = make_projections(kind, torch.float32)
        X = make_X(torch.float32)

        def fused(x):
            return call(fast_lora, kind, x, projections)

        result = backward(lambda x: run(fused, x, use_reentrant = False), X, projections)
        assert all(torch.equal(a, b) for a, b in zip(result, backward(fused, X, projections)))
