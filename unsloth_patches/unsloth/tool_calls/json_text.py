# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""JSON text, of which nothing gets lost."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Tuple

from .errors import ToolCallError


def read_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError where a key's first value of two would be lost."""
    return _DECODER.decode(text)


def checked_json(text: str, what: str) -> Any:
    """The same; ToolCallError about ``what``, with the text's beginning, where it is not JSON."""
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise ToolCallError(f"{what} is a text that is not JSON ({error}): {text!r:.80}") from None


def _without_loss(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        for key, value in pairs:
            if value is not read[key] and value != read[key]:
                raise ValueError(f"the key {key!r} comes twice; keep one")
    return read


_DECODER = json.JSONDecoder(object_pairs_hook = _without_loss)
