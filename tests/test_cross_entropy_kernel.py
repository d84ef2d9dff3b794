# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The kernel behind every cross entropy beside its torch counterpart in float64."""

import pytest
import torch
from backend import DEVICE, check_compiled, require

require("interpreter")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture
def kernel():
    from types import SimpleNamespace

    from unsloth import cross_entropy_spec
    from unsloth.kernels import cross_entropy_rows

    return SimpleNamespace(**{**vars(cross_entropy_rows), **vars(cross_entropy_spec)})


@pytest.mark.parametrize("vocab", [1, 3, 16, 37, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0, "logit_scale": 0.5, "label_smoothing": 0.1, "class_weight": None},
        {"label_smoothing": 0.1, "z_loss": 1e-3},
    ],
)
def test_the_kernel_equals_its_torch_counterpart(kernel, vocab, dtype, options):
    """In place, out of place and over float32 logits; whatever stands behind the last column."""
    rows, columns = 3, kernel.padded_columns(vocab)
    assert columns % 16 == 0 <= columns - vocab < 16  # every row begins aligned
    make = torch.Generator().manual_seed(vocab)
    values = (torch.randn(rows, vocab, generator = make) * 3).to(DEVICE, dtype)
    labels = torch.randint(0, vocab, (rows,), generator = make).to(DEVICE)
    bias = torch.randn(vocab, generator = make).to(DEVICE, dtype)
    class_weight = torch.rand(vocab, generator = make).to(DEVICE)
    spec = kernel.RowLoss(**{"class_weight": class_weight, **options})
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


@pytest.mark.parametrize(
    "class_weight, error, words",
    [
        ([1.0] * 9, TypeError, r"floating point tensor of \[9\]"),
        (torch.ones(9, dtype = torch.int64), TypeError, r"floating point tensor of \[9\]"),
        (torch.ones(8), ValueError, r"class_weight must be \[9\]"),
        (torch.ones(9, requires_grad = True), ValueError, "detach"),
        (torch.ones(9, device = "meta"), ValueError, "class_weight is on meta and the rest on"),
    ],
)
def test_class_weights_that_do_not_fit_are_named(kernel, class_weight, error, words):
    """Before a kernel reads them."""
    with pytest.raises(error, match = words):
        kernel.RowLoss.validated("loss", torch.zeros(2, 9, device = DEVICE), 9, class_weight)


_BARRIERS = """
from bare.kernels.cross_entropy_kernel import _cross_entropy_kernel as kernel

options = {each.name: False for each in kernel.params if each.is_constexpr}
options.update(HAS_GRADS = True, FROM_END = True, LANES = 128, WIDTH = 8)
types = {name: "constexpr" if name in options else "i32" for name in kernel.arg_names}
types.update({name: "*fp32" for name in types if name.endswith("_ptr")})
types.update(grads_ptr = "*bf16", labels_ptr = "*i64")
types.update(dict.fromkeys(("smoothing", "logit_scale", "softcap", "z_loss"), "fp32"))
for narrow, barriers in ((False, 1), (True, 3)):
    source = ASTSource(kernel, types, {**options, "NARROW": narrow})
    made = compile(source, target = GPUTarget("cuda", 90, 32), options = {"num_warps": 4})
    assert made.asm["ttir"].count("barrier") == barriers, made.asm["ttir"].count("barrier")
"""


def test_threads_wait_before_narrower_gradients_lie_over_logits(tmp_path):
    """The interpreter has one thread: what every one must have read before any writes is seen in the code."""
    from unsloth.kernels import cross_entropy_kernel
    check_compiled(cross_entropy_kernel, _BARRIERS, tmp_path)
