# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""4-bit dequantize: bit for bit what the format says, in one launch, for every format and size.

Without a GPU the kernels run in Triton's interpreter; with one, the same tests run on it, against
bitsandbytes' CUDA kernels.
"""

import copy
import importlib
import itertools
import os
import pickle
import random
import shutil
import types

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason = "runs the compiled kernel")
needs_interpreter = pytest.mark.skipif(GPU, reason = "counts launches of Triton's interpreter")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A tile is 2048 elements: a multiple of it, one short of it, odd, below a block, a single one.
SHAPES = ((64, 64), (3, 2048 - 1), (33, 77), (5, 7), (1, 1))


@pytest.fixture(scope = "module")
def nf4():
    """The module under test."""
    import unsloth  # noqa: F401

    return importlib.import_module("unsloth.kernels.nf4_dequantize")


@pytest.fixture(scope = "module")
def launching(nf4):
    return importlib.import_module("unsloth.kernels.nf4_launch")


@pytest.fixture(scope = "module")
def planning(nf4):
    return importlib.import_module("unsloth.kernels.nf4_plan")


def quantized(
    shape,
    dtype = torch.bfloat16,
    quant_type = "nf4",
    blocksize = 64,
    nested = True,
    seed = 0,
    storage = None,
):
    """(packed, quant_state) of random bytes and scales, so that every code and sign occurs."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    blocks = -(-numel // blocksize)
    size = 1 if storage is None else storage.itemsize
    count = -(-((numel + 1) // 2) // size) * size
    packed = torch.randint(0, 256, (count, 1), dtype = torch.uint8, generator = generator)
    if storage is not None:
        packed = packed.view(-1).view(storage).view(-1, 1)
    absmax, offset, state2 = torch.rand(blocks, generator = generator) * 3, None, None
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype = torch.uint8, generator = generator)
        offset = torch.tensor(0.0137, device = DEVICE)
        state2 = QuantState(
            absmax = (torch.rand(-(-blocks // 256), generator = generator) * 0.1).to(DEVICE),
            code = create_dynamic_map().to(DEVICE),
            blocksize = 256,
            dtype = torch.float32,
        )
    state = QuantState(
        absmax = absmax.to(DEVICE),
        shape = torch.Size(shape),
        code = get_4bit_type(quant_type, device = DEVICE),
        blocksize = blocksize,
        quant_type = quant_type,
        dtype = dtype,
        offset = offset,
        state2 = state2,
    )
    return packed.to(DEVICE), state


def defined(packed, state):
    """The format's definition in plain torch, on the CPU."""
    packed = packed.cpu().contiguous().view(-1).view(torch.uint8)
    numel = state.shape.numel()
    nibbles = torch.stack((packed >> 4, packed & 15), 1).view(-1)[:numel].long()
    scale = state.absmax.cpu()
    if state.state2 is not None:
        block2 = torch.arange(scale.numel()) // state.state2.blocksize
        scale = state.state2.code.cpu()[scale.long()] * state.state2.absmax.cpu()[block2]
        scale = scale + state.offset.cpu()
    code = state.code.cpu().clone()
    if state.quant_type == "fp4":
        code[8] = -0.0  # bitsandbytes' kernels put the sign on zero too; its table does not
    values = code[nibbles] * scale[torch.arange(numel) // state.blocksize]
    return values.to(state.dtype).view(state.shape)


def same_bits(a, b):
    """Equal dtype, shape and bits; tells -0.0 from 0.0, and a poisoned element from any value."""
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(a.view(integer), b.view(integer))


def poisoned(shape, dtype):
    return torch.full(shape, float("nan"), dtype = dtype, device = DEVICE)


def as_list(state):
    """The older list form of a quant state."""
    second = None
    if state.state2 is not None:
        inner = state.state2
        second = [state.offset, [inner.absmax, inner.code, inner.blocksize, None, None, None, None]]
    parts = [state.absmax, state.shape, state.dtype, state.blocksize, second]
    return [*parts, state.quant_type, state.code]


# ---- Values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", (True, False), ids = ("double", "flat"))
@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("dtype", DTYPES, ids = str)
def test_decodes_every_shape_bit_for_bit(nf4, dtype, quant_type, nested):
    """Sizes on the tile grid and off it, odd ones too, into buffers that held NaN."""
    for seed, shape in enumerate(SHAPES):
        packed, state = quantized(shape, dtype, quant_type, nested = nested, seed = seed)
        out = poisoned(shape, dtype)
        nf4.dequantize_4bit(packed, state, out = out)
        assert same_bits(out, defined(packed, state)), shape


@pytest.mark.parametrize("blocksize", (32, 64, 128, 256, 512, 1024, 2048, 4096))
def test_every_blocksize(nf4, blocksize):
    """All of bitsandbytes' blocksizes, also where a block spans rows and the last is cut short."""
    for shape in ((4, 2048), (3, 1111)):
        packed, state = quantized(shape, blocksize = blocksize)
        assert same_bits(nf4.dequantize_4bit(packed, state), defined(packed, state))


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float16, torch.float32), ids = str)
def test_float_stored_bytes(nf4, storage):
    """Packed bytes kept in a float dtype (bnb_4bit_quant_storage), as FSDP needs them."""
    packed, state = quantized((48, 64), storage = storage)
    assert packed.dtype == storage
    assert same_bits(nf4.dequantize_4bit(packed, state), defined(packed, state))


def test_transposed_weight_returns_transpose(nf4):
    """weight.t() in, dense weight transposed out: fast_lora.py's backward relies on it."""
    packed, state = quantized((32, 96))
    result = nf4.dequantize_4bit(packed.t(), state)
    assert result.shape == (96, 32)
    assert same_bits(result, defined(packed, state).t())


def test_three_dimensional_weight(nf4):
    """Expert weights [experts, rows, columns] keep their shape."""
    packed, state = quantized((3, 8, 64))
    assert same_bits(nf4.dequantize_4bit(packed, state), defined(packed, state))


@pytest.mark.parametrize("byte_offset, element_offset", ((16, 8), (4, 2), (1, 1), (3, 0)))
def test_unaligned_addresses(nf4, byte_offset, element_offset):
    """Views at any byte of the packed weight and any element of the output."""
    packed, state = quantized((5, 999))
    store = torch.zeros(packed.numel() + byte_offset, dtype = torch.uint8, device = DEVICE)
    store[byte_offset:] = packed.view(-1)
    numel = state.shape.numel()
    buffer = poisoned((numel + element_offset + 8,), state.dtype)
    out = buffer[element_offset : element_offset + numel].view(state.shape)
    nf4.dequantize_4bit(store[byte_offset:].view(-1, 1), state, out = out)
    assert same_bits(out, defined(packed, state))
    # Not one element before or behind it.
    assert buffer[:element_offset].isnan().all() and buffer[element_offset + numel :].isnan().all()


def test_empty_weight(nf4):
    """No elements, no launch, no error."""
    packed, state = quantized((0, 64))
    assert nf4.dequantize_4bit(packed, state).shape == (0, 64)


def test_random_formats(nf4):
    """Random shapes, formats and layouts (200 on a GPU, against bitsandbytes itself)."""
    from bitsandbytes.functional import dequantize_4bit as bitsandbytes_dequantize

    rng = random.Random(3407)
    for seed in range(200 if GPU else 25):
        shape = (rng.randint(1, 40), rng.choice((rng.randint(1, 700), 64 * rng.randint(1, 8))))
        options = dict(
            dtype = rng.choice(DTYPES),
            quant_type = rng.choice(("nf4", "fp4")),
            blocksize = rng.choice((32, 64, 128, 256, 512, 1024, 2048, 4096)),
            nested = rng.random() < 0.7,
            seed = seed,
        )
        packed, state = quantized(shape, **options)
        out = poisoned(shape, state.dtype)
        nf4.dequantize_4bit(packed, state, out = out)
        expected = bitsandbytes_dequantize(packed, state) if GPU else defined(packed, state)
        assert same_bits(out, expected), (shape, options)


@needs_gpu
def test_extreme_scales_equal_bitsandbytes(nf4):
    """Zero, subnormal, negative, overflowing scales: flushed, signed and rounded the same way."""
    from bitsandbytes.functional import dequantize_4bit as bitsandbytes_dequantize

    scales = (0.0, -0.0, 1e-39, -1e-39, 1.2e-38, 3e-38, -2.5, 7e4, 3e38, float("inf"))
    for dtype, quant_type in itertools.product(DTYPES, ("nf4", "fp4")):
        packed, state = quantized((len(scales), 64), dtype, quant_type, nested = False)
        state.absmax = torch.tensor(scales, device = DEVICE)
        expected = bitsandbytes_dequantize(packed, state)
        result = nf4.dequantize_4bit(packed, state)
        assert same_bits(result.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert same_bits(result.isnan().half(), expected.isnan().half())


# ---- Several weights --------------------------------------------------------------------------


def test_many_fill_one_buffer(nf4):
    """Q, K and V: views of one buffer without gaps, so that it is also one tall matrix."""
    pairs = [quantized((rows, 64), seed = rows) for rows in (64, 32, 32)]
    weights, states = map(list, zip(*pairs))
    out = poisoned((128 * 64,), torch.bfloat16)
    views = nf4.dequantize_4bit_many(weights, states, out = out)
    expected = [defined(*pair) for pair in pairs]
    assert all(same_bits(view, value) for view, value in zip(views, expected))
    assert same_bits(out.view(-1, 64), torch.cat(expected))


def test_many_with_different_formats(nf4):
    """Other formats, odd sizes, an empty weight, a transposed one, more than one launch takes."""
    formats = (("nf4", 64, True), ("nf4", 64, True), ("fp4", 64, True), ("nf4", 128, False))
    shapes = ((9, 33), (64, 64), (2, 31), (0, 64), (7, 5), (16, 128), (1, 3))
    pairs = []
    for i, shape in enumerate(shapes):
        quant_type, blocksize, nested = formats[i % len(formats)]
        pairs.append(
            quantized(shape, quant_type = quant_type, blocksize = blocksize, nested = nested, seed = i)
        )
    weights, states = map(list, zip(*pairs))
    weights[1] = weights[1].t()
    views = nf4.dequantize_4bit_many(weights, states)
    for i, (view, (packed, state)) in enumerate(zip(views, pairs)):
        expected = defined(packed, state)
        assert same_bits(view, expected.t() if i == 1 else expected), i


@needs_interpreter
def test_launch_counts(nf4, launching, monkeypatch):
    """One launch for a double quantized weight, NF4 or FP4, and one for up to four weights."""
    launches = []
    real = launching._compile
    monkeypatch.setattr(
        launching, "_compile", lambda kernel, *rest: launches.append(kernel) or real(kernel, *rest)
    )
    for quant_type in ("nf4", "fp4"):
        nf4.dequantize_4bit(*quantized((8, 64), quant_type = quant_type))
    assert len(launches) == 2
    for count, expected in ((3, 1), (4, 1), (5, 2)):
        launches.clear()
        weights, states = map(list, zip(*[quantized((4, 64), seed = i) for i in range(count)]))
        nf4.dequantize_4bit_many(weights, states)
        assert len(launches) == expected, count


# ---- Errors -----------------------------------------------------------------------------------


def spoiled(what):
    """(packed, state, out) with one thing wrong."""
    packed, state = quantized((8, 64))
    out = poisoned((8, 64), torch.bfloat16)
    if what == "quant_type":
        state.quant_type = "int4"
    elif what == "blocksize":
        state.blocksize = 96
    elif what == "small blocksize":
        state.blocksize = 16
    elif what == "second blocksize":
        state.state2.blocksize = 100
    elif what == "dtype":
        state.dtype = torch.float64
    elif what == "absmax length":
        state.absmax = state.absmax[:-1]
    elif what == "absmax dtype":
        state.absmax = state.absmax.float()
    elif what == "second absmax length":
        state.state2.absmax = state.state2.absmax.repeat(2)
    elif what == "weight length":
        packed = packed[:-1]
    elif what == "weight dtype":
        packed = packed.to(torch.int64)
    elif what == "weight strides":
        packed = packed.repeat(1, 2)[:, :1]
    elif what == "meta":
        packed = packed.to("meta")
    elif what == "repacked":
        state.packing_format_for_cpu = True
    elif what == "out shape":
        out = out.view(64, 8)
    elif what == "out dtype":
        out = out.half()
    elif what == "out strides":
        out = poisoned((64, 8), torch.bfloat16).t()
    elif what == "out device":
        out = out.to("meta")
    return packed, state, out


@pytest.mark.parametrize(
    "what, error, words",
    (
        ("quant_type", ValueError, "'int4'; it must be 'nf4' or 'fp4'"),
        ("blocksize", ValueError, "blocksize is 96; it must be a power of two"),
        ("small blocksize", ValueError, "blocksize is 16; it must be a power of two, 32 or more"),
        ("second blocksize", ValueError, "state2.blocksize is 100"),
        ("dtype", TypeError, "torch.float64; it must be float16, bfloat16 or float32"),
        ("absmax length", ValueError, "absmax has 7 elements .* it must have 8"),
        ("absmax dtype", TypeError, "absmax has dtype torch.float32; it must be torch.uint8"),
        ("second absmax length", ValueError, "state2.absmax has 2 elements .* it must have 1"),
        ("weight length", ValueError, "holds 255 bytes, .* packs into 256"),
        ("weight dtype", TypeError, "dtype torch.int64; it must be uint8"),
        ("weight strides", ValueError, r"strides \(2, 1\) .* Pass weight.contiguous"),
        ("meta", ValueError, "meta device"),
        ("repacked", ValueError, "packing_format_for_cpu"),
        ("out shape", ValueError, r"out has shape \(64, 8\); the weight has \(8, 64\)"),
        (
            "out dtype",
            ValueError,
            "out has dtype torch.float16; quant_state.dtype is torch.bfloat16",
        ),
        ("out strides", ValueError, "out has strides"),
        ("out device", ValueError, "out is on meta"),
    ),
)
def test_refuses_before_launch(nf4, what, error, words):
    """Each bad input is named, with what to do, and the output is left as it was."""
    packed, state, out = spoiled(what)
    with pytest.raises(error, match = words):
        nf4.dequantize_4bit(packed, state, out = out)
    assert out.device.type == "meta" or out.isnan().all()


def test_many_refuses_mixtures(nf4):
    """Lists of different lengths, and dtypes that one buffer cannot hold."""
    packed, state = quantized((8, 64))
    other, half_state = quantized((8, 64), torch.float16)
    with pytest.raises(ValueError, match = "2 weights and 1 quant states"):
        nf4.dequantize_4bit_many([packed, packed], [state])
    with pytest.raises(ValueError, match = "0 weights"):
        nf4.dequantize_4bit_many([], [])
    with pytest.raises(ValueError, match = "one buffer cannot hold"):
        nf4.dequantize_4bit_many([packed, other], [state, half_state])
    with pytest.raises(ValueError, match = r"out has shape \(5,\); the weight has \(512,\)"):
        nf4.dequantize_4bit_many([packed], [state], out = poisoned((5,), torch.bfloat16))


# ---- Plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ("absmax", "shape", "offset", "dtype", "quant_type", "second", "bytes")
)
def test_notices_a_changed_quant_state(nf4, what):
    """A quant state that was changed after its first use is read again: never stale numbers."""
    packed, state = quantized((8, 64))
    nf4.dequantize_4bit(packed, state)
    other_packed, other = quantized((8, 64), seed = 5)
    if what == "absmax":
        state.absmax = other.absmax
    elif what == "shape":
        state.shape = torch.Size((16, 32))
    elif what == "offset":
        state.offset = torch.tensor(2.0, device = DEVICE)
    elif what == "dtype":
        state.dtype = torch.float32
    elif what == "quant_type":
        state.quant_type, state.code = "fp4", quantized((8, 64), quant_type = "fp4")[1].code
    elif what == "second":
        state.state2.absmax = other.state2.absmax
    elif what == "bytes":
        packed = other_packed
    assert same_bits(nf4.dequantize_4bit(packed, state), defined(packed, state))


def test_checks_a_moved_weight_again(nf4):
    """A known quant state with another weight's bytes is refused, however often it was used."""
    packed, state = quantized((8, 64))
    nf4.dequantize_4bit(packed, state)
    with pytest.raises(ValueError, match = "holds 128 bytes, .* packs into 256"):
        nf4.dequantize_4bit(packed[:128].clone(), state)


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


@pytest.mark.parametrize("nested", (True, False), ids = ("double", "flat"))
def test_list_form_quant_state(nf4, nested):
    """Quant states from before they were a class."""
    from unsloth.kernels.utils import fast_dequantize

    packed, state = quantized((16, 64), nested = nested)
    assert same_bits(fast_dequantize(packed, as_list(state)), defined(packed, state))


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
def test_hands_everything_else_to_stock(nf4, what):
    """FP8 scales, NVFP4 and Int4 states, dense weights, and UNSLOTH_BNB_TRITON=0."""
    stock, calls = stub_stock(used = what != "switched off")
    replaced = nf4.replace_fast_dequantize(stock)
    packed, state = quantized((8, 64))
    other = {"none": None, "tensor": torch.ones(1), "object": types.SimpleNamespace(scale = 1)}
    quant_state = other.get(what, state)
    assert replaced(packed, quant_state, use_global_buffer = True) == "stock"
    assert replaced(packed, quant_state, dtype = torch.float16) == "stock"
    assert [keywords for _, keywords in calls] == [{}, {"dtype": torch.float16}]


def test_falls_back_when_triton_fails(nf4, launching, monkeypatch):
    """A kernel that does not compile: one warning, then Unsloth's own kernels for good."""
    stock, calls = stub_stock()
    replaced = nf4.replace_fast_dequantize(stock)
    packed, state = quantized((8, 64))

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(launching, "dequantize_kernel", Broken())
    monkeypatch.setattr(launching, "_COMPILED", {})
    with pytest.warns(UserWarning, match = "no such instruction"):
        assert replaced(packed, state) == "stock"
    assert replaced(packed, state) == "stock" and len(calls) == 2


def test_refuses_an_unknown_upstream(nf4):
    """Without Unsloth's scratch buffers the patch is not applied, and says why."""
    stock, _ = stub_stock()
    del stock.__globals__["_can_use_scratch"]
    with pytest.raises(NotImplementedError, match = "_can_use_scratch"):
        nf4.replace_fast_dequantize(stock)


def test_cpu_tensors(nf4, monkeypatch):
    """CPU weights: bitsandbytes' operator, and the definition where that errs."""
    monkeypatch.setattr(nf4, "_goes_to_bitsandbytes", lambda W: True)
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
            (view,) = nf4.dequantize_4bit_many([packed], [state])
            assert torch.equal(view, expected)


# ---- torch.compile, graphs, streams -----------------------------------------------------------


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_compiles_without_graph_breaks(nf4, quant_type):
    """fullgraph, dynamic shapes, one weight through fast_dequantize and several at once."""
    from unsloth.kernels.utils import fast_dequantize

    pairs = [quantized((32, 64), quant_type = quant_type, seed = i) for i in range(3)]
    weights, states = map(list, zip(*pairs))

    def block(x):
        dense = fast_dequantize(weights[0].t(), states[0])
        views = nf4.dequantize_4bit_many(weights, states)
        return [x @ dense, *(x @ view.t() for view in views)]

    torch._dynamo.reset()
    # Inductor on the CPU needs a C++ compiler.
    backend = "inductor" if GPU or shutil.which("g++") else "aot_eager"
    compiled = torch.compile(block, fullgraph = True, dynamic = True, backend = backend)
    for batch in (3, 5):
        x = torch.randn(batch, 64, device = DEVICE, dtype = torch.bfloat16)
        torch.testing.assert_close(compiled(x), block(x))


def test_operator_passes_opcheck(nf4, planning):
    """Schema, fake tensors, autograd registration and AOT dispatch of the operator."""
    pairs = [quantized((16, 64), seed = i) for i in range(2)]
    tensors = [planning.plan_for(*pair).tensors for pair in pairs]
    columns = [list(column) for column in zip(*tensors)]
    arguments = ([packed for packed, _ in pairs], *columns, [1024, 1024], "nf4", 64, 256)
    out = torch.zeros(2048, dtype = torch.bfloat16, device = DEVICE)
    torch.library.opcheck(torch.ops.unsloth.dequantize_4bit_.default, (out, *arguments))


@needs_gpu
def test_cuda_graph_and_streams(nf4):
    """Captured launches replay on new bytes; a side stream's launch stays on that stream."""
    packed, state = quantized((128, 256))
    out = poisoned((128, 256), torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        nf4.dequantize_4bit(packed, state, out = out)
    side.synchronize()
    assert same_bits(out, defined(packed, state))
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
            pair = nf4.dequantize_4bit_many([packed, packed], [state, state])
            shared = utils.fast_dequantize(packed, state, use_global_buffer = True)
            for result in (single, *pair, shared):
                assert result.device.index == 1 and same_bits(result, expected)
            shared.fill_(float("nan"))
        assert torch.cuda.current_device() == current
        scratch = utils.fast_dequantize.__wrapped__.__globals__["_SCRATCH"]
        assert shared.data_ptr() == scratch[("weight", 1)].data_ptr()
