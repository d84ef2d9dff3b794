# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A fault at a chosen point of a training step: an error in an operation, Ctrl-C before a line."""

import contextlib
import random
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts operations, those of the backward pass too; raises OutOfMemoryError in number ``failing``."""

    def __init__(self, failing = None):
        super().__init__()
        self.count, self.failing = 0, failing

    def __torch_dispatch__(
        self,
        func,
        types,
        args = (),
        kwargs = None,
    ):
        self.count += 1
        if self.count == self.failing:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


class Lines(contextlib.AbstractContextManager):
    """Counts lines of Unsloth that run in this thread; raises KeyboardInterrupt before number ``failing``."""

    def __init__(self, failing = None):
        self.count, self.failing = 0, failing

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def _enter_frame(self, frame, event, argument):
        name = str(frame.f_globals.get("__name__"))
        return self._line if "unsloth" in name.split(".") else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.count += 1
            if self.count == self.failing:
                raise KeyboardInterrupt
        return self._line


def check_steps_after_faults(
    step,
    expected,
    fault,
    points = 20,
):
    """``step()`` raises at ``points`` seeded points of it; each next one is, bit for bit, ``expected``.

    step: returns tensors. fault: Operations, Lines, or another such counter of what it takes away.
    """
    with fault() as counted:
        step()
    assert counted.count > points
    error = KeyboardInterrupt if fault is Lines else torch.OutOfMemoryError
    for point in sorted(random.Random(21).sample(range(1, counted.count + 1), points)):
        with pytest.raises(error), fault(point):
            step()
        found = step()
        same = len(found) == len(expected) and all(map(torch.equal, found, expected))
        assert same, f"the step after a fault at {point} of {counted.count} differs"
