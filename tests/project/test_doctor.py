# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``doctor``: every failure that it knows, provoked once; its verdict and its remedy."""

import ctypes
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from bitsandbytes import cextension  # before a test says that there is a GPU
from toy_project import ROOT

from unsloth_patches import doctor
from unsloth_patches.private_names import PRIVATE_NAMES
from unsloth_patches.registry import PATCHES, SUPPORTED_UPSTREAM
from unsloth_patches.reporting import PatchStatus
from unsloth_patches.settings import SWITCHES

NEWEST = SUPPORTED_UPSTREAM[-1]
VERSIONS = {package: doctor.tested_range(package)[1] or "1.0" for package in doctor.NEEDED}
VERSIONS.update(unsloth = NEWEST, unsloth_zoo = NEWEST)


@pytest.fixture
def machine(monkeypatch):
    """A machine where nothing is missing, as a dict of versions; no GPU, no switches set."""
    versions = dict(VERSIONS)
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, ""))
    monkeypatch.setattr(doctor, "status", lambda: [])
    monkeypatch.setattr(doctor, "missing", lambda find_file, on_gpu: [])
    others = ("UNSLOTH_PATCHES_DISABLE", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CC")
    for variable in (*SWITCHES, *others):
        monkeypatch.delenv(variable, raising = False)
    monkeypatch.delenv("TRITON_INTERPRET", raising = False)
    monkeypatch.delitem(sys.modules, "unsloth", raising = False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    return versions


def found(check, verdict):
    """The one finding of a check, which must have this verdict; a problem always has a remedy."""
    (finding,) = [each for each in doctor.examine() if each.check == check]
    assert finding.verdict == verdict, finding
    assert finding.remedy or verdict == "ok"
    return finding


def give_gpu(monkeypatch, major, minor):
    properties = types.SimpleNamespace(
        name = "Some GPU", major = major, minor = minor, total_memory = 2**34
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(cextension, "lib", types.SimpleNamespace(compiled_with_cuda = True))


def test_a_good_machine_has_no_problem(machine, monkeypatch):
    give_gpu(monkeypatch, 9, 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    findings = doctor.examine()
    assert {finding.verdict for finding in findings} == {"ok"}
    assert {"python", "unsloth", "device", "C compiler", "import order"} <= {
        f.check for f in findings
    }


def test_unsloth_missing(machine):
    del machine["unsloth"]
    assert f"pip install unsloth=={NEWEST}" in found("unsloth", "problem").remedy


@pytest.mark.parametrize("version", ["3.10.13", "3.14.0rc1"])
def test_a_python_outside_of_what_was_tested(machine, monkeypatch, version):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: version)
    assert "tested with Python 3.11 to 3.13" in found("python", "note").remedy


def test_unsloth_of_another_release(machine):
    machine["unsloth"] = "2031.1.1"
    assert all(version in found("unsloth", "note").remedy for version in SUPPORTED_UPSTREAM)


def test_unsloth_zoo_of_another_release(machine):
    machine["unsloth_zoo"] = SUPPORTED_UPSTREAM[0]
    assert f"unsloth_zoo=={NEWEST}" in found("versions", "note").remedy


@pytest.mark.parametrize("package", doctor.NEEDED)
def test_package_missing(machine, package):
    del machine[package]
    remedy = found(package, "problem").remedy
    assert f"pip install {package}" in remedy and doctor.NEEDED[package] in remedy


@pytest.mark.parametrize("version, near", [("2.1.0", 0), ("9.0", 1)])
def test_package_outside_of_what_was_tested(machine, version, near):
    """Older than all, or newer: the pip line names the nearest tested version."""
    machine["torch"] = version
    oldest_and_newest = doctor.tested_range("torch")
    remedy = found("torch", "note").remedy
    assert f"pip install 'torch=={oldest_and_newest[near]}'" in remedy
    assert all(tested in remedy for tested in oldest_and_newest)


def test_a_local_build_or_patch_release_of_a_tested_version(machine):
    newest = doctor.tested_range("torch")[1]
    for version in (newest + "+cpu", newest.rpartition(".")[0] + ".99"):
        machine["torch"] = version
        found("torch", "ok")


def test_what_was_tested_is_told(machine):
    text = found("tested", "ok").found
    assert all(word in text for word in ("2026-", "Python 3.11", "torch ", "trl ", NEWEST))


def test_an_absent_private_name_is_told(machine, monkeypatch):
    gone = PRIVATE_NAMES[-1]._replace(place = "torch.nowhere:x", without = "goes without")
    monkeypatch.setattr(doctor, "missing", lambda find_file, on_gpu: [gone])
    finding = found(", ".join(gone.patches), "note")
    assert finding.found == "this torch has no torch.nowhere.x" and "goes without" in finding.remedy


def test_a_bitsandbytes_without_kernels_for_the_cpu(machine, monkeypatch):
    from bitsandbytes import functional

    def refuse(*args, **kwargs):
        raise NotImplementedError("Device type not supported: cpu\nmore")

    assert "4 bits" not in {finding.check for finding in doctor.examine()}
    monkeypatch.setattr(functional, "quantize_4bit", refuse)
    machine["bitsandbytes"] = "0.45.5"
    assert found("bitsandbytes", "note").remedy.startswith("tested with 0.50.2; if something fails")
    finding = found("4 bits", "note")
    assert finding.found.endswith("Device type not supported: cpu") and "0.45.5" in finding.found
    newest = doctor.tested_range("bitsandbytes")[1]
    assert "not QLoRA" in finding.remedy and f"'bitsandbytes=={newest}'" in finding.remedy


NO_LIBRARY = "No compatible CUDA binary found at libbitsandbytes_cuda990.so"


@pytest.mark.parametrize(
    "library, reason",
    [
        (cextension.BNBNativeLibrary(ctypes.CDLL(None)), "it has loaded the CPU's"),
        (cextension.ErrorHandlerMockBNBNativeLibrary(NO_LIBRARY + "\nmore"), NO_LIBRARY),
    ],
    ids = ["CPU's", "none"],
)
def test_a_bitsandbytes_without_a_library_for_the_gpu(machine, monkeypatch, library, reason):
    """As it stands in bitsandbytes after a load of another library, or of none."""
    give_gpu(monkeypatch, 9, 0)
    monkeypatch.setattr(cextension, "lib", library)
    finding = found("4 bits", "problem")
    assert finding.found.endswith(f"has not loaded its GPU library: {reason}")
    assert "reinstall bitsandbytes" in finding.remedy and "CUDA" in finding.remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "4 bits" not in {finding.check for finding in doctor.examine()}


def test_a_bitsandbytes_that_does_not_import_or_does_not_tell(machine, monkeypatch):
    """Its error is a row; where it has no such names, nothing is known."""
    give_gpu(monkeypatch, 9, 0)
    monkeypatch.delattr(cextension, "lib")
    assert "4 bits" not in {finding.check for finding in doctor.examine()}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "bitsandbytes" in found("4 bits", "problem").found.partition(": ")[2]


def test_torch_does_not_import(machine, monkeypatch):
    """A broken torch is one row; the checks that need it are left out instead of failing."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_ROWS", "12")
    assert "reinstall torch" in found("device", "problem").remedy
    assert "C compiler" not in {finding.check for finding in doctor.examine()}


def test_old_gpu(machine, monkeypatch):
    give_gpu(monkeypatch, 7, 0)
    assert "7.5" in found("device", "problem").remedy


def test_gpus_of_several_kinds(machine, monkeypatch):
    """Each kind is told; one that is too old is a problem, wherever it stands."""
    give_gpu(monkeypatch, 9, 0)
    new, old = torch.cuda.get_device_properties(0), types.SimpleNamespace(total_memory = 2**33)
    old.name, old.major, old.minor = "Old GPU", 6, 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: (new, new, old)[index])
    finding = found("device", "problem")
    assert finding.found == "2 x Some GPU, sm_90, 16 GiB; 1 x Old GPU, sm_61, 8 GiB"
    assert "leave the older GPU out of CUDA_VISIBLE_DEVICES" in finding.remedy


def test_a_gpu_that_does_not_answer(machine, monkeypatch):
    """A row, and the checks after it."""
    give_gpu(monkeypatch, 9, 0)

    def fail(index):
        raise RuntimeError("CUDA error: unknown error\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    finding = found("device", "problem")
    assert finding.found.endswith("CUDA error: unknown error") and "nvidia-smi" in finding.remedy


def test_no_gpu(machine):
    assert "CPU backend" in found("device", "note").remedy


def test_gpu_with_a_cpu_build_of_torch(machine, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build" in found("device", "problem").remedy


def test_gpu_that_torch_does_not_see(machine, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0" in found("device", "problem").remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES=7" in found("device", "problem").found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "unset it" in found("device", "note").remedy


def test_a_container_that_pins_the_gpu(machine, monkeypatch):
    """Unsloth compiles in one process there, unless CUDA_VISIBLE_DEVICES names the GPU too."""
    give_gpu(monkeypatch, 9, 0)
    for value, count in (("all", 0), ("", 0), ("3", 1)):
        monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", value)
        assert sum(each.check == "compile workers" for each in doctor.examine()) == count
    assert "CUDA_VISIBLE_DEVICES" in found("compile workers", "note").remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "compile workers" not in {finding.check for finding in doctor.examine()}


def test_no_c_compiler(machine, monkeypatch):
    give_gpu(monkeypatch, 9, 0)
    assert "install gcc" in found("C compiler", "problem").remedy
    monkeypatch.setenv("CC", "/missing/cc")
    assert "/missing/cc" in found("C compiler", "problem").found


def test_interpreter_left_on(machine, monkeypatch):
    give_gpu(monkeypatch, 9, 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows = [finding for finding in doctor.examine() if finding.found == "TRITON_INTERPRET=1"]
    assert [row.verdict for row in rows] == ["note"] and "unset it" in rows[0].remedy


def test_unsloth_imported_first(machine, monkeypatch):
    module = types.ModuleType("unsloth")
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "unsloth", module)
    assert found("import order", "ok").found == "unsloth_patches was imported first"
    monkeypatch.setattr(doctor, "imported_late", lambda: True)
    assert "import unsloth_patches" in found("import order", "note").remedy
    # status() tells it too, in a row that is no patch.
    monkeypatch.setattr(doctor, "status", lambda: [row("late", "its reason")])
    assert "some-patch" not in {finding.check for finding in doctor.examine()}


def test_unknown_patch_switched_off(machine, monkeypatch):
    monkeypatch.setenv("UNSLOTH_PATCHES_DISABLE", f"nf4,{PATCHES[-1].name}")
    remedy = found("switches", "problem").remedy
    assert "no such patch: nf4;" in remedy and all(
        patch.name in remedy for patch in PATCHES if patch.targets
    )


ON_OR_OFF = (
    "UNSLOTH_BNB_TRITON",
    "UNSLOTH_LOSS_FLOAT32_LOGITS",
    "UNSLOTH_CE_FP32_HEAD_GRAD",
    "UNSLOTH_LOSS_CHECK_LABELS",
    "UNSLOTH_BLOCK_COMPILE_PACKED",
    "UNSLOTH_CHECKPOINT_ONE_GRAPH",
    "UNSLOTH_COMPILE_WORKERS_EARLY",
)


def test_every_documented_variable_is_read_by_doctor():
    """Names of patches have a row of their own, and UNSLOTH_PATCHES_QUIET belongs to no patch."""
    table = (ROOT / "docs" / "settings.md").read_text(encoding = "utf-8")
    documented = set(re.findall(r"^\| `(UNSLOTH_\w+)`", table, flags = re.MULTILINE))
    assert documented - {"UNSLOTH_PATCHES_DISABLE", "UNSLOTH_PATCHES_QUIET"} == set(SWITCHES)


def test_every_switch_belongs_to_a_patch():
    """status() would not tell a mistyped value otherwise."""
    assert {switch.patch for switch in SWITCHES.values()} <= {patch.name for patch in PATCHES}


@pytest.mark.parametrize(
    "variable, bad, good",
    [
        ("UNSLOTH_LOSS_CHUNK_ROWS", "many", "512"),
        ("UNSLOTH_LOSS_CHUNK_ROWS", "0", "1"),
        ("UNSLOTH_FSDP2_OFFLOAD", "blocks:0", "blocks:3"),
        ("UNSLOTH_BLOCK_FULLGRAPH", "maybe", "auto"),
        ("UNSLOTH_COMPILE_REPORT", "2", "0"),
        ("UNSLOTH_TOOL_CHECKS", "of", " OFF"),
        ("UNSLOTH_STEP_GRAPHS", "never", "auto"),
        ("UNSLOTH_LOSS_CHUNK_FILE", "pyproject.toml", "sizes.json"),
        ("UNSLOTH_LOSS_CHUNK_FILE", "wrong.json", "sizes.json"),
        ("UNSLOTH_FSDP2_SHARDED_LOAD", "maybe", "off"),
        ("UNSLOTH_COMPILE_CACHE_DIR", "pyproject.toml", "no/such/folder"),
        ("UNSLOTH_COMPILE_CACHE_DIR", "/dev/null/cache", "~nobody-of-this-name/cache"),
        *((name, "true", "0") for name in ON_OR_OFF),
    ],
)
def test_switches_are_read_as_training_reads_them(
    machine, monkeypatch, tmp_path, variable, bad, good
):
    monkeypatch.chdir(tmp_path)
    files = {
        "pyproject.toml": "[x]",
        "sizes.json": '{"A GPU": 384}',
        "wrong.json": '{"A GPU": "x"}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv(variable, bad)
    finding = found("switches", "problem")
    assert finding.found == f"{variable}={bad}"
    assert variable in finding.remedy or f"{bad!r} cannot be written" in finding.remedy
    monkeypatch.setenv(variable, good)
    assert found("switches", "ok").found == f"{variable}={good}"


def row(
    state,
    reason,
    name = "some-patch",
):
    return PatchStatus(name, "Its title", (), state, f"{reason}; waits for unsloth.models", reason)


@pytest.mark.parametrize(
    "state, reason, verdict, remedy",
    [
        ("pending", "will apply", "ok", ""),
        ("pending", "for GPUs, not in use here", "ok", ""),
        ("pending", "will be skipped: another version", "note", "stay; see CONTRIBUTING"),
        ("pending", "will be skipped: UNSLOTH_PATCHES_DISABLE", "note", "stay; unset UNSLOTH_P"),
        ("skipped", "switched off by UNSLOTH_PATCHES_DISABLE", "note", "stay; unset UNSLOTH_PAT"),
        ("skipped", "another version", "note", "stock functions stay"),
        ("failed", "KeyError: 'x'", "problem", "report this line"),
        ("applied", "", "ok", ""),
        ("off", "undo() took it out; install() puts it in", "note", "install() puts it in"),
        ("upstreamed", "this Unsloth already contains it", "ok", ""),
    ],
)
def test_patches(machine, monkeypatch, state, reason, verdict, remedy):
    rows = (
        [row(state, reason)._replace(reason = reason)] if state != "pending" else [row(state, reason)]
    )
    monkeypatch.setattr(doctor, "status", lambda: rows)
    finding = found("some-patch", verdict)
    assert remedy in finding.remedy and "waits for" not in finding.found


@pytest.mark.parametrize("gpu", [True, False])
def test_patches_for_gpus_say_so_without_one(machine, monkeypatch, gpu):
    """The kernels are not in use without a GPU; the chat templates are."""
    monkeypatch.setattr(doctor, "_sees_gpu", lambda: gpu)
    names = ("nf4-dequantize", "llama-chat-templates")
    rows = [row("pending", "will apply", name) for name in names]
    monkeypatch.setattr(doctor, "status", lambda: rows)
    assert found("nf4-dequantize", "ok").found == (
        "will apply" if gpu else "for GPUs, not in use here"
    )
    assert found("llama-chat-templates", "ok").found == "will apply"


def test_command_line():
    """The exit code is 1 with a problem; --json says the same as the table; Unsloth stays out."""
    command = [sys.executable, "-X", "importtime", "-m", "unsloth_patches", "doctor", "--json"]
    environment = {**os.environ, "UNSLOTH_PATCHES_DISABLE": "nothing-like-it"}
    done = subprocess.run(command, env = environment, cwd = ROOT, capture_output = True, text = True)
    assert done.returncode == 1
    problems = [each for each in json.loads(done.stdout) if each["verdict"] == "problem"]
    assert any("nothing-like-it" in each["remedy"] for each in problems)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and "unsloth" not in imported
