# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Change what ``torch.compile`` makes of a decoder block while block compile sets its class up."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Callable, Iterator

import torch

__all__ = ["torch_compile_as"]

_swapping = threading.RLock()


@contextlib.contextmanager
def torch_compile_as(make: Callable) -> Iterator[None]:
    """Inside, ``torch.compile(function, **options)`` is ``make(compile, function, **options)``.

    compile: what ``torch.compile`` was before; it is that again afterwards, also after an error.
    """
    with _swapping:
        before = torch.compile
        torch.compile = functools.partial(make, before)
        try:
            yield
        finally:
            torch.compile = before
