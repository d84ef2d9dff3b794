# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The 4-bit decode kernel: bit for bit what the format says, in one launch, for every format and size.

Without a GPU it runs in Triton's interpreter; with one, the same tests run on it, against
bitsandbytes' CUDA kernels.
"""

import importlib
import itertools
import random

import pytest
import torch
from backend import DEVICE, GPU, check_compiled, require

require("interpreter")
from nf4_weights import DTYPES, defined, poisoned, quantized, same_bits  # noqa: E402

needs_gpu = pytest.mark.skipif(not GPU, reason = "runs the compiled kernel")
needs_interpreter = pytest.mark.skipif(GPU, reason = "replaces Unsloth's launchers by stubs")
# A tile is 2048 elements: a multiple of it, one short of it, odd, below a block, a single one.
SHAPES = ((64, 64), (3, 2048 - 1), (33, 77), (5, 7), (1, 1))


@pytest.fixture(scope = "module")
def kernel():
    """The module under test."""
    import unsloth  # noqa: F401
    return importlib.import_module("unsloth.kernels.nf4_dequantize_kernel")


def arguments(packed, state, out):
    """What unsloth::dequantize_4bit_ takes."""
    if state.state2 is None:
        scales, blocksize2 = (state.absmax,) * 4, 0
    else:
        second = state.state2
        scales, blocksize2 = (
            (state.absmax, second.code, second.absmax, state.offset),
            second.blocksize,
        )
    return out, packed, *scales, state.quant_type, state.blocksize, blocksize2


def decode(
    packed,
    state,
    out = None,
):
    """state's weight by the operator, into memory that held NaN."""
    out = poisoned(state.shape, state.dtype) if out is None else out
    torch.ops.unsloth.dequantize_4bit_(*arguments(packed, state, out))
    return out


@pytest.mark.parametrize("nested", (True, False), ids = ("double", "flat"))
@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("dtype", DTYPES, ids = str)
def test_decodes_every_shape_bit_for_bit(kernel, dtype, quant_type, nested):
    """Sizes on the tile grid and off it, odd ones too."""
    for seed, shape in enumerate(SHAPES):
        packed, state = quantized(shape, dtype, quant_type, nested = nested, seed = seed)
        assert same_bits(decode(packed, state), defined(packed, state)), shape


@pytest.mark.parametrize("blocksize", (32, 64, 128, 256, 512, 1024, 2048, 4096))
def test_every_blocksize(kernel, blocksize):
    """All of bitsandbytes' blocksizes, also where a block spans rows and the last is cut short."""
    for shape in ((4, 2048), (3, 1111)):
        packed, state = quantized(shape, blocksize = blocksize)
        assert same_bits(decode(packed, state), defined(packed, state))


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.float16, torch.float32), ids = str)
def test_float_stored_bytes(kernel, storage):
    """Packed bytes kept in a float dtype (bnb_4bit_quant_storage), as FSDP needs them."""
    packed, state = quantized((48, 64), storage = storage)
    assert packed.dtype == storage
    assert same_bits(decode(packed, state), defined(packed, state))


@pytest.mark.parametrize("byte_offset, element_offset", ((16, 8), (4, 2), (1, 1), (3, 0)))
def test_unaligned_addresses(kernel, byte_offset, element_offset):
    """Views at any byte of the packed weight and any element of the output."""
    packed, state = quantized((5, 999))
    store = torch.zeros(packed.numel() + byte_offset, dtype = torch.uint8, device = DEVICE)
    store[byte_offset:] = packed.view(-1)
    numel = state.shape.numel()
    buffer = poisoned((numel + element_offset + 8,), state.dtype)
    out = buffer[element_offset : element_offset + numel].view(state.shape)
    decode(store[byte_offset:].view(-1, 1), state, out)
    assert same_bits(out, defined(packed, state))
    # Not one element before or behind it.
    assert buffer[:element_offset].isnan().all() and buffer[element_offset + numel :].isnan().all()


def test_empty_weight(kernel):
    """No elements, no launch, no error."""
    assert decode(*quantized((0, 64))).shape == (0, 64)


def test_random_formats(kernel):
    """Random shapes, formats and layouts (200 on a GPU, against bitsandbytes itself)."""
    from bitsandbytes.functional import dequantize_4bit as bitsandbytes_dequantize

    rng = random.Random(3407)
    for seed in range(200 if GPU else 12):
        shape = (rng.randint(1, 40), rng.choice((rng.randint(1, 700), 64 * rng.randint(1, 8))))
        options = dict(
            dtype = rng.choice(DTYPES),
            quant_type = rng.choice(("nf4", "fp4")),
            blocksize = rng.choice((32, 64, 128, 256, 512, 1024, 2048, 4096)),
            nested = rng.random() < 0.7,
            seed = seed,
        )
        packed, state = quantized(shape, **options)
        expected = bitsandbytes_dequantize(packed, state) if GPU else defined(packed, state)
        assert same_bits(decode(packed, state), expected), (shape, options)


@needs_gpu
def test_extreme_scales_equal_bitsandbytes(kernel):
    """Zero, subnormal, negative, overflowing scales: flushed, signed and rounded the same way."""
    from bitsandbytes.functional import dequantize_4bit as bitsandbytes_dequantize

    scales = (0.0, -0.0, 1e-39, -1e-39, 1.2e-38, 3e-38, -2.5, 7e4, 3e38, float("inf"))
    for dtype, quant_type in itertools.product(DTYPES, ("nf4", "fp4")):
        packed, state = quantized((len(scales), 64), dtype, quant_type, nested = False)
        state.absmax = torch.tensor(scales, device = DEVICE)
        expected = bitsandbytes_dequantize(packed, state)
        result = decode(packed, state)
        assert same_bits(result.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert same_bits(result.isnan().half(), expected.isnan().half())


# ---- Launching --------------------------------------------------------------------------------


class Launchers:
    """Stubs of Unsloth's launch and relaunch: what they were called with, and what they answer."""

    def __init__(self, answer):
        self.answer, self.launched, self.relaunched = answer, [], []

    def launch(self, kernel, grid, args, n_tensors, constants, index, **options):
        self.launched.append((grid, args, n_tensors, constants))
        return "entry"

    def relaunch(self, entry, grid, index, args):
        self.relaunched.append((entry, grid, args))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def launched(kernel, monkeypatch):
    """(stubs, (packed, state)) after three launches of one weight, by what relaunch answers."""
    from unsloth.kernels import triton_launch

    def run(answer):
        stubs = Launchers(answer)
        monkeypatch.setattr(triton_launch, "launch", stubs.launch)
        monkeypatch.setattr(triton_launch, "relaunch", stubs.relaunch)
        monkeypatch.setattr(kernel, "current_device", lambda: None)
        kernel.launch_for.cache_clear()
        packed, state = quantized((64, 64))
        for _ in range(3):
            decode(packed, state)
        return stubs, (packed, state)

    yield run
    kernel.launch_for.cache_clear()  # a test may have launched by the stubs after run, too


@needs_interpreter
def test_one_launch_then_relaunches_by_address(launched):
    """A weight is one launch of Triton's, which Unsloth's relaunch repeats with today's addresses."""
    stubs, (packed, state) = launched(True)
    ((grid, args, n_tensors, constants),) = stubs.launched
    assert grid == (2,) and len(args) == 7 and n_tensors == 6
    assert constants["ALIGN"] in (4, 16) and constants["ON_GRID"] and constants["NESTED"]
    assert [(entry, grid) for entry, grid, _ in stubs.relaunched] == [("entry", (2,))] * 2
    address, absmax, code2, absmax2, offset, _, numel = stubs.relaunched[-1][2]
    second = state.state2
    parts = (packed, state.absmax, second.code, second.absmax, state.offset)
    assert [address, absmax, code2, absmax2, offset] == [part.data_ptr() for part in parts]
    assert numel == 4096


@needs_interpreter
@pytest.mark.parametrize(
    "answer", (False, TypeError("launcher takes other arguments")), ids = ("refused", "other Triton")
)
def test_launches_again_where_relaunch_does_not(launched, answer):
    """UNSLOTH_TRITON_FAST_LAUNCH=0, a profiler on Triton's launches, a Triton of another make."""
    stubs, _ = launched(answer)
    assert len(stubs.launched) == 3 and len(stubs.relaunched) == 2


@needs_interpreter
def test_no_relaunch_on_another_device(kernel, launched, monkeypatch):
    """A relaunch would run on the current device, which is not the weight's."""
    stubs, pair = launched(True)
    monkeypatch.setattr(kernel, "current_device", lambda: 1)
    for _ in range(2):
        decode(*pair)
    assert len(stubs.launched) == 3 and len(stubs.relaunched) == 2


@needs_interpreter
def test_out_of_memory_is_the_callers_and_the_next_launch_is_as_before(
    kernel, launched, monkeypatch
):
    """Only other errors say that Triton cannot run the kernel."""
    from unsloth.kernels import triton_launch
    from unsloth.kernels.nf4_dequantize_kernel import DequantizeUnavailable

    stubs, pair = launched(False)
    for error, raised in (
        (torch.cuda.OutOfMemoryError("no room"), torch.cuda.OutOfMemoryError),
        (RuntimeError("no such instruction"), DequantizeUnavailable),
    ):

        def fail(
            *args,
            error = error,
            **options,
        ):
            raise error

        monkeypatch.setattr(triton_launch, "launch", fail)
        kernel.launch_for.cache_clear()
        with pytest.raises(raised, match = str(error)):
            decode(*pair)
        monkeypatch.setattr(triton_launch, "launch", stubs.launch)
        kernel.launch_for.cache_clear()
        count = len(stubs.launched)
        decode(*pair)
        assert len(stubs.launched) == count + 1


def test_a_gpu_before_volta_is_refused(kernel, monkeypatch):
    """By its number, with what decodes there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    with pytest.raises(kernel.DequantizeUnavailable, match = "6.1 has no .*bitsandbytes.functional"):
        kernel.Launch("nf4", 64, 256, 4096, 0)


_COMPILES = """
from bare.kernels.nf4_dequantize_kernel import WARPS, dequantize_kernel as kernel

types = dict.fromkeys(kernel.arg_names, "constexpr")
types.update(W = "*u8", absmax = "*u8", n_elements = "i64")
types.update(dict.fromkeys(("code2", "absmax2", "offset"), "*fp32"))
options = dict(CHUNKS = 64, BLOCK_SHIFT = 1, BLOCK2_SHIFT = 8, NESTED = True, FP4 = False, ALIGN = 16)
for capability, out in ((75, "*fp16"), (90, "*bf16")):
    new = capability >= 80
    source = ASTSource(
        kernel, {**types, "out": out}, {**options, "ON_GRID": True, "PTX": True, "HAS_CVT2": new}
    )
    made = compile(source, target = GPUTarget("cuda", capability, 32), options = {"num_warps": WARPS})
    assert made.asm["cubin"] and "prmt.b32" in made.asm["ptx"]
    assert ("x2.f32" in made.asm["ptx"]) == new
"""


def test_compiles_for_gpus_that_are_not_there(kernel, tmp_path):
    """Triton's assembler takes the kernel's PTX for a T4, which lacks some instructions, and for an H100."""
    check_compiled(kernel, _COMPILES, tmp_path)


# ---- torch.compile, graphs, streams -----------------------------------------------------------


def test_operator_passes_opcheck(kernel):
    """Schema, fake tensors, autograd registration and AOT dispatch of the operator."""
    packed, state = quantized((16, 64))
    out = torch.zeros(state.shape, dtype = state.dtype, device = DEVICE)
    torch.library.opcheck(torch.ops.unsloth.dequantize_4bit_.default, arguments(packed, state, out))


@needs_gpu
def test_cuda_graph_and_streams(kernel):
    """Captured launches replay on new bytes; a side stream's launch stays on that stream."""
    packed, state = quantized((128, 256))
    out = poisoned((128, 256), torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        decode(packed, state, out)
    side.synchronize()
    assert same_bits(out, defined(packed, state))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(packed, state, out)
    packed.copy_(quantized((128, 256), seed = 9)[0])
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(out, defined(packed, state))
