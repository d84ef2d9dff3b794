# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Fused LoRA for Q, K, V, for O and for the MLP on the products of ``lora_products.py``.

They stand where Unsloth's LoRA_QKV, LoRA_W and LoRA_MLP stood, and hand over to those whatever has
dropout, a LoRA bias, or a base weight that is neither dense in X's dtype nor bitsandbytes' 4-bit.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, List, Sequence, Tuple, Union

import torch

from . import lora_mlp_recompute, lora_products
from .lora_mlp_recompute import Projection, as_projections
from .lora_products import (
    gradient_A,
    gradient_B,
    gradients,
    narrow,
    project,
    project_back,
    split_ranks,
    stacked_A,
)

__all__ = ["add_lora_before_product", "share_products_of_MLP", "share_products_of_QKV"]

_QuantState: Any = None  # bitsandbytes' class, set by the decorators below


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, t.shape[-1])


def _save(ctx: Any, projections: Sequence[Projection], *tensors: torch.Tensor) -> None:
    ctx.bases = [(p.W, p.W_quant, p.S) for p in projections]
    ctx.save_for_backward(*tensors, *(t for p in projections for t in (p.A, p.B)))


def _saved(ctx: Any) -> Tuple[List[torch.Tensor], List[Projection]]:
    tensors = ctx.saved_tensors  # once: non-reentrant checkpointing unpacks at every reading
    count = len(tensors) - 2 * len(ctx.bases)
    AB = tensors[count:]
    projections = [
        Projection(W, W_quant, AB[2 * i], AB[2 * i + 1], S)
        for i, (W, W_quant, S) in enumerate(ctx.bases)
    ]
    return list(tensors[:count]), projections


def _buffer_for_dX(X: torch.Tensor, inplace: bool) -> torch.Tensor:
    # Eager code reuses X, as stock does; AOT autograd rejects a backward that mutates an input, and a
    # second derivative reads X.
    kept = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return X if inplace and not kept else torch.empty_like(X)


def _per_argument(found: Sequence[torch.Tensor]) -> List[Any]:
    """[dA, dB, ...] as gradients of (W, W_quant, A, B, S) of each projection."""
    return [g for i in range(0, len(found), 2) for g in (None, None, found[i], found[i + 1], None)]


def _parallel_forward(ctx: Any, X: torch.Tensor, inplace: bool, *arguments: Any) -> Any:
    """X (batch, length, K) -> Y (batch, length, N) of each projection of X."""
    projections = as_projections(arguments)
    x = _rows(X)
    XA = narrow(x, stacked_A(projections, X.dtype).t())
    _save(ctx, projections, X, XA)
    ctx.inplace = inplace
    return tuple(
        project(x, xa, p).view(X.shape[0], X.shape[1], -1)
        for xa, p in zip(split_ranks(XA, projections, 1), projections)
    )


def _parallel_backward(ctx: Any, *dYs: torch.Tensor) -> Tuple[Any, ...]:
    (X, XA), projections = _saved(ctx)
    x = _rows(X)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        XA = narrow(
            x, stacked_A(projections, X.dtype).t()
        )  # create_graph: the kept one is a constant
    dX = _buffer_for_dX(x, ctx.inplace)
    found = gradients([_rows(dY) for dY in dYs], x, XA, projections, dX)
    return (dX.view(X.shape), None, *_per_argument(found))


def _mlp_forward(
    ctx: Any,
    X: torch.Tensor,
    inplace: bool,
    needed: Union[bool, torch.Tensor],
    activation: Callable,
    activation_backward: Callable,
    *arguments: Any,
) -> torch.Tensor:
    """X (batch, length, K) -> down(activation(gate(X), up(X))); zeros if not ``needed``.

    needed as a tensor, in a graph of SwiGLU: see ``lora_mlp_recompute.down_proj_if_needed``.
    """
    gate, up, down = projections = as_projections(arguments)
    x = _rows(X)
    XA = narrow(x, stacked_A((gate, up), X.dtype).t())
    gate_XA, up_XA = split_ranks(XA, (gate, up), 1)
    e, g = project(x, gate_XA, gate), project(x, up_XA, up)
    _save(ctx, projections, X, XA, e, g)
    ctx.inplace, ctx.activation_backward = inplace, activation_backward
    batch, length = X.shape[:2]
    if needed is False:
        return X.new_zeros(()).expand(batch, length, down.B.shape[0])
    if needed is not True:
        return lora_mlp_recompute.down_proj_if_needed(e, g, needed, down).view(batch, length, -1)
    h = _rows(activation(e.view(batch, length, -1), g.view(batch, length, -1)))
    return project(h, narrow(h, down.A.to(X.dtype).t()), down).view(batch, length, -1)


def _down_(
    out: torch.Tensor, h: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, S: float
) -> None:
    lora_products._products_(out, h @ A.t(), B.t(), S, 0.0, h, W.t())


def _mlp_backward(ctx: Any, dY: torch.Tensor) -> Tuple[Any, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "Unsloth: LoRA_MLP has no second derivative, as its activation's backward is a kernel. "
            "Leave out create_graph=True, or gate_proj, up_proj and down_proj of target_modules."
        )
    (X, XA, e, g), (gate, up, down) = _saved(ctx)
    dY, x, dtype = _rows(dY), _rows(X), X.dtype
    dYB = narrow(dY, down.B.to(dtype))
    # The activation's backward gives h again, so nothing of width N was kept for it.
    h, df, de = ctx.activation_backward(project_back(dY, dYB, down), e, g)
    hA = narrow(h, down.A.to(dtype).t())
    d_down = gradient_A(dYB, h, down.S), gradient_B(dY, hA, down.S)
    dX = _buffer_for_dX(x, ctx.inplace)
    found = gradients([de, df], x, XA, (gate, up), dX)
    return (dX.view(X.shape), None, None, None, None, *_per_argument([*found, *d_down]))


def _handles(X: torch.Tensor, projections: Sequence[Projection], extras: Sequence[Any]) -> bool:
    """Plain LoRA (no dropout or bias in ``extras``) on dense or 4-bit weights of X's dtype."""
    if X.dim() != 3 or any(extra is not None for extra in extras):
        return False
    for p in projections:
        if p.A is None or p.B is None:
            return False
        if p.W_quant is None:
            if type(p.W) not in (torch.Tensor, torch.nn.Parameter) or p.W.dtype != X.dtype:
                return False
        elif not _is_bitsandbytes(p.W_quant) or p.W_quant.dtype != X.dtype:
            return False
    return True


def _is_bitsandbytes(state: Any) -> bool:
    # FSDP2's sharded state is a class of its own below it, and an ordinary state while gathered.
    return _QuantState is not None and isinstance(state, _QuantState)


# autograd.Functions; made by the decorators below, with the amp decorators of the stock module.
_LoRAParallel: Any = None
_LoRAMLP: Any = None


def _attach(stock: type) -> None:
    """Make the Functions. Without bitsandbytes, quantized weights of every kind stay with stock."""
    global _LoRAParallel, _LoRAMLP, _QuantState
    module = sys.modules[stock.__module__]
    if lora_products.fast_lora is module:
        return
    try:
        from bitsandbytes.functional import QuantState
    except ImportError:
        QuantState = None

    def function(name: str, forward: Callable, backward: Callable) -> type:
        methods = {
            "forward": staticmethod(module.torch_amp_custom_fwd(forward)),
            "backward": staticmethod(module.torch_amp_custom_bwd(backward)),
        }
        return type(name, (torch.autograd.Function,), methods)

    _QuantState = QuantState
    _LoRAParallel = function("LoRAParallel", _parallel_forward, _parallel_backward)
    _LoRAMLP = function("LoRAMLP", _mlp_forward, _mlp_backward)
    lora_products.fast_lora = module


def _inplace(X: torch.Tensor, rest: Sequence[Any]) -> bool:
    """From the arguments behind the projections: (inplace, dropout_p, biases ...), all optional."""
    stock = lora_products.fast_lora
    if rest and not rest[0]:
        return False
    return not stock._rms_layernorm._SAVE_OUTPUT or stock._may_overwrite_input(X)


def share_products_of_QKV(stock: type) -> type:
    """LoRA_QKV.apply(X, 3 x (W, W_quant, A, B, S), inplace, dropout_p, 3 biases) -> Q, K, V"""
    _attach(stock)

    class LoRA_QKV:
        @staticmethod
        def apply(X, *arguments):
            parameters, rest = arguments[:15], arguments[15:]
            if not _handles(X, as_projections(parameters), rest[1:]):
                return stock.apply(X, *arguments)
            return _LoRAParallel.apply(X, _inplace(X, rest), *parameters)

    return LoRA_QKV


def add_lora_before_product(stock: type) -> type:
    """LoRA_W.apply(X, W, W_quant, A, B, S, dropout_p, bias) -> X W^T + S (X A^T) B^T"""
    _attach(stock)

    class LoRA_W:
        @staticmethod
        def apply(X, *arguments):
            parameters, rest = arguments[:5], arguments[5:]
            if not _handles(X, as_projections(parameters), rest):
                return stock.apply(X, *arguments)
            # dX is not written into this X, the attention's output: stock does not either.
            return _LoRAParallel.apply(X, False, *parameters)[0]

    return LoRA_W


def share_products_of_MLP(stock: type) -> type:
    """LoRA_MLP.apply(X, 3 x (W, W_quant, A, B, S), activation and its backward, inplace, dropout_p,
    3 biases). The function of lora_mlp_recompute.py, which leaves out the output, is replaced too."""
    _attach(stock)

    def variant(otherwise: type, recompute: bool = False) -> type:
        class LoRA_MLP:
            @staticmethod
            def apply(X, *arguments):
                parameters, functions, rest = arguments[:15], arguments[15:17], arguments[17:]
                # Where stock has the dropout, the other function has its tensor, or None.
                needed, extras = (rest[1], rest[2:]) if recompute else (None, rest[1:])
                if not _handles(X, as_projections(parameters), extras):
                    return otherwise.apply(X, *arguments)
                if needed is None:
                    needed = not recompute
                return _LoRAMLP.apply(X, _inplace(X, rest), needed, *functions, *parameters)

        return LoRA_MLP

    lora_mlp_recompute.function = variant(lora_mlp_recompute.function, recompute = True)
    lora_mlp_recompute.down_ = _down_
    return variant(stock)
