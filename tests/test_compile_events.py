# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What torch.compile did: compilations, recompilations and graph breaks, with their reasons."""

import logging

import pytest
import torch
from backend import require

require("interpreter")

import unsloth  # noqa: F401, E402
from toy_blocks import BREAK_LINE, breaking, fresh_dynamo  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_more_compilations_than_dynamo_keeps_are_all_counted():
    """Dynamo keeps 64 entries; what was there before is not counted, and its limit comes back."""
    from torch._dynamo import utils
    from unsloth.models.compile_events import CompileEvents

    def compiled(seed):
        source = f"def f(x):\n    return x * {seed} + 1\n"
        names = {}
        exec(source, names)
        return torch.compile(names["f"], backend = "eager")

    compiled(-1)(torch.ones(2))
    limit = utils._compilation_metrics.maxlen
    events = CompileEvents()
    events.start()
    for seed in range(70):
        compiled(seed)(torch.ones(2))
    events.stop()
    assert len(events.compilations) == events.graphs == 70
    assert utils._compilation_metrics.maxlen == limit
    assert events.seconds() > 0


def test_breaks_have_file_and_line_and_recompilations_their_reason():
    """From torch's silenced logs: nothing is printed, and their levels are as before."""
    from unsloth.models.compile_events import CompileEvents
    from unsloth.models.compile_failures import Place

    loggers = [
        logging.getLogger(f"torch._dynamo.{name}.__graph_breaks")
        for name in ("symbolic_convert", "convert_frame")
    ]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    events = CompileEvents()
    events.start()
    function = torch.compile(breaking, backend = "eager", dynamic = False)
    function(torch.ones(3))
    function(torch.ones(4))
    events.stop()
    assert before == [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    places = {entry.place: count for entry, count in events.breaks.items()}
    assert places == {Place(breaking.__code__.co_filename, BREAK_LINE): events.break_count}
    assert events.break_count == torch._dynamo.utils.counters["graph_break"].total() > 0
    assert all("graph_break" in entry.reason for entry in events.breaks)
    assert any("size mismatch" in c.recompile_reason for c in events.recompilations)


def test_a_recompilation_names_the_guard_that_matters():
    """Not the one that tells the other gradient mode's graph apart, which is compared first."""
    from unsloth.models.compile_events import CompileEvents

    function = torch.compile(lambda x: x.sin() + 1, backend = "eager", dynamic = False)
    logger = logging.getLogger("torch._dynamo.guards.__recompiles")
    before = (logger.level, logger.propagate, list(logger.handlers))
    events = CompileEvents()
    events.start()
    for length in (3, 4):
        with torch.no_grad():
            function(torch.ones(length))
        function(torch.ones(length))
    events.stop()
    reasons = [c.recompile_reason for c in events.recompilations]
    assert len(reasons) == 3 and "grad_mode" in reasons[0]
    assert all("size mismatch" in r and "grad_mode" not in r for r in reasons[1:])
    assert before == (logger.level, logger.propagate, logger.handlers)
    assert "recompiles" not in torch._logging._internal.log_state.artifact_names


def test_a_reset_of_dynamos_counters_does_not_lose_breaks():
    """Someone else's counters.clear() in the middle of training."""
    from unsloth.models.compile_events import CompileEvents

    torch.compile(lambda x: x + 1, backend = "eager")(torch.ones(1))
    events = CompileEvents()
    events.start()
    torch.compile(breaking, backend = "eager")(torch.ones(3))
    events.drain()
    torch._dynamo.utils.counters.clear()
    torch.compile(lambda x: x + 2, backend = "eager")(torch.ones(1))
    events.stop()
    assert events.break_count == 1 and events.graphs == 2
