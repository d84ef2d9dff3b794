# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One rank's shard of a bitsandbytes 4-bit weight, QuantState included, and its life under FSDP2.

A weight is cut on rows of 256 quantization blocks (256 x 64 = 16,384 weights): a row is one block
of the nested quantization too, so packed bytes, absmax and nested absmax of a row depend on no
other row. Only the nested offset, the mean of all absmax, needs the other ranks. Rows are padded to
a multiple of the world size, so every rank holds equally many.

FSDP2 sees a frozen uint8 parameter of ``(rows, 8192)`` whose local tensor is a ``PackedShard``. Its
all-gather extension (``fsdp_pre_all_gather``, ``fsdp_post_all_gather``; torch's own hook for
quantized parameters) gathers bytes and scales in the same collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist

from .fsdp2_gather import SHARD, HostBlock, lean_class

try:
    from bitsandbytes import functional as bnb_functional
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.utils import unpack_tensor_to_dict
except Exception:  # absent or broken: Unsloth has to import without it, and no model is 4-bit then
    bnb_functional = SimpleNamespace(QuantState = object)
    Linear4bit = Params4bit = type("Linear4bitIsMissing", (), {})
    unpack_tensor_to_dict = None

NESTED_BLOCKSIZE = 256  # of bitsandbytes' compress_statistics
# Launch plans of Unsloth's own kernels: they keep the scales' addresses and key on the tensors.
_ADDRESS_CACHES = ("_unsloth_nf4_plan", "_unsloth_gemv_plan")


@dataclass(frozen = True)
class RowLayout:
    """Which weights of a flattened weight of ``numel`` elements belong to ``rank`` of ``world``.
    blocks, nested_blocks, packed_bytes: of the whole weight.
    """

    numel: int
    world: int
    rank: int
    blocksize: int

    @property
    def row(self) -> int:
        return self.blocksize * NESTED_BLOCKSIZE

    @property
    def local_rows(self) -> int:
        return -(-(-(-self.numel // self.row)) // self.world)

    @property
    def rows(self) -> int:
        return self.local_rows * self.world

    @property
    def start(self) -> int:
        return min(self.rank * self.local_rows * self.row, self.numel)

    @property
    def stop(self) -> int:
        return min((self.rank + 1) * self.local_rows * self.row, self.numel)

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    @property
    def nested_blocks(self) -> int:
        return -(-self.blocks // NESTED_BLOCKSIZE)

    @property
    def packed_bytes(self) -> int:
        return -(-self.numel // 2)

    def placeholder(self) -> torch.nn.Parameter:
        """Full-size uint8 ``(rows, row / 2)`` on meta: ``fully_shard`` cuts it into equal rows."""
        shape = (self.rows, self.row // 2)
        return torch.nn.Parameter(
            torch.empty(shape, dtype = torch.uint8, device = "meta"), requires_grad = False
        )


@dataclass(frozen = True)
class WeightFormat:
    """How a whole weight is quantized. dtype: what it dequantizes to; nested: of its scales too."""

    shape: torch.Size
    dtype: torch.dtype
    quant_type: str = "nf4"
    nested: bool = True


class ShardedQuantState(bnb_functional.QuantState):
    """A QuantState whose scales FSDP2 gathers with the packed bytes.

    While the weight is gathered it is an ordinary QuantState. While it is sharded there are no
    scales to save, and ``as_dict`` is empty, so a ``state_dict()`` taken then holds the packed
    shard alone; the saves of Unsloth gather first.
    """

    gathered = False

    def set_gathered(self, absmax: torch.Tensor, nested: Optional[torch.Tensor]) -> None:
        self.absmax = absmax
        if self.state2 is not None:
            self.state2.absmax = nested
        self.gathered = True

    def forget_addresses(self) -> None:
        """Void what Unsloth's kernels cached by address: a gather allocates the scales anew."""
        for name in _ADDRESS_CACHES:
            if name in self.__dict__:
                self.__dict__[name] = None

    def as_dict(self, packed: bool = False) -> dict:
        if not self.gathered or self.absmax.untyped_storage().size() == 0:
            return {}
        return super().as_dict(packed = packed)


class PackedShard(torch.Tensor):
    """uint8 ``(local_rows, blocksize * 128)``: the packed bytes of this rank, zero in the padding.

    A class, not hooks on an instance: views and copies to another device keep the class only.
    """

    def fsdp_pre_all_gather(
        self,
        mesh: Any,
        outer_size: torch.Size,
        outer_stride: Tuple[int, ...],
        module: torch.nn.Module,
        mp_policy: Any,
    ) -> Tuple[Tuple[torch.Tensor, ...], "WeightShard"]:
        shard = get_shard(module)
        plain = self.as_subclass(torch.Tensor)
        scales = (scale.to(plain.device, non_blocking = True) for scale in shard.scales())
        return (plain, *scales), shard

    def fsdp_post_all_gather(
        self,
        gathered: Tuple[torch.Tensor, ...],
        shard: "WeightShard",
        param_dtype: torch.dtype,
        *,
        out: Optional[torch.Tensor] = None,
    ) -> Optional[Tuple[torch.Tensor, Tuple[torch.Tensor, ...]]]:
        shard.set_gathered(gathered[1:])
        # FSDP2 frees and reallocates the gathered buffers themselves; there are no others.
        return None if out is not None else (gathered[0], ())


@dataclass
class WeightShard:
    """This rank's part of one Linear4bit weight.

    packed: uint8 ``(local_rows, row / 2)``; absmax: ``(local_rows, 256)``, uint8 with nested
    quantization, else float32; nested: float32 ``(local_rows, 1)`` or None; state: what the
    gathered weight is dequantized with. Tensors are on the rank's device, or, once offloaded, views
    of the buffer of ``host``, which is copied to the device at once.
    """

    layout: RowLayout
    packed: torch.Tensor
    absmax: torch.Tensor
    nested: Optional[torch.Tensor]
    state: ShardedQuantState
    host: Optional[HostBlock] = None
    _gathered_storage: int = 0

    @property
    def on_host(self) -> bool:
        return self.host is not None

    def scales(self) -> Tuple[torch.Tensor, ...]:
        return (self.absmax,) if self.nested is None else (self.absmax, self.nested)

    def set_gathered(self, scales: Tuple[torch.Tensor, ...]) -> None:
        # FSDP2 frees and fills the same storages again and again. Views of them stay good, and with
        # them what a kernel keeps that reads addresses when it is launched.
        storage = scales[0].untyped_storage()._cdata
        if storage == self._gathered_storage and self.state.gathered:
            self.state.forget_addresses()
            return
        self._gathered_storage = storage
        absmax = scales[0].view(-1)[: self.layout.blocks]
        nested = None
        if self.nested is not None:
            nested = scales[1].view(-1)[: self.layout.nested_blocks]
        self.state.set_gathered(absmax, nested)

    def sizes(self) -> List[int]:
        """Bytes of the packed weights and of each of the scales."""
        return [t.numel() * t.element_size() for t in (self.packed, *self.scales())]

    def nbytes(self) -> int:
        return sum(self.sizes())

    def install(self, fsdp_param: Any) -> None:
        """Make this shard the local tensor of torch's FSDPParam for the placeholder."""
        pinned = self.on_host and self.packed.is_pinned()
        if fsdp_param.offload_to_cpu and not (self.on_host and pinned >= fsdp_param.pin_memory):
            HostBlock([self], fsdp_param.pin_memory)
        elif self.on_host:
            fsdp_param.offload_to_cpu, fsdp_param.pin_memory = True, pinned
        module = fsdp_param._module_info.module
        set_shard(module, self)
        # bitsandbytes would repack the gathered weight in place for CPU inference.
        module.support_avx512bf16_for_cpu = False
        local = self.packed.as_subclass(PackedShard)
        parameter = torch.nn.Parameter(fsdp_param.to_sharded_dtensor(local), requires_grad = False)
        parameter._local_tensor = local  # Parameter() detaches, and the class is lost in that
        fsdp_param._setattr_on_modules(parameter)
        fsdp_param.reset_sharded_param()
        fsdp_param._init_extensions()
        # The gathered weight gets the shape that bitsandbytes gives packed bytes, without the
        # padding.
        fsdp_param._orig_size = torch.Size((self.layout.packed_bytes, 1))
        fsdp_param._contiguous_orig_stride = (1, 1)
        self._keep_class_and_state(fsdp_param, module)
        fsdp_param.__class__ = lean_class(type(fsdp_param))

    def _keep_class_and_state(self, fsdp_param: Any, module: Linear4bit) -> None:
        # What Unsloth's FSDP2 hooks put back onto the gathered parameter, which is torch's plain one.
        meta = {
            "quant_state": self.state,
            "blocksize": self.layout.blocksize,
            "compress_statistics": self.nested is not None,
            "quant_type": self.state.quant_type,
            "quant_storage": torch.uint8,
            "bnb_quantized": True,
        }
        fsdp_param._unsloth_quant_meta = meta
        fsdp_param._unsloth_param_cls = Params4bit
        fsdp_param._unsloth_param_module = module
        for name, value in {**meta, SHARD: self}.items():
            setattr(fsdp_param.sharded_param, name, value)


def get_shard(module: torch.nn.Module) -> Optional[WeightShard]:
    """The shard that ``module`` (a Linear4bit) holds, or None."""
    return module.__dict__.get(SHARD)


def set_shard(module: Linear4bit, shard: WeightShard) -> None:
    """``shard`` as what ``module`` holds of its weight, with the QuantState that goes with it."""
    module.__dict__[SHARD] = shard
    module.quant_state = shard.state


def param_groups(model: torch.nn.Module) -> Iterator[Any]:
    """torch's FSDPParamGroup objects below ``model``."""
    from torch.distributed.fsdp import FSDPModule
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.13: at most one
            groups = [getattr(state, "_fsdp_param_group", None)]
        yield from (group for group in groups if group is not None)


def fsdp_params(model: torch.nn.Module) -> Iterator[Any]:
    """torch's FSDPParam objects below ``model``."""
    return (fsdp_param for group in param_groups(model) for fsdp_param in group.fsdp_params)


def shard_group(mesh: Any) -> Any:
    """The process group that weights are sharded over: the last dimension of a 1-D or HSDP mesh."""
    return mesh.get_group(mesh.ndim - 1)


def mesh_device(mesh: Any) -> torch.device:
    """This rank's device of ``mesh``."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, getattr(torch, mesh.device_type).current_device())


def all_gather_rows(local: torch.Tensor, group: Any) -> torch.Tensor:
    world = dist.get_world_size(group)
    out = local.new_empty((local.shape[0] * world, *local.shape[1:]))
    dist.all_gather_into_tensor(out, local.contiguous(), group = group)
    return out


def make_shard(
    layout: RowLayout,
    weight_format: WeightFormat,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    nested: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = None,
) -> WeightShard:
    """A shard with its QuantState, whose shape is the whole weight's and whose scales are the
    shard's until a gather. nested: absmax of the absmax, its code and the offset.
    """
    outer, state2, offset = None, None, None
    if nested is not None:
        outer, code2, offset = nested
        state2 = bnb_functional.QuantState(
            absmax = outer.view(-1), blocksize = NESTED_BLOCKSIZE, code = code2, dtype = torch.float32
        )
    state = ShardedQuantState(
        absmax = absmax.view(-1),
        shape = weight_format.shape,
        code = code,
        blocksize = layout.blocksize,
        quant_type = weight_format.quant_type,
        dtype = weight_format.dtype,
        offset = offset,
        state2 = state2,
    )
    return WeightShard(layout, packed, absmax, outer, state)


def quantize_rows(
    weights: Optional[torch.Tensor],
    layout: RowLayout,
    weight_format: WeightFormat,
    device: torch.device,
    group: Any,
) -> WeightShard:
    """Quantize this rank's weights, flat ``[stop - start]``; None where it has none. Collective over
    ``group`` with nested quantization; an error is raised behind that, where no rank waits.

    The result is bit-identical to the same slice of
    ``bitsandbytes.functional.quantize_4bit(whole, compress_statistics = nested)``.
    """
    rows, quant_type = layout.local_rows, weight_format.quant_type
    absmax = torch.zeros(rows, NESTED_BLOCKSIZE, device = device)
    packed, error = None, None
    try:
        packed = torch.zeros(rows, layout.row // 2, dtype = torch.uint8, device = device)
        if weights is not None and weights.numel():
            data, state = bnb_functional.quantize_4bit(
                weights.to(device = device, dtype = weight_format.dtype, non_blocking = True),
                blocksize = layout.blocksize,
                compress_statistics = False,
                quant_type = quant_type,
            )
            copy_front(packed, data)
            copy_front(absmax, state.absmax)
    except Exception as problem:
        error = problem
    if weight_format.nested:
        # The mean of the whole absmax: a mean of means adds up in another order, and has other bits.
        offset = all_gather_rows(absmax, group).view(-1)[: layout.blocks].mean()
    if error is not None:
        raise error
    code = bnb_functional.get_4bit_type(quant_type, device = device)
    if not weight_format.nested:
        return make_shard(layout, weight_format, packed, absmax, code)
    scales = torch.zeros(rows, NESTED_BLOCKSIZE, dtype = torch.uint8, device = device)
    outer = torch.zeros(rows, 1, device = device)
    count = -(-(layout.stop - layout.start) // layout.blocksize)
    if count:
        quantized, state2 = bnb_functional.quantize_blockwise(
            absmax.view(-1)[:count] - offset, blocksize = NESTED_BLOCKSIZE
        )
        copy_front(scales, quantized)
        copy_front(outer, state2.absmax)
        code2 = state2.code
    else:
        code2 = bnb_functional.create_dynamic_map().to(device)
    return make_shard(layout, weight_format, packed, scales, code, (outer, code2, offset))


def copy_front(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``source`` to the front of ``target``, both flattened; the rest of it is padding."""
    target.view(-1)[: source.numel()].copy_(source.view(-1))
