# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Everything that can be wrong with the demo's arguments and libraries, found before anything slow starts."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Optional

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# What the report is drawn with, after training: too late to find that it is missing.
LIBRARIES = ("matplotlib", "plotext")


class DemoError(Exception):
    """What is wrong with an argument, in one sentence, and what to do about it."""


def check_libraries() -> None:
    """Raise DemoError where a library that draws the report is not installed."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"{' and '.join(missing)} not installed, and the report is drawn with it. "
            f"`pip install {' '.join(missing)}`."
        )


def check_model(folder: Path) -> None:
    """Raise DemoError unless ``folder`` holds a checkpoint: config.json, weights and a tokenizer."""
    if not folder.exists():
        raise DemoError(
            f"--model {folder}: there is no such folder. Name a local checkpoint's folder."
        )
    if not folder.is_dir():
        raise DemoError(f"--model {folder} is a file. Name the folder that holds config.json.")
    config = folder / "config.json"
    if not config.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It holds a LoRA adapter: name the folder of its base model."
        raise DemoError(f"--model {folder} has no config.json, so it is no checkpoint.{hint}")
    try:
        parsed = json.loads(config.read_text(encoding = "utf-8"))
    except (OSError, ValueError) as error:
        raise DemoError(
            f"{config} cannot be read ({error}). Download the checkpoint again."
        ) from None
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise DemoError(f"{config} names no model_type. Download the checkpoint again.")
    if not any(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise DemoError(
            f"--model {folder} has no weights ({' or '.join(WEIGHTS)}). Download the checkpoint again."
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise DemoError(f"--model {folder} has no tokenizer ({', '.join(TOKENIZERS)}).")


def check_out(folder: Path) -> Path:
    """Make the output folder; raise DemoError where a file cannot be written into it."""
    try:
        folder.mkdir(parents = True, exist_ok = True)
        with tempfile.TemporaryFile(dir = folder):
            pass
    except OSError as error:
        raise DemoError(
            f"--out {folder}: cannot write there ({error.strerror}). Name another folder."
        ) from None
    return folder


def check_numbers(steps: Optional[int], prompts: int) -> None:
    """Raise DemoError for counts that make no run."""
    if steps is not None and steps < 1:
        raise DemoError(f"--steps {steps}: has to be at least 1.")
    if not 1 <= prompts <= 240:
        raise DemoError(f"--prompts {prompts}: has to be between 1 and 240.")
