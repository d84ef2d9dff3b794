# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The Triton kernels compiled for GPUs that are not here: registers, memory and widths of accesses.

Runs without a GPU: Triton carries the assembler and the disassembler. What comes out is what the
compiler makes, not how fast it runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List

from . import harness
from .ahead_of_time_cases import VOCAB, Case, cases, half

# Compute capability -> a GPU that has it.
CAPABILITIES = {
    75: "T4",
    80: "A100",
    86: "A10, RTX 3090",
    89: "L4, RTX 4090",
    90: "H100, H200",
    100: "B200",
    120: "RTX 5090",
}
QUICK = (75, 90)


# ------------------------------------------------------------------------------- compiling


@dataclass(frozen = True)
class Code:
    """What the compiler made of a kernel.

    registers: of a thread. shared_bytes: of a program. spill_bytes, stack_bytes: local memory of a
    thread for registers that did not fit, and all of it. accesses: instruction -> how often it
    stands in the machine code, for global and local memory.
    """

    capability: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    warps: int
    entries: int
    accesses: Dict[str, int] = field(default_factory = dict)

    def widest(self, instruction: str) -> int:
        """Bits of the widest LDG (load) or STG (store); 0 where there is none."""
        return max(
            (width(name) for name in self.accesses if name.startswith(instruction)), default = 0
        )


def width(instruction: str) -> int:
    """Bits that a thread moves with an instruction such as LDG.E.EF.128.CONSTANT or STG.E.U16."""
    for part in instruction.split(".")[1:]:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def compile_case(case: Case, capability: int) -> Code:
    """Compiles a kernel for a capability. Raises RuntimeError where Triton cannot compile here."""
    _require_compiler()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, warps = case.function(), case.warps(capability)
    constants = case.constants(capability)
    signature = {
        name: "constexpr" if name in constants else _type(case, name, capability)
        for name in kernel.arg_names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in case.aligned
    }
    source = ASTSource(kernel, signature, constexprs = constants, attrs = attributes)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        with contextlib.redirect_stdout(log):
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target = target, options = {"num_warps": warps})
    return Code(
        capability = capability,
        shared_bytes = compiled.metadata.shared,
        warps = warps,
        entries = compiled.asm["ptx"].count(".entry"),
        accesses = _accesses(compiled.asm["cubin"]),
        **_resources(log.getvalue()),
    )


def _type(case: Case, argument: str, capability: int) -> str:
    return case.types.get(argument, "fp32").replace("T", half(capability))


def _tools() -> Path:
    import triton
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _require_compiler() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("bench aot: TRITON_INTERPRET=1 replaces the compiler; unset it.")
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(f"bench aot: Triton does not import: {error}") from error
    if not hasattr(triton, "knobs") or not (_tools() / "nvdisasm").exists():
        raise RuntimeError(
            f"bench aot: Triton {triton.__version__} has no knobs or carries no nvdisasm; "
            "3.6 and 3.7 for Linux do."
        )


def _resources(log: str) -> dict:
    registers = re.search(r"Used (\d+) registers", log)
    memory = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if not registers or not memory:
        raise RuntimeError(f"bench aot: ptxas said nothing of its resources:\n{log[-500:]}")
    stack, stores, loads = map(int, memory.groups())
    return {
        "registers": int(registers.group(1)),
        "stack_bytes": stack,
        "spill_bytes": max(stores, loads),
    }


def _accesses(cubin: bytes) -> Dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix = ".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(_tools() / "nvdisasm"), "-c", file.name], capture_output = True, text = True
        )
    if done.returncode:
        raise RuntimeError(f"bench aot: nvdisasm failed: {done.stderr.strip()}")
    counts: Dict[str, int] = {}
    for name in re.findall(r"\b((?:LDG|STG|LDL|STL)[.\w]*)", done.stdout):
        counts[name] = counts.get(name, 0) + 1
    return counts


# ------------------------------------------------------------------------------- the table

COLUMNS = (
    "kernel",
    "sm",
    "registers",
    "shared B",
    "spills B",
    "local B",
    "load bits",
    "store bits",
)


def table(results: Dict[str, List[Code]]) -> List[List[object]]:
    """One row a kernel and capability, under COLUMNS."""
    return [
        [
            name,
            code.capability,
            code.registers,
            code.shared_bytes,
            code.spill_bytes,
            code.stack_bytes,
            code.widest("LDG"),
            code.widest("STG"),
        ]
        for name, codes in results.items()
        for code in codes
    ]


def print_results(results: Dict[str, List[Code]]) -> None:
    """The table in 80 columns: a row a kernel, in it a line a capability."""
    rows, heads = [], [column.replace(" ", "\n") for column in COLUMNS]
    for name, codes in results.items():
        _, *columns = zip(*table({name: codes}))
        rows.append([textwrap.fill(name, 17), *("\n".join(map(str, each)) for each in columns)])
    harness.print_table("kernels compiled ahead of time, not run", heads, rows)


def markdown(results: Dict[str, List[Code]], compiler: str) -> str:
    """The table for a reader of the repository."""
    gpus = ", ".join(f"sm_{sm} {gpu}" for sm, gpu in CAPABILITIES.items())
    lines = [
        "# The kernels, compiled ahead of time",
        "",
        f"Compiled by {compiler}, not run: {gpus}. Half precision is float16 on sm_75 and bfloat16 on",
        f"the others; the loss kernels have {VOCAB} columns. Registers and local memory are a thread's,",
        "shared memory is a program's, bits are those of the widest load and store of global memory.",
        "Command: `python -m unsloth_patches bench aot`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" + " ---: |" * (len(COLUMNS) - 1),
    ]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table(results)]
    return "\n".join(lines) + "\n"


def run(out: Path, quick: bool = False) -> int:
    """Compiles every kernel for every capability; writes ``aot.json`` and ``aot.md`` under out."""
    results: Dict[str, List[Code]] = {}
    chosen = QUICK if quick else CAPABILITIES
    try:
        for case in cases():
            results[case.name] = [compile_case(case, capability) for capability in chosen]
            print(f"compiled for {len(chosen)} GPUs: {case.name}", flush = True)
    except RuntimeError as error:
        print(error, file = sys.stderr)
        return 2
    import triton

    name = "python -m unsloth_patches bench aot" + (" --quick" if quick else "")
    payload = {
        "computed": "compiled ahead of time, not run",
        "gpus": {str(sm): gpu for sm, gpu in CAPABILITIES.items()},
        "kernels": {name: [vars(code) for code in codes] for name, codes in results.items()},
    }
    harness.save_json(Path(out) / "aot.json", payload, name)
    text = markdown(results, f"Triton {triton.__version__}")
    (Path(out) / "aot.md").write_text(text, encoding = "utf-8")
    print_results(results)
    return 0
