# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The sizes of a dense Llama-like decoder, read from a model, a config, a dict or a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Tuple

__all__ = ["LlamaShape", "read_shape"]


@dataclass(frozen = True)
class LlamaShape:
    """What the count needs of a Llama-like config. Sizes in elements; linears as (out, in)."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    attention: int  # query heads x head size
    key_value: int  # key/value heads x head size
    tied: bool

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

    Raises ValueError for what is no dense Llama-like decoder: a count that leaves out a mixture of
    experts or another block would promise memory that is not there.
    """
    if isinstance(model_or_config, LlamaShape):
        return model_or_config
    values = _config_values(model_or_config)
    experts = [
        key for key in ("num_experts", "num_local_experts", "n_routed_experts") if values.get(key)
    ]
    if experts:
        raise ValueError(
            f"plan_offload: {experts[0]} = {values[experts[0]]}: a mixture of experts is not "
            "counted "
            "here; give the plan a dense Llama-like config."
        )
    needed = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    missing = [key for key in needed if not isinstance(values.get(key), int) or values[key] <= 0]
    if missing:
        raise ValueError(
            f"plan_offload: the config gives no positive {', '.join(missing)}; it has to be a "
            "dense "
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
    )


def _config_values(source: Any) -> Dict[str, Any]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"plan_offload: no config at {str(source)!r}; give a folder or a config.json."
            )
        try:
            source = json.loads(path.read_text(encoding = "utf-8"))
        except ValueError as error:
            raise ValueError(f"plan_offload: {path} is not JSON: {error}.") from None
    if not isinstance(source, dict):
        config = getattr(source, "config", source)
        if not hasattr(config, "to_dict"):
            raise ValueError(
                f"plan_offload: cannot read a config from {type(source).__name__}; give a model, a "
                "config, a dict or a path."
            )
        source = config.to_dict()
    return source.get("text_config") or source
