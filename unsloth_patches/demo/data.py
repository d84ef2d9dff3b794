# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Tool-calling conversations: a seeded generator, a bundled file, and held-out prompts.

No held-out prompt occurs in training, nor its call: its wording is one of ``HELD_OUT_PHRASES``, and
its combination of values (two numbers, an amount with its units or currencies, an event with a
person, a city with that tool) is reserved (``_reserved``). Every single number, unit, person and city
does occur: a model that starts from random weights knows no token that it has not been shown.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from .phrases import (
    CURRENCY_WORDS,
    EVENTS,
    HELD_OUT_PHRASES,
    JOINS_HELD_OUT,
    JOINS_TRAIN,
    OPERATOR_WORDS,
    PEOPLE,
    TRAIN_PHRASES,
    UNIT_GROUPS,
)
from .tools import CITIES, DAYS, TOOLS

Call = Dict[str, Any]  # {"name": str, "arguments": dict}
Conversation = Dict[str, Any]  # {"messages": list, "tools": list of schemas}

BUNDLED = Path(__file__).with_name("conversations.jsonl")


@dataclass(frozen = True)
class Example:
    """A user's prompt, the tools on offer and the calls that answer it."""

    prompt: str
    tools: Tuple[str, ...]
    calls: Tuple[Call, ...]


NUMBERS = (*range(2, 21), 25, 30, 40, 50, 60, 75, 100, 150, 200, 250)
TIMES = tuple(f"{hour:02d}:{minute:02d}" for hour in range(8, 20) for minute in (0, 15, 30, 45))
UNIT_PAIRS = tuple(pair for group in UNIT_GROUPS for pair in permutations(group, 2))
CURRENCY_PAIRS = tuple(permutations(CURRENCY_WORDS, 2))
SUMS = tuple(product(NUMBERS, NUMBERS))
EXCHANGES = tuple(product(NUMBERS, CURRENCY_PAIRS))
MEASURES = tuple(product(NUMBERS, UNIT_PAIRS))
MEETINGS = tuple(product(EVENTS, PEOPLE))


def _reserved(place: int) -> bool:
    """Whether the combination at this place of its list is for held-out prompts alone."""
    return place % 5 == 2


def _draw(
    rng: random.Random,
    held_out: bool,
    options: Sequence,
    shift: int = 0,
) -> Any:
    """One of the options: of those that are reserved for held-out prompts, or of the others."""
    while True:
        place = rng.randrange(len(options))
        if _reserved(place + shift) == held_out:
            return options[place]


def _fill(tool: str, held_out: bool, rng: random.Random) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Slots for a wording of the tool, and the call's arguments."""
    if tool in ("get_weather", "get_time"):
        # A city that is reserved with one of the two tools occurs in training with the other.
        city = _draw(rng, held_out, tuple(CITIES), shift = 2 * (tool == "get_time"))
        return {"city": city}, {"city": city}
    if tool == "calculate":
        a, b = _draw(rng, held_out, SUMS)
        word = rng.choice(list(OPERATOR_WORDS))
        return {"a": a, "op": word, "b": b}, {"expression": f"{a} {OPERATOR_WORDS[word]} {b}"}
    if tool == "convert_currency":
        amount, (source, target) = _draw(rng, held_out, EXCHANGES)
        return {"amount": amount, "source": source, "target": target}, {
            "amount": amount,
            "from_currency": CURRENCY_WORDS[source],
            "to_currency": CURRENCY_WORDS[target],
        }
    if tool == "convert_units":
        value, (source, target) = _draw(rng, held_out, MEASURES)
        return {"amount": value, "source": source, "target": target}, {
            "value": value,
            "from_unit": source,
            "to_unit": target,
        }
    event, person = _draw(rng, held_out, MEETINGS)
    slots = {
        "title": f"{event} with {person}",
        "day": rng.choice(DAYS),
        "time": rng.choice(TIMES),
    }
    return slots, dict(slots)


def _ask(
    tool: str, phrases: Dict[str, Tuple[str, ...]], held_out: bool, rng: random.Random
) -> Tuple[str, Call]:
    slots, arguments = _fill(tool, held_out, rng)
    slots["day"] = slots.get("day", "").capitalize()
    text = rng.choice(phrases[tool]).format(**slots)
    return text[0].upper() + text[1:], {"name": tool, "arguments": arguments}


def _offer(needed: Sequence[str], rng: random.Random, distractors: int) -> Tuple[str, ...]:
    """The needed tools among some that are not, in random order."""
    others = rng.sample([name for name in TOOLS if name not in needed], distractors)
    offered = list(dict.fromkeys([*needed, *others]))
    rng.shuffle(offered)
    return tuple(offered)


def _example(tools: Sequence[str], held_out: bool, rng: random.Random) -> Example:
    phrases = HELD_OUT_PHRASES if held_out else TRAIN_PHRASES
    asked = [_ask(tool, phrases, held_out, rng) for tool in tools]
    prompt = asked[0][0]
    if len(asked) == 2:
        join = rng.choice(JOINS_HELD_OUT if held_out else JOINS_TRAIN)
        prompt = join.format(first = prompt, second = asked[1][0])
    return Example(prompt, _offer(tools, rng, 1), tuple(call for _, call in asked))


def generate(
    count: int,
    seed: int,
    pairs: float = 0.0,
) -> List[Example]:
    """``count`` training examples; a share ``pairs`` of them needs two calls at once."""
    rng = random.Random(seed)
    names = list(TOOLS)
    return [
        _example(rng.choices(names, k = 2 if rng.random() < pairs else 1), False, rng)
        for _ in range(count)
    ]


def held_out(count: int, pairs: bool = False) -> List[Example]:
    """``count`` held-out examples, the same on every call; every tool equally often."""
    rng = random.Random(20261122 + pairs)
    names = list(TOOLS)
    examples = []
    for i in range(count):
        tools = [names[i % len(names)]]
        if pairs:
            tools.append(names[(i + 1 + i // len(names)) % len(names)])
        examples.append(_example(tools, True, rng))
    return examples


def conversation(example: Example) -> Conversation:
    """The example as messages and tool schemas, as ``apply_chat_template`` takes them."""
    calls = [{"type": "function", "function": call} for call in example.calls]
    return {
        "messages": [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "tool_calls": calls},
        ],
        "tools": [TOOLS[name] for name in example.tools],
    }


def bundled() -> List[Conversation]:
    """The conversations of conversations.jsonl: hand-written wordings, some with results and answers."""
    lines = BUNDLED.read_text(encoding = "utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "tools": [TOOLS[name] for name in row["tools"]]} for row in rows]


def training_set(count: int, seed: int, pairs: float) -> List[Conversation]:
    """The bundled conversations and generated ones, ``count`` in all, shuffled by ``seed``."""
    rows = bundled()
    rows += [conversation(example) for example in generate(max(0, count - len(rows)), seed, pairs)]
    random.Random(seed).shuffle(rows)
    return rows[:count]
