# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Decoding 4-bit weights."""

from __future__ import annotations

from typing import Tuple

from .entries import Patch, Target

PATCHES: Tuple[Patch, ...] = (
    Patch(
        name = "nf4-kernel",
        title = "Add a Triton kernel that decodes any bitsandbytes 4-bit weight in one launch",
        targets = (),
        modules = ("kernels/nf4_decode.py", "kernels/nf4_dequantize_kernel.py"),
        shared = ("nf4_weights.py",),
        tests = {"tests/test_nf4_kernel.py": "interpreter"},
        requires = ("test-backends",),
    ),
    Patch(
        name = "nf4-dequantize",
        title = "Dequantize every bitsandbytes 4-bit weight in one Triton launch",
        targets = (
            Target(
                attribute = "unsloth.kernels.utils:fast_dequantize",
                replacement = "kernels.nf4_fast_dequantize:dequantize_in_one_launch",
                import_after = "from ..bnb_availability import native_kernels_ready",
                fingerprints = frozenset(
                    # One definition per device branch, and the outermost one that is live: 2026.10.9, .7
                    "1454833d36486569 317cbc886535aa9f 6362d349d6e3df04 d01b9c70a43e6aa4 "
                    "1929688413cf077a 5996de1656b594d5 a796198c099dfb75 dd96aa49b3577ea4".split()
                ),
            ),
        ),
        modules = ("kernels/nf4_dequantize.py", "kernels/nf4_fast_dequantize.py"),
        tests = {"tests/test_nf4_dequantize.py": "interpreter"},
        requires = ("nf4-kernel",),
    ),
)
