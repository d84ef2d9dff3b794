# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""At which tokens a model stops: the end tokens that its chat template writes."""

from __future__ import annotations

import functools
import inspect
from typing import List, Tuple

from .parser import END_TOKENS


def stop_token_ids(tokenizer) -> List[int]:
    """Ids of the end tokens that the tokenizer's chat template writes and its vocabulary has.

    They are looked up by name: ids differ between checkpoints, and small vocabularies lack them.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    ids = []
    for token in END_TOKENS:
        token_id = tokenizer.convert_tokens_to_ids(token) if token in template else None
        if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token:
            ids.append(token_id)
    return ids


def add_stop_tokens(model, tokenizer) -> Tuple[int, ...]:
    """Makes ``generate`` stop at the end tokens of the tokenizer's chat template.

    Base checkpoints stop at <|end_of_text|> alone, and a model trained on chats ends its turns with
    <|eot_id|> (or <|eom_id|>): without this it writes on after a tool call. The ids are appended to
    ``model.generation_config.eos_token_id``; what is there stays, and nothing happens where there
    is nothing to widen. Returns the ids that were added.
    """
    config = getattr(model, "generation_config", None)
    current = getattr(config, "eos_token_id", None)
    present = [current] if isinstance(current, int) else list(current or ())
    added = [i for i in stop_token_ids(tokenizer) if i not in present]
    if config is None or not present or not added:
        return ()
    config.eos_token_id = present + added
    return tuple(added)


def stop_at_end_of_turn(stock):
    """``train_on_responses_only`` that adds the template's stop tokens to the trainer's model, where
    the template is one of Llama 3.x that can call tools.

    Decorates ``unsloth.chat_templates.train_on_responses_only``.
    """
    signature = inspect.signature(stock)
    if not {"trainer", "tokenizer"} <= set(signature.parameters):
        raise NotImplementedError(
            "train_on_responses_only has other parameters than the known ones"
        )

    @functools.wraps(stock)
    def train_on_responses_only(*args, **kwargs):
        given = signature.bind_partial(*args, **kwargs).arguments
        trainer, tokenizer = given.get("trainer"), given.get("tokenizer")
        if tokenizer is None:
            tokenizer = getattr(trainer, "processing_class", getattr(trainer, "tokenizer", None))
        if trainer is not None and _calls_tools(tokenizer):
            add_stop_tokens(getattr(trainer, "model", None), tokenizer)
        return stock(*args, **kwargs)

    return train_on_responses_only


def _calls_tools(tokenizer) -> bool:
    """Whether the chat template writes Llama's ``{"name": ..., "parameters": ...}``."""
    template = getattr(getattr(tokenizer, "tokenizer", tokenizer), "chat_template", None)
    return isinstance(template, str) and '"parameters": ' in template
