# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Every Triton kernel that the patches launch, as training launches it: what `bench aot` compiles."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Callable, Dict, List, Tuple

VOCAB = 128256  # Llama 3's; the launch shape of the loss kernels depends on it


@dataclass(frozen = True)
class Case:
    """A kernel as training launches it.

    types: argument -> its type in Triton's words; T stands for the half precision of the GPU
        (float16 before sm_80, else bfloat16). Arguments that are not named are float32.
    constants: capability -> the constexpr arguments. settings: capability -> number of warps.
    aligned: arguments that are multiples of 16 in training, which Triton then assumes.
    """

    name: str
    module: str
    kernel: str
    types: Dict[str, str]
    constants: Callable[[int], dict]
    warps: Callable[[int], int]
    aligned: Tuple[str, ...] = ()

    def function(self):
        return getattr(
            importlib.import_module(f"unsloth_patches.unsloth.kernels.{self.module}"), self.kernel
        )


def half(capability: int) -> str:
    """The type of 16-bit training: the T4 computes in float16."""
    return "fp16" if capability < 80 else "bf16"


# ------------------------------------------------------------------------------- the kernels


def nf4_case(
    name: str,
    out: str = "*T",
    **changed,
) -> Case:
    """The dequantize kernel on a double quantized NF4 weight of blocksize 64."""

    from unsloth_patches.unsloth.kernels.nf4_dequantize_kernel import CHUNKS, WARPS

    def constants(capability: int) -> dict:
        plain = {
            "CHUNKS": CHUNKS,
            "BLOCK_SHIFT": 1,
            "BLOCK2_SHIFT": 8,
            "NESTED": True,
            "FP4": False,
            "ALIGN": 16,
            "ON_GRID": True,
            "PTX": True,
            "HAS_CVT2": capability >= 80,
        }
        return {**plain, **changed}

    types = {"W": "*u8", "absmax": "*u8", "code2": "*fp32", "absmax2": "*fp32", "offset": "*fp32"}
    types.update(out = out, n_elements = "i32")
    module, kernel = "nf4_dequantize_kernel", "dequantize_kernel"
    return Case(name, module, kernel, types, constants, lambda capability: WARPS)


def _rows(half_logits: bool) -> Tuple[int, dict]:
    """(warps, LANES and WIDTH) of the row kernels for VOCAB columns."""
    import torch

    from unsloth_patches.unsloth.kernels.cross_entropy_kernel import launch_shape

    warps, lanes, width = launch_shape(VOCAB, torch.bfloat16 if half_logits else torch.float32)
    return warps, {"LANES": lanes, "WIDTH": width}


_ROW_ALIGNED = ("logits_ptr", "logits_stride", "grads_ptr", "grads_stride", "VOCAB", "COLUMNS")
_CROSS_ENTROPY_TYPES = {
    "logits_stride": "i32",
    "grads_stride": "i32",
    "labels_ptr": "*i64",
    "losses_ptr": "*fp32",
    "row_scale_ptr": "*fp32",
    "bias_ptr": "*T",
    "weight_ptr": "*fp32",
    "weight_sum_ptr": "*fp32",
    "ignore_index": "i32",
    "VOCAB": "i32",
    "COLUMNS": "i32",
}
_OPTIONS = ("BIAS", "WEIGHT", "SMOOTHING", "SCALE", "SOFTCAP", "Z_LOSS")


def _cross_entropy_case(name: str, half_logits: bool, options: bool) -> Case:
    def constants(capability: int) -> dict:
        flags = {f"HAS_{option}": options for option in _OPTIONS}
        flags.update(HAS_GRADS = True, HAS_ROW_SCALE = options, HAS_FACTOR = options)
        flags.update(NARROW = not half_logits, FROM_END = half_logits)
        return {**flags, **_rows(half_logits)[1]}

    logits = "*T" if half_logits else "*fp32"
    types = {**_CROSS_ENTROPY_TYPES, "logits_ptr": logits, "grads_ptr": "*T"}
    warps = lambda capability: _rows(half_logits)[0]  # noqa: E731
    kernel = "_cross_entropy_kernel"
    return Case(name, "cross_entropy_kernel", kernel, types, constants, warps, _ROW_ALIGNED)


def _log_probs_case(name: str, kernel: str, **flags) -> Case:
    constants = lambda capability: {  # noqa: E731
        **dict.fromkeys(("HAS_BIAS", "HAS_SCALE", "HAS_SOFTCAP"), False),
        **flags,
        **_rows(True)[1],
    }
    types = {name: "*fp32" for name in ("values_ptr", "upstream_ptr", "bias_ptr")}
    types.update(logits_ptr = "*T", grads_ptr = "*T", targets_ptr = "*i64", top1_ptr = "*i64")
    types.update(logits_stride = "i32", grads_stride = "i32", rows = "i32", VOCAB = "i32", COLUMNS = "i32")
    warps = lambda capability: _rows(True)[0]  # noqa: E731
    return Case(name, "log_probs_kernel", kernel, types, constants, warps, _ROW_ALIGNED)


def cases() -> List[Case]:
    """Every kernel that the patches launch, in the forms that training uses most."""
    return [
        nf4_case("4-bit dequantize"),
        nf4_case("4-bit dequantize, any size", ON_GRID = False),
        _cross_entropy_case("cross entropy, plain", half_logits = True, options = False),
        _cross_entropy_case(
            "cross entropy, every option, float32 logits", half_logits = False, options = True
        ),
        _log_probs_case("log-probabilities", "_log_probs_kernel"),
        _log_probs_case("log-probabilities, gradients", "_log_probs_gradient_kernel", NARROW = False),
        Case(
            "SwiGLU, backward",
            "swiglu_backward",
            "_swiglu_backward_kernel",
            {**dict.fromkeys(("gradient", "e", "g", "h", "df"), "*T"), "count": "i32"},
            lambda capability: {"LONG": False, "BLOCK": 1024},
            lambda capability: 4,
            ("gradient", "e", "g", "h", "df", "count"),
        ),
        Case(
            "scaling of gradients",
            "loss_chunking",
            "_scale_kernel",
            {"values_ptr": "*T", "factor_ptr": "*fp32", "size": "i64"},
            lambda capability: {"BLOCK": 4096},
            lambda capability: 4,
            ("values_ptr", "size"),
        ),
    ]
