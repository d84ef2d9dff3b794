# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What captured blocks depend on: each change of it is told."""

import copy
from types import SimpleNamespace

import torch
from backend import require

require("interpreter")
import unsloth  # noqa: F401, E402
from replayed_models import backbone, kernels, llama, made, recorders  # noqa: E402, F401


def test_a_4_bit_weights_state_is_looked_at(llama):
    """Whatever of it is another now; a merge that empties the list of merges again is none."""
    from unsloth.models.step_graphs_state import BlockState

    layers = backbone(llama).layers
    projection = layers[1].mlp.gate_proj
    weight, zeros = projection.base_layer.weight, torch.zeros
    nested = SimpleNamespace(absmax = zeros(2), code = zeros(3), state2 = None)
    weight.quant_state = SimpleNamespace(
        absmax = zeros(4), code = zeros(5), offset = zeros(()), state2 = nested
    )
    changes = [(weight, "quant_state", copy.copy(weight.quant_state))]
    changes += [(weight.quant_state, name, zeros(4) + 1) for name in ("absmax", "code", "offset")]
    changes += [(nested, name, zeros(2) + 1) for name in ("absmax", "code")]
    changes += [(weight.quant_state, "state2", copy.copy(nested))]
    state = BlockState(layers)
    for owner, name, new in changes:
        before = getattr(owner, name)
        setattr(owner, name, new)
        assert state.changed(wholly = False) and state.readable() and not state.moved()
        setattr(owner, name, before)
        assert not state.changed(wholly = False) and not state.changed()
    projection.merged_adapters.append("default")
    assert state.changed(wholly = False)
    projection.merged_adapters.clear()
    assert not state.changed(wholly = False)


def test_a_weight_without_memory_has_moved():
    """Swapped for one of another layout, whose address cannot be asked."""
    from unsloth.models.step_graphs_state import BlockState

    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    state = BlockState(layers)
    assert not state.moved()
    other = torch.nn.Parameter(torch.eye(2).to_sparse())
    torch.utils.swap_tensors(layers[0].weight, other)
    assert state.moved() and state.changed() == "weights moved"
