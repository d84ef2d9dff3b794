# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""UNSLOTH_BLOCK_FULLGRAPH=strict in a Trainer: it stops before a weight changes."""

import sys
from types import SimpleNamespace

import pytest
import torch
from backend import require

require("interpreter")

import unsloth  # noqa: F401, E402
from toy_blocks import (  # noqa: E402, F401
    BREAK,
    MODE,
    Toy,
    aot_eager,
    breaking,
    fresh_dynamo,
    toy,
    train,
)


def test_the_trainer_refuses_an_unknown_mode(toy, train, monkeypatch):
    """Before a trainer is built: ValueError with the value and the choices."""
    model = toy("auto")
    monkeypatch.setenv(MODE, "everything")
    with pytest.raises(ValueError, match = "'everything': choose one of auto, strict, off"):
        train(model)


def test_strict_stops_before_any_weight_changes(toy, train, monkeypatch):
    """A break; blocks that nobody set up for compiling; a mode that was set too late."""
    from unsloth.models.compile_modes import FullgraphError

    model = toy("strict", between = breaking)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FullgraphError, match = BREAK):
        train(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(FullgraphError, match = "no decoder block of this model is set up"):
        train(Toy())
    late = toy("auto")
    monkeypatch.setenv(MODE, "strict")
    with pytest.raises(FullgraphError, match = "set it before the model is loaded"):
        train(late)


def test_a_model_that_was_demoted_before_training_is_refused(toy):
    """By Unsloth, in a call before train(): with why, where it is known."""
    from unsloth.models.compile_modes import FullgraphError, watched_regions
    from unsloth.models.compile_strict import require_compiled_blocks

    model = toy("strict")
    (region,) = watched_regions(model)
    require_compiled_blocks(model)
    layer = next(m for m in model.modules() if type(m) is region.layer_class)
    layer.__dict__["_unsloth_block_mode"] = 0
    with pytest.raises(FullgraphError, match = "layers are demoted already: by Unsloth"):
        require_compiled_blocks(model)
    region.note_failure(ValueError("no room"))
    with pytest.raises(FullgraphError, match = "layers are demoted already: .*no room"):
        require_compiled_blocks(model)


def test_a_demoted_loss_stops_before_a_weight_changes(toy, train, monkeypatch):
    """Strict mode alone; the report's own switch does not matter."""
    from unsloth.models import compile_strict
    from unsloth.models.compile_modes import FullgraphError

    monkeypatch.setenv("UNSLOTH_COMPILE_REPORT", "0")
    monkeypatch.setattr(
        compile_strict, "loss_state", lambda: "demoted to eager: it does not compile"
    )
    model = toy("strict")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FullgraphError, match = "the fused loss is not one compiled graph"):
        train(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setenv(MODE, "auto")
    assert train(toy("auto")).state.global_step == 3


@pytest.mark.parametrize(
    "calls, compiled, told",
    [
        ({"fused": 3, "stock: a mask": 0}, False, "hand-written kernels"),
        ({"fused": 3, "stock: a mask": 1}, False, "demoted to eager"),
        ({}, True, "compiled with fullgraph"),
        ({"stock: a mask": 2}, None, "not seen"),
        (None, False, "demoted to eager"),
    ],
)
def test_how_the_loss_ran_is_told(monkeypatch, calls, compiled, told):
    """By its calls where it is ours alone, else by unsloth_zoo; calls None: without the loss's patch."""
    from unsloth.models.compile_strict import loss_state

    ours = None if calls is None else SimpleNamespace(calls = lambda: calls)
    zoo = SimpleNamespace(_FUSED_CE_COMPILE_SUPPORTED = compiled)
    monkeypatch.setitem(sys.modules, "unsloth.fused_loss", ours)
    monkeypatch.setitem(sys.modules, "unsloth_zoo.fused_losses.cross_entropy_loss", zoo)
    assert loss_state().startswith(told)
