# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Two training processes that take turns: while one works, the other waits and leaves the GPU alone.

Stock and patched Unsloth cannot share a process, and starting one takes longer than its steps. So
both are started once, and short stretches of their steps alternate on the same GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

LIMIT_S = 600  # for one turn: a hang must not hold the GPU


def own_caches(form: str, folder: Path) -> dict:
    """This process's environment, with caches of compiled code and data of the form's own."""
    caches = folder / f"caches-{form.replace(' ', '-')}"
    return {
        **os.environ,
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "HF_DATASETS_CACHE": str(caches / "datasets"),
    }


class Turns:
    """A worker's end of the line. Without a line (a worker run by hand) no turn is waited for."""

    def __init__(self, handle: Optional[int]):
        self._line = None if handle is None else Connection(handle)

    def wait(self, message: Any = None) -> None:
        """Tell that everything up to here is done, and return when it is this process's turn."""
        if self._line is not None:
            self._line.send(message)
            self._line.recv()


class Worker:
    """A process of `train_worker`, or of the module job["worker"]. It works between `go` and the end of `wait`, and only then."""

    def __init__(self, job: dict, environment: dict, folder: Path):
        self.form = job["form"]
        self._log = folder / f"log-{self.form}.txt"
        described = folder / f"job-{self.form}.json"
        described.write_text(json.dumps(job), encoding = "utf-8")
        self._line, theirs = Pipe()
        command = [sys.executable, "-m", f"{__package__}.{job.get('worker', 'train_worker')}"]
        with self._log.open("w", encoding = "utf-8") as output:
            self._process = subprocess.Popen(
                [*command, str(described), str(theirs.fileno())],
                env = environment,
                stdout = output,
                stderr = subprocess.STDOUT,
                pass_fds = [theirs.fileno()],
            )
        theirs.close()  # so that the line ends when the process does

    def go(self) -> None:
        try:
            self._line.send("go")
        except OSError:
            raise self._failure("ended") from None

    def wait(self) -> Any:
        """What the worker sends at the end of its turn. Raises RuntimeError with the end of its log."""
        try:
            if self._line.poll(LIMIT_S):
                return self._line.recv()
        except (EOFError, OSError):
            raise self._failure("ended") from None
        raise self._failure(f"said nothing for {LIMIT_S} s")

    def _failure(self, what: str) -> RuntimeError:
        if what == "ended":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)  # its exit code comes a moment after its line ends
        self.stop()
        tail = self._log.read_text(encoding = "utf-8", errors = "replace").splitlines()[-30:]
        code = self._process.returncode
        return RuntimeError(
            f"bench train: the {self.form} process {what} (exit code {code}):\n" + "\n".join(tail)
        )

    def stop(self) -> None:
        """End the process at once; what it has measured was sent before."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._line.close()


@contextlib.contextmanager
def working(
    jobs: Dict[str, dict], environment: Callable[[str, Path], dict], folder: Path
) -> Iterator[Dict[str, Worker]]:
    """form -> its worker, all started at once and importing Unsloth. Ctrl-C ends the block, and what was
    measured before is kept."""
    workers: Dict[str, Worker] = {}
    try:
        for form, job in jobs.items():
            Path(job["scratch"]).mkdir()
            workers[form] = Worker(job, environment(form, folder), folder)
        yield workers
    except KeyboardInterrupt:
        print("bench: stopped; keeping what is complete", flush = True)
    finally:
        for worker in workers.values():
            worker.stop()


def set_off(workers: Dict[str, Worker]) -> None:
    """Wait until every worker has imported Unsloth, let them load at once, and wait for all."""
    for worker in workers.values():
        worker.wait()
    at_once(workers, {})


def at_once(workers: Dict[str, Worker], runs: Dict[str, dict]) -> None:
    """One turn of every worker at the same time."""
    for worker in workers.values():
        worker.go()
    for form, worker in workers.items():
        runs[form] = worker.wait() or runs.get(form, {})


def alternate(workers: Dict[str, Worker], steps: int, stretch: int, runs: Dict[str, dict]) -> None:
    """Stretches of steps by turns, in the other order every other time. Fills runs as results come."""
    for number in range(-(-steps // stretch)):
        for form in list(workers) if number % 2 == 0 else reversed(workers):
            workers[form].go()
            runs[form] = workers[form].wait() or runs.get(form, {})
