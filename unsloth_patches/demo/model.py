# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""A small random-weight model of Llama 3.1's architecture, and a tokenizer with its special tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict, Iterable, List

from .data import NUMBERS, TIMES, bundled
from .phrases import (
    CURRENCY_WORDS,
    EVENTS,
    JOINS_TRAIN,
    OPERATOR_WORDS,
    PEOPLE,
    TRAIN_PHRASES,
    UNIT_GROUPS,
)
from .tools import CITIES, DAYS, TOOLS

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)

# Lower-case words keep the space before them, as in Llama's own pattern. Up to three digits and a
# time of day are one piece. Names and numbers never carry a space or a quote: a city is the same
# token in a question and in a call. A key of a call is one token.
PATTERN = r"""[^\w\n]+[a-z_]+": "?|\d\d:\d\d|\d{1,3}| ?[a-z_']+|[A-Z]+[a-z]*|[^\w\n]+?(?= ?[a-z_])|[^\w\n]+|\n+|\w"""


def natural_text() -> List[str]:
    """What users say in the bundled conversations."""
    return [m["content"] for row in bundled() for m in row["messages"] if m["role"] == "user"]


def corpus() -> List[str]:
    """Text on which the tokenizer's merges are trained.

    Wordings without values, the calls' JSON without values, the names that calls use, and what
    stands in a message's header.
    """
    calls = []
    for name, tool in TOOLS.items():
        kinds = tool["function"]["parameters"]["properties"].items()
        arguments = {key: "" if kind["type"] == "string" else 0 for key, kind in kinds}
        calls.append(json.dumps({"name": name, "parameters": arguments}))
        calls.append("; ".join([calls[-1]] * 2))
    slots = dict.fromkeys("city a op b amount source target title day time".split(), "")
    phrases = [phrase.format(**slots) for group in TRAIN_PHRASES.values() for phrase in group]
    phrases += [join.format(first = "", second = "") for join in JOINS_TRAIN]
    closed = (OPERATOR_WORDS, CURRENCY_WORDS, EVENTS, DAYS, *UNIT_GROUPS)
    words = [f'"{word}" {word}' for group in closed for word in group]
    names = [*map(str.capitalize, DAYS), *CURRENCY_WORDS.values(), *CITIES, *PEOPLE]
    names += [*map(str, NUMBERS), *TIMES]
    headers = ["system\n\n", "user\n\n", "assistant\n\n", "ipython\n\n"]
    return [*headers, *calls, *phrases, *words, " ".join(names)] * 8 + natural_text()


def template_pieces(chat_template: str) -> List[str]:
    """What the chat template writes around any question: its fixed texts, and each tool's schema."""
    empty = make_tokenizer(())
    empty.chat_template = chat_template
    pieces: Dict[str, None] = {}
    for tool in TOOLS.values():
        messages = [{"role": "user", "content": ""}]
        rendered = empty.apply_chat_template(messages, tools = [tool], tokenize = False)
        texts = re.split(r"<\|\w+\|>|(?<=\n\n)(?=\{\n)", rendered)
        pieces.update(dict.fromkeys(text for text in texts if re.search(r"\w+\W*\n", text)))
    return list(pieces)


def make_tokenizer(
    texts: Iterable[str],
    pieces: Iterable[str] = (),
    vocab_size: int = 4096,
):
    """Byte-level BPE with Llama's special tokens.

    pieces: texts that become one token each. Of Llama 3.1's prompt, which is mostly the same for
    every question, a dozen tokens are left, and a step takes half the time.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior = "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space = False, use_regex = False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size = vocab_size,
        special_tokens = list(SPECIAL_TOKENS),
        min_frequency = 6,
        initial_alphabet = pre_tokenizers.ByteLevel.alphabet(),
        show_progress = False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized = False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object = tokenizer,
        bos_token = "<|begin_of_text|>",
        eos_token = "<|eot_id|>",
        pad_token = "<|finetune_right_pad_id|>",
        model_max_length = 131072,
        clean_up_tokenization_spaces = False,
    )


def make_model(tokenizer, seed: int = 3407):
    """Llama 3.1's architecture at hidden size 256, two layers, with random weights (not yet in 4
    bits).

    Three choices of the random start make copying easier to learn, after Trockman and Kolter,
    "Mimetic Initialization of Self-Attention Layers" (2023): queries start as keys do, each
    head's output projection as the transpose of its value projection, and lm_head as the
    embeddings, which share a common random offset. All of them are free to move apart: nothing is
    tied.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size = len(tokenizer),
        hidden_size = 256,
        intermediate_size = 256,
        num_hidden_layers = 2,
        num_attention_heads = 8,
        num_key_value_heads = 4,
        max_position_embeddings = 131072,
        rms_norm_eps = 1e-5,
        initializer_range = 256**-0.5,
        rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings = False,
        bos_token_id = tokenizer.bos_token_id,
        eos_token_id = tokenizer.eos_token_id,
        pad_token_id = tokenizer.pad_token_id,
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings += torch.randn(config.hidden_size) * config.initializer_range
        model.lm_head.weight.copy_(embeddings)
        for layer in model.model.layers:
            _start_alike(layer.self_attn, config)
    torch.set_rng_state(generator_state)
    return model


def _per_query_head(weight, config):
    """(key/value heads, head_dim, hidden) -> a projection's weight: each head serves several query heads."""
    groups = config.num_attention_heads // config.num_key_value_heads
    return weight.repeat_interleave(groups, dim = 0).reshape(-1, config.hidden_size)


def _start_alike(attention, config) -> None:
    """Queries start as keys, and the output projection as the values' transpose."""
    import torch

    torch.nn.init.orthogonal_(attention.v_proj.weight)
    heads = (config.num_key_value_heads, -1, config.hidden_size)
    attention.q_proj.weight.copy_(_per_query_head(attention.k_proj.weight.view(heads), config))
    attention.o_proj.weight.copy_(_per_query_head(attention.v_proj.weight.view(heads), config).T)


def save_scratch(folder: Path) -> Path:
    """Write the random model and its tokenizer into ``folder`` as a checkpoint. Needs unsloth imported."""
    from unsloth.chat_templates import CHAT_TEMPLATES

    template = CHAT_TEMPLATES["llama-3.1"][0].replace("{system_message}", "")
    tokenizer = make_tokenizer(corpus(), template_pieces(template))
    tokenizer.chat_template = template  # for other scripts that train it on messages
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
