# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
import sys

try:
    from .cli import app
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich"):
        raise
    sys.exit(
        f"unsloth_patches: this Python ({sys.executable}) has no {error.name}, which the command line needs. "
        "In a checkout: bash scripts/setup.sh && source .venv/bin/activate; elsewhere: pip install typer rich"
    )

app(prog_name = "python -m unsloth_patches")
