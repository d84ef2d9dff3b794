# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""SwiGLU's backward inside compiled blocks: exact as the eager kernel, with one buffer less."""

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, GPU, require

require("interpreter")
on_gpu = pytest.mark.skipif(not GPU, reason = "needs a CUDA GPU")


@pytest.fixture
def swiglu(monkeypatch):
    """The kernel behind LoRA_MLP's backward, and the operator that compiled code calls."""
    import unsloth  # noqa: F401
    from unsloth.kernels import swiglu, swiglu_backward

    monkeypatch.setattr(swiglu_backward, "_DEVICES", (DEVICE,))
    torch._dynamo.reset()
    return swiglu


def tensors(
    shape = (7, 300),
    dtype = torch.float32,
    seed = 0,
):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator = make).to(DEVICE, dtype) * 3 for _ in range(3)]


def exact(gradient, e, g):
    e, g = (x.double().requires_grad_() for x in (e, g))
    h = F.silu(e) * g
    de, dg = torch.autograd.grad(h, (e, g), gradient.double())
    return h.detach(), dg, de


def compiled(swiglu, *inputs):
    """(h, df, de) as a compiled backward gets them, and the operators in its graph."""
    operators = []

    def backend(graph, example_inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        kernel = swiglu.swiglu_DWf_DW_dfg_kernel
        function = torch.compile(kernel, backend = backend, fullgraph = True)
        return function(*inputs), operators


@pytest.mark.parametrize("shape", [(7, 300), (1, 1024), (3, 1025), (1, 1), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compiled_backward_is_as_exact_as_the_eager_kernel(swiglu, dtype, shape):
    """h, dL/dg and dL/de against float64, and bit-equal to the eager kernel's where it runs."""
    if dtype is torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter does not round to bfloat16 as a GPU does")
    inputs = tensors(shape, dtype)
    found, operators = compiled(swiglu, *(x.clone() for x in inputs))
    assert any("swiglu_backward_" in name for name in operators)
    eps = torch.finfo(dtype).eps
    for ours, oracle in zip(found, exact(*inputs)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), oracle, rtol = 4 * eps, atol = 8 * eps)
    if inputs[0].numel():
        by_kernel = swiglu.swiglu_DWf_DW_dfg_kernel(*(x.clone() for x in inputs))
        for ours, eager in zip(found, by_kernel):
            assert torch.equal(ours, eager)


def test_the_gradient_s_buffer_is_reused_and_e_and_g_are_kept(swiglu):
    """The operator overwrites the gradient alone: e and g are saved tensors."""
    gradient, e, g = tensors()
    before = e.clone(), g.clone()
    (h, df, de), _ = compiled(swiglu, gradient, e, g)
    assert de.data_ptr() == gradient.data_ptr()
    assert torch.equal(e, before[0]) and torch.equal(g, before[1])
    assert len({x.data_ptr() for x in (h, df, de, e, g)}) == 5


def test_the_operator_is_registered_as_it_behaves(swiglu):
    """Schema, mutation, fake tensors and functionalization agree (torch.library.opcheck)."""
    torch.library.opcheck(torch.ops.unsloth.swiglu_backward_.default, tuple(tensors((4, 40))))


@pytest.mark.parametrize("case", ["eager", "with grad", "other device"])
def test_everything_else_goes_to_stock(swiglu, monkeypatch, case):
    """Eager code, traces that autograd records, and devices without Triton's kernels."""
    from unsloth.kernels import swiglu_backward

    stock = swiglu_backward.backward_in_place_when_traced(lambda DW, e, g: (DW * 2, e, g))
    inputs = tensors((2, 8))
    if case == "other device":
        monkeypatch.setattr(swiglu_backward, "_DEVICES", ("xpu",))
    function = stock if case == "eager" else torch.compile(stock, backend = "eager", fullgraph = True)
    with torch.set_grad_enabled(case == "with grad"):
        assert torch.equal(function(*inputs)[0], inputs[0] * 2)


@pytest.mark.parametrize(
    "shapes", [((4, 6), (4, 5), (4, 6)), ((4, 6), (4, 6), (2, 6))], ids = ["e", "g"]
)
def test_unequal_shapes_are_named(swiglu, shapes):
    """The error says which shapes came."""
    with pytest.raises(ValueError, match = "equal shapes"):
        torch.ops.unsloth.swiglu_backward_(*(torch.zeros(s, device = DEVICE) for s in shapes))


def test_a_gradient_that_is_not_contiguous_is_named(swiglu):
    """It could not be overwritten as one piece."""
    gradient, e, g = tensors((6, 4))
    with pytest.raises(ValueError, match = "contiguous gradient"):
        torch.ops.unsloth.swiglu_backward_(gradient.t().contiguous().t(), e, g)


@on_gpu
def test_inductor_allocates_two_buffers_and_not_three(swiglu):
    """Peak memory of the compiled backward: the inputs and two results."""
    shape, dtype = (4096, 4096), torch.bfloat16
    size = 4096 * 4096 * 2

    def backward(dY, W, e, g):
        return [x.sum() for x in swiglu.swiglu_DWf_DW_dfg_kernel(dY @ W, e, g)]

    torch._dynamo.reset()
    run = torch.compile(backward, fullgraph = True)
    inputs = [torch.randn(shape, device = DEVICE, dtype = dtype) for _ in range(4)]
    with torch.no_grad():
        run(*inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run(*inputs)
        assert torch.cuda.max_memory_allocated() - base < 3.5 * size
