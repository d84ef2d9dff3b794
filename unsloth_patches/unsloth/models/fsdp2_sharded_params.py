# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""One rank's shard of a bitsandbytes 4-bit weight, QuantState included, and its life under FSDP2.

A weight is cut on rows of 256 quantization blocks (256 x 64 = 16,384 weights): a row is one block
of the nested quantization too, so packed bytes, absmax and nested absmax of a row depend on no
other row. Only the nested offset, the mean of all absmax, needs the other ranks. Rows are padded to
a multiple of the world size, so every rank holds equally many.

FSDP2 sees a frozen uint8 parameter of ``(rows, 8192)`` whose local tensor is a ``PackedShard``. Its
all-gather extension (``fsdp_pre_all_gather``, ``fsdp_post_all_gather``; torch's own hook for
quantized parameters) gathers bytes and scales in the same collective; ``_LeanGather`` spares the host
what going through it costs at every gather.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist

try:
    from bitsandbytes import functional as bnb_functional
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.utils import unpack_tensor_to_dict
except Exception:  # absent or broken: Unsloth has to import without it, and no model is 4-bit then
    bnb_functional = SimpleNamespace(QuantState = object)
    Linear4bit = Params4bit = type("Linear4bitIsMissing", (), {})
    unpack_tensor_to_dict = None

NESTED_BLOCKSIZE = 256  # of bitsandbytes' compress_statistics
SHARD = "_fsdp2_weight_shard"  # where a Linear4bit keeps its rank's shard
_ALIGNMENT = 256  # bytes; of tensors that are gathered into one storage
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
    host: Optional["HostBlock"] = None
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

    def to_host(self, pin: bool) -> None:
        """Move the bytes and scales to host memory, pinned for copies that run beside computation."""
        HostBlock([self], pin)

    def install(self, fsdp_param: Any) -> None:
        """Make this shard the local tensor of torch's FSDPParam for the placeholder."""
        pinned = self.on_host and self.packed.is_pinned()
        if fsdp_param.offload_to_cpu and not (self.on_host and pinned >= fsdp_param.pin_memory):
            self.to_host(fsdp_param.pin_memory)
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


class HostBlock:
    """Shards that are gathered together, in one buffer of host memory that reaches the device in
    one copy. Making it moves them there.
    """

    def __init__(self, shards: Sequence[WeightShard], pin: bool):
        self._ids = [id(shard) for shard in shards]
        # Each part's size is a multiple of the next one's item size; shards begin aligned.
        self._sizes = [-(-shard.nbytes() // 256) * 256 for shard in shards]
        self._copied: Dict[int, torch.Tensor] = {}
        self._buffer = torch.empty(sum(self._sizes), dtype = torch.uint8, pin_memory = pin)
        for shard, space in zip(shards, self._buffer.split(self._sizes)):
            parts = (shard.packed, *shard.scales())
            pieces = space[: shard.nbytes()].split(shard.sizes())
            moved = [piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts)]
            for target, part in zip(moved, parts):
                target.copy_(part)
            shard.host, shard.packed, shard.absmax = self, *moved[:2]
            shard.nested = None if shard.nested is None else moved[2]
            if not shard.state.gathered:  # it names the device's copies, and would keep them there
                shard.state.absmax = shard.absmax.view(-1)
                if shard.nested is not None:
                    shard.state.state2.absmax = shard.nested.view(-1)

    def begin(self, device: torch.device) -> None:
        """Start the copy to ``device`` on the current stream, which has to be that of the gather."""
        parts = self._buffer.to(device, non_blocking = True).split(self._sizes)
        self._copied = dict(zip(self._ids, parts))

    def take(self, shard: WeightShard, device: torch.device) -> Tuple[torch.Tensor, ...]:
        """The shard's parts as bytes on ``device``; each copy is handed out once."""
        if id(shard) not in self._copied:
            self.begin(device)
        return self._copied.pop(id(shard))[: shard.nbytes()].split(shard.sizes())


class _LeanGather:
    """What torch's FSDPParam does at a gather of a ``PackedShard``, after the first with less work
    for the host: inputs are made once, and one storage for all gathered tensors is freed and
    allocated.
    """

    _inputs: Tuple[Any, Any] = (None, None)
    _gathered: Any = None

    @property
    def all_gather_inputs(self):
        local = self.sharded_param._local_tensor
        if not hasattr(self, "_unsharded_param"):
            return super().all_gather_inputs
        shard = _shard_of(self)
        if self.offload_to_cpu:
            # One copy for the block, on the stream of the gather that asks or of the one before.
            return shard.host.take(shard, self.device)
        if self._inputs[0] is not local:
            parts = (local.as_subclass(torch.Tensor), *shard.scales())
            self._inputs = (local, [part.view(-1) for part in parts])
        return self._inputs[1]

    def init_all_gather_outputs(self, numels, dtypes, world_size, device, *args, **kwargs):
        if self.all_gather_outputs:  # type: ignore[has-type]
            return
        sizes = [numel * world_size * dtype.itemsize for numel, dtype in zip(numels, dtypes)]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        whole = torch.empty(sum(padded), dtype = torch.uint8, device = device)
        parts = zip(torch.split(whole, padded), sizes, dtypes)
        self.all_gather_outputs = [part[:size].view(dtype) for part, size, dtype in parts]
        self._gathered = whole.untyped_storage()
        self._gathered_size = sum(padded)

    def alloc_all_gather_outputs(self):
        if self._gathered.size() == 0:
            self._gathered.resize_(self._gathered_size)

    def free_unsharded_param(self):
        if self._gathered is not None and self._gathered.size() != 0:
            self._gathered.resize_(0)

    def init_unsharded_param(self):
        if hasattr(self, "_unsharded_param"):
            _shard_of(self).set_gathered(self.all_gather_outputs[1:])
        else:
            super().init_unsharded_param()


def _shard_of(fsdp_param: Any) -> Any:
    return fsdp_param._module_info.module.__dict__[SHARD]


@functools.lru_cache(maxsize = None)
def lean_class(stock: type) -> type:
    """``stock`` (torch's FSDPParam) with ``_LeanGather``, or alone where it is not as known here."""
    names = [name for name in vars(_LeanGather) if not name.startswith("_")]
    if issubclass(stock, _LeanGather) or not all(hasattr(stock, name) for name in names):
        return stock
    return type(stock.__name__, (_LeanGather, stock), {})


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
