# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Graphs, breaks and recompilations of a toy block, on any machine, as the compile report has."""

from __future__ import annotations

from typing import Callable, Dict

LENGTHS = (5, 7, 9, 12)


def _whole(x, scale):
    import torch
    return x + torch.nn.functional.silu(x @ x.transpose(1, 2)) @ x * scale


def _broken(x, scale):
    import torch
    torch._dynamo.graph_break()
    return _whole(x, scale)


def _scaled(step: int) -> float:
    return 1.0 + step


def graphs_of_a_toy() -> Dict[str, dict]:
    """Name -> what CompileEvents counted for a block that is whole, one that breaks, and one whose
    scale is a Python float that differs at every call (which Dynamo compiles into the graph).
    """
    cases = {
        "whole": (_whole, lambda step: 1.0),
        "with a graph break": (_broken, lambda step: 1.0),
        "with a scale of its own": (_whole, _scaled),
    }
    return {name: _graphs(*case) for name, case in cases.items()}


def _graphs(function: Callable, scale: Callable[[int], float]) -> dict:
    import torch

    from unsloth_patches.unsloth.models.compile_events import CompileEvents

    from .compile_worker import told

    torch._dynamo.reset()
    events = CompileEvents()
    events.start()
    # Floats stay constants, as they do inside an autograd.Function.
    with torch._dynamo.config.patch(specialize_float = True):
        compiled = torch.compile(function, backend = "aot_eager")
        for step, length in enumerate(LENGTHS):
            x = torch.ones(2, length, 8, requires_grad = True)
            torch._dynamo.maybe_mark_dynamic(x, 1)
            compiled(x, scale(step)).sum().backward()
    events.stop()
    return told(events)
