# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""How many bytes training may still fill, on this rank's GPU and on its host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional

__all__ = ["usable_device_memory", "usable_host_memory"]

_UNKNOWN = 2**62


def usable_device_memory(
    mesh: Any = None,
    reserve: int = 0,
    fresh: bool = False,
) -> int:
    """Bytes of this GPU that training may fill: free now (after the context, NCCL and other
    processes) plus what torch holds already, under the process's memory fraction; the minimum over
    ``mesh``'s ranks.

    reserve: bytes of the free memory that something else will take. fresh: what torch has allocated
    belongs to something else too, as before a model is loaded.

    Raises RuntimeError without a GPU: state ``device_memory`` instead.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("memory plan: no CUDA device to measure; pass device_memory in bytes.")
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    usable = max(free - reserve, 0) + torch.cuda.memory_reserved(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if fraction is not None:
        usable = min(usable, int(total * fraction(device)))
    if fresh:
        usable = max(usable - torch.cuda.memory_allocated(device), 0)
    return _smallest(usable, mesh)


def _smallest(value: int, mesh: Any) -> int:
    """The minimum of ``value`` over the ranks of ``mesh``, so that all ranks decide alike."""
    if mesh is None:
        return value
    import torch
    import torch.distributed as dist

    smallest = torch.tensor([value], dtype = torch.int64, device = mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(smallest, op = dist.ReduceOp.MIN, group = mesh.get_group(dim))
    return int(smallest.item())


def usable_host_memory(mesh: Any = None) -> Optional[int]:
    """Bytes of host memory that are free for new allocations, under the cgroup's limit; the minimum
    over ``mesh``'s ranks. None if no rank can tell."""
    smallest = _smallest(min([*_free_on_host(), _UNKNOWN]), mesh)
    return None if smallest == _UNKNOWN else max(smallest, 0)


def _free_on_host() -> List[int]:
    """What the kernel and the cgroup leave free, in bytes; empty where neither can be read."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding = "utf-8").splitlines():
            if line.startswith("MemAvailable"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding = "utf-8").strip()
        if limit.isdigit():
            used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding = "utf-8"))
            for line in Path("/sys/fs/cgroup/memory.stat").read_text(encoding = "utf-8").splitlines():
                if line.startswith("inactive_file "):
                    used -= int(line.split()[1])  # cached files, which the kernel gives back
            found.append(int(limit) - used)
    except OSError:
        pass  # no such file on this system; what was read so far stands
    return found
