# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Benchmarks' own arithmetic and command line: what is computed from samples, and what is said."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from toy_project import ROOT
from typer.testing import CliRunner

from unsloth_patches.bench import (
    BENCHMARKS,
    chunk_size,
    every,
    families,
    fsdp2,
    fsdp2_cards,
    fsdp2_launch,
    fsdp2_worker,
    harness,
    models,
    steps,
    steps_worker,
    train,
    train_profile,
    train_turns,
    train_worker,
    trainers,
    trainers_worker,
    vision_worker,
)
from unsloth_patches.cli import app

# ------------------------------------------------------------------------------- the breakdown


def on_gpu(
    name,
    start,
    duration,
    correlation,
    cat = "kernel",
    op = 0,
):
    arguments = {"correlation": correlation, "External id": op}
    return {"cat": cat, "name": name, "ts": start, "dur": duration, "tid": 7, "args": arguments}


def launch(
    moment,
    correlation,
    thread = 1,
):
    arguments = {"correlation": correlation}
    event = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": moment, "dur": 1}
    return {**event, "tid": thread, "args": arguments}


def operator(number, name, *shapes):
    arguments = {"External id": number, "Input Dims": [list(shape) for shape in shapes]}
    return {"cat": "cpu_op", "name": name, "ts": 0, "dur": 1, "tid": 1, "args": arguments}


TRACE = [
    operator(1, "aten::mm", (8192, 4096), (4096, 14336)),
    operator(2, "aten::addmm_", (8192, 4096), (8192, 16), (16, 4096)),
    {
        "cat": "user_annotation", "name": train_profile.LOSS_RANGE, "ts": 100, "dur": 50, "tid": 1,
        "args": {"External id": 9},
    },
    *(launch(10 * n, n) for n in (1, 2, 3, 4, 5)),
    launch(120, 6),
    launch(120, 7, thread = 2),
    launch(130, 8),
    on_gpu("nvjet_tst_128x256", 1000, 400, 1, op = 1),
    on_gpu("nvjet_tst_128x64", 1400, 100, 2, op = 2),
    on_gpu("_nf4_dequant_kernel", 1500, 50, 3),
    on_gpu("flash_fwd_kernel", 1600, 200, 4),
    on_gpu("_rms_layernorm_forward", 1800, 30, 5),
    on_gpu("nvjet_tst_loss", 2000, 300, 6, op = 1),
    on_gpu("nvjet_tst_other_thread", 2300, 20, 7, op = 1),
    on_gpu("_cross_entropy_kernel", 2400, 100, 8),
    on_gpu("Memcpy DtoH", 1700, 150, 11, cat = "gpu_memcpy"),
    on_gpu("Memset", 3000, 10, 12, cat = "gpu_memset"),
]  # fmt: skip


def test_breakdown_sorts_and_adds_up():
    """Products are told apart by their shapes, the loss by the range and thread that launched it, and
    a copy counts for as long as nothing else ran."""
    found = train_profile.breakdown(TRACE, steps = 2)
    expected = {
        "base GEMMs": 420,
        "LoRA": 100,
        "loss": 400,
        "attention": 200,
        "dequantize": 50,
        "norms, elementwise, optimizer": 30,
        "copies": 20 + 10,
    }
    assert found["ms"] == pytest.approx({kind: us / 2e3 for kind, us in expected.items()})
    assert found["busy_ms"] == pytest.approx(sum(expected.values()) / 2e3)
    assert found["hidden_copies_ms"] == pytest.approx(130 / 2e3)
    assert found["top"]["LoRA"] == {"nvjet_tst_128x64": pytest.approx(0.05)}


# ------------------------------------------------------------------------------- timing


def test_no_candidate_always_follows_the_same_one():
    """Every round has each name once, and every pair of neighbours turns up both ways round."""
    rounds = list(harness.shuffled_rounds("abc", 30))
    assert all(sorted(order) == list("abc") for order in rounds)
    followers = {tuple(pair) for order in rounds for pair in zip(order, order[1:])}
    assert len(followers) == 6
    assert rounds == list(harness.shuffled_rounds("abc", 30)), "the same in every process"


def test_host_and_wall_time_run_every_candidate():
    """Warm-up, then each candidate as often as asked; medians of all samples."""
    calls = {"a": 0, "b": 0}

    def count(name):
        def run():
            calls[name] += 1

        return run

    found = harness.host_time({name: count(name) for name in calls}, calls = 3, rounds = 4)
    assert calls == {"a": 22, "b": 22} and found["a"]["n"] == 4
    found = harness.wall_time({name: count(name) for name in calls}, rounds = 4, warmup = 1)
    assert calls == {"a": 27, "b": 27} and found["b"]["n"] == 4


# ------------------------------------------------------------------------------- comparisons


def measured_run(
    stretches,
    losses,
    busy = None,
):
    memory = {"peak_mib": 100.0, "reserved_mib": 120.0}
    share = {"stretches": stretches, "losses": losses, **memory, "graphs": {}}
    run = {"shares": {name: share for name in train.SHARES}}
    if busy is not None:
        run["profile"] = {"ms": {"base GEMMs": busy - 1, "loss": 1.0}, "busy_ms": busy}
    return run


class Allocator:
    """torch.cuda of three steps: one that captures 500 bytes and leaves 400 of them free, two replays."""

    peaks, reserved, captures = [700, 300, 250], [900, 800, 800], [2, 2, 2]

    def __init__(self):
        self.step = 0

    def __getattr__(self, name):
        return lambda: None  # empty_cache and its like

    def max_memory_allocated(self):
        return self.peaks[self.step] * 2**20

    def max_memory_reserved(self):
        return self.reserved[self.step] * 2**20

    def memory_snapshot(self):
        sizes = [((0, 0), 400, 300), ((0, 1), 500, 100)]
        return [
            {"segment_pool_id": p, "total_size": t * 2**20, "allocated_size": a * 2**20}
            for p, t, a in sizes
        ]


def test_peak_counts_what_graphs_hold(monkeypatch):
    """A replay allocates nothing, and what its pool holds is taken all the same; a capture's is allocated."""
    gpu, model = train_worker.Gpu(), object()
    gpu.cuda = allocator = Allocator()
    monkeypatch.setattr(
        train_worker,
        "replay_summary",
        lambda model: {"captures": allocator.captures[allocator.step]},
    )
    gpu.reset_peak()
    gpu.step_done(model)
    assert gpu.memory() == {"peak_mib": 700, "reserved_mib": 900}
    gpu.reset_peak()
    for allocator.step in (1, 2):
        gpu.step_done(model)
    assert gpu.memory() == {"peak_mib": 300 + 400, "reserved_mib": 800}


def test_compare_share():
    """The first steps of a stretch do not count; each pair of stretches is compared by itself, too."""
    slow = [9.0] * train.SKIPPED
    runs = {
        "stock": measured_run([slow + [0.2] * 9, slow + [0.4] * 9, slow + [0.2] * 9], [4.0, 2.0]),
        "patched": measured_run([slow + [0.1] * 9] * 3, [4.0, 2.002]),
    }
    result = train.compare_share(runs, "half", models.MODELS["llama-1b"])
    assert result["speedup"] == pytest.approx(2.0)
    assert result["stretch_speedups"] == pytest.approx([2.0, 4.0, 2.0])
    assert result["stock"]["tokens_per_second"] == pytest.approx(4 * 2048 / 0.2)
    assert result["patched"]["step_seconds"]["n"] == 27
    assert result["relative_difference"] == pytest.approx([0.0, 0.001])
    assert train.CONTROL not in result
    runs[train.CONTROL] = measured_run([slow], [4.0, 2.0002])
    control = train.compare_share(runs, "half", models.MODELS["llama-1b"])[train.CONTROL]
    assert control["largest_difference"] == pytest.approx(1e-4)


def test_breakdown_ends_with_idle_time():
    """What a step took without the profiler, less what the GPU was busy, is idle."""
    steps = [[0.02] * 9]
    runs = {"stock": measured_run(steps, [1.0], 18.0), "patched": measured_run(steps, [1.0], 15.0)}
    shares = {name: train.compare_share(runs, name, models.TOY) for name in train.SHARES}
    found = train.breakdowns({"shares": shares, "runs": runs})
    assert found["stock"] == pytest.approx({"base GEMMs": 17.0, "loss": 1.0, "idle": 2.0})
    assert found["patched"]["idle"] == pytest.approx(5.0)
    runs = dict.fromkeys(runs, measured_run(steps, [1.0]))
    assert train.breakdowns({"shares": shares, "runs": runs}) == {}


# ------------------------------------------------------------------------------- short sequences


def test_the_gpus_own_time_is_the_union_of_its_kernels():
    from torch.autograd import DeviceType

    def event(device, start, duration):
        return types.SimpleNamespace(
            device_type = lambda: device, start_ns = lambda: start, duration_ns = lambda: duration
        )

    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event(gpu, 50, 10), event(gpu, 0, 30), event(gpu, 10, 5), event(cpu, 0, 99)]
    events.append(event(gpu, 25, 15))
    results = types.SimpleNamespace(events = lambda: events)
    profile = types.SimpleNamespace(profiler = types.SimpleNamespace(kineto_results = results))
    assert steps_worker._busy_seconds(profile) == pytest.approx(50e-9)


def test_compare_steps():
    """The first stretch, which compiles and captures, does not count; nor does a stretch's first step."""

    def run(
        seconds,
        loss,
        busy = None,
    ):
        found = {
            "stretches": [[9.0, 9.0], [9.0, seconds, seconds]], "tokens": [500, 1000, 1500],
            "first_step": 8.0, "peak_mib": 1.0, "reserved_mib": 2.0, "losses": [loss], "graphs": {},
        }  # fmt: skip
        return {"cases": {"default": {**found, **({"busy": busy} if busy else {})}}}

    busy = {"busy_seconds": 0.3, "tokens": 3000, "steps": 3}
    runs = {"stock": run(1.0, 2.0), "patched": run(0.5, 2.0), "graphs": run(0.2, 2.002, busy)}
    found = steps.compare_case(runs, "default")
    assert [found[form]["speedup"] for form in steps.FORMS] == pytest.approx([1.0, 2.0, 5.0])
    assert found["graphs"]["tokens_per_second"] == pytest.approx(5000)
    assert found["graphs"]["largest_difference"] == pytest.approx(1e-3)
    assert found["graphs"]["gpu_limit_tokens_per_second"] == pytest.approx(10000)
    assert found["graphs"]["gpu_busy_share"] == pytest.approx(0.5)
    assert "gpu_busy_share" not in found["stock"]


# ------------------------------------------------------------------------------- turns

WORKER = """#!{python}
import sys
sys.path.insert(0, {root!r})
from unsloth_patches.bench.train_turns import Turns
line = Turns(int(sys.argv[4]))
print("it broke here", flush = True)
{body}
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Start a process with this body in the place of train_worker."""

    def start(body, form = "stock"):
        program = tmp_path / f"python-{form}"
        program.write_text(WORKER.format(python = sys.executable, root = str(ROOT), body = body))
        program.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(train_turns.sys, "executable", str(program))
            return train_turns.Worker({"form": form}, dict(os.environ), tmp_path)

    return start


def test_turns_alternate(worker, tmp_path):
    """A process works only between its go and its next wait."""
    log = tmp_path / "order"
    body = (
        "for number in range(2):\n    line.wait(number)\n"
        f"    open({str(log)!r}, 'a').write(sys.argv[0][-7:] + str(number) + ' ')\n"
        "line.wait('end')"
    )
    both = [worker(body, "forms-a"), worker(body, "forms-b")]
    assert [each.wait() for each in both] == [0, 0]
    for each in (both[0], both[1], both[1], both[0]):
        each.go()
        last = each.wait()
    assert last == "end"
    assert log.read_text().split() == ["forms-a0", "forms-b0", "forms-b1", "forms-a1"]
    for each in both:
        each.go()
        each.stop()


def test_a_failing_process_is_told(worker):
    """The end of its output comes back, at once and not after the time limit."""
    failing = worker("line.wait(1)\nsys.exit(3)")
    failing.wait()
    failing.go()
    with pytest.raises(
        RuntimeError, match = r"(?s)stock process ended \(exit code 3\).*it broke here"
    ):
        failing.wait()
    with pytest.raises(RuntimeError, match = "stock process ended"):
        failing.go()


def test_a_hanging_process_is_ended(worker, monkeypatch):
    hanging = worker("import time\ntime.sleep(600)")
    monkeypatch.setattr(train_turns, "LIMIT_S", 0.2)
    with pytest.raises(RuntimeError, match = "said nothing for 0.2 s"):
        hanging.wait()
    assert hanging._process.poll() is not None


# ------------------------------------------------------------------------------- without a GPU


def fsdp2_result(**changes):
    """What a rank of `bench fsdp2` writes for a case on the CPU."""
    measured = dict.fromkeys(("load_peak", "after_load", "wrap_peak", "after_wrap", "train_peak"))
    return {
        "load_s": 0.1,
        "step_s": 0.05,
        "tokens_per_s": 900.0,
        "losses": [6.2],
        **measured,
        **changes,
    }


def test_fsdp2_shows_nothing_where_nothing_was_measured(monkeypatch, capsys):
    """Without a GPU there is no memory of one: dashes, not zeros, and a line that says so."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    memory = fsdp2_worker.Memory(torch)
    assert memory.peak() is None and memory.now() is None and fsdp2_worker._gib(None) is None
    case = {"name": "sharded", "load": "auto", "checkpoint": "x"}
    group = types.SimpleNamespace(cases = [case], mode = "ours", world = 2)
    row = fsdp2.merged_row(group, 0, [fsdp2_result(), fsdp2_result(load_s = 0.2)])
    assert row["error"] == "" and row["train_peak"] is None and row["load_s"] == 0.2
    fsdp2.show("title", [row])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sharded" in line]
    assert line.count(fsdp2.NOT_THERE) == 5 and " 0 " not in line
    fsdp2.say_without_gpu("fsdp2", "losses")
    said = capsys.readouterr().out
    assert "no CUDA GPU" in said and "Not measured: memory of a GPU" in said
    row = fsdp2.merged_row(group, 0, [fsdp2_result(train_peak = 1.5), fsdp2_result(train_peak = 2.0)])
    assert row["train_peak"] == 2.0


def test_fsdp2_measures_stock_without_the_patches(tmp_path, monkeypatch):
    """A rank's own package would patch the Unsloth that is shown as stock."""
    started = []
    monkeypatch.setattr(fsdp2_launch.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    for mode in ("ours", "upstream"):
        fsdp2_launch.Group([], mode, 1, tmp_path)
    assert [env["UNSLOTH_PATCHES_DISABLE"] for env in started] == ["", "all"]


def test_fsdp2_does_not_wait_for_ranks_that_a_failed_one_left(tmp_path, monkeypatch):
    class Hanging:
        def poll(self):
            return None

    monkeypatch.setattr(fsdp2_launch.subprocess, "Popen", lambda *_, **__: Hanging())
    monkeypatch.setattr(fsdp2_launch, "AFTER_A_FAILURE", 0.2)
    group = fsdp2_launch.Group([{"name": "a"}], "upstream", 2, tmp_path)
    group._outputs[0].write_text('{"error": "out of memory"}\n', encoding = "utf-8")
    row = fsdp2.merged_row(group, 0, group.run(0))
    assert row["error"] == "out of memory"


def test_fsdp2_rounds_become_one_row():
    """Medians of the loads' times, the largest memory; the step's time is that of its turns."""
    load = {"name": "sharded", "length": 10}
    turn = {**load, **fsdp2.TURN}
    group = types.SimpleNamespace(cases = [load, turn], mode = "upstream", world = 2)
    loads = [
        fsdp2.merged_row(
            group,
            0,
            [fsdp2_result(load_s = load_s, train_peak = peak, steps_s = [9.0, *steps])],
        )
        for load_s, peak, steps in [(3.0, 1.5, [0.2]), (2.0, 1.7, [0.4]), (4.0, 1.6, [0.3])]
    ]
    (row,) = fsdp2.over_rounds(loads)
    assert (row["load_s"], row["train_peak"], row["step_s"]) == (3.0, 1.7, 0.3)
    assert row["tokens_per_s"] == 66.7 and len(row["ranks"]) == 3
    # A turn loads nothing, and its steps are the ones that count.
    later = {"load_s": None, "train_peak": None, "steps_s": [9.0, 0.5, 0.6, 0.7]}
    turns = [fsdp2.merged_row(group, 1, [fsdp2_result(**later)])] * 2
    (row,) = fsdp2.over_rounds([*loads, *turns])
    assert (row["load_s"], row["train_peak"], row["step_s"]) == (3.0, 1.7, 0.6)
    assert row["timed_steps"] == 6 and row["step_quartiles"] == [0.5, 0.7]


def test_fsdp2_ratios_pair_the_turns():
    """The host's speed changes between turns, and for both sides."""

    def row(name, load, *turns):
        ranks = [{"load_s": load, "steps_s": [9.0, 9.0]}]
        ranks += [{"steps_s": [9.0, *times]} for times in turns]
        ranks = [rank for one in ranks for rank in (one, {"steps_s": [7.0, 7.0]})]
        return {"case": {"name": name}, "world": 2, "load_s": load, "ranks": ranks}

    ours = row("sharded", 2.0, [0.1, 0.2, 0.3], [0.4, 0.4, 0.4], [0.9, 0.9, 0.9])
    stock = row("stock, sharded layout", 4.0, [0.1, 0.1, 0.1], [0.4, 0.4, 0.4], [1.8, 1.8, 1.8])
    assert fsdp2.ratios([stock, ours]) == [
        ("sharded", "stock, sharded layout", [2.0, 1.0, 0.5], 0.5)
    ]
    assert fsdp2.ratios([ours]) == []


def test_fsdp2_turns_load_each_training_once_before_any_is_timed(tmp_path):
    order = fsdp2._cases(tmp_path, fsdp2.SHAPE, 12, 2048, big = tmp_path / "whole")
    turns = [case for *_, case in order if case.get("turn")]
    names = [case["name"] for case in turns if case["turn"] == "first"]
    assert len(names) == len(set(names)) == 9
    for group in (names[:6], names[6:]):
        of_group = [case for case in turns if case["name"] in group]
        assert [case["name"] for case in of_group] == group * (1 + fsdp2.TURNS)
        assert all(case["turn"] == "again" for case in of_group[len(group) :])
    last = [index for index, (*_, case) in enumerate(order) if case.get("turn")][-1]
    assert all(case.get("card_gib") for *_, case in order[last + 1 :])  # an error ends its process


def test_fsdp2_keeps_a_training_for_its_turns_only(monkeypatch):
    """What it holds meanwhile does not count for the others."""
    made, allocated = [], [100]

    class Training:
        model = None

        def __init__(self, case, found, memory):
            made.append((case["name"], memory.now()))
            allocated[0] += 1000

        def run(self, case, found):
            found["steps_s"] = [0.1]

    gpu = types.SimpleNamespace(
        memory_allocated = lambda: allocated[0],
        max_memory_allocated = lambda: allocated[0] + 2**30,
        synchronize = lambda: None,
        reset_peak_memory_stats = lambda: None,
        is_available = lambda: True,
    )
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(fsdp2_worker, "_Training", Training)
    peaks = []
    for name in ("a", "b", "a", "b"):
        found = {}
        fsdp2_worker._measure({"name": name, "turn": "first"}, found)
        assert found["steps_s"] == [0.1]
        peaks.append(found.get("train_peak"))
    assert made == [("a", 100), ("b", 100)] and peaks == [1.0, 1.0, None, None]
    fsdp2_worker._measure({"name": "c"}, {})
    assert made[2:] == [("c", 2100)] and not fsdp2_worker.KEPT


def test_fsdp2_cards_are_narrowed_to_where_training_begins():
    assert fsdp2_cards.between(1.0, 4.0, 2) == [2.0, 3.0]
    tried = [(2.0, False), (3.0, True), (2.5, True)]
    assert fsdp2_cards.narrowed(1.0, 4.0, tried) == (2.0, 2.5)
    assert fsdp2_cards.narrowed(1.0, 4.0, [(2.0, False), (3.0, False)]) == (3.0, 4.0)


def test_fsdp2_names_no_card_and_no_gpu_without_one(tmp_path):
    without = [
        case for *_, case in fsdp2._cases(tmp_path, fsdp2.TOY, 2, 32, emulated = False, gpu = False)
    ]
    names = " ".join(case["name"] for case in without)
    assert "GiB" not in names and "GPU" not in names
    assert not any(case.get("card_gib") for case in without)
    with_gpu = [case for *_, case in fsdp2._cases(tmp_path, fsdp2.SHAPE, 12, 2048)]
    assert sum(bool(case.get("card_gib")) for case in with_gpu) == 2
    assert "one GPU" in {case["name"] for case in with_gpu}


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_run(name):
    module = importlib.import_module(f"unsloth_patches.bench.{BENCHMARKS[name].module}")
    assert list(inspect.signature(module.run).parameters)[:2] == ["out", "quick"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing"], "no benchmark 'nothing'; there are: aot, "),
        (["loss", "--model", "llama-1b"], "bench loss has no --model; `train`, `steps` and"),
        (["steps", "--float32"], "bench steps has no --float32; `bench train` has"),
        (["aot", "--out", "{file}/below"], "name another folder with --out"),
    ],
)
def test_bench_errors_name_a_remedy(tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    arguments = [argument.format(file = tmp_path / "file") for argument in arguments]
    done = CliRunner().invoke(app, ["bench", *arguments], env = {"COLUMNS": "300"})
    assert done.exit_code == 2 and words in done.output


def test_unknown_model_is_named(tmp_path, capsys):
    assert train.run(tmp_path, model = "llama-9b") == 2
    error = capsys.readouterr().err
    assert "no model 'llama-9b'" in error and "llama-1b" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", models.TRAINED_OTHERWISE)
def test_steps_measures_qlora_only(tmp_path, capsys, name):
    """Under that name QLoRA would be measured: its worker knows no options."""
    assert steps.run(tmp_path, model = name) == 2
    assert f"no model {name!r}" in capsys.readouterr().err
    assert not any(model.options for model in models.MODELS.values())


def test_the_chunk_size_picture_shows_every_swept_shape(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    results = ROOT / "docs" / "results" / "chunk_size_h100.json"
    payload = json.loads(results.read_text(encoding = "utf-8"))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    chunk_size.plot(payload, tmp_path / "picture.png")
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == [part["shape"] for part in payload["swept"]]
    times, memory, _ = (
        [line for line in a.lines if line.get_marker() == "o"] for a in drawn[0].axes
    )
    assert len(times) == len(memory) == len({line.get_color() for line in times}) == len(legend)


def test_float32_is_a_llamas(tmp_path):
    """Another model's norms would be left out of the reference in silence."""
    name = "qwen3-4b-12-layers"
    with pytest.raises(RuntimeError, match = "is a Qwen3, and only Llama .* --model llama-1b"):
        train._add_float32(tmp_path / "train.json", name, models.MODELS[name])
    with pytest.raises(RuntimeError, match = "all weights trained.*is no QLoRA.* --model llama-1b"):
        train._add_float32(
            tmp_path / "train.json", "llama-1b-full", train.EVERY_MODEL["llama-1b-full"]
        )


@pytest.mark.parametrize(
    ("name", "loaded", "skipped"),
    [
        ("llama-1b", {"load_in_4bit": True, "full_finetuning": False}, None),
        ("llama-1b-lora", {"load_in_4bit": False, "full_finetuning": False}, None),
        ("llama-1b-full", {"load_in_4bit": False, "full_finetuning": True}, None),
        ("llama-1b-skip", {"load_in_4bit": True, "full_finetuning": False}, "auto"),
    ],
)
def test_train_asks_unsloth_for_what_the_model_says(tmp_path, monkeypatch, name, loaded, skipped):
    asked = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(*_, **given):
            asked.update(given)
            return "model", "tokenizer"

        @staticmethod
        def get_peft_model(model, **given):
            asked.update(given)
            return model

    unsloth = types.SimpleNamespace(FastLanguageModel = FastLanguageModel)
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    job = train.job_for("stock", name, train.EVERY_MODEL[name], tmp_path, {})
    assert train_worker.load(json.loads(json.dumps(job))) == ("model", "tokenizer")
    assert asked.items() >= loaded.items()
    assert asked.get("checkpoint_skip_layers") == skipped
    assert ("lora_alpha" in asked) is not loaded["full_finetuning"]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_has_its_own_architecture(tmp_path, monkeypatch, name):
    """The checkpoint is one that transformers makes a model of that family from."""
    family = families.FAMILIES[name]
    if importlib.util.find_spec("torchvision") is None:  # its processor of videos wants it
        monkeypatch.setattr(vision_worker, "save_processor", families.save_word_tokenizer)
    families.make(tmp_path, family, quick = True)
    config = json.loads((tmp_path / "config.json").read_text())
    stem = family.config.removesuffix("Config").removesuffix("Text")
    kind = "ConditionalGeneration" if "text_config" in config else "CausalLM"
    assert config["architectures"] == [f"{stem}For{kind}"]
    config = config.get("text_config", config)
    assert config["hidden_size"] == families.TINY["hidden_size"] and config["vocab_size"] == 512
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ("Llama", "Qwen3"))
def test_a_checkpoint_has_every_weight_of_its_model(tmp_path, kind):
    import transformers

    from unsloth_patches.bench.fsdp2_cells import TOY
    from unsloth_patches.bench.fsdp2_checkpoint import make_checkpoint

    make_checkpoint(tmp_path, {**TOY, "kind": kind, "head_dim": 32}, 2)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info = True
    )
    assert type(model).__name__ == f"{kind}ForCausalLM"
    assert not any(info.values()), info


def test_which_patches_ran():
    """Those whose functions are called in the block, from Python 3.12 on."""
    from unsloth_patches.unsloth.kernels.loss_chunk_size import is_budget

    with steps_worker.patches_that_run() as names:
        assert is_budget(3)
    assert names == (["loss-chunking"] if sys.version_info >= (3, 12) else [])


def test_what_trainers_are_compared_by():
    """GRPO's reward, the steps that sampled alike, and tokens where TRL alone counts them."""
    assert trainers_worker.even_words(["w2 w3 other", "w4", ""]) == [0.5, 1.0, 0.0]
    assert trainers.alike([0.5, 1.0, 0.0], [0.5, 1.0, 0.5]) == 2
    assert trainers.alike([0.5, 1.0], [0.5, 1.0]) == 2
    log = [{"loss": 1.0, "num_tokens": 30}, {"loss": 0.9, "num_tokens": 70}, {"train_runtime": 3.0}]
    trainer = types.SimpleNamespace(state = types.SimpleNamespace(log_history = log))
    assert steps_worker.step_tokens(trainer) == [30, 40]


def test_a_family_that_does_not_train_is_told(tmp_path, monkeypatch, capsys):
    """With the end of its process's output, and the others go on."""
    form = {
        "step_seconds": {"median": 0.5},
        "first_step_seconds": 2.0,
        "peak_mib": 10.0,
        "largest_difference": 3e-4,
        "graphs": {"share": 0.75},
    }

    def compare(name, quick):
        if name == "Qwen 3":
            raise RuntimeError("bench families: ended\nKeyError: 'lm_head'")
        return {each: form for each in families.FORMS}

    monkeypatch.setattr(families, "compare", compare)
    assert families.run(tmp_path, quick = True) == 1
    (path,) = tmp_path.glob("families_*.json")
    assert set(json.loads(path.read_text())["families"]) == set(families.QUICK)
    printed = capsys.readouterr().out
    assert "KeyError: 'lm_head'" in printed and "75%" in printed and "500" in printed
    assert families.run(tmp_path, model = "Llama 9") == 2
    assert "no family 'Llama 9'" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [True, False])
def test_bench_all_goes_on_after_a_failure(tmp_path, monkeypatch, capsys, gpu):
    """Each benchmark in its own process; those with nothing to do here are not started."""
    codes = {"loss": 2, "train": 3 if gpu else 0}
    started = []

    def run(command, **_):
        started.append(command[command.index("bench") + 1])
        return subprocess.CompletedProcess(command, codes.get(started[-1], 0))

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(every.subprocess, "run", run)
    assert every.run(tmp_path) == (1 if gpu else 0)
    printed = capsys.readouterr().out
    if gpu:
        assert started == list(BENCHMARKS)
        assert "FAILED (exit code 3)" in printed and "cannot run here" in printed
    else:
        assert started == [name for name, each in BENCHMARKS.items() if each.without_gpu]
        assert "needs a CUDA GPU" in printed and "without a GPU: the losses of a toy" in printed


def test_bench_imports_nothing_heavy():
    """The list of benchmarks is there at once: neither torch nor Unsloth is imported for it."""
    code = (
        "import sys, unsloth_patches.bench; print(sorted({'torch', 'unsloth'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd = ROOT, capture_output = True, text = True, check = True
    )
    assert done.stdout.strip() == "[]"
