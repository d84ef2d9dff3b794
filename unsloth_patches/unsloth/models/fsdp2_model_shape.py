# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The sizes of a dense Llama-like decoder, read from a model, a config, a dict or a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Tuple

__all__ = ["LINEARS", "LlamaShape", "read_shape"]

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# model_type of configs whose blocks are exactly those seven linears and two or more norms.
LLAMA_LIKE = (
    "cohere cohere2 exaone4 gemma gemma2 gemma3_text granite helium llama ministral ministral3 "
    "mistral olmo olmo2 olmo3 qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_vl_text seed_oss smollm3 "
    "stablelm"
).split()
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("vocab_size",)


@dataclass(frozen = True)
class LlamaShape:
    """What the count needs of a Llama-like config. Sizes in elements; linears as (out, in).

    notes: what a count by these sizes leaves out or assumes, a line each.
    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    attention: int  # query heads x head size
    key_value: int  # key/value heads x head size
    tied: bool
    notes: Tuple[str, ...] = ()

    @property
    def linears(self) -> Dict[str, Tuple[int, int]]:
        return {
            "q_proj": (self.attention, self.hidden),
            "k_proj": (self.key_value, self.hidden),
            "v_proj": (self.key_value, self.hidden),
            "o_proj": (self.hidden, self.attention),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def block_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def parameters(self) -> int:
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * (self.block_parameters + 2 * self.hidden) + tables + self.hidden


def read_shape(model_or_config: Any) -> LlamaShape:
    """The shape of a model, a config object, a dict, or a path to a folder or a config.json.

    Raises ValueError for what is no dense decoder: a count that leaves out a mixture of experts or
    takes an encoder for a decoder would promise memory that is not there.
    """
    if isinstance(model_or_config, LlamaShape):
        return model_or_config
    outer = _config_values(model_or_config)
    values = {**outer, **outer["text_config"]} if outer.get("text_config") else outer
    notes = (*_other_parts(outer), *_checked_kind(outer, values))
    experts = [key for key in _EXPERTS if values.get(key)]
    if experts:
        raise ValueError(
            f"memory plan: {experts[0]} = {values[experts[0]]}: a mixture of experts is not counted. "
            "Give the plan a dense Llama-like config."
        )
    missing = [key for key in _SIZES if not isinstance(values.get(key), int) or values[key] <= 0]
    if missing:
        raise ValueError(
            f"memory plan: the config gives no positive {', '.join(missing)}. It has to be a dense "
            "Llama-like config (hidden_size, intermediate_size, num_hidden_layers, ...)."
        )
    heads = values["num_attention_heads"]
    head_size = values.get("head_dim") or values["hidden_size"] // heads
    return LlamaShape(
        hidden = values["hidden_size"],
        intermediate = values["intermediate_size"],
        layers = values["num_hidden_layers"],
        vocab = values["vocab_size"],
        attention = heads * head_size,
        key_value = (values.get("num_key_value_heads") or heads) * head_size,
        tied = bool(values.get("tie_word_embeddings", False)),
        notes = notes,
    )


def _other_parts(outer: Dict[str, Any]) -> Tuple[str, ...]:
    """A note where the model has more than a language part: towers have configs of their own."""
    parts = [
        key
        for key, value in outer.items()
        if key.endswith("_config") and key not in ("text_config", "quantization_config")
        if isinstance(value, dict) and value.get("hidden_size")
    ]
    if not parts:
        return ()
    return (f"not counted: {', '.join(parts)} (only the language part is); add its weights",)


def _checked_kind(outer: Dict[str, Any], values: Dict[str, Any]) -> Tuple[str, ...]:
    """A note for a decoder whose blocks are not known here. Raises ValueError for other models."""
    kind = values.get("model_type") or outer.get("model_type")
    architectures = [str(name) for name in outer.get("architectures") or ()]
    decodes = any(
        name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in architectures
    )
    if values.get("is_encoder_decoder") or (kind and kind not in LLAMA_LIKE and not decodes):
        raise ValueError(
            f"memory plan: model_type = {kind!r} with architectures = {architectures} is not known to "
            "be a decoder, and only dense Llama-like decoders are counted. Where its blocks are "
            "Llama's, give the sizes alone, without model_type."
        )
    if not kind or kind in LLAMA_LIKE:
        return ()
    return (f"model_type {kind!r} is counted as if its blocks were Llama's",)


def _config_values(source: Any) -> Dict[str, Any]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"memory plan: no config at {str(source)!r}; give a folder or a config.json."
            )
        try:
            source = json.loads(path.read_text(encoding = "utf-8"))
        except ValueError as error:
            raise ValueError(f"memory plan: {path} is not JSON: {error}.") from None
    if not isinstance(source, dict):
        config = getattr(source, "config", source)
        if not hasattr(config, "to_dict"):
            raise ValueError(
                f"memory plan: cannot read a config from {type(source).__name__}; give a model, a "
                "config, a dict or a path."
            )
        source = config.to_dict()
    return source
