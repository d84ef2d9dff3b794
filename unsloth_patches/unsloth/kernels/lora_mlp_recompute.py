# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The SwiGLU MLP with LoRA for a caller that needs its graph, not its output.

Gradient checkpointing runs a block a second time to rebuild what the backward pass reads. The MLP
comes last, and nothing in the backward pass reads the value of its down projection: a third of the
MLP's products is spent on a tensor that is dropped. ``models/checkpoint_recompute.py`` says when
that is so, by an attribute of the MLP; here the product is left out. Gradients keep every bit.

A compiled block has one graph for both runs (``models/checkpoint_shared_graph.py``). There the
attribute is a tensor, an input of the graph, and the product stands in an operator that reads it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, Callable, List, NamedTuple, Sequence

import torch

__all__ = [
    "DOWN_PROJ_NEEDED",
    "SKIP_DOWN_PROJ",
    "Projection",
    "as_projections",
    "define_inplace_operator",
    "down_proj_if_needed",
    "skip_down_proj_in_recompute",
    "with_recompute_variant",
]

# Attribute of an MLP module: True while a block runs whose output nobody reads.
SKIP_DOWN_PROJ = "_unsloth_skip_down_proj"
# The same for compiled code: a bool tensor of no dimensions on the CPU, False while nobody reads.
DOWN_PROJ_NEEDED = "_unsloth_down_proj_needed"

# Set by the decorators below. Globals, because Dynamo traces what reads them.
_fast_lora: Any = None  # unsloth.kernels.fast_lora
function: Any = None  # LoRA_MLP with _forward; lora_functions.py puts its own in front of it
_takes_dtype: bool = True  # fast_dequantize does: not before Unsloth 2026.10.8


class Projection(NamedTuple):
    """What ``get_lora_parameters`` returns: weight, quant state, A, B, scaling."""

    W: torch.Tensor
    W_quant: Any
    A: torch.Tensor
    B: torch.Tensor
    S: float


def as_projections(arguments: Sequence[Any]) -> List[Projection]:
    """Each five of a LoRA Function's arguments as a Projection."""
    return [Projection(*arguments[i : i + 5]) for i in range(0, len(arguments), 5)]


# ------------------------------------------------------- the output, or nothing, in a graph

_library: Any = None  # a Library takes its operators with it when it is collected


def define_inplace_operator(name: str, function: Callable) -> Any:
    """Register ``unsloth::name``, an operator that writes into its argument ``out``; returns it.

    By torch.library.Library: in a compiled block a call of a custom_op costs the host 20 us.
    """
    global _library
    if _library is None:
        _library = torch.library.Library("unsloth", "FRAGMENT")
    _library.define(name + torch.library.infer_schema(function, mutates_args = ("out",)))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"unsloth::{name}", lambda *_: None, lib = _library)
    return getattr(torch.ops.unsloth, name).default


def _down_(
    out: torch.Tensor, h: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, S: float
) -> None:
    """out = h W^T + S (h A^T) B^T, in the order of ``matmul_lora``."""
    torch.mm(h, W.t(), out = out)
    out.addmm_(h @ A.t(), B.t(), alpha = S)


down_: Callable = _down_  # lora_functions.py puts its own order in its place


def _swiglu_down_(
    out: torch.Tensor,
    e: torch.Tensor,
    g: torch.Tensor,
    needed: torch.Tensor,
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    S: float,
) -> None:
    """Operator unsloth::swiglu_down_: down(silu(e) * g) into out; nothing unless ``needed``."""
    if needed.item():
        down_(out, _fast_lora.swiglu_fg_kernel(e.unsqueeze(0), g.unsqueeze(0))[0], W, A, B, S)


_swiglu_down: Any = define_inplace_operator("swiglu_down_", _swiglu_down_)


def down_proj_if_needed(
    e: torch.Tensor, g: torch.Tensor, needed: torch.Tensor, down: Projection
) -> torch.Tensor:
    """(rows, H): the SwiGLU MLP's output from e = gate(X) and g = up(X), (rows, N) both.

    needed: as DOWN_PROJ_NEEDED; where it is False when the graph runs, nothing is computed and the
    result holds whatever its memory held. Of ``down`` W is (H, N), or 4-bit with its quant state; A
    is (r, N), B (H, r), S LoRA's scale.
    """
    dtype = e.dtype
    as_dtype = {"dtype": dtype} if _takes_dtype else {}
    W = _fast_lora.fast_dequantize(down.W, down.W_quant, use_global_buffer = True, **as_dtype)
    out = e.new_empty(e.shape[0], down.B.shape[0])
    _swiglu_down(out, e, g, needed, W, down.A.to(dtype), down.B.to(dtype), down.S)
    return out


# ------------------------------------------------------------------------------ the Function


def _forward(ctx: Any, X: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """LoRA_MLP.forward without dropout and biases: saves what LoRA_MLP.backward reads; returns zeros
    shaped as the output, of one element.

    With a tensor where LoRA_MLP takes its dropout: what down_proj_if_needed returns.
    """
    gate, up, down = as_projections(arguments[:15])
    _, activation_backward, inplace, needed = arguments[15:19]
    e = _fast_lora.matmul_lora(X, *gate)
    g = _fast_lora.matmul_lora(X, *up)
    bases = (x for p in (gate, up, down) for x in (p.W, p.W_quant, p.S))
    ctx.custom_saved_tensors = (*bases, activation_backward)
    # No dropout, so no masks; no bias.
    ctx.save_for_backward(gate.A, gate.B, up.A, up.B, down.A, down.B, X, e, g, None, None, None)
    ctx.inplace = inplace and (
        not _fast_lora._rms_layernorm._SAVE_OUTPUT or _fast_lora._may_overwrite_input(X)
    )
    ctx.dropout_p, ctx.biases, ctx.global_buffer = (0.0, 0.0, 0.0), (False, False, False), True
    shape = (*X.shape[:-1], down.B.shape[0])
    if needed is None:
        return X.new_zeros(()).expand(shape)
    e, g = e.view(-1, e.shape[-1]), g.view(-1, g.shape[-1])
    return down_proj_if_needed(e, g, needed, down).view(shape)


def with_recompute_variant(stock: type) -> type:
    """LoRA_MLP as it is; a subclass that shares its backward pass is derived from it.

    It is a target so that its fingerprint is checked: the subclass fills the context that
    ``LoRA_MLP.backward`` reads.
    """
    global _fast_lora, function, _takes_dtype
    _fast_lora = sys.modules[stock.__module__]
    _takes_dtype = "dtype" in inspect.signature(_fast_lora.fast_dequantize).parameters
    forward = staticmethod(_fast_lora.torch_amp_custom_fwd(_forward))
    function = type("LoRA_MLP_recompute", (stock,), {"forward": forward})
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


def skip_down_proj_in_recompute(stock: Callable) -> Callable:
    """The same function; it leaves out the down projection where the MLP's output is not read."""

    @functools.wraps(stock)
    def apply_lora_mlp_swiglu(
        self,
        X,
        inplace = True,
    ):
        # Grad mode first: without it nothing is recomputed, and no graph guards on the flag.
        if not torch.is_grad_enabled():
            return stock(self, X, inplace)
        needed = self.__dict__.get(DOWN_PROJ_NEEDED) if torch.compiler.is_compiling() else None
        if needed is None and not self.__dict__.get(SKIP_DOWN_PROJ, False):
            return stock(self, X, inplace)
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if not _is_plain(projections, X):
            return stock(self, X, inplace)
        arguments = [p for proj in projections for p in _fast_lora.get_lora_parameters(proj)]
        arguments += [_fast_lora.swiglu_fg_kernel, _fast_lora.swiglu_DWf_DW_dfg_kernel, inplace]
        arguments += [needed, None, None, None]  # LoRA_MLP's dropout and biases
        return _fast_lora._apply(function, X, *arguments)

    return apply_lora_mlp_swiglu
