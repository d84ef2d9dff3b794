# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tool calls of Llama 3.1, 3.2 and 3.3: read out of what a model wrote, and stopped after.

::

    add_stop_tokens(model, tokenizer)  # train_on_responses_only does it too
    message = parse_tool_calls(generated_ids, tokenizer, tools)
"""

from .errors import ToolCallError
from .parser import parse_tool_calls
from .stop_tokens import add_stop_tokens, stop_token_ids

__all__ = [
    "ToolCallError",
    "add_stop_tokens",
    "parse_tool_calls",
    "stop_token_ids",
]
