# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What reading and checking conversations costs: rendering beside stock's, and streams by length. CPU.

Both tokenizers render the same clean conversations in short turns; the ratio is that of the medians. CPU
time and short turns, so that other programs on the machine count little, and for both alike.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, List

from .harness import environment

REPEATS = 5
TURN = 50  # conversations that one renders before it is the other's turn
STREAM_IDS = (1000, 3000, 9000)


def _tool(number: int) -> Dict[str, Any]:
    properties = {
        "city": {"type": "string", "description": "The city to look up"},
        "units": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    }
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    function = {
        "name": f"tool_{number}",
        "description": "Looks something up.",
        "parameters": parameters,
    }
    return {"type": "function", "function": function}


def _plain(number: int) -> List[Dict[str, Any]]:
    ask = {"role": "user", "content": f"Question {number}: " + "what do you think of it? " * 6}
    answer = {"role": "assistant", "content": "This is what I think of it. " * 10}
    return [{"role": "system", "content": "Be kind."}, ask, answer, ask, answer]


def _calling(number: int) -> List[Dict[str, Any]]:
    arguments = {"city": "Rome", "units": "celsius", "days": [1, 2, number]}
    function = {"name": "tool_1", "arguments": arguments}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    ask, answer = _plain(number)[1:3]
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"degrees": 20})}
    return [ask, calling, result, answer] * 2


def _rendering(tokenizers, conversations, tools) -> Dict[str, float]:
    options = {"tools": tools, "tokenize": False}
    times: Dict[str, List[float]] = {name: [] for name in tokenizers}
    for _ in range(REPEATS):
        for first in range(0, len(conversations), TURN):
            turn = conversations[first : first + TURN]
            for name, tokenizer in tokenizers.items():
                start = time.process_time()
                for messages in turn:
                    tokenizer.apply_chat_template(messages, **options)
                times[name].append((time.process_time() - start) / len(turn) * 1e6)
    stock, ours = median(times["stock"]), median(times["ours"])
    return {"stock_us": stock, "ours_us": ours, "ratio": ours / stock}


def _streaming(tokenizer, count: int) -> float:
    """Seconds to feed a call of so many ids one at a time."""
    from unsloth.tool_calls.stream import ToolCallStream

    text = '{"name": "tool_1", "parameters": {"items": ['
    text += ", ".join(['{"a": "b}{"}'] * (count // 12 + 1))
    ids = tokenizer(text, add_special_tokens = False).input_ids[: count - 4]
    stream, start = ToolCallStream(tokenizer), time.process_time()
    for one in ids:
        stream.feed([one])
    return time.process_time() - start


def run(out: Path, quick: bool = False) -> int:
    """Writes chat.json. Returns 0."""
    os.environ["UNSLOTH_PATCHES_QUIET"] = "1"
    import unsloth  # noqa: F401
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from unsloth.chat_templates import get_chat_template

    def made():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space = False)
        backend.decoder = decoders.ByteLevel()
        special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        pad = "<|finetune_right_pad_id|>"
        return PreTrainedTokenizerFast(tokenizer_object = backend, pad_token = pad, **special)

    stock, ours = made(), get_chat_template(made(), "llama-3.1")
    stock.chat_template = ours.chat_template
    share = 20 if quick else 1
    cases = {
        "4,000 plain": ([_plain(i) for i in range(4000 // share)], None),
        "2,000 with calls": ([_calling(i) for i in range(2000 // share)], None),
        "1,000 with 11 tools": (
            [_calling(i) for i in range(1000 // share)],
            [_tool(i) for i in range(11)],
        ),
    }
    command = "python -m unsloth_patches bench chat" + (" --quick" if quick else "")
    figures: Dict[str, Any] = {**environment(command), "repeats": REPEATS, "turn": TURN}
    for name, (conversations, tools) in cases.items():
        figures[name] = _rendering({"stock": stock, "ours": ours}, conversations, tools)
        print(f"{name:<22} " + ", ".join(f"{k} {v:.2f}" for k, v in figures[name].items()))
    figures["stream_seconds"] = {count: _streaming(ours, count) for count in STREAM_IDS}
    print("stream, ids: seconds  ", figures["stream_seconds"])
    (out / "chat.json").write_text(json.dumps(figures, indent = 2) + "\n", encoding = "utf-8")
    return 0
