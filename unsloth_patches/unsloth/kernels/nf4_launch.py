# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Launching nf4_dequantize_kernel's kernels: settings, arguments, compiled kernels reused."""

import functools
from typing import Optional, Sequence

import torch
import triton

from .nf4_dequantize_kernel import (
    CHUNK,
    DEFAULT_SETTINGS,
    LAUNCH_SETTINGS,
    MANY,
    dequantize_kernel,
    dequantize_many_kernel,
)

# TRITON_INTERPRET=1 makes @triton.jit return another class, which runs on CPU tensors.
INTERPRETED = not isinstance(dequantize_kernel, triton.runtime.JITFunction)
HIP = torch.version.hip is not None
is_compiling = torch.compiler.is_compiling
current_device = getattr(torch._C, "_cuda_getDevice", None)
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class DequantizeUnavailable(RuntimeError):
    """The kernel cannot run: a device it was never tested on, or Triton failed to compile it."""


@functools.lru_cache(maxsize = None)
def settings(index: Optional[int]):
    """(chunks a program decodes, warps, has cvt.rn.*x2) on CUDA device ``index``."""
    if index is None:
        return (*DEFAULT_SETTINGS, False)
    capability = torch.cuda.get_device_capability(index)
    if capability < (7, 0):
        raise DequantizeUnavailable(
            f"dequantize_4bit: compute capability {capability[0]}.{capability[1]} has no cache "
            "eviction policies; 7.0 or newer is needed. Use "
            "bitsandbytes.functional.dequantize_4bit."
        )
    return (*LAUNCH_SETTINGS.get(capability, DEFAULT_SETTINGS), capability >= (8, 0))


def alignment(bits: int) -> int:
    """16, 4 or 1, the cases of the kernels: what addresses, or-ed into bits, are multiples of."""
    return 16 if bits & 15 == 0 else 4 if bits & 3 == 0 else 1


def constants_of(state_format, align: int, numels: Sequence[int], index: Optional[int]) -> dict:
    """The kernels' constexpr arguments, in their order."""
    quant_type, blocksize, blocksize2 = state_format
    chunks, _, has_cvt2 = settings(index)
    return {
        "CHUNKS": chunks,
        "BLOCK_SHIFT": (blocksize // CHUNK).bit_length() - 1,
        "BLOCK2_SHIFT": max(blocksize2.bit_length() - 1, 0),
        "NESTED": blocksize2 > 0,
        "FP4": quant_type == "fp4",
        "ALIGN": align,
        "ON_GRID": align >= 4 and all(n % (chunks * CHUNK) == 0 for n in numels),
        "PTX": not (INTERPRETED or HIP),
        "HAS_CVT2": has_cvt2,
    }


def arguments_of(weights, out, numels: Sequence[int], chunks: int):
    """(kernel, grid, runtime arguments) for one to MANY weights that lie one after another in out.

    weights: for each (W, absmax, code2, absmax2, offset). They and out: tensors, or addresses.
    """
    tiles = [-(-n // (chunks * CHUNK)) for n in numels]
    if len(numels) == 1:
        return dequantize_kernel, tiles[0], (*weights[0], out, numels[0])
    arguments, first, start = [out], 0, 0
    for weight, numel, count in zip(weights, numels, tiles):
        arguments += [*weight, numel, first, start]
        first, start = first + count, start + numel
    for _ in range(MANY - len(numels)):
        arguments += [*weights[-1], numels[-1], first, 0]
    return dequantize_many_kernel, first, tuple(arguments)


_COMPILED = {}
_knobs = getattr(getattr(triton, "knobs", None), "runtime", None)


def profiled() -> bool:
    """Whether a profiler listens to Triton's launches, which then have to go Triton's own way."""
    enter, leave = _knobs.launch_enter_hook, _knobs.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


def _compile(kernel, grid: int, arguments, constants: dict, warps: int):
    """Launches through Triton, which compiles if need be. Returns what relaunch takes, or None."""
    try:
        compiled = kernel[(grid,)](*arguments, **constants, num_warps = warps)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise DequantizeUnavailable(
            f"dequantize_4bit: Triton {triton.__version__} could not run the kernel "
            f"({type(error).__name__}: {error}). Use bitsandbytes.functional.dequantize_4bit."
        ) from error
    parts = [getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")]
    if None in parts or _knobs is None:
        return None  # the interpreter, or a Triton with another launcher
    return (*parts, tuple(constants.values()))


def relaunch(compiled, grid: int, index: int, addresses) -> None:
    """One launch on the current stream of device ``index``, which is the current device.

    Skips what Triton does in Python for each call (binding, specializing, hashing): the kernels are
    specialized on none of their arguments. Plain addresses also spare the launcher a driver query
    for each pointer.
    """
    start, function, metadata, constants = compiled
    stream = raw_stream(index)
    start(grid, 1, 1, stream, function, metadata, None, None, None, *addresses, *constants)


def start_bits(numels: Sequence[int], size: int) -> int:
    """The or-ed byte offsets at which weights start that lie one after another."""
    bits, start = 0, 0
    for numel in numels:
        bits |= start
        start += numel * size
    return bits


def launch(weights, out, numels, state_format, align: int, index: Optional[int]):
    """One launch for one to MANY weights (see arguments_of). Returns what relaunch takes."""
    if index is not None and current_device() != index:
        with torch.cuda.device(index):
            return launch(weights, out, numels, state_format, align, index)
    chunks, warps, _ = settings(index)
    constants = constants_of(state_format, align, numels, index)
    is_long = tuple(n >= 2**31 for n in (*numels, sum(numels)))
    key = (index, out.dtype, is_long, *constants.values())
    compiled = _COMPILED.get(key)
    if compiled is None or profiled():
        # Packed bytes are bytes to the kernel, so one compiled kernel serves every storage dtype.
        weights = [(W.view(torch.uint8), *scales) for W, *scales in weights]
        kernel, grid, arguments = arguments_of(weights, out, numels, chunks)
        compiled = _COMPILED[key] = _compile(kernel, grid, arguments, constants, warps)
    else:
        weights = [[tensor.data_ptr() for tensor in weight] for weight in weights]
        _, grid, addresses = arguments_of(weights, out.data_ptr(), numels, chunks)
        relaunch(compiled, grid, index, addresses)
    return compiled


def groups_of(formats: Sequence[tuple], numels: Sequence[int]):
    """Slices of at most MANY neighbours of one format that have any elements."""
    start = 0
    for stop in range(1, len(formats) + 1):
        if stop < len(formats) and stop - start < MANY and formats[stop] == formats[start]:
            continue
        if sum(numels[start:stop]):
            yield slice(start, stop)
        start = stop
