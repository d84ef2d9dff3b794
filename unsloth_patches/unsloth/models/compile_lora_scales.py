# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Keep one graph a block where only a LoRA scale differs.

Dynamo compiles a Python float into the graph and guards on its value. Layers whose LoRA scales
differ (PEFT's ``alpha_pattern``) therefore got a graph each, times two under gradient checkpointing
and times two again for batches of one row. Here such a scale enters the graph as a tensor: B *
scale takes B's place, and the scale that is left is 1. Models whose layers share their scales are
untouched.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch

from ..kernels.lora_scale_inputs import SCALE_INPUTS

__all__ = ["scales_as_inputs", "share_graph_between_lora_scales", "update_scale_inputs"]

# On a layer: its projections that have such inputs, with the scale that each input holds.
_HELD = "_lora_scales_held"


def scales_as_inputs(layers: Sequence[torch.nn.Module]) -> int:
    """Make graph inputs of the LoRA scales that differ between decoder layers at the same place.

    layers: decoder layers with PEFT's LoRA projections in them. A layer updates its inputs before
    each call, so a scale changed later (``set_scale``) counts from the next call on. Adapters added
    later keep constant scales, as do those that are the same in every layer. Returns how many
    scales became inputs.
    """
    values: Dict[Tuple[str, str], set] = {}
    for layer in layers:
        for name, projection, adapter in _scaled(layer):
            values.setdefault((name, adapter), set()).add(projection.scaling[adapter])
    varying = {place for place, found in values.items() if len(found) > 1}
    count = 0
    for layer in layers:
        chosen = [(p, adapter) for name, p, adapter in _scaled(layer) if (name, adapter) in varying]
        if chosen:
            count += len(chosen)
            _hold(layer, chosen)
    return count


def _scaled(layer: torch.nn.Module) -> Iterator[Tuple[str, Any, str]]:
    """(name in the layer, projection, adapter) of every LoRA scale below ``layer``."""
    for name, module in layer.named_modules():
        scaling = getattr(module, "scaling", None)
        lora_B = getattr(module, "lora_B", None)
        if isinstance(scaling, dict) and isinstance(lora_B, torch.nn.ModuleDict):
            for adapter in lora_B:
                if isinstance(scaling.get(adapter), (int, float)):
                    yield name, module, adapter


def _hold(layer: torch.nn.Module, chosen: Iterable[Tuple[Any, str]]) -> None:
    if _HELD not in layer.__dict__:
        layer.register_forward_pre_hook(update_scale_inputs)
    held: List[list] = []
    for projection, adapter in chosen:
        inputs = projection.__dict__.setdefault(SCALE_INPUTS, {})
        inputs.pop(adapter, None)
        held.append([projection, adapter, None])
    layer.__dict__[_HELD] = held
    update_scale_inputs(layer, ())


def update_scale_inputs(layer: torch.nn.Module, args: Any) -> None:
    """Forward pre-hook: give the graph inputs of ``layer`` the scales that PEFT holds now."""
    if torch.compiler.is_compiling():
        return  # an outer graph owns the layer; its caller's hooks ran before
    for entry in layer.__dict__[_HELD]:
        projection, adapter, value = entry
        scale = projection.scaling.get(adapter)
        inputs = projection.__dict__[SCALE_INPUTS]
        if scale is None:  # the adapter is gone
            inputs.pop(adapter, None)
            continue
        device = projection.lora_B[adapter].weight.device
        tensor = inputs.get(adapter)
        if tensor is None or tensor.device != device:
            with torch.inference_mode(False):  # training saves and fills it
                inputs[adapter] = torch.tensor(float(scale), dtype = torch.float32, device = device)
        elif scale != value:
            inputs[adapter].fill_(float(scale))
        entry[2] = scale


def share_graph_between_lora_scales(stock: Callable) -> Callable:
    """``_legacy_block_compile``, block compile of the models whose forward passes read their LoRA by
    ``get_lora_parameters``: with LoRA scales that differ as graph inputs."""

    @functools.wraps(stock)
    def _legacy_block_compile(model):
        wrapped = stock(model)
        try:
            from unsloth.models._block_compile import _MARK, _layers
            layers = [layer for layer, _ in _layers(model)]
            # Not `wrapped`: it names only the classes that this call wrapped, none for a second model.
            scales_as_inputs([x for x in layers if getattr(type(x).forward, _MARK, False)])
        except Exception as error:  # as where block compile fails: the model trains without
            warnings.warn(f"Unsloth: LoRA scales stay constants: {error}", stacklevel = 2)
        return wrapped

    return _legacy_block_compile
