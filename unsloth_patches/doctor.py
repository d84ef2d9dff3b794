# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What this environment is missing, found without importing Unsloth (which may be what does not work)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Iterator, List, NamedTuple

from .patching import FAILED, PENDING, SKIPPED, disabled_names, status
from .registry import PATCHES, SUPPORTED_UPSTREAM


class Finding(NamedTuple):
    """One row of ``doctor``; ``verdict`` is ok, note or problem."""

    check: str
    found: str
    verdict: str
    remedy: str = ""


# Package -> what fails without it.
NEEDED = {
    "torch": "nothing works",
    "triton": "no kernels on a GPU",
    "bitsandbytes": "no 4-bit weights",
    "transformers": "no models",
    "peft": "no LoRA",
    "trl": "no SFTTrainer",
    "unsloth_zoo": "unsloth does not import",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _upstream() -> Finding:
    version = _version("unsloth")
    if not version:
        remedy = f"pip install unsloth=={SUPPORTED_UPSTREAM[-1]}"
        return Finding("unsloth", "not installed", "problem", remedy)
    if version in SUPPORTED_UPSTREAM:
        return Finding("unsloth", version, "ok")
    supported = " or ".join(SUPPORTED_UPSTREAM)
    remedy = f"tested with {supported}; here only functions whose code is known get replaced"
    return Finding("unsloth", version, "note", remedy)


def _packages() -> Iterator[Finding]:
    for package, consequence in NEEDED.items():
        version = _version(package)
        if version:
            yield Finding(package, version, "ok")
        else:
            remedy = f"{consequence}: pip install {package}"
            yield Finding(package, "not installed", "problem", remedy)


def _device() -> Finding:
    try:
        import torch
    except Exception as error:
        remedy = "reinstall torch for this machine (pytorch.org, Get started)"
        return Finding("device", f"torch does not import: {error}", "problem", remedy)
    if not torch.cuda.is_available():
        remedy = "Unsloth's CPU backend: LoRA works, slowly; the Triton kernels need a GPU"
        return Finding("device", f"CPU, {torch.get_num_threads()} threads", "note", remedy)
    properties = torch.cuda.get_device_properties(0)
    gib = properties.total_memory / 2**30
    found = f"{torch.cuda.device_count()} x {properties.name}, sm_{properties.major}{properties.minor}, {gib:.0f} GiB"
    if properties.major < 7 or (properties.major, properties.minor) == (7, 0):
        return Finding(
            "device", found, "problem", "Unsloth's kernels need compute capability 7.5 or newer"
        )
    return Finding("device", found, "ok")


def _order() -> Finding:
    here = sys.modules.get("unsloth")
    if here is None or getattr(here, "__spec__", None) is None:
        return Finding("import order", "unsloth not imported yet", "ok")
    remedy = "put `import unsloth_patches` before `from unsloth import …`"
    return Finding("import order", "unsloth was imported first", "note", remedy)


def _switches() -> Iterator[Finding]:
    unknown = disabled_names() - {patch.name for patch in PATCHES}
    if unknown:
        known = ", ".join(patch.name for patch in PATCHES)
        found = f"UNSLOTH_PATCHES_DISABLE={os.environ['UNSLOTH_PATCHES_DISABLE']}"
        yield Finding(
            "switches",
            found,
            "problem",
            f"no such patch: {', '.join(sorted(unknown))}; there are {known}, all",
        )


def _patches() -> Iterator[Finding]:
    for row in status():
        if row.state == PENDING:
            verdict = "note" if row.reason.startswith("will be skipped") else "ok"
            remedy = (
                "stock functions stay; see CONTRIBUTING, refreshing a patch"
                if verdict == "note"
                else ""
            )
            yield Finding(row.name, row.reason, verdict, remedy)
        elif row.state in (SKIPPED, FAILED):
            verdict = "problem" if row.state == FAILED else "note"
            remedy = (
                "report this line as an issue" if row.state == FAILED else "stock functions stay"
            )
            yield Finding(row.name, f"{row.state}: {row.reason}", verdict, remedy)
        else:
            yield Finding(row.name, row.state, "ok")


def examine() -> List[Finding]:
    """Every check, in the order in which a failure explains the ones below it."""
    interpreter = Finding("python", platform.python_version(), "ok")
    if sys.version_info < (3, 9):
        interpreter = interpreter._replace(verdict = "problem", remedy = "use Python 3.9 or newer")
    findings = [interpreter, _upstream(), *_packages(), _device(), _order(), *_switches()]
    return findings + list(_patches())
