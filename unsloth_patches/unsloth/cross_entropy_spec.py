# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What a row's cross entropy is made of, and how rows of logits lie in memory."""

import os
from dataclasses import dataclass
from typing import Optional

import torch

try:
    import triton
except ImportError:  # a CPU build of torch may come without Triton
    triton = None

__all__ = ["RowLoss", "finite_number", "narrow_view", "padded_columns", "uses_triton"]

# Rows start 16-byte aligned whatever the vocabulary: the last columns of a buffer are padding.
COLUMN_ALIGNMENT = 16


@dataclass(frozen = True)
class RowLoss:
    """What a row's loss is made of, apart from its logits and label; see `validated`.

    class_weight: float32 or float64 [vocab], on the logits' device, or None.
    ignore_index: rows with this label have loss 0 and gradient 0.
    """

    class_weight: Optional[torch.Tensor] = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    softcap: float = 0.0
    z_loss: float = 0.0

    @staticmethod
    def validated(
        name: str,
        like: torch.Tensor,
        vocab_size: int,
        class_weight: Optional[torch.Tensor] = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        z_loss: float = 0.0,
    ) -> "RowLoss":
        """The options of the loss ``name``; raises TypeError or ValueError for values that do not fit.

        like: the logits or hidden states, whose device and float64 the class weights share.
        """
        if class_weight is not None:
            if not isinstance(class_weight, torch.Tensor) or not class_weight.is_floating_point():
                raise TypeError(
                    f"{name}: class_weight must be a floating point tensor of [{vocab_size}]."
                )
            if class_weight.shape != (vocab_size,):
                raise ValueError(
                    f"{name}: class_weight must be [{vocab_size}], one weight a class, got shape "
                    f"{tuple(class_weight.shape)}; set it again where the embeddings were resized."
                )
            if class_weight.requires_grad:
                raise ValueError(
                    f"{name}: class_weight has no gradient; pass class_weight.detach()."
                )
            if class_weight.device != like.device:
                raise ValueError(
                    f"{name}: class_weight is on {class_weight.device} and the rest on {like.device}; "
                    "move class_weight with .to(hidden.device)."
                )
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            class_weight = class_weight.to(wide).contiguous()
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"{name}: ignore_index must be an integer, got {ignore_index!r}.")
        smoothing = finite_number(name, "label_smoothing", label_smoothing)
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"{name}: label_smoothing must be between 0 and 1, got {smoothing}.")
        softcap = finite_number(name, "softcap", softcap)
        if softcap < 0.0:
            raise ValueError(f"{name}: softcap must be positive, or 0 for none; got {softcap}.")
        scale = finite_number(name, "logit_scale", logit_scale)
        z_loss = finite_number(name, "z_loss", z_loss)
        return RowLoss(class_weight, ignore_index, smoothing, scale, softcap, z_loss)


def finite_number(name: str, label: str, value) -> float:
    """``value`` as a float; ValueError naming ``label`` where it is none, infinite or NaN.

    Text and truth values are none, though ``float`` takes them: True is a switch, not a strength of 1.
    """
    try:
        number = float("nan") if _is_no_number(value) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(
            f"{name}: {label} must be a finite number, got {value!r}; give an int or a float."
        )
    return number


def _is_no_number(value) -> bool:
    kind = str(getattr(value, "dtype", ""))  # NumPy's and torch's have truth values as well
    return isinstance(value, (bool, str, bytes)) or kind.endswith("bool")


def padded_columns(vocab_size: int) -> int:
    """Row stride of a logits buffer, in elements."""
    return -(-vocab_size // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT


def uses_triton(tensor: torch.Tensor) -> bool:
    """True where the Triton kernels serve this tensor; float64 and other devices run plain torch."""
    if triton is None or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET", "0") == "1"


def narrow_view(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows of ``logits`` seen as ``dtype``, each from its row's first byte on."""
    if dtype == logits.dtype:
        return logits
    rows, columns = logits.shape
    wide = logits.as_strided((rows, logits.stride(0)), (logits.stride(0), 1))
    return wide.view(dtype)[:, :columns]
