# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Private names of the installed PyTorch and Triton are there, and mean what the patches take them for."""

import importlib
import inspect
import re

import pytest
import torch
from toy_project import ROOT

import unsloth_patches
from unsloth_patches import private_names
from unsloth_patches.private_names import PRIVATE_NAMES
from unsloth_patches.registry import PATCHES
from unsloth_patches.upstream_source import patch_misfit, source_file


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids = lambda name: name.place)
def test_is_there(name):
    if name.gpu and not torch.cuda.is_available():
        pytest.skip("only a CUDA build with a GPU has it")
    module, _, attribute = name.place.partition(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        assert hasattr(found, part), f"{', '.join(name.patches)}: {name.without}"
        found = getattr(found, part)
    assert name.is_there(source_file), "it is there, and its source does not tell"
    assert set(name.patches) <= {patch.name for patch in PATCHES}


def test_every_private_import_is_listed():
    """``from torch._x import name`` and ``torch._C.name`` in what lands, found in its text."""
    listed = {name.place.partition(":")[2].split(".")[0] for name in PRIVATE_NAMES}
    # Types that carry what is documented of tensors; getattr with a default, for what may be absent.
    listed |= {"TensorBase", "async_compile", "config", "utils"}
    pattern = re.compile(r"from (?:torch|triton)\.[\w.]*\b_\w[\w.]* import (\w+)|torch\._C\.(\w+)")
    for file in sorted((ROOT / "unsloth_patches" / "unsloth").rglob("*.py")):
        for found in pattern.finditer(file.read_text(encoding = "utf-8")):
            name = found[1] or found[2]
            assert name in listed, f"{file.name} uses {found[0]}: add it to private_names.py"


PLACES = [
    "torch._C:_gone",
    "torch._dynamo.utils:gone",
    "torch._gone:x",
    "torch._dynamo.utils:CompilationMetrics.gone",
    "torch._dynamo.utils:Gone.field",
]


@pytest.mark.parametrize("place", PLACES)
def test_an_absent_one_switches_its_patch_off(monkeypatch, place):
    gone = private_names.PrivateName(place, ("nf4-kernel",))
    less = private_names.PrivateName(place, ("compile-workers",), "later")
    monkeypatch.setattr(private_names, "PRIVATE_NAMES", (gone, less, PRIVATE_NAMES[-1]))
    assert private_names.missing(source_file, on_gpu = False) == [gone, less]
    by_name = {patch.name: patch for patch in PATCHES}
    (row,) = [row for row in unsloth_patches.status() if row.name == "compile-workers"]
    assert row.brief.endswith(f"this torch has no {place.replace(':', '.')}: later")
    reason = patch_misfit(by_name["nf4-kernel"])
    assert reason == f"this torch has no {place.replace(':', '.')}, which the patch relies on"
    assert patch_misfit(by_name["compile-workers"]) == ""


def test_saved_tensor_hooks_are_asked_for_without_an_error():
    asked = torch._C._autograd._top_saved_tensors_default_hooks
    assert not asked(False)
    with torch.autograd.graph.save_on_cpu():
        assert asked(False)


def test_stacks_of_modes_are_counted():
    from torch.overrides import TorchFunctionMode
    assert torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0
    with TorchFunctionMode():
        assert torch._C._len_torch_function_stack() == 1


def test_marks_of_a_tensor_are_those_that_a_leaf_copies():
    """``mark_dynamic`` and the like leave nothing else on a tensor."""
    from unsloth_patches.unsloth.models.checkpoint_shared_graph import _MARKS

    marked = torch.zeros(4, 4)
    torch._dynamo.mark_dynamic(marked, 0, min = 2, max = 64)
    torch._dynamo.maybe_mark_dynamic(marked, 1)
    unknown = [n for n in vars(marked) if not n.startswith("_dynamo_") and n not in _MARKS]
    assert unknown == [] and vars(marked)


def test_compile_workers_take_no_arguments():
    from torch._inductor import async_compile
    assert not inspect.signature(async_compile.maybe_warm_pool).parameters
    assert async_compile.get_compile_threads() >= 1


def test_compilation_metrics_have_their_fields():
    from torch._dynamo.utils import CompilationMetrics
    assert {"co_name", "entire_frame_compile_time_s"} <= set(
        CompilationMetrics.__dataclass_fields__
    )


def test_inductor_keeps_tritons_cache_below_its_own(tmp_path, monkeypatch):
    from torch._inductor.runtime.runtime_utils import triton_cache_dir
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert str(tmp_path) in triton_cache_dir(0)
