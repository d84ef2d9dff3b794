# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Where and why torch.compile gave up, in one line each, from what torch says about it."""

from __future__ import annotations

import os
import re
import traceback
from typing import NamedTuple, Tuple

__all__ = ["Place", "failure_place", "last_frame", "one_line", "reason_and_hint", "short_path"]

_STACK_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_NOISE = ("Encountered graph break when", "Failed to handle graph break gracefully")


class Place(NamedTuple):
    """A line of source; ``file`` is empty where torch did not say."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{short_path(self.file)}:{self.line}" if self.file else "place not reported"


def short_path(file: str) -> str:
    """``file`` below site-packages, or below the working folder; else as it is."""
    for root in ("site-packages" + os.sep, "dist-packages" + os.sep, os.getcwd() + os.sep):
        if root in file:
            return file.rsplit(root, 1)[-1]
    return file


def last_frame(text: str) -> Place:
    """The innermost frame of a stack in ``text`` that is not torch's own."""
    frames = [f for f in _STACK_FRAME.finditer(text) if os.sep + "torch" + os.sep not in f["file"]]
    return Place(frames[-1]["file"], int(frames[-1]["line"])) if frames else Place()


def failure_place(error: BaseException) -> Place:
    """The line of the traced code at which torch.compile gave up."""
    stack = getattr(error, "real_stack", None)
    if stack:
        return Place(stack[-1].filename, stack[-1].lineno or 0)
    _, told, text = str(error).partition("from user code:")
    if told:
        return last_frame(text)
    return last_frame("".join(traceback.format_tb(error.__traceback__)))


def reason_and_hint(text: str) -> Tuple[str, str]:
    """Torch's message in one line, and its first hint."""
    lines = [line.strip() for line in text.strip().splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    hint = next((line[len("Hint:") :].strip() for line in lines if line.startswith("Hint:")), "")
    told = [line for line in lines if not line.startswith(("Hint:", "Developer debug"))][:2]
    return " ".join(told)[:400] or "no reason given", hint[:300]


def one_line(text: str) -> str:
    """The text without line breaks and runs of blanks, cut at 400 characters."""
    return " ".join(text.split())[:400]
