# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Losses whose gradients are computed once say so, where autograd would differentiate zeros."""

import torch

__all__ = ["refuse_second_derivative"]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradients are computed once. Compute the whole "
            "logits and PyTorch's own loss of them where create_graph=True is needed."
        )


def refuse_second_derivative(name: str, gradients: tuple, *inputs: torch.Tensor) -> tuple:
    """The gradients, such that differentiating them by any of ``inputs`` raises instead of giving zeros.

    inputs: all that the gradients depend on, the upstream gradient too; autograd runs only what leads
    to the tensors that it is asked for. Does nothing without ``create_graph``, where grad mode is off.
    """
    if not torch.is_grad_enabled():
        return gradients
    present = [g.detach() for g in gradients if g is not None]
    guarded = iter(_NoSecondDerivative.apply(name, len(present), *present, *inputs))
    return tuple(None if g is None else next(guarded) for g in gradients)
