# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""bitsandbytes 4-bit weights for tests, and what they decode to."""

import torch
from backend import DEVICE

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
