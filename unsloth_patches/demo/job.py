# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The steps of the main job, in order, each with its progress and its output."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..console import status_listing
from . import report, train
from .checks import DemoError
from .data import Example, held_out, training_set
from .evaluate import Answer, answer, run_calls
from .model import save_scratch

PAIR_SHARE = 0.6  # of the generated training prompts, those that need two calls at once


def fine_tune(
    console: Console,
    model_folder: Optional[Path],
    out: Path,
    steps: Optional[int],
    seed: int,
    prompts: int,
) -> None:
    """The whole job; the arguments are those of ``demo.run``, checked. Raises DemoError."""
    started = time.monotonic()
    _import_unsloth(console)
    recipe = train.SCRATCH if model_folder is None else train.CHECKPOINT
    recipe = replace(recipe, steps = steps or recipe.steps)
    if model_folder is None:
        with console.status("making a random model and training its tokenizer …"):
            model_folder = save_scratch(out / "model")
    with console.status(f"loading {model_folder} in 4 bits …"):
        model, tokenizer = train.load(model_folder.resolve(), recipe)  # the adapter names it
    settings = _settings(model, tokenizer, model_folder, recipe, seed)
    console.print(report.settings_table(settings))
    _require_4bit(settings["layers in 4 bits"], model_folder)
    losses: List[float] = []
    bar = _bar(console)
    task = bar.add_task("training", total = recipe.steps, note = "")

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        bar.update(task, completed = step, note = f"loss {loss:.3f}")
        if not console.is_terminal and step % max(1, recipe.steps // 20) == 0:
            # A log file shows no bar.
            console.print(f"step {step} of {recipe.steps}: loss {loss:.3f}")

    with console.status("rendering and tokenizing the conversations …"):
        conversations = training_set(recipe.steps * recipe.batch_size, seed, PAIR_SHARE)
        trainer = train.make_trainer(model, tokenizer, conversations, out, recipe, seed, on_step)
    exams = {"one call": held_out(prompts), "two calls": held_out((prompts + 1) // 2, pairs = True)}
    before = _examine(console, model, tokenizer, exams, recipe, "before training")
    settings["trained"] = _train(console, trainer, bar, losses)
    adapter = out / "adapter"
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)

    report.write(out, settings, losses, before, {})  # for a second Ctrl-C, which skips what follows
    after = _examine(console, model, tokenizer, exams, recipe, "after training")
    settings["whole run"] = f"{time.monotonic() - started:.0f} s"
    report.write(out, settings, losses, before, after)
    _show(console, settings, losses, before, after, out)


def _import_unsloth(console: Console) -> None:
    """Settings that libraries read when they are imported, then Unsloth with the patches."""
    for name, value in (
        ("HF_HUB_OFFLINE", "1"),  # everything is local: no waiting for a hub that is not needed
        ("OMP_WAIT_POLICY", "PASSIVE"),  # threads that spin slow each other down on a busy host
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("UNSLOTH_DISABLE_STATISTICS", "1"),
    ):
        os.environ.setdefault(name, value)
    # It only says that an optional kernel for CPUs was not downloaded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with console.status("importing unsloth with the patches (about 15 s) …"):
        import unsloth_patches  # noqa: F401, I001
        import unsloth  # noqa: F401
        import unsloth.chat_templates  # noqa: F401

        from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    needed = next(row for row in unsloth_patches.status() if row.name == "parallel-tool-calls")
    if needed.state not in ("applied", "upstreamed"):
        raise DemoError(
            f"the patch {needed.name} is {needed.state} ({needed.reason}), and the demo trains on its "
            "joined calls. `python -m unsloth_patches doctor` says more."
        )


def _settings(model, tokenizer, folder: Path, recipe: train.Recipe, seed: int) -> Dict[str, Any]:
    import torch

    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": folder,
        "device": device,
        "vocabulary": len(tokenizer),
        "layers in 4 bits": sum(_is_4bit(module) for module in model.modules()),
        "trained parameters": f"{trainable:,}",
        "steps x batch": f"{recipe.steps} x {recipe.batch_size}",
        "optimizer": "Muon (LoRA), AdamW (embeddings)" if recipe.from_scratch else "AdamW",
        "seed": seed,
    }


def _require_4bit(layers: int, folder: Path) -> None:
    """Unsloth loads 16 bits where bitsandbytes has no kernels for the device, and says one line."""
    if not layers:
        raise DemoError(
            f"Unsloth refused 4 bits and loaded {folder} in 16: LoRA on that is not QLoRA, which this "
            "demo is about. `python -m unsloth_patches doctor` says why, and names the bitsandbytes to install."
        )


def _is_4bit(module) -> bool:
    # PEFT's LoRA layer around it has the same class name.
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith(
        "bitsandbytes"
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width = 20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console = console,
    )


def _train(console: Console, trainer, bar: Progress, losses: List[float]) -> str:
    """Train until done or Ctrl-C; returns one line on what happened."""
    started = time.monotonic()
    with train.stop_on_interrupt(trainer) as state, bar:
        trainer.train()
    line = f"{len(losses)} steps in {time.monotonic() - started:.0f} s"
    if not state["stopped"]:
        return line
    console.print(
        "[yellow]stopped by Ctrl-C[/]: saving what was trained. Ctrl-C again leaves at once."
    )
    return line + ", stopped by Ctrl-C"


def _examine(
    console: Console,
    model,
    tokenizer,
    exams: Dict[str, List[Example]],
    recipe: train.Recipe,
    when: str,
) -> Dict[str, List[Answer]]:
    with _bar(console) as bar:
        total = sum(map(len, exams.values()))
        task = bar.add_task(f"prompts {when}", total = total, note = "")

        def advance(count: int) -> None:
            bar.advance(task, count)

        return {
            kind: answer(model, tokenizer, examples, recipe.max_new_tokens, progress = advance)
            for kind, examples in exams.items()
        }


def _show(
    console: Console,
    settings: Dict[str, Any],
    losses: List[float],
    before: Dict[str, List[Answer]],
    after: Dict[str, List[Answer]],
    out: Path,
) -> None:
    import unsloth_patches

    console.print(status_listing(unsloth_patches.status()))
    console.print(report.settings_table(settings))
    if losses:
        width = min(console.width, 100)
        console.print(report.terminal_plot(losses, width = width, color = console.is_terminal))
    for kind, answers in after.items():
        console.print(report.answers_table(kind, answers))
    for kind, answers in after.items():
        shown = next((a for a in answers if a.right), answers[0])
        console.print(report.call_table(kind, shown, run_calls(shown)))
    console.print(report.score_table(before, after))
    console.print(report.files_table(out, settings["model"]))
