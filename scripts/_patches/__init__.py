# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Parts of ``scripts/patches.py``: the git form of the patch set, built from the registry."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINE_LENGTH = 100  # Unsloth's


class PatchesError(Exception):
    """What went wrong and what to do about it, for a person: no traceback is shown."""

    def __init__(
        self,
        message: str,
        remedy: str = "",
    ):
        super().__init__(message)
        self.remedy = remedy
