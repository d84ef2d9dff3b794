# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""LoRA scales that differ between layers cost no graph; each counts from the next call on."""

import pytest
import torch
from backend import DEVICE, require

require("interpreter")

import unsloth  # noqa: F401, E402
from fast_models import (  # noqa: E402, F401
    LAYERS,
    RANK,
    SCALES,
    assert_bit_equal,
    build,
    eager,
    get_layers,
    graphs,
    many_steps,
    step,
    unsloth_modules,
)
from small_models import PROJECTIONS  # noqa: E402


def test_equal_scales_stay_constants(build):
    """A model without alpha_pattern gets neither hooks nor tensors: its graph is upstream's."""
    from unsloth.models import compile_lora_scales

    model = build()
    assert compile_lora_scales.scales_as_inputs(list(get_layers(model))) == 0

    def updating(model):
        update = compile_lora_scales.update_scale_inputs
        return [list(x._forward_pre_hooks.values()).count(update) for x in get_layers(model)]

    assert updating(model) == [0] * LAYERS
    differing = build(alpha_pattern = SCALES)
    assert updating(differing) == [1] * LAYERS
    count = LAYERS * len(PROJECTIONS)
    assert compile_lora_scales.scales_as_inputs(list(get_layers(differing))) == count
    assert updating(differing) == [1] * LAYERS, "set up twice"
    layer = get_layers(differing)[0]
    inputs = layer.mlp.down_proj.__dict__[compile_lora_scales.SCALE_INPUTS]
    inputs.clear()
    with torch.inference_mode():  # where GRPO runs the model first, and training saves the tensor
        compile_lora_scales.update_scale_inputs(layer, ())
    assert not any(scale.is_inference() for scale in inputs.values()) and inputs


def test_layers_that_differ_in_their_lora_scale_share_a_graph(build):
    """alpha_pattern with four scales: one graph for every length, loss and gradients bit-equal to eager.
    A scale that is changed later (PEFT's set_scale) counts from the next step on, without another graph."""
    from unsloth.models import _block_compile

    # Before 2026.10.9 the first batch's rows are a constant of its graph.
    most = 1 if hasattr(_block_compile, "_mark_batch_dynamic") else 2
    model = build(alpha_pattern = SCALES)
    for rows, length in ((4, 7), (3, 50), (2, 24)):
        before = step(model, rows, length)
        assert 0 < graphs() <= most
        if DEVICE == "cpu":
            assert_bit_equal(before, eager(model, rows, length))
    for layer in get_layers(model):
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).set_scale("default", 4.0)
    after = step(model, 2, 24)
    assert graphs() == most
    assert not torch.equal(before[0], after[0])
    if DEVICE == "cpu":
        assert_bit_equal(after, eager(model, 2, 24))


def test_a_scale_that_is_no_power_of_two_is_as_exact_as_eager(build):
    """B * scale is rounded once more than alpha in addmm: the error stays that of bfloat16."""
    patterns = {rf".*layers\.{layer}\..*": RANK * (1.3 + layer / 7) for layer in range(LAYERS)}
    model = build(alpha_pattern = patterns, backend = "eager")
    twin = _in_float64(model)
    off, eager_off = [0.0, 0.0], [0.0, 0.0]  # of the loss and of the gradients
    for seed in range(8):
        ours = step(model, 12, 24, seed)
        assert graphs() == 1
        reference = eager(model, 12, 24, seed)
        exact = step(twin, 12, 24, seed)
        # Six losses a step, of two rows each.
        for kind, of in enumerate(
            (lambda found: found[0].view(6, -1).mean(1), lambda found: found[1])
        ):
            off[kind] += sum(_distance(a, c) for a, c in zip(of(ours), of(exact)))
            eager_off[kind] += sum(_distance(b, c) for b, c in zip(of(reference), of(exact)))
    # The gradients are thousands of samples of the error. The losses are 48, and the ratio of two
    # such sums scatters by 0.16 (over 200 seeds it is 1.10, with the gradients' 1.007).
    assert off[0] <= 1.5 * eager_off[0] and off[1] <= 1.05 * eager_off[1], (off, eager_off)


def _distance(value, exact):
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _in_float64(model):
    """The model's own bfloat16 values in float64, run by a transformers model with LoRA."""
    import copy

    twin = copy.deepcopy(model).double()
    for layer in get_layers(twin):
        layer.mlp.__dict__.pop("forward", None)
        layer.self_attn.__dict__.pop("apply_qkv", None)
        layer.self_attn.__dict__.pop("apply_o", None)
        layer.__dict__["_unsloth_block_mode"] = 0
    rotary = twin.base_model.model.model.rotary_emb
    for cache in (rotary.multi_gpu_cos_cached, rotary.multi_gpu_sin_cached):
        cache[0] = None if cache[0] is None else cache[0].double()
    twin.config.dtype = torch.float64
    return twin


# Scales belong to the layers, which families share; Qwen2's have biases. Without a GPU, the others'
# blocks are run with such scales in the tests of packed rows.
FAMILIES = [("llama", 4, False), ("qwen2", 16, True)]
FAMILIES += [("mistral", 4, True), ("qwen3", 4, True)] if DEVICE == "cuda" else []


@pytest.mark.parametrize("family, bits, checkpointing", FAMILIES)
def test_many_steps_with_an_evaluation_need_few_graphs(build, family, bits, checkpointing):
    """Padded batches, four LoRA scales. A reference pass with adapters off, as in DPO: one graph more for
    each kind, however often it comes."""
    model = many_steps(build, family, bits, checkpointing, packing = False)
    before = graphs()
    for index in range(4 if family == "llama" else 0):
        step(model, 2, 20 + index)
        with model.disable_adapter(), torch.no_grad():
            step(model, 2, 30 + index)
        assert graphs() <= before + 2


def test_a_set_up_that_raises_costs_no_model(build, monkeypatch):
    """Told as a warning; scales stay constants of the graphs, as before."""
    from unsloth.models import compile_lora_scales

    def broken(layers):
        raise KeyError("ours")

    monkeypatch.setattr(compile_lora_scales, "scales_as_inputs", broken)
    with pytest.warns(UserWarning, match = "LoRA scales stay constants.*ours"):
        model = build(alpha_pattern = SCALES)
    assert not any("_lora_scales_held" in layer.__dict__ for layer in get_layers(model))
