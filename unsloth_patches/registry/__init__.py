# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The one catalogue of patches: what each replaces, with what, and how it is tested; a file a subject.

Everything else reads it: the import hooks (``hooks.py``), the command line, and
``scripts/patches.py``, which writes the git form from the same entries.
"""

from __future__ import annotations

from typing import Tuple

from . import blocks, compiled_blocks, dequantize, fsdp2, losses, step_graphs, tool_calls
from .entries import Patch, Target

__all__ = ["PATCHES", "SUPPORTED_UPSTREAM", "Patch", "Target"]

SUPPORTED_UPSTREAM = ("2026.10.6", "2026.10.7", "2026.10.8", "2026.10.9")

TEST_BACKENDS = Patch(
    name = "test-backends",
    title = "Let a test file say which backend of Unsloth it needs",
    targets = (),
    shared = ("backend.py", "fast_models.py", "faults.py", "small_models.py"),
    tests = {"tests/test_shared_backend.py": "cpu"},
)

# In the order of the series.
PATCHES: Tuple[Patch, ...] = (
    TEST_BACKENDS,
    *tool_calls.PATCHES,
    *dequantize.PATCHES,
    *losses.PATCHES,
    *blocks.PATCHES,
    *fsdp2.PATCHES,
    *compiled_blocks.PATCHES,
    tool_calls.RELOAD,
    *step_graphs.PATCHES,
)
