# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""LoRA scales that enter a compiled block as tensors; models/compile_lora_scales.py makes them.

Apart from it, because unsloth.kernels must not need unsloth.models to be imported.
"""

from __future__ import annotations

import functools
from typing import Callable

import torch

__all__ = ["SCALE_INPUTS", "scales_from_graph_inputs"]

# On a projection: adapter -> its scale as a float32 tensor of no dimensions, a graph input.
SCALE_INPUTS = "_lora_scale_inputs"


def scales_from_graph_inputs(stock: Callable) -> Callable:
    """``get_lora_parameters``: (W, quant state, A, B, scale), in a trace with B * scale and 1.0."""

    @functools.wraps(stock)
    def get_lora_parameters(proj):
        found = stock(proj)
        inputs = proj.__dict__.get(SCALE_INPUTS)
        if inputs is None or found[2] is None or not torch.compiler.is_compiling():
            return found
        adapter = proj.active_adapters
        adapter = adapter if isinstance(adapter, str) else adapter[0]
        if adapter not in inputs:
            return found
        W, quant_state, A, B, _ = found
        return W, quant_state, A, B * inputs[adapter], 1.0

    return get_lora_parameters
