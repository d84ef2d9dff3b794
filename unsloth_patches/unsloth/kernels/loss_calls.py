# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Which losses ran, and whether the function that one stands in for is the one that it knows."""

import inspect
from typing import Dict

__all__ = ["calls", "count_call", "require_parameters"]

_COUNTS: Dict[str, int] = {}


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
