# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""TRL's trainers, stock Unsloth beside the patches: SFT, DPO and GRPO (without vLLM).

The model of `bench families`' Llama 3 with LoRA, the forms of that benchmark by turns, on the same data
from the same start. Sampling has the same seed in all forms, so GRPO's rewards are equal until
rounding changes a sampled token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict

from . import harness
from .families import FAMILIES, FORMS, MEASURED, measured, train_forms
from .steps import compare_case

COMMAND = "python -m unsloth_patches bench trainers"
STEPS, STRETCH = 40, 10
CASES = {
    "SFT": {"path": "default", "median": 490, "batch": 2},
    "DPO": {"path": "default", "median": 160, "batch": 2},
    "GRPO": {"path": "default", "median": 100, "batch": 4},
}


def compare(name: str, quick: bool) -> Dict[str, Any]:
    """form -> what it measured of a trainer, in processes of its own: a trainer leaves settings behind
    that the next one reads. Raises RuntimeError with the end of its output if a process fails."""
    steps, stretch = (4, 2) if quick else (STEPS, STRETCH)
    case = {**CASES[name], "trainer": name, "steps": steps}
    if quick:
        case["median"] = 20
    runs = train_forms(
        FAMILIES["Llama 3"], {name: case}, stretch, quick, COMMAND, worker = "trainers_worker"
    )
    forms = compare_case(runs, name, FORMS)
    for form, found in forms.items():
        found["rewards"] = runs[form]["cases"][name]["rewards"]
        # Not relative to the loss, which is about nothing in GRPO.
        pairs = zip(forms["stock"]["losses"], found["losses"])
        found["furthest"] = max(abs(a - b) for a, b in pairs)
    return forms


def alike(a: list, b: list) -> int:
    """How many of the first values are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def show(trainers: Dict[str, Dict[str, Any]]) -> None:
    """Prints a row for each trainer; times and memory only where a GPU was measured."""
    columns = ["trainer", "loss differs by", "two stock runs by", "rewards equal for"]
    columns += MEASURED
    rows = []
    for name, forms in trainers.items():
        stock, patched = forms["stock"], forms["patched"]
        row = [name, *(f"{forms[form]['furthest']:.1e}" for form in ("patched", "stock again"))]
        steps = alike(stock["rewards"], patched["rewards"])
        row += [f"{steps} of {len(stock['rewards'])} steps" if stock["rewards"] else ""]
        rows.append(row + measured(stock, patched))
    harness.print_table("QLoRA rank 16 with each trainer", columns, rows)


def run(out: Path, quick: bool = False) -> int:
    """Trains with every trainer and writes JSON under out after each.

    Without a GPU a toy trains on Unsloth's CPU backend: losses are compared, times mean nothing.
    """
    import torch

    quick, trainers = quick or not torch.cuda.is_available(), {}
    for name in CASES:
        try:
            trainers[name] = compare(name, quick)
        except RuntimeError as error:
            print(error, file = sys.stderr)
            return 1
        print(f"{name}: done", flush = True)
        path = Path(out) / f"trainers_{harness.slug()}.json"
        harness.save_json(path, {"trainers": trainers}, COMMAND)
    show(trainers)
    return 0
