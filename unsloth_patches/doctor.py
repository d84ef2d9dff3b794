# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What this environment is missing, found without importing Unsloth (which may be what does not work)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections import Counter
from typing import Iterator, List, NamedTuple

from .hooks import imported_late
from .private_names import SKIPPED as NAME_SKIPS_PATCH
from .private_names import missing
from .registry import PATCHES, SUPPORTED_UPSTREAM
from .reporting import FOR_GPUS, LATE_MEANS, WILL_APPLY, serves_cpu, status
from .settings import set_values
from .stacks import newest_date, numbers, outside, tested_pythons, tested_range, tested_text
from .states import FAILED, LATE, OFF, PENDING, SKIPPED, disabled_names, patch_names
from .upstream_source import source_file


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


def _interpreter() -> Finding:
    version, tested = platform.python_version(), tested_pythons()
    if numbers(tested[0]) <= numbers(version)[:2] <= numbers(tested[-1]):
        return Finding("python", version, "ok")
    remedy = (
        f"tested with Python {tested[0]} to {tested[-1]}; if something fails, "
        f"use a virtual environment: python{tested[-1]} -m venv DIR"
    )
    return Finding("python", version, "note", remedy)


def _upstream() -> Finding:
    version = _version("unsloth")
    if not version:
        remedy = f"pip install unsloth=={SUPPORTED_UPSTREAM[-1]}"
        return Finding("unsloth", "not installed", "problem", remedy)
    if version in SUPPORTED_UPSTREAM:
        return Finding("unsloth", version, "ok")
    supported = ", ".join(SUPPORTED_UPSTREAM)
    remedy = (
        f"tested with {supported}; here only functions whose code is known get replaced. "
        f"pip install unsloth=={SUPPORTED_UPSTREAM[-1]} unsloth_zoo=={SUPPORTED_UPSTREAM[-1]}"
    )
    return Finding("unsloth", version, "note", remedy)


def _packages() -> Iterator[Finding]:
    for package, consequence in NEEDED.items():
        version = _version(package)
        if version and outside(package, version):
            oldest, newest = tested_range(package)
            bound = newest if numbers(version) > numbers(newest) else oldest
            remedy = (
                f"tested with {tested_text(package)}; if something fails: "
                f"pip install '{package}=={bound}'"
            )
            yield Finding(package, version, "note", remedy)
        elif version:
            yield Finding(package, version, "ok")
        else:
            remedy = f"{consequence}: pip install {package}"
            yield Finding(package, "not installed", "problem", remedy)
    zoo, unsloth = _version("unsloth_zoo"), _version("unsloth")
    if zoo and unsloth in SUPPORTED_UPSTREAM and zoo != unsloth:
        remedy = f"they are released together: pip install unsloth_zoo=={unsloth}"
        yield Finding("versions", f"unsloth {unsloth}, unsloth_zoo {zoo}", "note", remedy)


def _tested() -> Finding:
    """What the tests ran on, so that a reader can tell how far an installation is from it."""
    ranges = [f"unsloth {SUPPORTED_UPSTREAM[0]} to {SUPPORTED_UPSTREAM[-1]}"]
    ranges += [f"{package} {tested_text(package)}" for package in NEEDED if tested_text(package)]
    pythons = tested_pythons()
    found = f"{newest_date()}: Python {pythons[0]} to {pythons[-1]}, {', '.join(ranges)}"
    return Finding("tested", found, "ok")


def _private_names() -> Iterator[Finding]:
    """Undocumented names that the installed PyTorch and Triton lack, and what goes without them."""
    for name in missing(source_file, _has_cuda()):
        if name.without != NAME_SKIPS_PATCH:  # the row of a patch that is skipped says so
            remedy = f"{name.without}; tested with {name.package} {tested_text(name.package)}"
            yield Finding(", ".join(name.patches), str(name), "note", remedy)


def _four_bits() -> Iterator[Finding]:
    """Without a GPU a bitsandbytes may have no kernels, and Unsloth then loads 16 bits with a line of text."""
    if _sees_gpu() or not _version("bitsandbytes") or not _version("torch"):
        return
    reason = _why_not_4bit()
    if reason:
        version, newest = _version("bitsandbytes"), tested_range("bitsandbytes")[1]
        remedy = f"models load in 16 bits, and LoRA on them is not QLoRA: pip install 'bitsandbytes=={newest}'"
        found = f"bitsandbytes {version} does not quantize on this CPU: {reason}"
        yield Finding("4 bits", found, "note", remedy)


def _gpu_library() -> Iterator[Finding]:
    """A bitsandbytes without a library for torch's CUDA version imports, and fails once it quantizes."""
    version = _version("bitsandbytes")
    reason = _why_no_gpu_library() if version and _has_cuda() else ""
    if reason:
        remedy = (
            "no 4-bit weights on the GPU: reinstall bitsandbytes, in a version with a library for "
            "torch's CUDA version; python -m bitsandbytes says more"
        )
        found = f"bitsandbytes {version} has not loaded its GPU library: {reason}"
        yield Finding("4 bits", found, "problem", remedy)


def _why_no_gpu_library() -> str:
    """An empty text too where a bitsandbytes does not say what it has loaded."""
    try:
        from bitsandbytes import cextension
    except Exception as error:
        return str(error).partition("\n")[0]
    library = getattr(cextension, "lib", None)
    if getattr(library, "compiled_with_cuda", True):
        return ""
    reason = getattr(library, "error_msg", None)  # a function where the library has no such name
    return reason.partition("\n")[0] if isinstance(reason, str) else "it has loaded the CPU's"


def _why_not_4bit() -> str:
    try:
        import torch
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(torch.ones(64, 64), quant_type = "nf4")
        functional.dequantize_4bit(packed, state)
    except Exception as error:
        return str(error).partition("\n")[0]
    return ""


def _has_cuda() -> bool:
    try:
        import torch
    except Exception:  # the device's row says so
        return False
    return torch.cuda.is_available()


def _device() -> Finding:
    try:
        import torch
    except Exception as error:
        remedy = "reinstall torch for this machine (pytorch.org, Get started)"
        return Finding("device", f"torch does not import: {error}", "problem", remedy)
    if not torch.cuda.is_available():
        return _without_gpu(torch)
    try:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        reason = str(error).partition("\n")[0]
        remedy = "run nvidia-smi: does it work? A GPU that is lost needs its machine restarted"
        return Finding("device", f"the GPU does not answer: {reason}", "problem", remedy)
    kinds = Counter(
        f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus
    )
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if any((gpu.major, gpu.minor) < (7, 5) for gpu in gpus):
        remedy = "Unsloth's kernels need compute capability 7.5 or newer (T4, RTX 20 and later)"
        if len(kinds) > 1:
            remedy += "; leave the older GPU out of CUDA_VISIBLE_DEVICES"
        return Finding("device", found, "problem", remedy)
    return Finding("device", found, "ok")


def _without_gpu(torch) -> Finding:
    """No CUDA GPU that torch can use: a machine without one, or one that is not set up for it."""
    if shutil.which("nvidia-smi") is None:
        remedy = "Unsloth's CPU backend: LoRA works, slowly; the Triton kernels need a GPU"
        return Finding("device", f"CPU, torch threads: {torch.get_num_threads()}", "note", remedy)
    if torch.version.cuda is None:
        remedy = "install a CUDA build of torch (pytorch.org, Get started)"
        return Finding("device", f"torch {torch.__version__} knows no CUDA", "problem", remedy)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        found = f"CPU: CUDA_VISIBLE_DEVICES={visible} hides the GPU"
        return Finding("device", found, "note", "unset it to train on the GPU")
    found = f"nvidia-smi is here, but torch {torch.__version__} sees no GPU"
    if visible:
        found += f" (CUDA_VISIBLE_DEVICES={visible}: does nvidia-smi -L list it?)"
    remedy = (
        f"run nvidia-smi: does it work, and is its driver new enough for CUDA {torch.version.cuda}?"
    )
    return Finding("device", found, "problem", remedy)


def _compiler() -> Iterator[Finding]:
    """Triton builds its kernels' launchers with a C compiler; Inductor compiles in workers."""
    try:
        import torch
    except Exception:  # the device's row says so
        return
    if not torch.cuda.is_available():
        return
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        remedy = "kernels run in Triton's interpreter, far too slowly to train; unset it"
        yield Finding("triton", "TRITON_INTERPRET=1", "note", remedy)
    named = os.environ.get("CC")
    found = next(
        filter(None, map(shutil.which, [named] if named else ["gcc", "cc", "clang"])), None
    )
    if found:
        yield Finding("C compiler", found, "ok")
    else:
        remedy = "no kernel can start: install gcc, or name a compiler in CC"
        yield Finding("C compiler", f"CC={named}" if named else "none", "problem", remedy)
    pinned = os.environ.get("NVIDIA_VISIBLE_DEVICES", "").strip().lower()
    if pinned not in ("", "all", "none", "void") and "CUDA_VISIBLE_DEVICES" not in os.environ:
        remedy = (
            "Unsloth then compiles in one process, one kernel after another; set "
            "CUDA_VISIBLE_DEVICES too (0 for the container's only GPU) and the first step comes sooner"
        )
        yield Finding("compile workers", f"NVIDIA_VISIBLE_DEVICES={pinned}", "note", remedy)


def _order() -> Finding:
    if sys.modules.get("unsloth") is None:
        return Finding("import order", "unsloth not imported yet", "ok")
    if not imported_late():
        return Finding("import order", "unsloth_patches was imported first", "ok")
    return Finding("import order", "unsloth was imported first", "note", LATE_MEANS)


def _sees_gpu() -> bool:
    try:
        import torch
    except Exception:  # the row of the device says so
        return True
    return torch.cuda.is_available()


def _switches() -> Iterator[Finding]:
    unknown = disabled_names() - set(patch_names())
    if unknown:
        known = ", ".join(patch_names())
        found = f"UNSLOTH_PATCHES_DISABLE={os.environ['UNSLOTH_PATCHES_DISABLE']}"
        remedy = f"no such patch: {', '.join(sorted(unknown))}; there are {known}, all"
        yield Finding("switches", found, "problem", remedy)
    for value in set_values():
        verdict = "problem" if value.problem else "ok"
        yield Finding("switches", f"{value.variable}={value.text}", verdict, value.problem)


def _patches() -> Iterator[Finding]:
    for_gpus = set() if _sees_gpu() else {p.name for p in PATCHES if not serves_cpu(p)}
    for row in status():
        if row.state == LATE:  # the import order has its own row
            continue
        if row.state == PENDING:
            # What it waits for is for `status`; here it only matters whether it will fit.
            # Behind it stands what has a row of its own here: an unknown value, an absent private name.
            outlook = row.brief.partition(";")[0]
            fits = outlook in (WILL_APPLY, FOR_GPUS)
            found = FOR_GPUS if fits and row.name in for_gpus else outlook if fits else row.brief
            remedy = "" if fits else _stays(row.brief, "see CONTRIBUTING, refreshing a patch")
            yield Finding(row.name, found, "ok" if fits else "note", remedy)
        elif row.state in (SKIPPED, FAILED):
            verdict = "problem" if row.state == FAILED else "note"
            remedy = "report this line as an issue" if row.state == FAILED else _stays(row.reason)
            yield Finding(row.name, f"{row.state}: {row.reason}", verdict, remedy)
        elif row.state == OFF:
            yield Finding(row.name, row.state, "note", row.reason)
        else:
            yield Finding(row.name, row.state, "ok")


def _stays(reason: str, otherwise: str = "") -> str:
    """What a patch that is left out means; a reader's own switch is taken back, no patch mended."""
    if "UNSLOTH_PATCHES_DISABLE" in reason:
        otherwise = "unset UNSLOTH_PATCHES_DISABLE to have it"
    return "; ".join(filter(None, ["stock functions stay", otherwise]))


def examine() -> List[Finding]:
    """Every check, in the order in which a failure explains the ones below it."""
    findings = [
        _interpreter(),
        _tested(),
        _upstream(),
        *_packages(),
        _device(),
        *_compiler(),
        *_four_bits(),
        *_gpu_library(),
        _order(),
    ]
    return [*findings, *_switches(), *_patches(), *_private_names()]
