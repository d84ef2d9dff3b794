# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Groups of ranks for ``bench fsdp2``: one process a GPU, each running ``fsdp2_worker``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import List

__all__ = ["Group"]

# What one case may take: a hang must not hold the GPUs.
SECONDS = 120
# The first case waits for the imports too, five processes at once.
IMPORT_SECONDS = 240
# How long the other ranks of a case have for their own result once one rank failed.
AFTER_A_FAILURE = 10


class Group:
    """``world`` ranks that import at once and wait with every case for their turn on the GPUs, so
    that cases of several groups can alternate.

    mode: "ours" (with the patches) or "upstream" (without). one_gpu: all ranks on GPU 0, through
    gloo; their memory counts then, their times do not.
    """

    def __init__(
        self,
        cases: List[dict],
        mode: str,
        world: int,
        folder: Path,
        one_gpu: bool = False,
    ):
        self.cases, self.mode, self.world = cases, mode, world
        tag = f"{mode}-{world}-{time.monotonic_ns()}"
        self._turn, self._cases_file = folder / f"{tag}.turn", folder / f"{tag}.json"
        self._cases_file.write_text(json.dumps(cases), encoding = "utf-8")
        self._outputs = [folder / f"{tag}-{rank}.out" for rank in range(world)]
        self._logs = [folder / f"{tag}-{rank}.log" for rank in range(world)]
        port = _free_port()
        self._processes = [self._start(rank, port, one_gpu) for rank in range(world)]

    def _start(self, rank: int, port: int, one_gpu: bool) -> subprocess.Popen:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world),
            "BENCH_TURN": str(self._turn),
            # Compiling takes longer than what is measured here, and both sides do without it.
            "UNSLOTH_COMPILE_DISABLE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "UNSLOTH_FSDP2": "1" if self.world > 1 else "0",
            # The worker's own package would patch the Unsloth that it is to measure.
            "UNSLOTH_PATCHES_DISABLE": "all" if self.mode == "upstream" else "",
        }
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        if self.world > 1:
            environment["LOCAL_RANK"] = "0" if one_gpu else str(rank)
            environment["LOCAL_WORLD_SIZE"] = str(self.world)
            environment["MASTER_ADDR"], environment["MASTER_PORT"] = "127.0.0.1", str(port)
        if one_gpu:
            environment["REHEARSE_ON_ONE_GPU"] = "1"
        command = [sys.executable, "-m", "unsloth_patches.bench.fsdp2_worker"]
        command += [str(self._cases_file), str(self._outputs[rank]), self.mode]
        with open(self._logs[rank], "w", encoding = "utf-8") as log:
            return subprocess.Popen(command, env = environment, stdout = log, stderr = log)

    def run(self, index: int) -> List[dict]:
        """Results of case ``index`` on every rank that reached its end; cases run in their order."""
        Path(f"{self._turn}-{index}").touch()
        limit = time.monotonic() + SECONDS + (IMPORT_SECONDS if index == 0 else 0)
        while time.monotonic() < limit:
            results = [_lines(output) for output in self._outputs]
            over = all(process.poll() is not None for process in self._processes)
            if any("error" in lines[index] for lines in results if len(lines) > index):
                # The other ranks may wait for the failed one in a collective, for minutes.
                limit = min(limit, time.monotonic() + AFTER_A_FAILURE)
            if over or all(len(lines) > index for lines in results):
                break
            time.sleep(0.05)
        found = [lines[index] for lines in results if len(lines) > index]
        if len(found) < self.world:
            for log in self._logs:
                tail = log.read_text(encoding = "utf-8", errors = "replace")
                print(f"--- {log.name}, last lines\n{tail[-1500:]}")
        return found

    def end(self) -> None:
        """Ends what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _lines(path: Path) -> List[dict]:
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding = "utf-8").rpartition("\n")  # a line may be half written
    return [json.loads(line) for line in whole.splitlines() if line]
