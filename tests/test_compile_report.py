# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What was compiled is summed up: graphs, breaks, recompilations and demotions with their reasons.

Without a GPU, blocks are compiled with aot_eager.
"""

import pytest
import torch
from backend import require

require("interpreter")

import unsloth  # noqa: F401, E402
from toy_blocks import BREAK, aot_eager, batch, breaking, fresh_dynamo, toy  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_a_report_without_training_is_an_error_or_says_so():
    """Before it was entered: RuntimeError. Entered, but no step: the table says it."""
    from unsloth.models.compile_report import CompileReport

    report = CompileReport()
    with pytest.raises(RuntimeError, match = "nothing was recorded; use it as a context manager"):
        report.summary()
    with report:
        pass
    assert "no training step was recorded" in report.table()
    with pytest.raises(RuntimeError, match = "make a new one"):
        report.__enter__()


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_block_without_breaks_is_one_graph(toy, mode):
    """All layers and lengths share graphs; evaluation is not counted."""
    from unsloth.models.compile_report import CompileReport

    model = toy(mode)
    with CompileReport(model) as report:
        for length in (5, 7, 9, 12):
            model(**batch(length)).loss.backward()
            report.step(tokens = 2 * length)
        model.eval()
        model(**batch())
    found = report.summary()
    (region,) = found["regions"]
    assert found["graph_breaks"] == 0 and found["graphs"] == 1 and found["recompilations"] == 0
    assert region["layers"] == {"compiled": 2} and region["fullgraph"] == (mode == "strict")
    assert region["compiled_calls"] == 8
    assert region["uncompiled_calls"] == {}
    assert "0 graph breaks" in report.table()


def test_auto_reports_a_break_with_its_line_and_trains_on(toy):
    """The negative control: a break put back into the block changes no loss, but is told."""
    from unsloth.models.compile_report import CompileReport

    wanted = toy("auto")(**batch()).loss
    model = toy("auto", between = breaking)
    with CompileReport(model) as report:
        loss = model(**batch()).loss
        loss.backward()
        report.step()
    assert torch.equal(loss, wanted)
    found = report.summary()
    assert found["graph_breaks"] >= 1 and found["graphs"] >= 2
    here = BREAK
    assert any(entry["where"].endswith(here) for entry in found["breaks"])
    assert BREAK in report.table()


def failing_backend(graph, inputs):
    raise RuntimeError("no code for this device")


def test_a_demotion_is_reported_with_its_reason(toy, monkeypatch):
    """A backend that fails: upstream keeps the stock forward."""
    from unsloth.models.compile_report import CompileReport

    monkeypatch.setattr(
        torch, "compile", lambda function, **kw: torch._dynamo.optimize(failing_backend)(function)
    )
    model = toy("auto")
    with CompileReport(model) as report:
        model(**batch()).loss.backward()
        report.step()
    (region,) = report.summary()["regions"]
    assert region["layers"] == {"eager": 2} and region["compiled_calls"] == 0
    ((reason, count),) = region["uncompiled_calls"].items()
    assert reason.startswith("demoted") and "no code for this device" in reason and count == 2
    assert "no code for this device" in report.table()


def test_ranks_that_differ_or_have_no_report_are_named():
    """Below rank 0's own lines; ranks like it are counted alone."""
    from unsloth.models.compile_report import CompileReport
    from unsloth.models.compile_table import table

    with CompileReport() as report:
        pass
    mine = report.summary()
    slow = {**mine, "compile_seconds": {**mine["compile_seconds"], "total": 12.34}}
    other = {**mine, "graphs": 9, "graph_breaks": 2}
    told = table([mine, slow, other, {"error": "KeyError: 'ours'"}]).splitlines()
    assert told[:-3] == table([mine]).splitlines()
    differs, lacks, ranks = (line.split(None, 2) for line in told[-3:])
    assert differs[:2] == ["rank", "2"] and "9 graphs, 2 graph breaks" in differs[2]
    assert lacks == ["rank", "3", "no report: KeyError: 'ours'"]
    assert ranks == ["ranks", "4;", "the slowest compiled for 12.3 s"]
    assert table([{"error": "gone"}, mine]) == "Unsloth: no compile report (gone)"


def test_step_graphs_are_told():
    """Share, buckets, pool, padding and reasons; nothing where nothing was asked to replay."""
    from unsloth.models.compile_report import CompileReport
    from unsloth.models.compile_table import table

    with CompileReport(torch.nn.Linear(2, 2)) as report:
        pass
    found = report.summary()
    assert found["step_graphs"] == {} and "step graphs" not in table([found])
    found["step_graphs"] = {
        "replayed": 3,
        "share": 0.75,
        "buckets": [(2, 64), (2, 128)],
        "pool_bytes": 5 << 20,
        "padding": 0.25,
        "reasons": {"a length's first batch": 1},
        "changes": {"requires_grad changed": 2},
    }
    told = table([found])
    assert "75% of micro-batches replayed (3), 2 buckets, pool 5 MiB, 25% padding" in told
    assert "1 not replayed: a length's first batch" in told
    assert "dropped 2 times: requires_grad changed" in told
