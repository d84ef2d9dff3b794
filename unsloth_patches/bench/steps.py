# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Whole QLoRA steps on short sequences: stock Unsloth, the patches, and the patches with step graphs.

Random-weight Llamas through FastLanguageModel (4-bit) and SFTTrainer, batch 2, accumulation 4, lengths
log-normal from 32 to 2048: as a plain SFTTrainer batches them (padding-free), padded, packed, and for
other medians. Each form trains in a process of its own on the same data from the same start; stretches
of their steps alternate on the GPU. Of each case the first stretch, in which blocks are compiled and
graphs captured, is told apart from the others. Last, long rows that keep the GPU busy by themselves.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterable, List, Optional

from . import harness
from .fsdp2_checkpoint import fast_folder, make_checkpoint
from .models import MODELS, Model, start
from .steps_worker import PROFILED_FORM
from .train_turns import alternate, own_caches, set_off, working

FORMS = {"stock": "0", "patched": "0", "graphs": "auto"}  # form -> UNSLOTH_STEP_GRAPHS
MEDIAN, LONGEST, BATCH, ACCUMULATION = 490, 2048, 2, 4
STRETCH = 20  # steps between two turns
SKIPPED = 1  # steps at the start of a stretch that do not count, beside its very first


def cases(quick: bool) -> Dict[str, dict]:
    """name -> path, median length, batch and steps of a case."""
    if quick:
        return {p: {"path": p, "median": 30, "batch": 2, "steps": 4} for p in ("default", "padded")}
    found = {
        path: {"path": path, "median": MEDIAN, "batch": BATCH, "steps": 60}
        for path in ("default", "padded", "packing")
    }
    for median in (128, 256, 1024):
        found[f"default {median}"] = {**found["default"], "median": median, "steps": 40}
    # Every row is cut at the longest length.
    found["4 x 2048"] = {"path": "padded", "median": 64 * LONGEST, "batch": 4, "steps": 40}
    return found


def command(name: Optional[str]) -> str:
    """How to repeat the figures of a model."""
    chosen = f" --model {name}" if name in MODELS else " --quick"
    return f"python -m unsloth_patches bench steps{chosen}"


def job_for(form: str, name: str, folder: Path, quick: bool) -> dict:
    """What steps_worker is told. folder: where the checkpoint is, or will be when it is its turn."""
    return {
        "worker": "steps_worker",
        "form": form,
        "checkpoint": str(folder / "model"),
        "scratch": str(folder / f"scratch-{form}"),
        "longest": 64 if quick else LONGEST,
        "accumulation": ACCUMULATION,
        "cases": cases(quick),
        "stretch": 2 if quick else STRETCH,
        "command": command(name),
    }


def _environment(form: str, folder: Path) -> dict:
    return {
        **own_caches(form, folder),
        "UNSLOTH_PATCHES_DISABLE": "all" if form == "stock" else "",
        "UNSLOTH_STEP_GRAPHS": FORMS[form],
    }


def compare(name: str, model: Model, quick: bool) -> dict:
    """Trains all forms by turns; what each measured. Raises RuntimeError with the end of its output
    if a process fails; Ctrl-C ends it with the cases that all forms have completed."""
    runs: Dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix = "bench-steps-", dir = fast_folder()) as scratch:
        folder = Path(scratch)
        jobs = {form: job_for(form, name, folder, quick) for form in FORMS}
        with working(jobs, _environment, folder) as workers:
            make_checkpoint(folder / "model", model.shape, model.layers, model.tied)
            set_off(workers)
            for case, told in cases(quick).items():
                alternate(workers, told["steps"], 2 if quick else STRETCH, runs)
                medians = {
                    form: measured["step_seconds"]["median"]
                    for form, measured in compare_case(runs, case).items()
                }
                found = ", ".join(f"{form} {each * 1e3:.0f} ms" for form, each in medians.items())
                print(f"{case}: {told['steps']} steps of each form; {found}", flush = True)
            for case in cases(quick) if _has_gpu() else ():
                workers[PROFILED_FORM].go()
                runs[PROFILED_FORM] = workers[PROFILED_FORM].wait()
                print(f"{case}: profiled", flush = True)
    complete = [
        c for c in cases(quick) if all(c in runs.get(f, {}).get("cases", {}) for f in FORMS)
    ]
    if not complete:
        raise RuntimeError("bench steps: stopped before anything was measured")
    compared = {case: compare_case(runs, case) for case in complete}
    return {"model": name, "title": model.title, "cases": compared, "runs": runs}


def _has_gpu() -> bool:
    import torch
    return torch.cuda.is_available()


def compare_case(
    runs: Dict[str, dict],
    case: str,
    forms: Iterable[str] = FORMS,
) -> dict:
    """Step time, tokens a second, memory and losses of all forms in one case; ratios to stock."""
    result = {}
    for form in forms:
        found = runs[form]["cases"][case]
        step = harness.summarize(_timed(found))
        each = sum(found["tokens"]) / len(found["tokens"])
        result[form] = {
            "step_seconds": step,
            "tokens_per_second": each / step["median"],
            "first_step_seconds": found["first_step"],
            "peak_mib": found["peak_mib"],
            "reserved_mib": found["reserved_mib"],
            **_busy(found.get("busy"), each / step["median"]),
            "losses": found["losses"],
            "graphs": found["graphs"],
        }
    stock = result["stock"]
    for form in forms:
        mine = result[form]
        mine["speedup"] = stock["step_seconds"]["median"] / mine["step_seconds"]["median"]
        steps = zip(_timed(runs["stock"]["cases"][case]), _timed(runs[form]["cases"][case]))
        mine["speedup_by_step"] = harness.summarize([a / b for a, b in steps])
        pairs = zip(stock["losses"], mine["losses"])
        mine["largest_difference"] = max(abs(b - a) / (abs(a) or 1.0) for a, b in pairs)
    return result


def _timed(found: dict) -> List[float]:
    """Seconds of the steps that count; the same rows at the same place in every form."""
    later = [part[SKIPPED:] for part in found["stretches"][1:]]
    return [s for part in later for s in part] or [s for p in found["stretches"] for s in p]


def _busy(found: Optional[dict], tokens_per_second: float) -> dict:
    """How fast the GPU's own time would let the case be, and the share of a step in which it works."""
    if not found or not found["busy_seconds"]:
        return {}
    limit = found["tokens"] / found["busy_seconds"]
    return {"gpu_limit_tokens_per_second": limit, "gpu_busy_share": tokens_per_second / limit}


def show(payload: dict) -> None:
    """Prints the comparison; times and memory only where a GPU was measured."""
    rows: List[list] = []
    for case, forms in payload["cases"].items():
        for form, found in forms.items():
            row = [case, form, f"{found['losses'][-1]:.4f}", f"{found['largest_difference']:.1e}"]
            if found["peak_mib"]:
                row += [
                    f"{found['step_seconds']['median'] * 1e3:.0f}",
                    f"{found['tokens_per_second']:.0f}",
                    f"{found['speedup']:.2f}",
                    f"{found['first_step_seconds']:.1f}",
                    f"{found['peak_mib']:.0f}",
                    f"{found['graphs'].get('share', 0):.0%}",
                    f"{found.get('gpu_busy_share', 0):.0%}",
                ]
            rows.append(row)
    columns = ["case", "form", "last loss", "from stock's"]
    if len(rows[0]) > len(columns):
        columns += [
            "step ms",
            "tokens/s",
            "speedup",
            "first step s",
            "peak MiB",
            "replayed",
            "busy",
        ]
    harness.print_table(f"{payload['title']}, QLoRA rank 16, short sequences", columns, rows)


def plot(payloads: List[dict], path: Path) -> None:
    """Tokens a second against the median length, a line a form; one panel a model, below each other."""
    lines = {  # form -> color, name
        "stock": ("upstream", "stock"),
        "patched": ("peer", "patched, UNSLOTH_STEP_GRAPHS=0"),
        "graphs": ("ours", "patched"),
    }
    with harness.plot_style() as plt:
        figure, panels = plt.subplots(
            len(payloads), 1, figsize = (5.2, 3.4 * len(payloads)), squeeze = False
        )
        for payload, axes in zip(payloads, panels[:, 0]):
            measured = {
                int(case.split()[1]) if " " in case else MEDIAN: forms
                for case, forms in payload["cases"].items()
                if case.startswith("default")
            }
            for form, (color, label) in lines.items():
                places = sorted(measured)
                values = [measured[n][form]["tokens_per_second"] for n in places]
                axes.plot(places, values, marker = "o", color = harness.COLORS[color], label = label)
            places = [n for n in sorted(measured) if "gpu_busy_share" in measured[n]["graphs"]]
            limit = [measured[n]["graphs"]["gpu_limit_tokens_per_second"] for n in places]
            axes.plot(places, limit, linestyle = ":", color = "gray", label = "GPU busy all the time")
            axes.set_xscale("log", base = 2)
            axes.set_xticks(sorted(measured), sorted(measured))
            axes.set_ylim(bottom = 0)
            axes.set_xlabel("median length, tokens")
            axes.set_ylabel("tokens a second")
            axes.set_title(f"{payload['title']}, plain SFTTrainer")
            axes.legend()
        figure.savefig(path)


def run(
    out: Path,
    quick: bool = False,
    model: Optional[str] = None,
) -> int:
    """Compares each model, or the one named, and writes JSON and a plot under out.

    Without a GPU a toy trains on Unsloth's CPU backend: losses are compared, times mean nothing.
    """
    chosen = start("steps", MODELS, model, quick)
    quick = "toy" in chosen
    if not chosen:
        return 2
    payloads = []
    for name, shape in chosen.items():
        try:
            payloads.append(compare(name, shape, quick))
        except RuntimeError as error:
            print(error, file = sys.stderr)
            return 1
        harness.save_json(
            Path(out) / f"steps_{harness.slug()}_{name}.json", payloads[-1], command(name)
        )
        show(payloads[-1])
    if not quick:
        harness.draw("steps", plot, payloads, Path(out) / f"steps_{harness.slug()}.png")
    return 0
