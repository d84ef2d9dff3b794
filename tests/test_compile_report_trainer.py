# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""SFTTrainer reports what was compiled: one table, one file, and never an error of its own."""

import errno
import json
import logging
import os

import pytest
import torch
from backend import GPU, require

require("interpreter")

import unsloth  # noqa: F401, E402
from toy_blocks import MODE, aot_eager, fresh_dynamo, toy, train  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def count_reports(trainer):
    from unsloth.models.compile_callback import CompileReportCallback
    return sum(isinstance(c, CompileReportCallback) for c in trainer.callback_handler.callbacks)


def test_an_unknown_switch_names_the_value_and_the_choices(toy, train, monkeypatch):
    """Told before a trainer is built."""
    monkeypatch.setenv("UNSLOTH_COMPILE_REPORT", "yes")
    with pytest.raises(ValueError, match = "COMPILE_REPORT='yes'.*1, 0"):
        train(toy("auto"))


def test_the_trainer_reports_once_and_saves_json(toy, train, tmp_path, capsys):
    """Added by itself; one table; compile_report.json in output_dir."""
    trainer = train(toy("strict"))
    out = capsys.readouterr().out
    assert count_reports(trainer) == 1 and out.count("Unsloth: what was compiled") == 1
    assert "2 compiled" in out and "0 graph breaks" in out and "tokens/s" in out
    (found,) = json.loads((tmp_path / "out" / "compile_report.json").read_text())["ranks"]
    assert found["mode"] == "strict" and found["graphs"] >= 1 and found["graph_breaks"] == 0
    assert found["speed"]["steps"] == 3 and found["speed"]["tokens_per_second"] > 0
    assert found["speed"]["tokens"] == 14 * found["speed"]["warm_steps"]
    assert not trainer.model._forward_pre_hooks


@pytest.mark.parametrize("name, value", [(MODE, "off"), ("UNSLOTH_COMPILE_REPORT", "0")])
def test_the_report_can_be_switched_off(toy, train, capsys, tmp_path, monkeypatch, name, value):
    """No callback, no table, no file."""
    model = toy("auto")
    monkeypatch.setenv(name, value)
    trainer = train(model)
    assert count_reports(trainer) == 0 and "what was compiled" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "compile_report.json").exists()


def test_a_folder_that_cannot_be_written_is_told(toy, train, capsys, tmp_path):
    """output_dir is a file: no JSON, a message with the path; the table is there."""
    folder = tmp_path / "taken"
    folder.write_text("a file")
    from unsloth.models.compile_report import CompileReport

    with CompileReport() as report:
        pass
    with pytest.raises(OSError, match = "cannot be written to .*taken.*make output_dir writable"):
        report.save(folder)
    trainer = train(toy("auto"))
    capsys.readouterr()
    from unsloth.models import compile_callback

    compile_callback._tell([report.summary()], str(folder))
    out = capsys.readouterr().out
    assert "what was compiled" in out and "make output_dir writable" in out
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_full_or_read_only_disk_leaves_the_earlier_report(tmp_path, monkeypatch, step, code):
    """No half of a report, nothing beside it, and the next one can be written."""
    from pathlib import Path

    from unsloth.models.compile_report import save

    path = save([{"run": 1}], tmp_path)
    before, write = path.read_text(), Path.write_text

    def failing(self, *args, **kwargs):
        if step == "write_text":
            write(self, '{"ranks"', encoding = "utf-8")
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(Path, step, failing)
        with pytest.raises(OSError, match = f"{os.strerror(code)}.*make output_dir writable"):
            save([{"run": 2}], tmp_path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    assert '"run": 2' in save([{"run": 2}], tmp_path).read_text()


def test_a_fault_of_the_report_never_ends_training(toy, train, capsys, monkeypatch):
    """Whatever fails inside it is told in one line, once."""
    from unsloth.models import compile_events

    def fault(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr(compile_events.CompileEvents, "drain", fault)
    trainer = train(toy("auto"))
    out = capsys.readouterr().out
    assert trainer.state.global_step == 3 and not trainer.model._forward_pre_hooks
    assert out.count("compile report stopped (KeyError") == 1 and "what was compiled" not in out


def test_a_fault_while_counting_or_at_the_end_is_told(monkeypatch, capsys):
    """In a step's tokens, in a summary, among the ranks: a line each, and no report is kept."""
    from types import SimpleNamespace

    from unsloth.models import compile_callback
    from unsloth.models.compile_report import CompileReport

    def fault(*args, **kwargs):
        raise KeyError("ours")

    def interrupted():
        raise KeyboardInterrupt

    callback = compile_callback.CompileReportCallback()
    with monkeypatch.context() as patched, CompileReport() as callback.report:
        patched.setattr(compile_callback, "batch_tokens", fault)
        callback._count(SimpleNamespace(training = True), (), {})
    assert callback.broken == "KeyError: 'ours'"
    assert callback._finish() == {"error": "KeyError: 'ours'"} and callback.report is None
    callback.broken, callback.report = "", CompileReport()  # which has not recorded
    found = callback._finish()
    assert found["error"].startswith("RuntimeError: CompileReport: nothing was recorded")
    assert callback.report is None
    callback.report = SimpleNamespace(summary = interrupted, __exit__ = lambda: None)
    with pytest.raises(KeyboardInterrupt):
        callback._finish()
    assert callback.report is None
    callback.report = CompileReport()
    monkeypatch.setattr(compile_callback, "_of_all_ranks", fault)
    callback.on_train_end(None, SimpleNamespace(is_world_process_zero = True), None)
    assert capsys.readouterr().out == "Unsloth: no compile report (KeyError: 'ours').\n"


def test_a_log_that_cannot_be_read_disturbs_no_compilation(monkeypatch):
    """A record that raises; another torch, without the list of its logs."""
    import sys

    from unsloth.models.compile_events import BreakHandler, RecompileHandler, _recompiles_on

    record, breaks = logging.LogRecord("a", logging.DEBUG, "b", 1, "%d", ("no number",), None), {}
    BreakHandler(breaks).emit(record)
    BreakHandler(breaks).emit(record)
    ((found, count),) = breaks.items()
    assert "unreadable entry" in str(found) and count == 2
    RecompileHandler().emit(record)
    monkeypatch.setitem(sys.modules, "torch._logging._internal", None)
    assert _recompiles_on() == []


def test_every_rank_counts_and_the_first_prints(monkeypatch):
    """All ranks' summaries go into the file, and into the table, which names those that differ."""
    import torch.distributed as dist
    from unsloth.models import compile_callback

    def gather(into, value):
        into[:] = [value, "other", {"error": "KeyError: 'ours'"}]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    found = compile_callback._of_all_ranks("mine")
    assert found == ["mine", "other", {"error": "KeyError: 'ours'"}]


def test_the_time_of_an_evaluation_or_a_save_is_no_steps():
    """The step around it is left out of the speed; before training there is nothing to leave out."""
    from unsloth.models.compile_callback import CompileReportCallback
    from unsloth.models.compile_report import CompileReport

    callback = CompileReportCallback()
    for event in (callback.on_evaluate, callback.on_save, callback.on_step_end):
        event(None, None, None)
    with CompileReport() as callback.report:
        clock = callback.report.clock
        for event in (None, callback.on_evaluate, callback.on_save, None):
            if event is not None:
                event(None, None, None)
            clock.step(compiled = False)
    assert callback.broken == "" and clock.figures()["steps"] == 4
    assert clock.figures()["warm_steps"] == 1


def test_a_recording_that_raises_can_be_done_again(toy, train, monkeypatch):
    """Loggers and Dynamo's limit are as before, after an error inside and after one in the start."""
    from torch._dynamo import utils
    from unsloth.models import compile_events
    from unsloth.models.compile_report import CompileReport

    logger = logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks")
    kept = utils._compilation_metrics
    before = (kept.maxlen, logger.level, logger.propagate, list(logger.handlers))

    def state():
        kept = utils._compilation_metrics
        return (kept.maxlen, logger.level, logger.propagate, list(logger.handlers))

    with pytest.raises(KeyError, match = "in training"):
        with CompileReport():
            assert state() != before
            raise KeyError("in training")
    assert state() == before

    def broken_step(hidden):
        raise KeyError("in a step")

    model = toy("auto", between = broken_step)
    with pytest.raises(KeyError, match = "in a step"):
        train(model)
    assert state() == before and not model._forward_pre_hooks

    def broken(self):
        raise KeyError("in the last drain")

    events = compile_events.CompileEvents()
    events.start()
    with pytest.raises(RuntimeError, match = "call stop first"):
        events.start()
    with monkeypatch.context() as patch:
        patch.setattr(compile_events.CompileEvents, "drain", broken)
        with pytest.raises(KeyError, match = "in the last drain"):
            events.stop()
    assert state() == before and not events.running
    with CompileReport() as report:
        torch.compile(lambda x: x + 3, backend = "eager")(torch.ones(1))
    assert report.summary()["graphs"] == 1 and state() == before


def test_a_trainer_that_nobody_keeps_trains_and_reports(toy, train, capsys):
    """``Trainer(...).train()``: the trainer is a temporary, and the recording ends all the same."""
    first = train(toy("auto"))
    capsys.readouterr()
    data = {"train_dataset": first.train_dataset, "data_collator": first.data_collator}
    type(first)(model = toy("auto"), args = first.args, **data).train()
    assert capsys.readouterr().out.count("what was compiled") == 1


@pytest.mark.skipif(not GPU, reason = "needs a CUDA GPU")
def test_the_sft_trainer_adds_the_report_by_itself():
    """Unsloth's trl.SFTTrainer, as it is after import."""
    import trl
    from unsloth.models.compile_callback import add_compile_report

    called, function = [], trl.SFTTrainer.__init__
    while function is not None:
        called += [cell.cell_contents for cell in function.__closure__ or ()]
        function = getattr(function, "__wrapped__", None)
    assert called.count(add_compile_report) == 1
