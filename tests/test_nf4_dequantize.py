# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""dequantize_4bit and fast_dequantize on the 4-bit kernel: what is served, refused and kept."""

import copy
import importlib
import pickle
import shutil
import types

import pytest
import torch
from backend import DEVICE, GPU, require

require("interpreter")
from nf4_weights import defined, poisoned, quantized, same_bits  # noqa: E402

needs_gpu = pytest.mark.skipif(not GPU, reason = "runs the compiled kernel")


@pytest.fixture(scope = "module")
def nf4():
    """The module under test."""
    import unsloth  # noqa: F401
    return importlib.import_module("unsloth.kernels.nf4_dequantize")


@pytest.fixture(scope = "module")
def kernel(nf4):
    return importlib.import_module("unsloth.kernels.nf4_dequantize_kernel")


@pytest.fixture(scope = "module")
def decorator(nf4):
    return importlib.import_module("unsloth.kernels.nf4_fast_dequantize").dequantize_in_one_launch


def as_list(state):
    """The older list form of a quant state."""
    second = None
    if state.state2 is not None:
        inner = state.state2
        second = [state.offset, [inner.absmax, inner.code, inner.blocksize, None, None, None, None]]
    parts = [state.absmax, state.shape, state.dtype, state.blocksize, second]
    return [*parts, state.quant_type, state.code]


# ---- Values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", (True, False), ids = ("double", "flat"))
@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_decodes_either_form_of_quant_state(nf4, quant_type, nested):
    """bitsandbytes' class and its older list, an offset that is a number, into memory of NaN."""
    packed, state = quantized((33, 77), torch.float16, quant_type, nested = nested)
    expected = defined(packed, state)
    for form in (state, as_list(state)):
        out = poisoned((33, 77), torch.float16)
        assert nf4.dequantize_4bit(packed, form, out = out) is out and same_bits(out, expected)
    if nested:
        state.offset = state.offset.item()
        assert same_bits(nf4.dequantize_4bit(packed, state), expected)


def test_transposed_weight_returns_transpose(nf4):
    """weight.t() in, dense weight transposed out: fast_lora.py's backward relies on it."""
    packed, state = quantized((32, 96))
    result = nf4.dequantize_4bit(packed.t(), state)
    assert result.shape == (96, 32)
    assert same_bits(result, defined(packed, state).t())


@pytest.mark.parametrize("shape", ((3, 8, 64), (0, 64)))
def test_other_shapes(nf4, shape):
    """Expert weights [experts, rows, columns] keep their shape; no elements, no launch, no error."""
    packed, state = quantized(shape)
    assert same_bits(nf4.dequantize_4bit(packed, state), defined(packed, state))


# ---- Errors -----------------------------------------------------------------------------------


def spoil(of, name, value):
    """Sets state.name, or state.state2.name, to value(what it was)."""

    def spoiled(packed, state, out):
        part = state.state2 if of == "state2" else state
        setattr(part, name, value(getattr(part, name, None)))
        return packed, out

    return spoiled


def give(what, value):
    """Replaces the packed weight, or out, by value(it)."""
    return lambda packed, state, out: (
        (value(packed), out) if what == "packed" else (packed, value(out))
    )


BAD = {
    "quant_type": (
        spoil("state", "quant_type", lambda _: "int4"),
        ValueError,
        "'int4'; it must be 'nf4' or 'fp4'",
    ),
    "blocksize": (
        spoil("state", "blocksize", lambda _: 96),
        ValueError,
        "blocksize is 96; it must be a power of two",
    ),
    "small blocksize": (
        spoil("state", "blocksize", lambda _: 16),
        ValueError,
        "blocksize is 16; it must be a power of two, 32 or more",
    ),
    "second blocksize": (
        spoil("state2", "blocksize", lambda _: 100),
        ValueError,
        "state2.blocksize is 100",
    ),
    "dtype": (
        spoil("state", "dtype", lambda _: torch.float64),
        TypeError,
        "torch.float64; it must be float16, bfloat16 or float32",
    ),
    "absmax length": (
        spoil("state", "absmax", lambda absmax: absmax[:-1]),
        ValueError,
        "absmax has 7 elements .* it must have 8",
    ),
    "absmax dtype": (
        spoil("state", "absmax", lambda absmax: absmax.float()),
        TypeError,
        "absmax has dtype torch.float32; it must be torch.uint8",
    ),
    "absmax strides": (
        spoil("state", "absmax", lambda absmax: absmax.repeat(2)[::2]),
        ValueError,
        r"strides \(2,\); it must have 8, contiguous",
    ),
    "absmax device": (
        spoil("state", "absmax", lambda absmax: absmax.to("meta")),
        ValueError,
        "absmax is on meta and the weight on",
    ),
    "second absmax length": (
        spoil("state2", "absmax", lambda absmax: absmax.repeat(2)),
        ValueError,
        "state2.absmax has 2 elements .* it must have 1",
    ),
    "second code": (
        spoil("state2", "code", lambda code: code[:16]),
        ValueError,
        "state2.code has 16 elements .* it must have 256",
    ),
    "offset": (
        spoil("state", "offset", lambda _: None),
        TypeError,
        "offset is None; it must be a tensor",
    ),
    "repacked": (
        spoil("state", "packing_format_for_cpu", lambda _: True),
        ValueError,
        "packing_format_for_cpu",
    ),
    "short weight": (
        give("packed", lambda packed: packed[:-1]),
        ValueError,
        "holds 255 bytes, .* packs into 256",
    ),
    "long weight": (
        give("packed", lambda packed: torch.cat([packed, packed[:1]])),
        ValueError,
        "holds 257 bytes, .* packs into 256",
    ),
    "weight dtype": (
        give("packed", lambda packed: packed.to(torch.int64)),
        TypeError,
        "dtype torch.int64; it must be uint8",
    ),
    "weight strides": (
        give("packed", lambda packed: packed.repeat(1, 2)[:, :1]),
        ValueError,
        r"strides \(2, 1\) .* Pass weight.contiguous",
    ),
    "meta": (give("packed", lambda packed: packed.to("meta")), ValueError, "meta device"),
    "out shape": (
        give("out", lambda out: out.view(64, 8)),
        ValueError,
        r"out has shape \(64, 8\); the weight has shape \(8, 64\)",
    ),
    "out dtype": (
        give("out", lambda out: out.half()),
        ValueError,
        "out has dtype torch.float16; the weight has dtype torch.bfloat16",
    ),
    "out strides": (
        give("out", lambda out: poisoned((64, 8), torch.bfloat16).t()),
        ValueError,
        "out has strides",
    ),
    "out device": (give("out", lambda out: out.to("meta")), ValueError, "out is on meta"),
}


@pytest.mark.parametrize("used", (False, True), ids = ("new", "used"))
@pytest.mark.parametrize("what", BAD)
def test_refuses_before_launch(nf4, what, used):
    """Each bad input is named, with what to do, and the output is left as it was; of a quant state
    that was used before, too."""
    if used and what == "repacked":
        pytest.skip("weights are repacked on the CPU, where no plan is kept")
    change, error, words = BAD[what]
    packed, state = quantized((8, 64))
    if used:
        nf4.dequantize_4bit(packed, state)
    packed, out = change(packed, state, poisoned((8, 64), torch.bfloat16))
    with pytest.raises(error, match = words):
        nf4.dequantize_4bit(packed, state, out = out)
    assert out.device.type == "meta" or out.isnan().all()


@pytest.mark.parametrize("device, hip", (("xpu", False), ("cuda", True)))
def test_gpus_of_other_makers_are_bitsandbytes_own(nf4, monkeypatch, device, hip):
    """Intel's, and AMD's, which torch calls cuda: the kernel was tested on neither."""
    monkeypatch.setattr(nf4, "HIP", hip)
    weight = types.SimpleNamespace(
        device = torch.device(device),
        is_cuda = hip,
        dtype = torch.uint8,
        is_contiguous = lambda: True,
        element_size = lambda: 1,
        numel = lambda: 256,
    )
    with pytest.raises(nf4.DequantizeUnavailable, match = f"is on {device}, .*bitsandbytes.functio"):
        nf4._check_weight(weight, types.SimpleNamespace(numel = 512))


# ---- Plans ------------------------------------------------------------------------------------


CHANGES = {
    "absmax": lambda state, other: setattr(state, "absmax", other.absmax),
    "absmax in place": lambda state, other: state.absmax.copy_(other.absmax),
    "absmax moved": lambda state, other: setattr(state.absmax, "data", other.absmax),
    "shape": lambda state, other: setattr(state, "shape", torch.Size((16, 32))),
    "offset": lambda state, other: setattr(state, "offset", torch.tensor(2.0, device = DEVICE)),
    "dtype": lambda state, other: setattr(state, "dtype", torch.float32),
    "quant_type": lambda state, other: vars(state).update(
        quant_type = "fp4", code = quantized((8, 64), quant_type = "fp4")[1].code
    ),
    "second level": lambda state, other: setattr(state, "state2", other.state2),
    "second absmax": lambda state, other: setattr(state.state2, "absmax", other.state2.absmax),
    "second code": lambda state, other: setattr(state.state2, "code", state.state2.code.flip(0)),
    "no second level": lambda state, other: vars(state).update(
        absmax = other.absmax.float(), state2 = None, offset = None
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_notices_a_changed_quant_state(nf4, what):
    """A quant state that was changed after its first use is read again: never stale numbers."""
    packed, state = quantized((8, 64))
    before = nf4.dequantize_4bit(packed, state)
    CHANGES[what](state, quantized((8, 64), seed = 5)[1])
    expected = defined(packed, state)
    assert not same_bits(before, expected)
    for _ in range(2):
        assert same_bits(nf4.dequantize_4bit(packed, state), expected)


def test_notices_other_blocksizes(nf4):
    """They alone, with the scales of the old ones: refused, and right again when put back."""
    packed, state = quantized((264, 64))  # 264 scales, in two blocks of the second level
    expected = nf4.dequantize_4bit(packed, state)
    for part, other, words in ((state, 128, "264 elements"), (state.state2, 512, "2 elements")):
        right, part.blocksize = part.blocksize, other
        with pytest.raises(ValueError, match = words):
            nf4.dequantize_4bit(packed, state)
        part.blocksize = right
    assert same_bits(nf4.dequantize_4bit(packed, state), expected)


def test_a_freed_part_is_not_mistaken_for_a_new_one(nf4):
    """The plan holds the parts that it compares, so that no new one gets the identity of an old."""
    packed, state = quantized((8, 64))
    for seed in range(5):
        state.absmax = quantized((8, 64), seed = seed)[1].absmax
        assert same_bits(nf4.dequantize_4bit(packed, state), defined(packed, state))


def test_follows_a_weight_that_moves(nf4):
    """Other bytes at another address, or in place, are decoded; the plan stays."""
    packed, state = quantized((8, 64))
    nf4.dequantize_4bit(packed, state)
    plan = state._dequantize_plan
    for seed, move in enumerate(
        (torch.Tensor.copy_, lambda old, new: setattr(old, "data", new)), 1
    ):
        move(packed, quantized((8, 64), seed = seed)[0])
        assert same_bits(nf4.dequantize_4bit(packed, state), defined(packed, state))
    assert state._dequantize_plan is plan


@pytest.mark.parametrize("where", ("the same address", "another address"))
@pytest.mark.parametrize("count", (128, 512))
def test_checks_another_weight_again(nf4, count, where):
    """A known quant state with another weight's bytes is refused, however often it was used."""
    store, state = torch.zeros(1024, 1, dtype = torch.uint8, device = DEVICE), quantized((8, 64))[1]
    nf4.dequantize_4bit(store[:256], state)
    other = store[:count] if where == "the same address" else store[256 : 256 + count]
    with pytest.raises(ValueError, match = f"holds {count} bytes, .* packs into 256"):
        nf4.dequantize_4bit(other, state)


def test_copies_and_pickles_drop_the_plan(nf4):
    """A model that was used can be copied and saved, and the copy decodes."""
    packed, state = quantized((8, 64))
    nf4.dequantize_4bit(packed, state)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert same_bits(nf4.dequantize_4bit(packed, other), defined(packed, state))


# ---- fast_dequantize --------------------------------------------------------------------------


def stub_stock(used = True):
    """A stock fast_dequantize that records its calls, with the globals of Unsloth's module."""
    import bitsandbytes.functional

    calls = []
    names = {
        "_SCRATCH": {},
        "_scratch": lambda kind, device, numel, dtype: torch.empty(
            numel, dtype = dtype, device = device
        ),
        "_can_use_scratch": lambda device: False,
        "_USE_NF4_KERNELS": used,
        "bnb_functional": bitsandbytes.functional,
        "calls": calls,
        "__builtins__": {},
    }
    code = "def fast_dequantize(*args, **kwargs):\n    calls.append((args, kwargs))\n    return 'stock'"
    exec(code, names)
    return names["fast_dequantize"], calls


def test_unsloth_uses_it(nf4):
    """Unsloth's fast_dequantize decodes FP4 itself and keeps a plan on the quant state."""
    from unsloth.kernels.utils import fast_dequantize

    packed, state = quantized((16, 64), quant_type = "fp4")
    result = fast_dequantize(packed, state)
    assert same_bits(result, defined(packed, state))
    assert hasattr(state, "_dequantize_plan")


def test_fast_dequantize_contract(nf4):
    """Dense weights pass; out, .t() in and out, the global buffer; dtype is for FP8 alone."""
    from unsloth.kernels.utils import fast_dequantize

    dense = torch.ones(2, 2, device = DEVICE)
    assert fast_dequantize(dense) is dense
    packed, state = quantized((32, 64))
    expected = defined(packed, state)
    for _ in range(3):  # without a plan, with one, with a kept scratch view
        assert same_bits(fast_dequantize(packed, state, use_global_buffer = True), expected)
        assert same_bits(fast_dequantize(packed.t(), state, use_global_buffer = True), expected.t())
        out = poisoned((32, 64), torch.bfloat16)
        assert fast_dequantize(packed, state, out = out, use_global_buffer = True) is out
        assert same_bits(out, expected)
    assert fast_dequantize(packed, state, dtype = torch.float32).dtype == torch.bfloat16


@pytest.mark.parametrize("what", ("none", "tensor", "object", "switched off"))
def test_hands_everything_else_to_stock(decorator, what):
    """FP8 scales, NVFP4 and Int4 states, dense weights, and UNSLOTH_BNB_TRITON=0."""
    stock, calls = stub_stock(used = what != "switched off")
    replaced = decorator(stock)
    packed, state = quantized((8, 64))
    other = {"none": None, "tensor": torch.ones(1), "object": types.SimpleNamespace(scale = 1)}
    quant_state = other.get(what, state)
    assert replaced(packed, quant_state, use_global_buffer = True) == "stock"
    assert replaced(packed, quant_state, dtype = torch.float16) == "stock"
    assert [keywords for _, keywords in calls] == [{}, {"dtype": torch.float16}]


def test_falls_back_when_triton_fails(kernel, decorator, monkeypatch):
    """A kernel that does not compile: one warning, then Unsloth's own kernels for good."""
    stock, calls = stub_stock()
    replaced = decorator(stock)
    packed, state = quantized((8, 64))

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(kernel, "dequantize_kernel", Broken())
    kernel.launch_for.cache_clear()
    with pytest.warns(UserWarning, match = "no such instruction"):
        assert replaced(packed, state) == "stock"
    assert replaced(packed, state) == "stock" and len(calls) == 2
    monkeypatch.undo()
    kernel.launch_for.cache_clear()
    assert replaced(packed, state) == "stock" and hasattr(state, "_dequantize_plan")


def test_refuses_an_unknown_upstream(decorator):
    """Without Unsloth's scratch buffers the patch is not applied, and says why."""
    stock, _ = stub_stock()
    del stock.__globals__["_can_use_scratch"]
    with pytest.raises(NotImplementedError, match = "_can_use_scratch"):
        decorator(stock)


def test_cpu_tensors(nf4, monkeypatch):
    """CPU weights: bitsandbytes' operator, and the definition where that errs."""
    monkeypatch.setattr(nf4, "INTERPRETED", False)
    for shape, blocksize in (((8, 128), 64), ((8, 96), 64), ((4, 64), 256), ((3, 33), 32)):
        for nested in (True, False):
            packed, state = quantized(shape, torch.float32, blocksize = blocksize, nested = nested)
            packed = packed.cpu()
            state.to("cpu")
            expected = defined(packed, state)
            assert torch.equal(nf4.dequantize_4bit(packed, state), expected)
            assert torch.equal(nf4.dequantize_4bit(packed.t(), state), expected.t())
            assert torch.equal(nf4.dequantize_4bit(packed, as_list(state)), expected)
            out = torch.full(shape, float("nan"))
            assert nf4.dequantize_4bit(packed, state, out = out) is out and torch.equal(out, expected)


# ---- torch.compile, devices -------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_compiles_without_graph_breaks(nf4, quant_type):
    """fullgraph and dynamic shapes, through fast_dequantize and dequantize_4bit."""
    from unsloth.kernels.utils import fast_dequantize

    packed, state = quantized((32, 64), quant_type = quant_type)
    other, other_state = quantized((48, 64), quant_type = quant_type, nested = False, seed = 1)

    def block(x):
        return x @ fast_dequantize(packed, state).t(), x @ nf4.dequantize_4bit(
            other.t(), other_state
        )

    torch._dynamo.reset()
    # Inductor on the CPU needs a C++ compiler.
    backend = "inductor" if GPU or shutil.which("g++") else "aot_eager"
    compiled = torch.compile(block, fullgraph = True, dynamic = True, backend = backend)
    for batch in (3, 5):
        x = torch.randn(batch, 64, device = DEVICE, dtype = torch.bfloat16)
        torch.testing.assert_close(compiled(x), block(x))


@needs_gpu
def test_a_captured_call_replays_on_new_bytes(nf4):
    packed, state = quantized((128, 256))
    out = nf4.dequantize_4bit(packed, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nf4.dequantize_4bit(packed, state, out = out)
    packed.copy_(quantized((128, 256), seed = 9)[0])
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, defined(packed, state))


@needs_gpu
def test_global_buffer_is_unsloths_own(nf4):
    """use_global_buffer returns Unsloth's shared memory, on the first call and on later ones."""
    from unsloth.kernels import utils

    packed, state = quantized((64, 64))
    addresses = {
        utils.fast_dequantize(packed, state, use_global_buffer = True).data_ptr() for _ in "123"
    }
    names = utils.fast_dequantize.__wrapped__.__globals__
    assert addresses == {names["_SCRATCH"][("weight", packed.device.index)].data_ptr()}


def test_a_buffer_that_unsloth_replaced_is_not_written_to(decorator, monkeypatch):
    """It grows with the largest weight: a view of the old one would be of freed, or others', memory."""
    module = importlib.import_module(decorator.__module__)
    monkeypatch.setattr(module, "_raw_stream", lambda index: 0)
    names = stub_stock()[0].__globals__
    utils, buffers = module._Utils(names), names["_SCRATCH"]
    names["_scratch"] = lambda kind, device, numel, dtype: buffers["weight", 0][:numel]
    plan = types.SimpleNamespace(
        device = torch.device("cuda", 0), numel = 4, dtype = torch.float32, shape = (2, 2)
    )
    for size in (4, 8):
        buffers["weight", 0] = torch.zeros(size)
        view = utils.scratch(plan)
        assert view.data_ptr() == buffers["weight", 0].data_ptr() and view.shape == (2, 2)
        assert utils.scratch(plan) is view


needs_two_gpus = pytest.mark.skipif(
    not GPU or torch.cuda.device_count() < 2, reason = "needs two GPUs"
)


@needs_two_gpus
@pytest.mark.parametrize("current", (0, 1))
def test_second_device(nf4, current):
    """A weight decoded where it lies, whether or not its device is the current one, which stays."""
    from unsloth.kernels import utils
    with torch.cuda.device(current):
        packed, state = quantized((64, 64))
        expected = defined(packed, state)
        assert same_bits(nf4.dequantize_4bit(packed, state), expected)
        packed = packed.to("cuda:1")
        state.to("cuda:1")
        for _ in range(2):  # the first call compiles and plans, the second relaunches
            single = nf4.dequantize_4bit(packed, state)
            shared = utils.fast_dequantize(packed, state, use_global_buffer = True)
            for result in (single, shared):
                assert result.device.index == 1 and same_bits(result, expected)
            shared.fill_(float("nan"))
        assert torch.cuda.current_device() == current
        scratch = utils.fast_dequantize.__wrapped__.__globals__["_SCRATCH"]
        assert shared.data_ptr() == scratch[("weight", 1)].data_ptr()
