# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Losses whose gradients are computed once say so, where autograd would differentiate zeros."""

import torch

__all__ = ["refuse_second_derivative"]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, _, *gradients):
        ctx.name = name
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.name} has no second derivative: its gradients are computed once. "
            "Use torch.nn.functional.cross_entropy of the logits where create_graph=True is needed."
        )


def refuse_second_derivative(name: str, gradients: tuple) -> tuple:
    """The gradients, such that differentiating them raises instead of giving zeros.

    Does nothing in a backward without ``create_graph``, where grad mode is off.
    """
    if not torch.is_grad_enabled():
        return gradients
    anchor = torch.zeros((), requires_grad = True)
    present = [g.detach() for g in gradients if g is not None]
    guarded = iter(_NoSecondDerivative.apply(name, anchor, *present))
    return tuple(None if g is None else next(guarded) for g in gradients)
