# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The error of everything here that reads conversations."""

from __future__ import annotations

from typing import Optional


class ToolCallError(ValueError):
    """A conversation that cannot be rendered faithfully: where, what is wrong, and what to do."""

    def in_conversation(self, number: int) -> "ToolCallError":
        """The same error, which names the conversation of a batch or dataset too."""
        return ToolCallError(str(self).replace("Unsloth: ", f"Unsloth: conversation {number}, ", 1))

    def in_row(self, row: Optional[int]) -> "ToolCallError":
        """The same error, which names the row of the data set too, where it is known."""
        return self if row is None else ToolCallError(f"{self} (row {row} of the data set)")


def where_in(
    index: int,
    number: Optional[int] = None,
    name: Optional[str] = None,
) -> str:
    """What a message of error starts with: ``Unsloth: messages[3], call 1 ('add'): ``."""
    call = "" if number is None else f", call {number}" + (f" ({name!r})" if name else "")
    return f"Unsloth: messages[{index}]{call}: "
