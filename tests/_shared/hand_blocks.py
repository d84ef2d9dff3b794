# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Small blocks, and what autograd makes of them."""

import pytest
import torch
from backend import DEVICE


class Block(torch.nn.Module):
    """x + B A x + shift, of which one layer's shift takes no part."""

    def __init__(self, uses_shift):
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(4, 8))
        self.B = torch.nn.Parameter(torch.randn(8, 4))
        self.shift = torch.nn.Parameter(torch.randn(8))
        self.frozen = torch.nn.Parameter(torch.randn(8), requires_grad = False)
        self.uses_shift = uses_shift

    def forward(self, x, scale):
        y = torch.tanh(x * self.frozen) @ self.A.t() @ self.B.t() * scale + x
        return ((y + self.shift) if self.uses_shift else y,)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return torch.nn.ModuleList(Block(n != 1) for n in range(3)).to(DEVICE)


def by_autograd(blocks, x, grad):
    y = x
    for block in blocks:
        (y,) = block(y, 0.5)
    trained = [p for p in blocks.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y, [x, *trained], grad, allow_unused = True)
    return y.detach(), grads[0], list(grads[1:])
