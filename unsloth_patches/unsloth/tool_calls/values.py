# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Plain Python values for those of pydantic, Arrow, numpy and pandas."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


def plain(value: Any) -> Any:
    """A dict, list or scalar for what pydantic, Arrow, numpy, pandas and enums hold."""
    if value is None or isinstance(value, (dict, list, str)) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, enum.Enum):
        return value.value
    for name in ("model_dump", "as_py", "to_pylist", "tolist"):
        method = getattr(value, name, None)
        if callable(method) and not isinstance(value, type):
            return method()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def is_missing(value: Any) -> bool:
    """None, or what pandas has for it: NaN and NA."""
    if value is None or type(value).__name__ == "NAType":
        return True
    return isinstance(value, float) and value != value
