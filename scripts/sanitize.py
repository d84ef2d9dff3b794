#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""compute-sanitizer over every Triton kernel at small, odd sizes: memcheck, then racecheck.

Every allocation is its own (no caching allocator), so an access past its end is seen. Each result is
compared with the same arithmetic in plain torch as well: a kernel that did nothing would be clean, too.

    python scripts/sanitize.py --log docs/sanitizer.txt        # needs a CUDA GPU and compute-sanitizer
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
LIMIT_S = 300  # for one tool on one group of cases
# The last one is read by the widest programs, two whole blocks and a part.
VOCABS = (1, 5, 127, 1000, 4099, 33333)
ROWS = 3


# ------------------------------------------------------------------------------- the cases


def _close(found, expected, tolerance: float) -> None:
    """NaN where NaN is due, and otherwise off by no more than tolerance of the largest value."""
    import torch

    found, expected = found.double().cpu(), expected.double().cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num(), expected.nan_to_num()
    limit = tolerance * max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= limit, (found, expected)


def _quantized(shape, dtype, **options):
    """(packed and state on the GPU, what the format says they decode to). Quantized on the CPU:
    bitsandbytes' own CUDA kernels read out of bounds at such sizes."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    from unsloth_patches.unsloth.kernels.nf4_dequantize import dequantize_4bit

    packed, state = quantize_4bit(torch.randn(shape, dtype = dtype), **options)
    expected = dequantize_4bit(packed, state).view(shape)
    state.to("cuda")
    return packed.cuda(), state, expected


def dequantize() -> int:
    """Weights of every format."""
    import torch

    from unsloth_patches.unsloth.kernels.nf4_dequantize import dequantize_4bit

    shapes = ((1, 2), (5, 7), (3, 2047), (33, 77), (64, 64), (1, 2079), (97, 129))
    formats = itertools.product(
        shapes, ("nf4", "fp4"), (torch.bfloat16, torch.float32), (32, 64, 4096), (True, False)
    )
    count = 0
    for shape, quant_type, dtype, blocksize, nested in formats:
        options = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": nested}
        packed, state, expected = _quantized(shape, dtype, **options)
        assert torch.equal(dequantize_4bit(packed, state).cpu().view(shape), expected)
        count += 1
    return count


def _rows(vocab: int, dtype):
    """Rows of logits as training holds them: each as long as the next multiple of 16."""
    import torch

    from unsloth_patches.unsloth.cross_entropy_spec import padded_columns

    buffer = torch.full((ROWS, padded_columns(vocab)), float("nan"), dtype = dtype, device = "cuda")
    buffer[:, :vocab] = torch.randn(ROWS, vocab, device = "cuda").mul_(3)
    return buffer[:, :vocab]


def _labels(vocab: int, ignored: int):
    """The last class, one that is ignored, and one far outside."""
    import torch
    return torch.tensor([vocab - 1, ignored, vocab + 10**6], device = "cuda")


def _specs(vocab: int):
    import torch

    from unsloth_patches.unsloth.cross_entropy_spec import RowLoss

    weight = torch.rand(vocab, device = "cuda") + 0.5
    everything = RowLoss(weight, -100, 0.1, 1.25, 20.0, 1e-2)
    return {"plain": RowLoss(), "every option": everything}


def cross_entropy() -> int:
    """Losses alone, gradients in place, and narrower gradients laid over float32 logits."""
    import torch

    from unsloth_patches.unsloth.cross_entropy_spec import narrow_view
    from unsloth_patches.unsloth.kernels.cross_entropy_rows import cross_entropy_rows
    from unsloth_patches.unsloth.kernels.cross_entropy_torch import torch_rows

    count = 0
    for vocab, dtype in itertools.product(VOCABS, (torch.bfloat16, torch.float32)):
        for name, spec in _specs(vocab).items():
            options = name != "plain"
            for out, scratch in itertools.product(("none", "same", "narrow"), (False, True)):
                if out == "narrow" and dtype != torch.float32:
                    continue
                logits = _rows(vocab, dtype)
                # Scratch promises that no label is ignore_index.
                labels = _labels(vocab, 0 if scratch else -100)
                bias = torch.randn(vocab, device = "cuda").to(dtype) if options else None
                scale = torch.rand(ROWS, device = "cuda") if options else None
                losses = torch.empty(ROWS, device = "cuda")
                wanted = torch.empty(ROWS, dtype = torch.float64, device = "cuda")
                gradient = torch.empty(ROWS, vocab, dtype = torch.float64, device = "cuda")
                torch_rows(logits.double(), labels, spec, wanted, gradient, scale, bias, False)
                grads = {"none": None, "same": logits, "narrow": None}[out]
                if out == "narrow":
                    grads = narrow_view(logits, torch.bfloat16)
                cross_entropy_rows(logits, labels, spec, losses, grads, scale, bias, scratch)
                _close(losses, wanted, 1e-5)
                if grads is not None:
                    _close(grads, gradient, 1e-2 if grads.dtype == torch.bfloat16 else 1e-5)
                count += 1
    return count


def log_probs() -> int:
    """Log-probability, logsumexp, entropy and top class of rows, and the gradients through them."""
    import torch

    from unsloth_patches.unsloth.kernels.log_probs_kernel import log_prob_gradients, log_prob_rows

    count = 0
    for vocab, dtype in itertools.product(VOCABS, (torch.bfloat16, torch.float32)):
        for spec in _specs(vocab).values():
            logits = _rows(vocab, dtype)
            targets = _labels(vocab, 0)
            exact = logits.double()
            values, top1 = log_prob_rows(logits, targets, spec, 0.7, None)
            wanted, _ = log_prob_rows(exact, targets, spec, 0.7, None)
            _close(values, wanted, 1e-4)
            assert bool((top1 < vocab).all())
            upstream = torch.randn(3, ROWS, device = "cuda")
            expected = torch.empty_like(exact)
            log_prob_gradients(exact, targets, spec, 0.7, None, wanted, upstream.double(), expected)
            log_prob_gradients(logits, targets, spec, 0.7, None, values, upstream, logits)
            _close(logits, expected, 2e-2 if dtype == torch.bfloat16 else 1e-4)
            count += 1
    return count


def swiglu_backward() -> int:
    """The three gradients of silu(e) * g, one of them in the place of the incoming one."""
    import torch

    from unsloth_patches.unsloth.kernels.swiglu_backward import swiglu_backward_

    shapes, dtypes = ((1, 1), (3, 341), (1, 1024), (5, 411)), (torch.bfloat16, torch.float32)
    for shape, dtype in itertools.product(shapes, dtypes):
        gradient, e, g = (torch.randn(shape, device = "cuda").to(dtype) for _ in range(3))
        exact = [t.double().requires_grad_() for t in (e, g)]
        forward = torch.nn.functional.silu(exact[0]) * exact[1]
        wanted = torch.autograd.grad(forward, exact, gradient.double())
        h, dg = swiglu_backward_(gradient, e, g)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        for found, value in zip((h, gradient, dg), (forward.detach(), *wanted)):
            _close(found, value, tolerance)
    return len(shapes) * len(dtypes)


def scaling() -> int:
    """Gradients scaled in place, at sizes around a block."""
    import torch

    from unsloth_patches.unsloth.kernels.loss_chunking import scale_

    sizes, dtypes = (1, 4095, 4096, 4097, 12289), (torch.bfloat16, torch.float32)
    for size, dtype in itertools.product(sizes, dtypes):
        values = torch.randn(size, device = "cuda").to(dtype)
        expected = values.double() * 0.3
        scale_(values, torch.tensor(0.3, device = "cuda"))
        _close(values, expected, 1e-2 if dtype == torch.bfloat16 else 1e-6)
    return len(sizes) * len(dtypes)


GROUPS = {
    "4-bit dequantize": dequantize,
    "cross entropy": cross_entropy,
    "log-probabilities": log_probs,
    "SwiGLU, backward": swiglu_backward,
    "scaling of gradients": scaling,
}


def run_cases(name: str) -> None:
    """What runs under the sanitizer: a group's cases, then their number."""
    import torch

    torch.manual_seed(3407)
    count = GROUPS[name]()
    torch.cuda.synchronize()
    print(f"cases: {count}", flush = True)


# ------------------------------------------------------------------------------- the sanitizer


def sanitize(tool: str, name: str) -> "tuple[bool, str]":
    """(clean, a line for the log) of one tool on one group."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, str(Path(__file__).resolve()), "--cases", name]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, env = environment, capture_output = True, text = True, timeout = LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return False, f"{tool:<10} {name:<22} NOT FINISHED in {LIMIT_S} s"
    seconds = time.perf_counter() - begin
    output = done.stdout + done.stderr
    cases = re.search(r"^cases: (\d+)", output, re.MULTILINE)
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output, re.MULTILINE)
    if done.returncode == 0 and cases and summary:
        line = f"{tool:<10} {name:<22} {cases.group(1):>4} cases  {summary[-1]}"
        return True, f"{line}  ({seconds:.0f} s)"
    return False, f"{tool:<10} {name:<22} exit code {done.returncode}\n{output[-3000:]}"


def header() -> str:
    import torch
    import triton

    tool = subprocess.run(["compute-sanitizer", "--version"], capture_output = True, text = True)
    version = re.search(r"Version \S+", tool.stdout)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return (
        f"python scripts/sanitize.py, {today}, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, triton {triton.__version__}, "
        f"compute-sanitizer {version.group() if version else 'of unknown version'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description = __doc__.splitlines()[0])
    parser.add_argument(
        "--cases", choices = GROUPS, help = "run a group's cases, without the sanitizer"
    )
    parser.add_argument("--log", type = Path, help = "also write the result to this file")
    parser.add_argument("--tool", choices = TOOLS, action = "append", help = "default: both")
    parser.add_argument("--jobs", type = int, default = 4, help = "runs at a time on the GPU")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(
            "sanitize: torch sees no CUDA GPU; run it on a machine that has one.", file = sys.stderr
        )
        return 2
    if arguments.cases:
        run_cases(arguments.cases)
        return 0
    if shutil.which("compute-sanitizer") is None:
        print(
            "sanitize: compute-sanitizer is not on PATH; the CUDA toolkit has it.", file = sys.stderr
        )
        return 2
    print(header(), flush = True)
    runs = [(tool, name) for tool in arguments.tool or TOOLS for name in GROUPS]
    found = {}
    with ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        started = {pool.submit(sanitize, *run): run for run in runs}
        for done in as_completed(started):
            found[started[done]] = done.result()
            print(done.result()[1], flush = True)
    lines = [header(), *(found[run][1] for run in runs)]
    clean = all(good for good, _ in found.values())
    if arguments.log:
        arguments.log.parent.mkdir(parents = True, exist_ok = True)
        arguments.log.write_text("\n".join(lines) + "\n", encoding = "utf-8")
    return 0 if clean else 1


if __name__ == "__main__":
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    sys.exit(main())
