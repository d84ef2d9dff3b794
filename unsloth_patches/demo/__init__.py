# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The main job, end to end: a fine-tune on tool calls with the patches in.

``run`` is what ``python -m unsloth_patches demo`` calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional


def run(
    model: Optional[Path] = None,
    out: Path = Path("demo_output"),
    steps: Optional[int] = None,
    seed: int = 3407,
    prompts: int = 30,
) -> int:
    """Fine-tune on tool calls and show what was learned. Returns the exit code.

    model: folder of a local checkpoint. None makes a small random-weight model of Llama 3.1's
        architecture and a tokenizer, in ``out/model``.
    out: folder for the model, the adapter, loss.png and report.json; made where it is missing.
    steps: optimizer steps; None takes the recipe's (``train.SCRATCH`` or ``train.CHECKPOINT``).
    seed: order of the training data and its generated part. Held-out prompts are always the same.
    prompts: how many held-out prompts need one call (1 to 240); half as many more need two at once.

    Exit codes: 0 done, 2 an argument is wrong or a library is missing (one line says which and what to do), 130 Ctrl-C
    outside training. Ctrl-C during training ends it after the running step: the adapter is saved,
    the report is shown, and the code is 0. A second Ctrl-C leaves at once; the adapter is kept.
    """
    from rich.console import Console

    from .checks import DemoError, check_libraries, check_model, check_numbers, check_out

    console = Console()
    try:
        check_numbers(steps, prompts)
        if model is not None:
            check_model(model)
        check_out(out)
        check_libraries()
        from .job import fine_tune

        fine_tune(console, model, out, steps, seed, prompts)
    except DemoError as error:
        console.print(f"[red]demo:[/] {error}", highlight = False, soft_wrap = True)
        return 2
    except KeyboardInterrupt:
        console.print(f"\n[yellow]stopped[/] by Ctrl-C; what was finished until then is in {out}")
        return 130
    return 0
