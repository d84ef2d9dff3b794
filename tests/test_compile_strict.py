# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""UNSLOTH_BLOCK_FULLGRAPH=strict: whatever keeps a decoder block from being one graph stops the run.

Without a GPU, blocks are compiled with aot_eager.
"""

import pytest
import torch
from backend import DEVICE, require

require("interpreter")

import unsloth  # noqa: F401, E402
from fast_models import (  # noqa: E402, F401
    build,
    eager_blocks,
    get_layers,
    step,
    unsloth_modules,
)
from toy_blocks import (  # noqa: E402, F401
    BREAK,
    MODE,
    aot_eager,
    batch,
    breaking,
    fresh_dynamo,
    toy,
)


def test_an_unknown_mode_names_the_value_and_the_choices(fresh_dynamo, monkeypatch):
    """Upper case and blanks are forgiven."""
    from unsloth.models.compile_modes import fullgraph_mode

    assert fullgraph_mode() == "auto"
    monkeypatch.setenv(MODE, " Strict ")
    assert fullgraph_mode() == "strict"
    monkeypatch.setenv(MODE, "full")
    with pytest.raises(ValueError, match = "UNSLOTH_BLOCK_FULLGRAPH='full'.*auto, strict, off"):
        fullgraph_mode()


def test_a_variable_of_unsloth_zoo_is_no_mode(monkeypatch):
    """It sets UNSLOTH_FULLGRAPH=1 while it compiles a model of FastModel; trainers are built after."""
    from unsloth.models.compile_modes import fullgraph_mode

    monkeypatch.delenv(MODE, raising = False)
    monkeypatch.setenv("UNSLOTH_FULLGRAPH", "1")
    assert fullgraph_mode() == "auto"


def test_off_is_upstream_alone(toy):
    """No region is watched."""
    from unsloth.models.compile_modes import watched_regions

    model = toy("off")
    model(**batch())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert watched_regions(model) == []


def test_an_unknown_mode_does_not_cost_a_model_its_compiled_blocks(toy, capsys):
    """Blocks are set up as with auto and the value is told; a trainer refuses it."""
    model = toy("full")
    assert "'full': choose one of auto, strict, off" in capsys.readouterr().out
    model(**batch()).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_strict_stops_at_a_break_with_line_and_remedy(toy):
    """Before any weight changed: the first forward raises."""
    from unsloth.models.compile_modes import FullgraphError

    model = toy("strict", between = breaking)
    with pytest.raises(FullgraphError) as caught:
        model(**batch())
    told = str(caught.value)
    assert BREAK in told
    assert "remedy" in told and "custom_op" in told and "FULLGRAPH=auto" in told


def test_a_demoted_block_is_refused_with_its_reason(toy, monkeypatch):
    """A backend that fails: upstream keeps the stock forward in auto, strict names the error."""
    from unsloth.models.compile_modes import FullgraphError, watched_regions

    def failing_backend(graph, inputs):
        raise RuntimeError("no code for this device")

    monkeypatch.setattr(
        torch, "compile", lambda function, **kw: torch._dynamo.optimize(failing_backend)(function)
    )
    model = toy("auto")
    model(**batch()).loss.backward()
    (region,) = watched_regions(model)
    ((reason, count),) = region.outside.items()
    assert reason.startswith("demoted") and "no code for this device" in reason and count == 2
    with pytest.raises(FullgraphError, match = "no code for this device"):
        toy("strict")(**batch())


def test_calls_around_the_region_are_counted_by_reason(toy, monkeypatch):
    """Switched off after loading, a cache, packed lengths: counted in auto, refused in strict."""
    from unsloth.models.compile_modes import FullgraphError, _why_outside, watched_regions

    model, strict = toy("auto"), toy("strict")
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "0")
    model(**batch())
    (region,) = watched_regions(model)
    assert region.outside == {"switched off by UNSLOTH_BLOCK_COMPILE=0": 2}
    with pytest.raises(FullgraphError, match = "switched off by UNSLOTH_BLOCK_COMPILE=0"):
        strict(**batch())
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "1")
    layer = torch.nn.Module()
    assert "packed batch (packed_seq_lengths)" in _why_outside(layer, {"packed_seq_lengths": 1})
    assert _why_outside(layer, {"past_key_values": 1}) == "called with a key-value cache"
    assert _why_outside(layer, {}) == "Unsloth ran the uncompiled forward"
    layer.__dict__["_unsloth_forced_float32"] = True
    assert _why_outside(layer, {}) == "float32 is forced for this model"
    monkeypatch.setenv("UNSLOTH_COMPILE_DISABLE", "partial")
    assert _why_outside(layer, {}) == "switched off by UNSLOTH_COMPILE_DISABLE"
    layer.__dict__["_unsloth_block_mode"] = 0
    assert _why_outside(layer, {}) is None


def test_a_set_up_that_raises_leaves_torch_compile_alone(fresh_dynamo, monkeypatch):
    """Later compiles are neither counted nor forced to full graphs; no half-made region stays."""
    from unsloth.models import _block_compile, compile_modes

    seen = []

    def broken(function, **options):
        seen.append(options["fullgraph"])
        raise RuntimeError("set-up")

    class Layer(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    forward, before = Layer.forward, compile_modes.watched_regions()
    monkeypatch.setenv(MODE, "strict")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RuntimeError, match = "set-up"):
        _block_compile._wrap(Layer, {})
    assert torch.compile is broken and seen == [True]
    assert Layer.forward is forward and compile_modes.watched_regions() == before


# Without a GPU a model takes ten seconds: there the plainest block and the one with the most in it stand for
# all. That the others have no break and are not demoted, the tests of packed rows show as well.
MODELS = [("llama", 16), ("qwen3", 4)]
if DEVICE == "cuda":
    MODELS = [(name, bits) for name in ("llama", "mistral", "qwen2", "qwen3") for bits in (16, 4)]


@pytest.mark.parametrize("family, bits", MODELS)
def test_lora_blocks_of_a_family_are_whole_graphs(build, monkeypatch, family, bits):
    """No break, no demotion, no call around the region over two lengths, and losses as eager's: bit
    for bit by Dynamo alone (AOTAutograd takes as long again, and is tested with LoRA's scales); on a
    GPU, by Inductor under a checkpoint, within bfloat16's noise."""
    from unsloth.models.compile_modes import watched_regions

    gpu = DEVICE == "cuda"
    monkeypatch.setenv(MODE, "strict")
    backend = "inductor" if gpu else "eager"
    model = build(family, bits = bits, checkpointing = gpu, backend = backend)
    losses = [step(model, 2, length)[0] for length in (33, 57)]
    (region,) = watched_regions(model)
    layers = get_layers(model)
    assert region.failures == [] and not region.outside
    assert region.compiled_calls >= 2 * len(layers)
    assert all(layer.__dict__["_unsloth_block_mode"] == 1 for layer in layers)
    found = torch._dynamo.utils.counters
    assert not found["graph_break"] and found["stats"]["unique_graphs"] <= (6 if gpu else 1)
    region.mode = "auto"  # strict mode would refuse the eager blocks that this is compared with
    with eager_blocks(model):
        expected, gradients = step(model, 2, 57)
    if gpu:
        torch.testing.assert_close(losses[1].mean(), expected.mean(), rtol = 2**-8, atol = 0)
    else:
        assert torch.equal(losses[1], expected)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_only_strict_turns_dynamos_errors_into_its_own():
    """auto hands upstream the error that it catches to run the block eagerly; other errors pass in both."""
    from torch._dynamo.exc import Unsupported
    from unsloth.models.compile_modes import BlockRegion, FullgraphError, _counted

    def raising(error):
        def compiled():
            raise error

        return compiled

    unsupported, other = Unsupported("a call that has no graph"), KeyError("of the model")
    for mode, error, raised in (
        ("auto", unsupported, Unsupported),
        ("strict", unsupported, FullgraphError),
        ("auto", other, KeyError),
        ("strict", other, KeyError),
    ):
        region = BlockRegion("Layer", mode, torch.nn.Linear)
        with pytest.raises(raised):
            _counted(raising(error), region)()
        assert len(region.failures) == 1 and region.entered == 0
        _counted(lambda: None, region)()
        with pytest.raises(torch.OutOfMemoryError):  # says nothing of the block
            _counted(raising(torch.OutOfMemoryError("no room")), region)()
        assert len(region.failures) == 1 and region.entered == 1


def test_places_are_named_below_site_packages_or_the_working_folder(tmp_path, monkeypatch):
    import os

    from unsloth.models.compile_failures import short_path

    monkeypatch.chdir(tmp_path)
    assert short_path(os.path.join("/x", "site-packages", "a", "b.py")) == os.path.join("a", "b.py")
    assert short_path(str(tmp_path / "c.py")) == "c.py"
    assert short_path("/elsewhere/d.py") == "/elsewhere/d.py"
