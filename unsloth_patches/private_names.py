# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Names of PyTorch and Triton that are not documented, and what the patches do where they are absent.

A release may drop them. A patch that has no way around an absent name is skipped with that reason; the
others say here what is given up, and ``doctor`` tells it. ``tests/project/test_private_names.py`` holds
the installed versions to the list, and to what the patches take the names for.
"""

from __future__ import annotations

import sys
from typing import List, NamedTuple, Tuple

from .fingerprints import FindFile, binds, binds_field

SKIPPED = "the patch is skipped"


class PrivateName(NamedTuple):
    """``module:name`` or ``module:Class.field``, the patches that use it, and what they do without it.

    gpu: only builds for CUDA have it.
    """

    place: str
    patches: Tuple[str, ...]
    without: str = SKIPPED
    gpu: bool = False

    def __str__(self) -> str:
        """``this torch has no torch._inductor.async_compile.maybe_warm_pool``"""
        return f"this {self.package} has no {self.place.replace(':', '.')}"

    @property
    def package(self) -> str:
        return self.place.replace(":", ".").partition(".")[0]

    def is_there(self, find_file: FindFile) -> bool:
        """Read from the sources, so that nothing is imported for it; what torch compiled in is asked of torch,
        once that is imported."""
        module, _, name = self.place.partition(":")
        if module not in ("torch", "torch._C"):
            return (binds_field if "." in name else binds)(module, name, find_file)
        found = sys.modules.get("torch")
        for part in self.place.replace(":", ".").split(".")[1:] if found is not None else ():
            found = getattr(found, part, None)
        return found is not None or "torch" not in sys.modules


_GRAPHS = ("step-graphs",)
_CACHE = ("compile-cache",)
_WORKERS = "the workers start when something compiles, as in stock"
_LOGS = "graph breaks are counted, and recompilations have one reason each"
_FSDP2 = "torch.distributed.fsdp._fully_shard"
_PARAM = f"{_FSDP2}._fsdp_param:FSDPParam"
_GROUP = f"{_FSDP2}._fsdp_param_group:FSDPParamGroup"
_TRITON = "kernels outside of compiled graphs are compiled again in each process"
PRIVATE_NAMES = (
    PrivateName("torch._C:_cuda_getCurrentRawStream", ("nf4-dequantize",), "slower launches", True),
    PrivateName("torch._C:_cuda_getDevice", ("nf4-kernel",), "slower launches", True),
    PrivateName("triton.runtime:JITFunction", ("nf4-kernel",)),
    PrivateName(
        "torch._C:_autograd._top_saved_tensors_default_hooks", ("checkpoint-shared-graph", *_GRAPHS)
    ),
    PrivateName("torch._C:_len_torch_dispatch_stack", _GRAPHS),
    PrivateName("torch._C:_len_torch_function_stack", _GRAPHS),
    PrivateName("torch._C:DisableTorchFunctionSubclass", _GRAPHS),
    PrivateName("torch._C:_any_requires_grad", _GRAPHS),
    PrivateName("torch._C:_current_graph_task_id", ("fsdp2-offload-apply",)),
    PrivateName("torch.cuda:_sleep", ("step-graphs-capture",)),
    PrivateName("torch._utils:_unflatten_dense_tensors", ("step-graphs-capture",)),
    PrivateName("torch.utils._pytree:tree_map", ("checkpoint-shared-graph",)),
    PrivateName("torch:_foreach_copy_", ("step-graphs-capture",)),
    PrivateName("torch.nn.modules.module:_global_forward_hooks", ("checkpoint-recompute",)),
    PrivateName(
        "torch.nn.modules.module:Module._forward_hooks", ("checkpoint-recompute", *_GRAPHS)
    ),
    PrivateName("torch:ops.aten._flash_attention_forward", ("packed-attention",)),
    PrivateName("torch._dynamo:maybe_mark_dynamic", ("packed-attention",)),
    PrivateName("torch._dynamo.exc:TorchDynamoException", ("compile-strict",)),
    PrivateName("torch._dynamo.utils:counters", ("compile-events",)),
    PrivateName("torch._dynamo.utils:get_compilation_metrics", ("compile-events",)),
    PrivateName("torch._dynamo.utils:set_compilation_metrics_limit", ("compile-events",)),
    PrivateName(
        "torch._dynamo.utils:CompilationMetrics.inductor_fx_local_cache_hit_count",
        ("compile-report",),
        "the report does not tell what came from a cache",
    ),
    PrivateName("torch._dynamo.symbolic_convert:graph_break_log", ("compile-events",), _LOGS),
    PrivateName("torch._dynamo.guards:recompiles_log", ("compile-events",), _LOGS),
    PrivateName("torch._logging._internal:log_state", ("compile-events",), _LOGS),
    PrivateName("torch._inductor.async_compile:maybe_warm_pool", ("compile-workers",), _WORKERS),
    PrivateName(
        "torch._inductor.async_compile:get_compile_threads", ("compile-workers",), _WORKERS
    ),
    PrivateName(
        "torch._functorch.config:autograd_cache_allow_custom_autograd_functions",
        _CACHE,
        "kernels are found again, traces are made again",
    ),
    PrivateName(
        "torch._inductor.runtime.runtime_utils:triton_cache_dir", ("compile-cache-files",), _TRITON
    ),
    PrivateName("triton.runtime.cache:FileCacheManager", ("compile-cache-files",), _TRITON),
    PrivateName(f"{_PARAM}._init_extensions", ("fsdp2-param-init",)),
    PrivateName(f"{_PARAM}._init_sharded_param", ("fsdp2-param-init",)),
    PrivateName(f"{_PARAM}._module_info", ("fsdp2-param-init",)),
    PrivateName(f"{_PARAM}._orig_size", ("fsdp2-param-init",)),
    PrivateName(f"{_PARAM}._contiguous_orig_stride", ("fsdp2-param-init",)),
    PrivateName(f"{_PARAM}._setattr_on_modules", ("fsdp2-param-init",)),
    PrivateName(f"{_PARAM}._sharded_param_data", ("fsdp2-offload-apply",)),
    PrivateName(f"{_PARAM}._unsharded_param", ("fsdp2-param-init",)),
    PrivateName(f"{_GROUP}._all_gather_result", ("fsdp2-offload-apply",)),
)


def missing(find_file: FindFile, on_gpu: bool) -> List[PrivateName]:
    """What the installed versions lack; of a package that is not there, nothing is told."""
    names = [n for n in PRIVATE_NAMES if (on_gpu or not n.gpu) and find_file(n.package)]
    return [name for name in names if not name.is_there(find_file)]


def why_skipped(patch: str, find_file: FindFile) -> str:
    """The name that a patch cannot do without and that is not there; empty where all are."""
    for name in PRIVATE_NAMES:
        if patch in name.patches and name.without == SKIPPED and not name.is_there(find_file):
            return f"{name}, which the patch relies on"
    return ""
