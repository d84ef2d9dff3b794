# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``bench all``: every benchmark in a process of its own, and a table of what ran.

Of its own, because Unsloth can be imported in one way only in a process, and because one benchmark's
crash must not cost the others.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from . import BENCHMARKS, DONE, NOT_HERE, harness


def outcome(code: int, gpu: bool, without_gpu: str) -> str:
    """What a benchmark's exit code says."""
    if code == DONE:
        return "done" if gpu else f"without a GPU: {without_gpu}"
    if code == NOT_HERE:
        return "cannot run here" if gpu else "needs a CUDA GPU"
    return f"FAILED (exit code {code})"


def run(out: Path, quick: bool = False) -> int:
    """Runs every benchmark; 1 if one failed, else 0. One that cannot run here has not failed."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        print("torch sees no CUDA GPU here. Without one:")
        for name, benchmark in BENCHMARKS.items():
            print(f"  {name:<12} {benchmark.without_gpu or 'cannot run'}")
    rows, failed = [], False
    for name, benchmark in BENCHMARKS.items():
        print(f"\n== bench {name}", flush = True)
        begin = time.perf_counter()
        code = NOT_HERE
        if gpu or benchmark.without_gpu:
            command = [sys.executable, "-m", "unsloth_patches", "bench", name, "--out", str(out)]
            code = subprocess.run(command + ["--quick"] * quick).returncode
        seconds = time.perf_counter() - begin
        said = outcome(code, gpu, benchmark.without_gpu)
        failed |= said.startswith("FAILED")
        rows.append([name, said, f"{seconds:.0f}"])
    harness.print_table(f"bench all, results in {out}", ["benchmark", "outcome", "seconds"], rows)
    return 1 if failed else 0
