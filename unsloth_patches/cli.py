# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The command line: ``python -m unsloth_patches status | doctor | demo | plan | bench``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Iterator, Optional

import typer
from rich.console import Console

from . import __version__
from .bench import BENCHMARKS, FAILED, NOT_HERE
from .console import doctor_listing, status_listing, verbose_status_listing
from .registry import SUPPORTED_UPSTREAM

app = typer.Typer(
    name = "unsloth-patches",
    help = "Patches for Unsloth: what is in, whether this machine is ready, a demo, benchmarks.",
    no_args_is_help = True,
    add_completion = False,
    pretty_exceptions_enable = False,
)
console = Console()


def _import_unsloth() -> Optional[Exception]:
    """Import Unsloth with its banner kept back; returns why it does not import, or None."""
    os.environ["UNSLOTH_PATCHES_QUIET"] = "1"
    banner = io.StringIO()
    try:
        with contextlib.redirect_stdout(banner), contextlib.redirect_stderr(banner):
            import unsloth  # noqa: F401
            import unsloth.chat_templates  # noqa: F401
    except Exception as error:
        return error
    return None


def _absent(error: Optional[Exception]) -> str:
    """The package whose absence an error is about, or an empty string."""
    if not isinstance(error, ImportError):
        return ""
    # Unsloth itself raises a plain ImportError where torch is absent.
    named = error.name if isinstance(error, ModuleNotFoundError) else ""
    packages = ((named or "").partition(".")[0], "unsloth", "torch")
    return next((package for package in packages if package and not _installed(package)), "")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is imported, and has no spec
        return True


def _reason(error: Optional[Exception]) -> str:
    """Why something does not import, with the remedy where a package is absent."""
    package = _absent(error)
    if not package:
        return f"{type(error).__name__}: {error}" if error else ""
    wanted = f"unsloth=={SUPPORTED_UPSTREAM[-1]}" if package == "unsloth" else package
    return f"this Python ({sys.executable}) has no {package}: pip install {wanted}"


@contextlib.contextmanager
def _naming_what_is_absent(name: str) -> Iterator[None]:
    """Within it one line, not a traceback, tells which package a benchmark lacks."""
    try:
        yield
    except ImportError as error:
        if not _absent(error):
            raise
        console.print(f"[red]bench {name} did not run[/]: {_reason(error)}", soft_wrap = True)
        raise typer.Exit(FAILED)


@app.command()
def status(
    as_json: bool = typer.Option(False, "--json", help = "Print JSON, with all that is known."),
    verbose: bool = typer.Option(False, help = "Show what each patch replaces, and whole reasons."),
) -> None:
    """Import Unsloth and show each patch, its state and what it gives; then why some are not in."""
    from . import status as current

    with console.status("importing unsloth …"):
        error = _import_unsloth()
    if _absent(error) and not as_json:
        # No patch can be in, and a list of all of them would push the reason off the screen.
        console.print(f"[red]no patch is in[/]: {_reason(error)}", soft_wrap = True)
        raise typer.Exit(1)
    rows = current()
    if as_json:
        patches = [row._asdict() for row in rows]
        print(
            json.dumps(
                {"version": __version__, "unsloth_error": _reason(error), "patches": patches},
                indent = 2,
            )
        )
    else:
        console.print(verbose_status_listing(rows) if verbose else status_listing(rows))
        if error:
            console.print(f"[red]unsloth does not import here:[/] {_reason(error)}")
            console.print("`python -m unsloth_patches doctor` says what is missing.")
    raise typer.Exit(1 if error or any(row.state == "failed" for row in rows) else 0)


@app.command()
def doctor(
    as_json: bool = typer.Option(False, "--json", help = "Print JSON instead of text."),
) -> None:
    """Check versions, device and patches without importing Unsloth, and say what to do."""
    from .doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent = 2))
    else:
        console.print(doctor_listing(findings))
    raise typer.Exit(1 if any(finding.verdict == "problem" for finding in findings) else 0)


@app.command()
def demo(
    model: Optional[Path] = typer.Option(
        None, help = "Folder of a local checkpoint to train. Default: make a small random model."
    ),
    out: Path = typer.Option(
        Path("demo_output"), help = "Folder for the adapter, the plot and the report."
    ),
    steps: Optional[int] = typer.Option(
        None, help = "Optimizer steps. Default: 600 for the small model, 60 for a checkpoint."
    ),
    seed: int = typer.Option(3407, help = "Order of the training data."),
    prompts: int = typer.Option(30, help = "Held-out prompts with one call; half as many with two."),
) -> None:
    """Fine-tune a model on tool calls with the patches in, and show what it learned."""
    from .demo import run
    raise typer.Exit(run(model, out, steps = steps, seed = seed, prompts = prompts))


@app.command()
def plan(
    model: Optional[Path] = typer.Option(
        None, help = "config.json, or a folder that holds one. Required without --table."
    ),
    gpus: Optional[int] = typer.Option(
        None, help = "GPUs that share the frozen weights. Required without --table."
    ),
    memory: float = typer.Option(79.0, help = "Memory of one GPU, GiB; 79 is an 80 GB card."),
    tokens: int = typer.Option(4096, help = "Tokens of one micro-batch on one GPU."),
    rank: int = typer.Option(16, help = "LoRA rank, on all seven linears of a block."),
    checkpointing: str = typer.Option("unsloth", help = "unsloth, on or off."),
    host: Optional[float] = typer.Option(
        None, help = "Memory of one host, GiB. Default: not limited."
    ),
    gpus_per_host: int = typer.Option(8, help = "Ranks of one host."),
    offload: str = typer.Option("auto", help = "auto, never, blocks:K or all."),
    sweep: bool = typer.Option(False, help = "One line for each power of two up to --gpus."),
    table: bool = typer.Option(False, help = "Markdown: Llama 70B and 405B on 2 to 64 GPUs."),
) -> None:
    """Would QLoRA on this model train on these GPUs under FSDP2, and with what offload? No GPU needed.

    Not counted: the memory of step graphs, which run on one GPU only: up to 256 MiB plus 15% of the
    peak (UNSLOTH_STEP_GRAPHS=0: none).
    """
    from .plan import plan as compute
    raise typer.Exit(
        compute(
            model,
            gpus,
            memory,
            tokens = tokens,
            rank = rank,
            checkpointing = checkpointing,
            host = host,
            gpus_per_host = gpus_per_host,
            offload = offload,
            sweep = sweep,
            table = table,
        )
    )


@app.command("check-chats")
def check_chats(
    data: Path = typer.Argument(help = "jsonl, json or parquet file, or a folder of data."),
    template: str = typer.Option("llama-3.1", help = "Name of the chat template."),
    parallel_tool_calls: str = typer.Option("error", help = "error, split or join, as in training."),
    messages: Optional[str] = typer.Option(None, help = "Column of conversations, if it is unusual."),
    tools: str = typer.Option("tools", help = "Column of the tools of each conversation."),
    model: Optional[Path] = typer.Option(None, help = "Folder of a tokenizer, to count tokens."),
    as_json: bool = typer.Option(False, "--json", help = "Print JSON: every bad row."),
    fix: Optional[Path] = typer.Option(None, help = "jsonl file for the rows that can be read."),
) -> None:
    """Which conversations of a data set cannot be trained on, and why? Exit code 1 if there are any."""
    from .check_chats import run

    error = _import_unsloth()
    if error:
        console.print(f"[red]unsloth does not import here:[/] {_reason(error)}", soft_wrap = True)
        raise typer.Exit(2)
    raise typer.Exit(run(data, template, parallel_tool_calls, messages, tools, model, as_json, fix))


@app.command()
def bench(
    name: str = typer.Argument(help = f"{', '.join(BENCHMARKS)}, or all: each in turn."),
    out: Optional[Path] = typer.Option(
        None, help = "Folder for JSON and plots. Default: bench_results in this folder."
    ),
    quick: bool = typer.Option(False, help = "Fewer shapes and repeats: does it run here?"),
    model: Optional[str] = typer.Option(
        None, help = "Of `train`, `steps` and `families`: one of their models, not all."
    ),
    float32: bool = typer.Option(
        False,
        help = "Of `train`: add float32's losses to an earlier run's results, of Llamas with QLoRA.",
    ),
) -> None:
    """Measure stock Unsloth, peers and the patches side by side on this machine."""
    import inspect

    if name != "all" and name not in BENCHMARKS:
        console.print(f"[red]no benchmark {name!r}[/]; there are: {', '.join(BENCHMARKS)}, all")
        raise typer.Exit(2)
    chosen = {"model": model} if model is not None else {}
    chosen.update({"float32": True} if float32 else {})
    place = "every" if name == "all" else BENCHMARKS[name].module
    with _naming_what_is_absent(name):
        module = importlib.import_module(f"{__package__}.bench.{place}")
    for option in chosen:
        if option not in inspect.signature(module.run).parameters:
            others = (
                "`bench train` has"
                if option == "float32"
                else "`train`, `steps` and `families` have"
            )
            console.print(f"[red]bench {name} has no --{option}[/]; {others}")
            raise typer.Exit(2)
    out = out or Path("bench_results")
    try:
        out.mkdir(parents = True, exist_ok = True)
    except OSError as error:
        console.print(
            f"[red]cannot write to {out}[/]: {error.strerror}; name another folder with --out"
        )
        raise typer.Exit(2)
    with _naming_what_is_absent(name):
        code = module.run(out, quick = quick, **chosen)
    if code != NOT_HERE and any(out.iterdir()):
        console.print(f"results: {out.resolve()}")
    raise typer.Exit(code)
