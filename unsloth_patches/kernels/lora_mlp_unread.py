# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The SwiGLU MLP with LoRA for a caller that needs its graph, not its output.

Gradient checkpointing runs a block a second time to rebuild what the backward pass reads. The MLP
comes last, and nothing in the backward pass reads the value of its down projection: a third of the
MLP's products is spent on a tensor that is dropped. ``models/checkpoint_recompute.py`` says when
that is so, by an attribute of the MLP; here the product is left out. Gradients keep every bit.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable

import torch

__all__ = ["OUTPUT_UNREAD", "replace_LoRA_MLP", "replace_apply_lora_mlp_swiglu"]

# Attribute of an MLP module: True while a block runs whose output nobody reads.
OUTPUT_UNREAD = "_unsloth_output_unread"

# Set when the patch is applied. Globals, because Dynamo traces what reads them.
_fast_lora: Any = None  # unsloth.kernels.fast_lora
function: Any = None  # LoRA_MLP with _forward; lora_functions.py puts its own in front of it


def _forward(
    ctx: Any,
    X: torch.Tensor,
    gateW: Any,
    gateW_quant: Any,
    gateA: torch.Tensor,
    gateB: torch.Tensor,
    gateS: float,
    upW: Any,
    upW_quant: Any,
    upA: torch.Tensor,
    upB: torch.Tensor,
    upS: float,
    downW: Any,
    downW_quant: Any,
    downA: torch.Tensor,
    downB: torch.Tensor,
    downS: float,
    activation: Callable,
    activation_backward: Callable,
    inplace: bool = True,
    *no_dropout_no_biases: None,
) -> torch.Tensor:
    """Saves what LoRA_MLP.backward reads; returns zeros shaped as the output, of one element."""
    e = _fast_lora.matmul_lora(X, gateW, gateW_quant, gateA, gateB, gateS)
    g = _fast_lora.matmul_lora(X, upW, upW_quant, upA, upB, upS)
    ctx.custom_saved_tensors = (
        gateW,
        gateW_quant,
        gateS,
        upW,
        upW_quant,
        upS,
        downW,
        downW_quant,
        downS,
        activation_backward,
    )
    # No dropout, so no masks; no bias.
    ctx.save_for_backward(gateA, gateB, upA, upB, downA, downB, X, e, g, None, None, None)
    ctx.inplace = inplace and (
        not _fast_lora._rms_layernorm._SAVE_OUTPUT or _fast_lora._may_overwrite_input(X)
    )
    ctx.dropout_p, ctx.biases, ctx.global_buffer = (0.0, 0.0, 0.0), (False, False, False), True
    return X.new_zeros(()).expand(*X.shape[:-1], downB.shape[0])


def replace_LoRA_MLP(stock: type) -> type:
    """LoRA_MLP as it is; a subclass that shares its backward pass is derived from it.

    It is a target so that its fingerprint is checked: the subclass fills the context that
    ``LoRA_MLP.backward`` reads.
    """
    global _fast_lora, function
    _fast_lora = sys.modules[stock.__module__]
    forward = staticmethod(_fast_lora.torch_amp_custom_fwd(_forward))
    function = type("LoRA_MLP_unread", (stock,), {"forward": forward})
    return stock


def _is_plain(projections: tuple, X: torch.Tensor) -> bool:
    """One trained adapter on each projection, no dropout, no bias: what ``_forward`` handles."""
    for projection in projections:
        if (
            _fast_lora._has_multiple_active_adapters(projection)
            or _fast_lora._has_active_dora_adapter(projection)
            or _fast_lora._has_activation_fake_quantizer(projection)
            or _fast_lora._active_lora_adapter(projection) is None
        ):
            return False
    return _fast_lora._lora_dropout_and_bias(projections, X) == (None, (None, None, None))


def replace_apply_lora_mlp_swiglu(stock: Callable) -> Callable:
    """The same function; it leaves out the down projection where the MLP's output is not read."""

    @functools.wraps(stock)
    def apply_lora_mlp_swiglu(
        self,
        X,
        inplace = True,
    ):
        # Grad mode first: without it nothing is recomputed, and no graph guards on the flag.
        if not torch.is_grad_enabled() or not self.__dict__.get(OUTPUT_UNREAD, False):
            return stock(self, X, inplace)
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if not _is_plain(projections, X):
            return stock(self, X, inplace)
        arguments = [p for proj in projections for p in _fast_lora.get_lora_parameters(proj)]
        arguments += [_fast_lora.swiglu_fg_kernel, _fast_lora.swiglu_DWf_DW_dfg_kernel, inplace]
        arguments += [None] * 4  # dropout and biases: LoRA_MLP.backward has a gradient for each
        return _fast_lora._apply(function, X, *arguments)

    return apply_lora_mlp_swiglu
