# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Which losses ran, and checks of how they are called: the function they stand in for, the options' names.

Imports nothing of ``unsloth.kernels``: the CPU backend needs this where there is no Triton.
"""

import difflib
import functools
import inspect
from typing import Dict, Iterable, Tuple

__all__ = ["calls", "count_call", "refuse_lookalikes", "require_parameters"]

_COUNTS: Dict[str, int] = {}
# What other libraries call our options.
_OTHER_NAMES = {
    "weight": "class_weight",
    "weights": "class_weight",
    "loss_weight": "loss_weights",
    "sample_weight": "loss_weights",
    "sample_weights": "loss_weights",
    "token_weights": "loss_weights",
    "label_smoothing_factor": "label_smoothing",
    "smoothing": "label_smoothing",
    "lse_square_scale": "z_loss",
    "z_loss_multiplier": "z_loss",
    "size_average": "reduction",
    "reduce": "reduction",
}


def calls() -> Dict[str, int]:
    """How often each loss ran here: ``fused``, ``dense``, ``cpu``, and ``stock: <reason>``."""
    return dict(_COUNTS)


def count_call(name: str) -> None:
    _COUNTS[name] = _COUNTS.get(name, 0) + 1


def require_parameters(function, expected) -> None:
    """Raises NotImplementedError where a function has other parameters than we know."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(expected):
        raise NotImplementedError(
            f"{function.__name__} takes ({', '.join(found)}) here, not ({', '.join(expected)})"
        )


def refuse_lookalikes(name: str, given: Iterable[str], options: Tuple[str, ...]) -> None:
    """TypeError for an argument that means one of ``options`` by another name or a slip of the pen."""
    for argument in given:
        meant = _meant(argument, options)
        if meant:
            raise TypeError(
                f"{name}: {argument!r} would be ignored; {meant!r} is what it is called here."
            )


@functools.lru_cache(maxsize = None)
def _meant(argument: str, options: Tuple[str, ...]) -> str:
    if argument in options:
        return ""
    if _OTHER_NAMES.get(argument) in options:
        return _OTHER_NAMES[argument]
    return "".join(difflib.get_close_matches(argument, options, 1, 0.85))
