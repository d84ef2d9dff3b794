# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Benchmarks, one module a capability: ``python -m unsloth_patches bench NAME``.

Each module has ``run(out: Path, quick: bool = False) -> int``; the figures that are quoted
anywhere stand under ``results/`` with the GPU, the versions and the command that made them.
"""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """module: below this package. without_gpu: what it does on a machine without a CUDA GPU."""

    module: str
    without_gpu: str = ""


BENCHMARKS = {
    "aot": Benchmark("ahead_of_time", "everything: the kernels are compiled, not run"),
    "chat": Benchmark("chat", "everything: it needs no GPU"),
    "chunk-size": Benchmark("chunk_size", "the computed choices for five GPUs"),
    "compile": Benchmark("compile", "graphs and graph breaks of a toy"),
    "dequant": Benchmark("dequant"),
    "families": Benchmark("families", "the losses of two toys"),
    "fsdp2": Benchmark("fsdp2", "losses of a toy on CPU ranks, no memory"),
    "fsdp2-cards": Benchmark("fsdp2_cards"),
    "fsdp2-plan": Benchmark("fsdp2_plan", "a toy on CPU ranks, nothing measured"),
    "lora": Benchmark("lora"),
    "loss": Benchmark("loss"),
    "steps": Benchmark("steps", "the losses of a toy"),
    "train": Benchmark("train", "the losses of a toy"),
    "trainers": Benchmark("trainers", "the losses of a toy"),
}
# What run() returns: done (without a GPU: what without_gpu says), failed, and cannot run here.
DONE, FAILED, NOT_HERE = 0, 1, 2
