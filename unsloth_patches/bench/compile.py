# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""QLoRA steps with compiled blocks: stock Unsloth and the patches, and stock without compiling.

Eight layers of Llama-3.1-8B's shape with random weights, 4-bit, LoRA of rank 16, gradient
checkpointing "unsloth", batch 4. Each run is a process of its own, measured in the order of RUNS;
"patched" has all patches in, in strict mode; "two graphs" too, but for a block's one graph. "cold"
begins with empty caches; "saved" too, but for the cache that an earlier run saved. Steps without
compiling are taken at the end of stock's first run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

from . import DONE, FAILED, compile_attention, harness
from .fsdp2_checkpoint import fast_folder, make_checkpoint
from .models import MODELS
from .train import free_gpu

COMMAND = "python -m unsloth_patches bench compile"
LENGTHS = (512, 1024, 2048, 4096)
FIRST_LENGTH = 2048
ROUNDS = 6  # timed steps at each length in each process
LIMIT_S = 300  # for one process: a hang must not hold the GPU


class Run(NamedTuple):
    """variant: what runs. phase: which caches it finds. cache: what it does with the saved one."""

    variant: str
    phase: str
    cache: str = ""
    uncompiled: bool = False


RUNS = (
    Run("stock", "cold", uncompiled = True),
    Run("patched", "cold", cache = "save"),
    Run("two graphs", "cold"),
    Run("patched", "saved", cache = "load"),
    # Again, for the first steps: processes of one kind differ by a quarter.
    Run("stock", "cold"),
    Run("patched", "cold"),
    Run("patched", "saved", cache = "load"),
)
ENVIRONMENTS: Dict[str, Dict[str, str]] = {
    "stock": {"UNSLOTH_PATCHES_DISABLE": "all"},
    "patched": {"UNSLOTH_BLOCK_FULLGRAPH": "strict"},
    "two graphs": {"UNSLOTH_BLOCK_FULLGRAPH": "strict", "UNSLOTH_CHECKPOINT_ONE_GRAPH": "0"},
}
MEMORY = ("peak_mib", "above_weights_mib", "reserved_mib")
COLORS = {
    "uncompiled": "baseline",
    "stock": "upstream",
    "two graphs": "peer",
    "patched": "ours",
}


def environment(chosen: Run, home: Path) -> Dict[str, str]:
    """This process's environment, with caches on disk of its own, empty."""
    caches = home / "caches"
    (caches / "tmp").mkdir(parents = True)
    return {
        **os.environ,
        # Unsloth removes TORCHINDUCTOR_CACHE_DIR; without it Inductor's folder is below TMPDIR.
        "TMPDIR": str(caches / "tmp"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
        **ENVIRONMENTS[chosen.variant],
    }


class Worker:
    """A process of compile_worker. It imports Unsloth at once; it loads and measures when told to."""

    def __init__(self, number: int, chosen: Run, folder: Path):
        self.name = f"{chosen.variant}, {chosen.phase}"
        self._home = folder / f"run-{number}"
        self._home.mkdir()
        job = {
            **chosen._asdict(),
            "checkpoint": str(folder / "model"),
            "batch": MODELS["llama-8b-8-layers"].batch,
            "length": FIRST_LENGTH,
            "lengths": LENGTHS,
            "rounds": ROUNDS,
            "cache_folder": str(folder / "saved"),
            "ready": str(self._home / "ready"),
            "go": str(self._home / "go"),
        }
        self._result = self._home / "result.json"
        described = self._home / "job.json"
        described.write_text(json.dumps(job), encoding = "utf-8")
        module = f"{__package__}.compile_worker"
        with (self._home / "log.txt").open("w", encoding = "utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(described), str(self._result)],
                env = environment(chosen, self._home),
                stdout = log,
                stderr = subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        """Until it has imported. Raises RuntimeError if it ends before, or takes too long."""
        end = time.monotonic() + LIMIT_S
        while not (self._home / "ready").exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(self._failure("did not import Unsloth"))
            time.sleep(0.2)

    def measure(self) -> dict:
        """What it saw when it was its turn. Raises RuntimeError with the end of its output."""
        (self._home / "go").touch()
        try:
            code = self._process.wait(timeout = LIMIT_S)
        except subprocess.TimeoutExpired:
            code = f"no result in {LIMIT_S} s"
        if code or not self._result.is_file():
            raise RuntimeError(self._failure(f"failed ({code})"))
        return json.loads(self._result.read_text(encoding = "utf-8"))

    def _failure(self, what: str) -> str:
        log = (self._home / "log.txt").read_text(encoding = "utf-8", errors = "replace")
        tail = "\n".join(log.splitlines()[-25:])
        return f"bench compile: {self.name} {what}:\n{tail}"

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def measure(runs) -> Iterator[dict]:
    """What every run in turn saw; one that fails is reported and left out.

    All processes import Unsloth first, side by side, and then load and measure one after the other,
    so that the minutes of importing are spent once and nothing else runs while one measures.
    """
    model = MODELS["llama-8b-8-layers"]
    with tempfile.TemporaryDirectory(prefix = "bench-compile-", dir = fast_folder()) as scratch:
        folder, workers = Path(scratch), []
        try:
            workers += [Worker(number, chosen, folder) for number, chosen in enumerate(runs)]
            make_checkpoint(folder / "model", model.shape, model.layers, model.tied)
            free_gpu()
            ready = [worker for worker in workers if _is_ready(worker)]
            for worker in ready:
                try:
                    seen = worker.measure()
                except RuntimeError as error:
                    print(error, file = sys.stderr)
                    continue
                first = seen["seconds"]["first_step"]
                print(f"{worker.name}: first step {first:.1f} s", flush = True)
                yield seen
        finally:
            for worker in workers:
                worker.end()


def _is_ready(worker: Worker) -> bool:
    try:
        worker.wait_until_ready()
        return True
    except RuntimeError as error:
        print(error, file = sys.stderr)
        return False


def attention(out: Path) -> bool:
    """SDPA beside flex attention in a process of its own, as ``compile_attention_<gpu>.json``."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "attention.json"
        worker = [sys.executable, "-m", f"{__package__}.compile_attention", str(written)]
        try:
            code = subprocess.run(worker, timeout = LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            code = f"no result in {LIMIT_S} s"
        if code or not written.is_file():
            print(f"bench compile: the attention comparison failed ({code})", file = sys.stderr)
            return False
        found = json.loads(written.read_text(encoding = "utf-8"))
    harness.save_json(out / f"compile_attention_{harness.slug()}.json", found, COMMAND)
    compile_attention.show(found)
    return True


def run(out: Path, quick: bool = False) -> int:
    """Measures, prints tables, writes ``compile_<gpu>.json`` and ``.png`` under out, and
    ``compile_attention_<gpu>.json``.

    Without a GPU: graphs, breaks and recompilations of a toy block, traced with aot_eager.
    quick: one cold run of stock and of the patches, no attention.
    """
    import torch

    if not torch.cuda.is_available():
        return on_cpu(Path(out))
    chosen = [run._replace(cache = "") for run in RUNS[:2]] if quick else RUNS
    compared = quick or attention(Path(out))
    path = Path(out) / f"compile_{harness.slug()}.json"
    payload = {"title": MODELS["llama-8b-8-layers"].title, "complete": False, "runs": []}
    for seen in measure(chosen):
        payload["runs"].append(seen)
        payload["complete"] = len(payload["runs"]) == len(chosen)
        harness.save_json(path, payload, COMMAND)  # what was measured outlives a later crash
    if payload["runs"]:
        show(payload)
        harness.draw("compile", plot, payload, path.with_suffix(".png"))
    return DONE if compared and payload["complete"] else FAILED


def show(payload: dict) -> None:
    """Prints one row a run, then step times by length."""
    rows = []
    for entry in payload["runs"]:
        seconds, seen = entry["seconds"], entry["all_lengths"]
        two = seconds["first_step"] + seconds["second_step"]
        row = [entry["variant"], entry["phase"], seconds["first_step"], two]
        row += [seen["compile_seconds"], seen["graphs"], seen["breaks"]]
        row += [seen["recompilations"], seconds.get("load_cache"), entry["losses"][0]]
        rows.append(row)
    columns = ["variant", "caches", "first step s", "first two s", "compiling s in all"]
    columns += ["graphs", "breaks", "recompiled", "load cache s", "first loss"]
    harness.print_table(f"{payload['title']}, QLoRA, batch 4 x {FIRST_LENGTH}", columns, rows)
    rows = []
    for variant, phase, lengths in measured(payload):
        for length, at in lengths.items():
            ms = harness.summarize(at["ms"])
            spread = f"{ms['q1']:.1f} - {ms['q3']:.1f}"
            row = [variant, phase, str(length), f"{ms['median']:.1f}", spread]
            rows.append(row + [at.get(key) for key in MEMORY])
    columns = ["variant", "caches", "length", "step ms", "quartiles"]
    columns += ["peak MiB", "above weights", "reserved MiB"]
    harness.print_table("Steps of batch 4 by length", columns, rows)


def measured(payload: dict) -> Iterator[Tuple[str, str, dict]]:
    """(variant, phase, what was measured by length), steps without compiling among them."""
    for entry in payload["runs"]:
        yield entry["variant"], entry["phase"], entry["lengths"]
        if entry["uncompiled"]:
            yield "uncompiled", entry["phase"], entry["uncompiled"]


def at(payload: dict, variant: str, length: str) -> List[dict]:
    """What each process of a variant measured at a length."""
    return [lengths[length] for name, _, lengths in measured(payload) if name == variant]


def plot(payload: dict, path: Path) -> None:
    """Seconds of the first two steps, step time and peak memory by length."""
    variants = [v for v in COLORS if v in {name for name, _, _ in measured(payload)}]
    lengths = list(payload["runs"][0]["lengths"])
    medians, peaks = {}, {}
    for variant in variants:
        found = [at(payload, variant, n) for n in lengths]
        medians[variant] = [harness.quantile(sum((f["ms"] for f in fs), []), 0.5) for fs in found]
        peaks[variant] = [max(f.get("peak_mib", 0.0) for f in fs) / 1024 for fs in found]
    with harness.plot_style() as plt:
        figure, (top, middle, bottom) = plt.subplots(3, 1, figsize = (harness.WIDTH, 9))
        names = [f"{r['variant']}, {r['phase']}".replace(" ", "\n") for r in payload["runs"]]
        two = [r["seconds"]["first_step"] + r["seconds"]["second_step"] for r in payload["runs"]]
        colors = [harness.COLORS[COLORS[r["variant"]]] for r in payload["runs"]]
        bars = top.bar(range(len(names)), two, color = colors)
        top.bar_label(bars, [f"{value:.1f}" for value in two], fontsize = 7)
        top.set_xticks(range(len(names)), names)
        top.set_ylabel("seconds")
        top.set_title("First two steps, by caches found")
        harness.grouped_bars(middle, lengths, medians, "ms", COLORS, "{:.0f}")
        middle.set_title("Step time by length, batch 4")
        harness.grouped_bars(bottom, lengths, peaks, "GiB", COLORS, "{:.1f}")
        bottom.set_title("Peak memory by length, batch 4")
        for axes in (middle, bottom):
            axes.set_xlabel("length, tokens")
        figure.savefig(path)


def on_cpu(out: Path) -> int:
    """What a machine without a GPU can show: graphs of a toy block, with and without a break."""
    from .compile_toy import graphs_of_a_toy

    print(
        "bench compile: torch sees no CUDA GPU; times and memory cannot be measured, and Unsloth's "
        "blocks do not compile here. Graphs of a toy block, traced with aot_eager:"
    )
    found = graphs_of_a_toy()
    harness.save_json(out / "compile_cpu.json", {"toy": found}, COMMAND)
    rows = [
        [name, r["graphs"], r["breaks"], r["recompilations"], "; ".join(r["break_places"])[:90]]
        for name, r in found.items()
    ]
    columns = ["block", "graphs", "breaks", "recompiled", "where"]
    harness.print_table("A toy block at four lengths", columns, rows)
    return DONE
