# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Benchmarks, one module a capability: ``python -m unsloth_patches bench NAME``.

Each module has ``run(out: Path, quick: bool = False) -> int``; the figures that are quoted
anywhere stand under ``results/`` with the GPU, the versions and the command that made them.
"""

BENCHMARKS = ("dequant", "loss", "chunk-size", "loss-training", "fsdp2")
