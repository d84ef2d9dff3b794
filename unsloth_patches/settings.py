# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Environment variables whose value can be mistyped, read as training reads them, and their old names.

Training reads each one late (a model's blocks are compiled, a loss is computed, a model is wrapped),
and on a machine without a GPU some are never read. ``status`` and ``doctor`` say before what they say.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Callable, Dict, Iterator, NamedTuple

# Read until version 0.3.
OLD_NAMES = {
    "UNSLOTH_PATCHES_FULLGRAPH": "UNSLOTH_BLOCK_FULLGRAPH",
    "UNSLOTH_FULLGRAPH": "UNSLOTH_BLOCK_FULLGRAPH",
    "UNSLOTH_PATCHES_OFFLOAD": "UNSLOTH_FSDP2_OFFLOAD",
}


def take_old_names() -> None:
    """Give the new name the value that the old one has, with a warning; where both are set and differ,
    the new one wins."""
    for old, new in OLD_NAMES.items():
        value = os.environ.get(old)
        if value is None or value == os.environ.get(new):  # equal: a parent process was here
            continue
        # unsloth_zoo has one of that name, with values of its own.
        if old == "UNSLOTH_FULLGRAPH" and value.strip().lower() not in ("auto", "strict", "off"):
            continue
        if new in os.environ:
            what = f"{old}={value} is ignored, because {new}={os.environ[new]} is set, its new name"
        else:
            os.environ[new] = value
            what = f"{old} is now called {new}, and the old name will not be read for long"
        warnings.warn(f"unsloth_patches: {what}; unset {old}.", FutureWarning, stacklevel = 4)


class Switch(NamedTuple):
    """patch: whose behaviour it changes. read: raises ValueError for a value that it does not know."""

    patch: str
    read: Callable[[], None]


class Value(NamedTuple):
    """One variable that is set; ``problem`` names value and choices, and is empty for a known value."""

    variable: str
    patch: str
    text: str
    problem: str


def _read_chunk_rows() -> None:
    import torch

    from .unsloth.kernels.loss_chunk_size import choose_chunk_rows
    choose_chunk_rows(1, 1, 2, torch.device("cpu"))


def _read_offload() -> None:
    from .unsloth.models.fsdp2_offload_plan import offload_override
    offload_override()


def _read_fullgraph() -> None:
    from .unsloth.models.compile_modes import fullgraph_mode
    fullgraph_mode()


def _read_compile_report() -> None:
    from .unsloth.models.compile_callback import report_switch
    report_switch()


def _read_tool_checks() -> None:
    from .unsloth.tool_calls.checks import checks_level
    checks_level()


def _read_step_graphs() -> None:
    from .unsloth.models.step_graphs_stack import mode
    mode()


def _read_sharded_load() -> None:
    from .unsloth.models.fsdp2_sharded_4bit import OFF, ON, variable
    if variable("UNSLOTH_FSDP2_SHARDED_LOAD") not in (*OFF, *ON, "auto"):
        raise ValueError("choose auto, 1 or 0")


def _read_chunk_file() -> None:
    """What is no size is passed over in training, with a warning."""
    from .unsloth.kernels.loss_chunk_size import is_budget, read_store
    if not all(map(is_budget, read_store().values() or [None])):
        raise ValueError("no JSON of sizes is there; `bench chunk-size` writes it, or unset it")


def _read_cache_folder() -> None:
    from .unsloth.models.compile_cache_files import CompileCacheError, check_folder

    folder = Path(os.path.expanduser(os.environ["UNSLOTH_COMPILE_CACHE_DIR"]))
    parent = next(filter(os.path.exists, (folder, *folder.parents)), Path("."))
    if parent != folder:  # training makes it
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise ValueError(
                f"folder {str(folder)!r} cannot be made: {str(parent)!r} is no folder that can be "
                "written; give one that can."
            )
        return
    try:
        check_folder(folder)
    except CompileCacheError as error:
        raise ValueError(str(error)) from error


def _on_or_off(patch: str, variable: str) -> Switch:
    """What training compares with one of the two only, so that any other value is as good as none."""

    def read() -> None:
        if os.environ[variable] not in ("0", "1"):
            raise ValueError("choose 1 or 0")

    return Switch(patch, read)


SWITCHES: Dict[str, Switch] = {
    "UNSLOTH_TOOL_CHECKS": Switch("tool-call-checks", _read_tool_checks),
    "UNSLOTH_STEP_GRAPHS": Switch("step-graphs", _read_step_graphs),
    "UNSLOTH_LOSS_CHUNK_ROWS": Switch("loss-chunking", _read_chunk_rows),
    "UNSLOTH_LOSS_CHUNK_FILE": Switch("loss-chunking", _read_chunk_file),
    "UNSLOTH_FSDP2_SHARDED_LOAD": Switch("fsdp2-load-choice", _read_sharded_load),
    "UNSLOTH_FSDP2_OFFLOAD": Switch("fsdp2-offload-plan", _read_offload),
    "UNSLOTH_BLOCK_FULLGRAPH": Switch("compile-strict", _read_fullgraph),
    "UNSLOTH_COMPILE_REPORT": Switch("compile-report-trainer", _read_compile_report),
    "UNSLOTH_COMPILE_CACHE_DIR": Switch("compile-cache", _read_cache_folder),
}
for _patch, _variable in (
    ("nf4-dequantize", "UNSLOTH_BNB_TRITON"),
    ("fused-cross-entropy", "UNSLOTH_LOSS_FLOAT32_LOGITS"),
    ("fused-cross-entropy", "UNSLOTH_CE_FP32_HEAD_GRAD"),
    ("linear-cross-entropy", "UNSLOTH_LOSS_CHECK_LABELS"),
    ("packed-attention", "UNSLOTH_BLOCK_COMPILE_PACKED"),
    ("checkpoint-shared-graph", "UNSLOTH_CHECKPOINT_ONE_GRAPH"),
    ("compile-workers", "UNSLOTH_COMPILE_WORKERS_EARLY"),
):
    SWITCHES[_variable] = _on_or_off(_patch, _variable)


def set_values() -> Iterator[Value]:
    """The variables that are set. Imports torch, so never before Unsloth, which wants to be first."""
    for variable, switch in SWITCHES.items():
        text = os.environ.get(variable)
        if not text:
            continue
        problem = ""
        try:
            switch.read()
        except ValueError as error:
            problem = str(error)
            if variable not in problem:
                problem = f"{variable}={text!r}: {problem.rstrip('.')}."
        except Exception:  # torch or transformers is missing or broken, which doctor has rows for
            continue
        yield Value(variable, switch.patch, text, problem)
