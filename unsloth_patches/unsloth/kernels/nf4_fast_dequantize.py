# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""``fast_dequantize`` on nf4_dequantize's kernel, with the stock function behind it."""

import functools
import warnings

import torch

from .nf4_dequantize import PLAN, Plan, check_out, dequantize_4bit, goes_to_pytorch, plan_for
from .nf4_dequantize_kernel import HIP, DequantizeUnavailable

__all__ = ["dequantize_in_one_launch"]

is_compiling = torch.compiler.is_compiling
_empty_like, _contiguous = torch.empty_like, torch.contiguous_format
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def dequantize_in_one_launch(stock):
    """``unsloth.kernels.utils.fast_dequantize`` on one kernel for NF4 and FP4.

    Serves bitsandbytes 4-bit weights (QuantState or its list form) on NVIDIA GPUs and the CPU.
    Everything else goes to ``stock``: dense weights, FP8, NVFP4, Int4 and packed states, xpu, npu
    and hip, and all of it where UNSLOTH_BNB_TRITON=0 switched Unsloth's own kernels off. A kernel
    that Triton cannot compile falls back to stock for good, with one warning.

    Raises NotImplementedError if stock's module lacks the scratch buffers that
    ``use_global_buffer`` shares with it.
    """
    utils = _Utils(stock.__globals__)

    @functools.wraps(stock)
    def fast_dequantize(
        W,
        quant_state = None,
        out = None,
        use_global_buffer = False,
        dtype = None,
    ):
        plan = None if is_compiling() else getattr(quant_state, PLAN, None)
        address = 0 if plan is None or utils.failed else plan.locate(W, quant_state)
        if not address:
            if utils.failed or not utils.serves(W, quant_state):
                keywords = {} if dtype is None else {"dtype": dtype}  # older releases have no dtype
                return stock(W, quant_state, out, use_global_buffer, **keywords)
            if is_compiling() or goes_to_pytorch(W):
                return dequantize_4bit(W, quant_state, out)
        try:
            if not address:
                plan, address = plan_for(W, quant_state), W.data_ptr()
            if out is not None:
                check_out(out, plan)
                result = out
            elif use_global_buffer:
                result = utils.scratch(plan)
            else:
                result = _empty_like(plan.prototype, memory_format = _contiguous)
            if plan.numel:
                plan.launch.run(W, address, plan.tensors, result)
        except DequantizeUnavailable as error:
            utils.failed = True
            warnings.warn(f"{error} Unsloth's own kernels take over.", stacklevel = 2)
            return fast_dequantize(W, quant_state, out, use_global_buffer, dtype)
        return result.t() if W.shape[0] == 1 else result

    return fast_dequantize


class _Utils:
    """What fast_dequantize needs of its module: whom to serve, and the scratch buffer."""

    def __init__(self, names: dict):
        needed = ("_SCRATCH", "_scratch", "_can_use_scratch", "_USE_NF4_KERNELS", "bnb_functional")
        missing = [name for name in needed if name not in names]
        if missing:
            raise NotImplementedError(f"unsloth.kernels.utils has no {', '.join(missing)}")
        self.names, self.buffers = names, names["_SCRATCH"]
        self.states = (list, getattr(names["bnb_functional"], "QuantState", list))
        self.failed = False  # until a launch fails

    def serves(self, W, quant_state) -> bool:
        return (
            isinstance(quant_state, self.states)
            and (W.is_cuda and not HIP or W.device.type == "cpu")
            and self.names["_USE_NF4_KERNELS"]
        )

    def scratch(self, plan: Plan) -> torch.Tensor:
        """Unsloth's shared buffer, viewed as the plan's weight; the plan keeps the view."""
        index = plan.device.index
        # Nothing is captured on the default stream, 0: _can_use_scratch would say yes.
        if index is None or _raw_stream(index) and not self.names["_can_use_scratch"](plan.device):
            return _empty_like(plan.prototype, memory_format = _contiguous)
        key, buffer, view = getattr(plan, "scratch", (None, None, None))
        if view is None or self.buffers.get(key) is not buffer:
            view = self.names["_scratch"]("weight", plan.device, plan.numel, plan.dtype)
            view, key = view.view(plan.shape), ("weight", index)
            plan.scratch = (key, self.buffers[key], view)
        return view
