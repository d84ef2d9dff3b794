# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Checks and mode of a tokenizer that get_chat_template made, when it is saved and loaded again."""

from __future__ import annotations

import functools
import logging

from .checks import Checks, checkable_parts, set_checks
from .other_templates import SAVED_NAME, show_calls_in
from .parallel import MODES
from .stop_tokens import add_stop_tokens

logger = logging.getLogger(__name__)


def restore_tool_call_mode(stock):
    """``from_pretrained`` whose tokenizer renders conversations as the one that was saved did.

    save_pretrained writes ``parallel_tool_calls`` into tokenizer_config.json. The model also stops at
    the template's end tokens again, which an adapter does not save.

    Decorates ``FastLanguageModel.from_pretrained`` of ``unsloth._cpu_init`` and
    ``unsloth.models.loader``.
    """

    @functools.wraps(stock)
    def from_pretrained(*args, **kwargs):
        loaded = stock(*args, **kwargs)
        if isinstance(loaded, tuple) and len(loaded) == 2 and restore(loaded[1]):
            add_stop_tokens(*loaded)
        return loaded

    return from_pretrained


def restore(tokenizer) -> bool:
    """Gives a loaded tokenizer its checks and mode back, in place; whether it had any mode."""
    restored = False
    for part in checkable_parts(tokenizer):
        saved = getattr(part, "init_kwargs", None) or {}
        mode, text = saved.get("parallel_tool_calls"), part.chat_template
        if SAVED_NAME in saved and isinstance(text, str):
            show_calls_in(part)
        if mode not in MODES or not isinstance(text, str):
            continue
        if '"parameters": ' not in text or (mode == "join") != ("tool_calls|length > 1" in text):
            logger.warning(
                f"Unsloth: the tokenizer was saved with parallel_tool_calls = {mode!r}, and its chat "
                "template is another one now. Call get_chat_template to render tool calls as in training."
            )
            continue
        set_checks(part, Checks(text, mode, MODES[mode]))
        restored = True
    return restored
