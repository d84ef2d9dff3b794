# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Whole training steps, stock Unsloth beside the patches: step time, memory, losses, where the time goes.

Random-weight models through FastLanguageModel and SFTTrainer, batch 4 x 2048, QLoRA of rank 16 (of the
1B shape also with blocks that keep their activations, 16-bit LoRA and full fine-tuning), shares of ignored
labels. Each form trains in a process of its own, on the same data from
the same start; stretches of their steps alternate on the GPU. They start at the same time, with
empty caches of compiled code. A third process is stock once more, for the losses of the first share.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

from . import harness
from .fsdp2_checkpoint import fast_folder, make_checkpoint
from .models import MODELS, TRAINED_OTHERWISE, Model, start
from .train_plot import plot
from .train_turns import Worker, alternate, own_caches, set_off, working

FORMS = ("stock", "patched")
CONTROL = "stock again"  # how far two runs of stock lie apart, at the first share
FLOAT32 = "float32"  # the same training written out in float32, see train_float32
SHARES = {"half": (0.5, 60), "a third": (1 / 3, 60), "none": (0.0, 60)}  # ignored share, steps
QUICK_SHARES = {name: (ignored, 6) for name, (ignored, _) in SHARES.items()}
PROFILED = "half"
STRETCH = 15  # steps between two turns
SKIPPED = 2  # steps at the start of a stretch that do not count, beside its very first
PROFILE_STEPS = 3
LOSS_BOUND = 1e-3
EVERY_MODEL = {**MODELS, **TRAINED_OTHERWISE}


def command(name: Optional[str]) -> str:
    """How to repeat the figures of a model."""
    chosen = f" --model {name}" if name in EVERY_MODEL else " --quick"
    return f"python -m unsloth_patches bench train{chosen}"


def job_for(form: str, name: str, model: Model, folder: Path, shares: dict) -> dict:
    """What train_worker is told. folder: where the checkpoint is, or will be when it is its turn."""
    return {
        "form": form,
        "started": time.time(),
        "checkpoint": str(folder / "model"),
        "scratch": str(folder / f"scratch-{form.replace(' ', '-')}"),
        "batch": model.batch,
        "length": model.length,
        "options": model.options,
        "shares": shares,
        "stretch": STRETCH,
        "profiled": PROFILED,
        "profile_steps": PROFILE_STEPS,
        "command": command(name),
    }


def _environment(form: str, folder: Path) -> dict:
    return {
        **own_caches(form, folder),
        "UNSLOTH_PATCHES_DISABLE": "" if form == "patched" else "all",
    }


def compare(name: str, model: Model, shares: dict) -> dict:
    """Trains both forms by turns; what each measured, and what that says about each share.

    Ctrl-C ends it with the shares that both forms have completed. Raises RuntimeError with the end
    of its output if a process fails.
    """
    runs: Dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix = "bench-train-", dir = fast_folder()) as scratch:
        folder = Path(scratch)
        jobs = {form: job_for(form, name, model, folder, shares) for form in FORMS}
        control = {PROFILED: shares[PROFILED]}
        jobs[CONTROL] = job_for(CONTROL, name, model, folder, control)
        with working(jobs, _environment, folder) as workers:
            make_checkpoint(folder / "model", model.shape, model.layers, model.tied)
            free_gpu()
            _take_turns(workers, shares, runs)
    complete = [s for s in shares if all(s in runs.get(f, {}).get("shares", {}) for f in FORMS)]
    if not complete:
        raise RuntimeError("bench train: stopped before anything was measured")
    compared = {share: compare_share(runs, share, model) for share in complete}
    found = {"model": name, "title": model.title, "options": model.options}
    return {**found, "shares": compared, "runs": runs}


def _take_turns(workers: Dict[str, Worker], shares: dict, runs: Dict[str, dict]) -> None:
    """Import, load and compile at once; then one process at a time. Fills runs as results come."""
    set_off(workers)  # to the first steps, which have compiled everything
    for share, (_, steps) in shares.items():
        alternate(workers, steps, STRETCH, runs)
        if share == PROFILED:
            workers.pop(CONTROL).stop()
        print(f"{share} ignored: {steps} steps of each form", flush = True)
    for worker in workers.values():  # the profile, which is sorted at leisure
        worker.go()
        worker.wait()
    for worker in workers.values():
        worker.go()
    for form, worker in workers.items():
        runs[form] = worker.wait()
        worker.go()


def free_gpu() -> None:
    import torch
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed_steps(run: dict, share: str) -> List[List[float]]:
    """Seconds of the steps that count, a list for each stretch."""
    return [part[SKIPPED:] for part in run["shares"][share]["stretches"] if len(part) > SKIPPED]


def compare_share(runs: Dict[str, dict], share: str, model: Model) -> dict:
    """Step time, tokens a second, memory and losses of both forms at one share of ignored labels.

    Times are pooled over a form's stretches; stretch_speedups says what each pair of neighbouring
    stretches gave by itself.
    """
    result, medians = {}, {}
    for form in FORMS:
        found, parts = runs[form]["shares"][share], timed_steps(runs[form], share)
        step = harness.summarize([seconds for part in parts for seconds in part])
        medians[form] = [harness.quantile(part, 0.5) for part in parts]
        result[form] = {
            "step_seconds": step,
            "tokens_per_second": model.batch * model.length / step["median"],
            **{key: found[key] for key in ("peak_mib", "reserved_mib", "graphs", "losses")},
        }
    stock, patched = (result[form] for form in FORMS)
    result["speedup"] = stock["step_seconds"]["median"] / patched["step_seconds"]["median"]
    result["stretch_speedups"] = [a / b for a, b in zip(medians["stock"], medians["patched"])]
    result.update(differences(stock["losses"], patched["losses"]))
    again = runs.get(CONTROL, {}).get("shares", {}).get(share)
    if again is not None:
        result[CONTROL] = differences(stock["losses"], again["losses"])
    return result


def differences(stock: List[float], other: List[float]) -> dict:
    """How far another run's losses are from stock's, relative: at each step, and at most."""
    each = [abs(b - a) / abs(a) for a, b in zip(stock, other)]
    return {"relative_difference": each, "largest_difference": max(each)}


def run(
    out: Path,
    quick: bool = False,
    model: Optional[str] = None,
    float32: bool = False,
) -> int:
    """Compares each model, or the one named, and writes JSON and a plot under out.

    Without a GPU a toy trains on Unsloth's CPU backend: losses are compared, times mean nothing.
    float32: instead, adds the losses of float32 to what an earlier run wrote there; without a model
    named, to those that it can.
    """
    chosen = start("train", EVERY_MODEL, model, quick)
    quick = "toy" in chosen
    if not chosen:
        return 2
    path_of = lambda name: Path(out) / f"train_{harness.slug()}_{name}.json"  # noqa: E731
    if float32 and model is None:
        chosen = _in_float32(chosen, path_of)
        if not chosen:
            return 1
    for name, shape in chosen.items():
        path = path_of(name)
        try:
            if float32:
                _add_float32(path, name, shape)
                continue
            shares = QUICK_SHARES if quick else SHARES
            if shape.options:
                shares = {PROFILED: shares[PROFILED]}
            payload = compare(name, shape, shares)
        except RuntimeError as error:
            print(error, file = sys.stderr)
            return 1
        harness.save_json(path, payload, command(name))
        show(payload)
    if not quick:
        draw(Path(out), harness.slug())
    return 0


def _in_float32(chosen: Dict[str, Model], path_of: Callable[[str], Path]) -> Dict[str, Model]:
    """Those that --float32 can do; says on stderr why the others are left out."""
    refusals = {name: _float32_refusal(path_of(name), name, m) for name, m in chosen.items()}
    for refusal in filter(None, refusals.values()):
        print(f"bench train --float32: left out: {refusal}", file = sys.stderr)
    return {name: model for name, model in chosen.items() if not refusals[name]}


def _float32_refusal(path: Path, name: str, model: Model) -> str:
    """Why there are no float32 losses for this model's results, and what to do; "" where there are."""
    if model.options:
        return (
            f"{name} ({model.title}) is no QLoRA, the only one written out in float32; name "
            "another, as --model llama-1b"
        )
    kind = model.shape.get("kind", "Llama")
    if kind != "Llama":
        return (
            f"{name} is a {kind}, and only Llama is written out in float32; name one of those, "
            "as --model llama-1b"
        )
    return "" if path.exists() else f"no {path}; run `{command(name)} --out {path.parent}` first"


def _add_float32(path: Path, name: str, model: Model) -> None:
    """Adds the losses of float32 to a results file, share by share. Raises RuntimeError where it
    cannot."""
    from .train_float32 import distances, reference

    refusal = _float32_refusal(path, name, model)
    if refusal:
        raise RuntimeError(f"bench train --float32: {refusal}")
    payload = json.loads(path.read_text(encoding = "utf-8"))
    shares = {
        share: (SHARES[share][0], len(found["stock"]["losses"]))
        for share, found in payload["shares"].items()
    }
    job = lambda folder: job_for(FLOAT32, name, model, folder, shares)  # noqa: E731
    make = lambda folder: make_checkpoint(folder, model.shape, model.layers, model.tied)  # noqa: E731
    with tempfile.TemporaryDirectory(prefix = "bench-train-") as caches:
        for share, losses in reference(job, _environment(FLOAT32, Path(caches)), make):
            found = payload["shares"][share]
            found[FLOAT32] = distances(losses, {form: found[form]["losses"] for form in FORMS})
            payload[f"{FLOAT32}_environment"] = harness.environment(f"{command(name)} --float32")
            path.write_text(json.dumps(payload, indent = 1) + "\n", encoding = "utf-8")
            print(_float32_line(share, found[FLOAT32]), flush = True)


def _float32_line(share: str, found: dict) -> str:
    far = ", ".join(
        f"{form} {found[form]['largest']:.1e} (mean {found[form]['mean']:.1e})" for form in FORMS
    )
    near = f"patched is nearer at {found['patched_nearer']} of {len(found['losses'])} steps"
    return f"{share} ignored, from float32 at most: {far}; {near}"


def show(payload: dict) -> None:
    """Prints the comparison and the breakdown; times and memory only where a GPU was measured."""
    measured = payload["shares"][PROFILED]["stock"]["peak_mib"] > 0
    rows = []
    for share, result in payload["shares"].items():
        for form in FORMS:
            part = result[form]
            step = part["step_seconds"]
            row = [share, form, f"{part['losses'][0]:.4f}", f"{part['losses'][-1]:.4f}"]
            row += [f"{result['largest_difference']:.1e}" if form == "patched" else ""]
            if measured:
                row += [
                    f"{step['median'] * 1e3:.1f}",
                    f"{step['q1'] * 1e3:.1f} - {step['q3'] * 1e3:.1f}",
                    f"{part['tokens_per_second']:.0f}",
                    f"{part['peak_mib']:.0f}",
                    f"{result['speedup']:.3f}" if form == "patched" else "",
                ]
            rows.append(row)
        if CONTROL in result:
            apart = f"{result[CONTROL]['largest_difference']:.1e}"
            rows.append([share, CONTROL, "", "", apart, *[""] * (5 * measured)])
    columns = ["ignored", "form", "first loss", "last loss", "differ by at most"]
    if measured:
        columns += ["step ms", "quartiles", "tokens/s", "peak MiB", "speedup"]
    way = "" if payload["options"] else ", QLoRA rank 16"
    harness.print_table(payload["title"] + way, columns, rows)
    for share, result in payload["shares"].items():
        if FLOAT32 in result:
            print(_float32_line(share, result[FLOAT32]))
    if not measured:
        return
    for form, found in payload["runs"].items():
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in found["seconds"].items())
        print(f"{form}: seconds {seconds}")
    for form, ms in breakdowns(payload).items():
        print(f"{form}: " + ", ".join(f"{kind} {value:.1f}" for kind, value in ms.items()) + " ms")


def breakdowns(payload: dict) -> Dict[str, Dict[str, float]]:
    """form -> kind -> milliseconds of a step with half the labels ignored; {} without a profile.

    Idle is what the step took without a profiler, less what the GPU was busy under it.
    """
    found = {}
    for form in FORMS:
        profile = payload["runs"][form].get("profile")
        if profile is None:
            return {}
        step = payload["shares"][PROFILED][form]["step_seconds"]["median"] * 1e3
        found[form] = {**profile["ms"], "idle": max(0.0, step - profile["busy_ms"])}
    return found


def draw(out: Path, gpu: str) -> None:
    """Draws train_<gpu>.png from the results files of all models under out."""
    payloads = [
        json.loads(p.read_text()) for p in sorted(out.glob(f"train_{gpu}_*.json"), reverse = True)
    ]
    results = [(p, breakdowns(p)) for p in payloads]
    harness.draw("train", plot, results, out / f"train_{gpu}.png", LOSS_BOUND)
