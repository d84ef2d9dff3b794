# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The kernels' machine code for GPUs that are not here: wide accesses, nothing spilled."""

import ast
import json
import os
import subprocess
import sys

import pytest
from toy_project import ROOT

from unsloth_patches.bench import ahead_of_time as aot

# In a process of its own: another test may have switched Triton's interpreter on in this one.
_COMPILE = """
import json, sys
from unsloth_patches.bench import ahead_of_time as aot
from unsloth_patches.bench.ahead_of_time_cases import nf4_case

def told(code):
    return {**vars(code), "loads": code.widest("LDG"), "stores": code.widest("STG"),
            "local": sum(n for name, n in code.accesses.items() if name[:3] in ("LDL", "STL"))}

cases = {case.name: case for case in aot.cases()}
report = {}
for name, case in cases.items():
    for capability in aot.CAPABILITIES if name == "4-bit dequantize" else aot.QUICK:
        report[f"{name} {capability}"] = told(aot.compile_case(case, capability))
for name, options in {"fp32": {"out": "*fp32"}, "no hints": {"ALIGN": 4}}.items():
    report[name] = told(aot.compile_case(nf4_case(name, **options), 90))
print(json.dumps(report))
"""


def run_python(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    environment.pop("UNSLOTH_PATCHES_FORM", None)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env = environment, cwd = ROOT, capture_output = True, text = True, timeout = 600
    )


@pytest.fixture(scope = "module")
def compiled(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("triton"))
    done = run_python("-c", _COMPILE, TRITON_CACHE_DIR = cache, TRITON_INTERPRET = "0")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def total(
    code,
    start,
    bits = "",
):
    return sum(n for name, n in code["accesses"].items() if name.startswith(start) and bits in name)


def launched_kernels():
    """Names of the @triton.jit functions that no other one calls."""
    defined, called = set(), set()
    for path in (ROOT / "unsloth_patches/unsloth/kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding = "utf-8"))):
            decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
            if any(each.startswith(("triton.jit", "jit")) for each in decorators):
                defined.add(node.name)
                calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
                called |= {getattr(call.func, "id", "") for call in calls}
    return defined - called


def test_every_launched_kernel_is_compiled():
    """A kernel that a patch launches and that is not in the table would go unseen."""
    assert {case.kernel for case in aot.cases()} == launched_kernels()


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_dequantize_is_wide_and_spills_nothing(compiled, capability):
    """One kernel; 32 elements a thread, loaded and stored 128 bits at a time; no local memory."""
    code = compiled[f"4-bit dequantize {capability}"]
    assert code["entries"] == 1
    assert total(code, "LDG", ".128") == 1
    assert total(code, "STG") == 4 == total(code, "STG", ".128")
    assert code["local"] == code["stack_bytes"] == code["spill_bytes"] == 0


def test_dequantize_in_other_cases(compiled):
    """float32 is as wide; a size off the grid keeps the wide path and adds a guarded one; without
    the 16-byte hints no access is wide."""
    wide, guarded, narrow = (
        compiled[name] for name in ("fp32", "4-bit dequantize, any size 90", "no hints")
    )
    assert total(wide, "STG", ".128") == 8 and total(wide, "LDG", ".128") == 1
    assert total(guarded, "STG", ".128") == 4 and total(guarded, "LDG", ".128") == 1
    assert total(guarded, "STG.E.U16") > 0
    assert wide["local"] == guarded["local"] == 0
    assert narrow["loads"] < 128 and narrow["stores"] < 128


@pytest.mark.parametrize("capability", aot.QUICK)
def test_row_kernels_are_wide_and_spill_nothing(compiled, capability):
    """The loss kernels read 128 bits at a time, and plain gradients leave as wide."""
    names = {name for name in compiled if name.endswith(f" {capability}")}
    rows = {name for name in names if "dequantize" not in name}
    assert len(rows) == sum("dequantize" not in case.name for case in aot.cases())
    for name in rows:
        code = compiled[name]
        assert code["loads"] == 128, name
        assert code["spill_bytes"] == code["local"] == 0, name
    assert compiled[f"cross entropy, plain {capability}"]["stores"] == 128


@pytest.mark.parametrize(
    "instruction, bits",
    [
        ("LDG.E.EF.128.CONSTANT", 128),
        ("STG.E.64", 64),
        ("LDG.E", 32),
        ("STG.E.U16", 16),
        ("LDG.E.U8.CONSTANT", 8),
        ("LDG.E.ENL2.256", 256),
    ],
)
def test_width_of_an_instruction(instruction, bits):
    assert aot.width(instruction) == bits


def test_interpreter_is_refused(tmp_path):
    """TRITON_INTERPRET=1 leaves nothing to compile; the error says what to do."""
    arguments = ("-m", "unsloth_patches", "bench", "aot", "--out", str(tmp_path))
    done = run_python(*arguments, TRITON_INTERPRET = "1")
    assert done.returncode == 2 and "unset it" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_committed_table_is_the_committed_json(capsys):
    """results/aot.md renders results/aot.json, with every kernel and every capability; printed, it fits 80
    columns."""
    document = json.loads((ROOT / "docs/results/aot.json").read_text())
    results = {
        name: [aot.Code(**code) for code in codes] for name, codes in document["kernels"].items()
    }
    compiler = f"Triton {document['environment']['versions']['triton']}"
    committed = (ROOT / "docs/results/aot.md").read_text()
    assert committed == aot.markdown(results, compiler)
    assert list(results) == [case.name for case in aot.cases()]
    for codes in results.values():
        assert [code.capability for code in codes] == list(aot.CAPABILITIES)
    aot.print_results(results)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
