# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Private names of the installed PyTorch and Triton are there, and mean what the patches take them for."""

import ast
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
        if inspect.isclass(
            found
        ):  # a field that each object gets: its source tells, and a test below
            break
        assert hasattr(found, part), f"{', '.join(name.patches)}: {name.without}"
        found = getattr(found, part)
    assert name.is_there(source_file), "it is there, and its source does not tell"
    assert set(name.patches) <= {patch.name for patch in PATCHES}


def _private_names_used(tree):
    """(line, name) of ``from torch._x import name``, ``torch.x._name`` and ``getattr(torch.x, "_name", …)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"(torch|triton)\b", node.module or ""):
            for each in node.names:
                if "._" in f"{node.module}.{each.name}":
                    yield node.lineno, each.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            chain = ast.unparse(node)
            if re.fullmatch(r"(torch|triton)(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*", chain):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            owner, name = map(ast.unparse, node.args[:2])
            if re.match(r"(torch|triton)\b", owner) and name.startswith("'_"):
                yield node.lineno, name.strip("'")


def test_every_private_name_is_listed():
    listed = {part for name in PRIVATE_NAMES for part in re.split("[:.]", name.place)}
    # A class that carries what is documented of tensors; log_state's and ops' own parts; a module imported whole.
    listed |= {"TensorBase", "data_ptr", "async_compile", "config", "utils"}
    for file in sorted((ROOT / "unsloth_patches" / "unsloth").rglob("*.py")):
        for line, name in _private_names_used(ast.parse(file.read_text(encoding = "utf-8"))):
            assert name in listed, f"{file.name}:{line} uses {name}: add it to private_names.py"


PLACES = [
    "torch._C:_gone",
    "torch._dynamo.utils:gone",
    "torch._gone:x",
    "torch._dynamo.utils:CompilationMetrics.gone",
    "torch._dynamo.utils:Gone.field",
    "torch:ops.aten._gone",
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
    fields = {"co_name", "entire_frame_compile_time_s", "inductor_fx_local_cache_hit_count"}
    assert fields <= set(CompilationMetrics.__dataclass_fields__)


def test_inductor_keeps_tritons_cache_below_its_own(tmp_path, monkeypatch):
    from torch._inductor.runtime.runtime_utils import triton_cache_dir
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert str(tmp_path) in triton_cache_dir(0)


def test_modules_and_sharded_parameters_have_their_fields():
    """Of objects, for their classes only annotate most of them."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    from unsloth_patches.unsloth.models.fsdp2_sharded_params import fsdp_params

    model = torch.nn.Linear(4, 4)
    distributed.init_process_group("gloo", store = distributed.HashStore(), rank = 0, world_size = 1)
    try:
        fully_shard(model, mesh = distributed.init_device_mesh("cpu", (1,)))
        model(torch.ones(1, 4))
        objects = {"Module": [model], "FSDPParam": list(fsdp_params(model))}
        assert len(objects["FSDPParam"]) == 2
        for name in PRIVATE_NAMES:
            owner, _, field = name.place.partition(":")[2].partition(".")
            for each in objects.get(owner, ()):
                assert hasattr(each, field), name
    finally:
        distributed.destroy_process_group()


def test_dynamo_logs_where_compile_events_listen():
    from torch._dynamo import convert_frame, guards, symbolic_convert

    from unsloth_patches.unsloth.models.compile_events import _BREAKS, _RECOMPILES

    logs = [symbolic_convert.graph_break_log, convert_frame.graph_break_log, guards.recompiles_log]
    assert [log.name for log in logs] == [*_BREAKS, *_RECOMPILES]
