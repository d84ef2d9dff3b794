# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The wordings and values from which ``data.py`` makes conversations.

Each tool has wordings for training and others that are only ever used in held-out prompts. A
held-out wording consists of words that training wordings also use: a model that starts from
random weights cannot know any other.
"""

from __future__ import annotations

from typing import Dict, Tuple

TRAIN_PHRASES: Dict[str, Tuple[str, ...]] = {
    "get_weather": (
        "What is the weather in {city}?",
        "How is the weather in {city} today?",
        "Is it cold in {city} right now?",
        "Tell me the weather for {city}.",
        "Do I need a coat in {city}?",
        "Will I need an umbrella in {city}?",
        "I am flying to {city}, what is the weather there?",
        "Show me the current weather in {city}, please.",
        "Weather in {city}?",
        "Is it sunny in {city} at the moment?",
        "How warm is it in {city}?",
        "Please check the temperature in {city}.",
        "What should I wear in {city} today?",
        "Give me the temperature in {city}, please.",
        "I want to know how hot it is in {city} today.",
        "Check if it is raining in {city} now.",
    ),
    "get_time": (
        "What time is it in {city}?",
        "Tell me the time in {city}.",
        "What is the current time in {city}?",
        "Is it late in {city} right now?",
        "I want to call a friend in {city}, what time is it there?",
        "Show me the local time in {city}, please.",
        "Time in {city}?",
        "Please check the clock in {city}.",
        "How late is it in {city}?",
        "What does the clock say in {city}?",
        "Give me the local time for {city}.",
        "I need to know what time it is in {city} now.",
        "Is it morning in {city} at the moment?",
        "Check the time in {city} for me.",
    ),
    "calculate": (
        "What is {a} {op} {b}?",
        "Calculate {a} {op} {b}.",
        "How much is {a} {op} {b}?",
        "Compute {a} {op} {b} for me.",
        "Please work out {a} {op} {b}.",
        "I need the result of {a} {op} {b}.",
        "Tell me what {a} {op} {b} is.",
        "{a} {op} {b} = ?",
        "Can you calculate {a} {op} {b}?",
        "Give me the value of {a} {op} {b}, please.",
        "What do I get for {a} {op} {b}?",
        "Solve {a} {op} {b}.",
    ),
    "convert_currency": (
        "Convert {amount} {source} to {target}.",
        "How much is {amount} {source} in {target}?",
        "What are {amount} {source} worth in {target}?",
        "I have {amount} {source}, how many {target} is that?",
        "Please change {amount} {source} into {target}.",
        "Exchange {amount} {source} for {target}.",
        "{amount} {source} in {target}, please.",
        "Tell me the value of {amount} {source} in {target}.",
        "How many {target} do I get for {amount} {source}?",
        "I want to change {amount} {source} to {target}.",
        "What do I get in {target} for {amount} {source}?",
        "Can you exchange {amount} {source} into {target}?",
    ),
    "convert_units": (
        "Convert {amount} {source} to {target}.",
        "How many {target} are {amount} {source}?",
        "What is {amount} {source} in {target}?",
        "How much is {amount} {source} in {target}?",
        "Please convert {amount} {source} into {target}.",
        "{amount} {source} in {target}, please.",
        "Tell me what {amount} {source} are in {target}.",
        "I need {amount} {source} in {target}.",
        "Give me {amount} {source} as {target}.",
        "Can you turn {amount} {source} into {target}?",
        "How many {target} is that, {amount} {source}?",
        "Show {amount} {source} as {target}.",
    ),
    "add_event": (
        "Add {title} on {day} at {time}.",
        "Put {title} on my calendar for {day} at {time}.",
        "Schedule {title} for {day} at {time}.",
        "Please plan {title} on {day}, {time}.",
        "On {day} at {time} I have {title}.",
        "Book {title} on {day} at {time}, please.",
        "I have {title} on {day} at {time}, add it to my calendar.",
        "Remind me of {title} on {day} at {time}.",
        "Save {title} for {day}, {time}.",
        "Can you schedule {title} on {day} at {time}?",
        "Make a calendar entry for {title}, {day} at {time}.",
        "New event: {title}, {day}, {time}.",
    ),
}

HELD_OUT_PHRASES: Dict[str, Tuple[str, ...]] = {
    "get_weather": (
        "Please tell me how warm it is in {city} today.",
        "I want to know the weather in {city}.",
        "Is it hot in {city} at the moment?",
        "What is the temperature in {city} right now?",
    ),
    "get_time": (
        "Please tell me what time it is in {city}.",
        "Show me the time in {city} now.",
        "Can you check the local time in {city}?",
        "I need the current time in {city}, please.",
    ),
    "calculate": (
        "Please calculate {a} {op} {b}.",
        "Can you tell me what {a} {op} {b} is?",
        "I want to know how much {a} {op} {b} is.",
        "Give me the result of {a} {op} {b}.",
    ),
    "convert_currency": (
        "Please convert {amount} {source} to {target}.",
        "I need to change {amount} {source} into {target}.",
        "Can you tell me how much {amount} {source} is in {target}?",
        "Give me the value of {amount} {source} in {target}, please.",
    ),
    "convert_units": (
        "Can you convert {amount} {source} to {target}?",
        "Please tell me how many {target} are {amount} {source}.",
        "I want to know what {amount} {source} is in {target}.",
        "Show me {amount} {source} in {target}, please.",
    ),
    "add_event": (
        "Please add {title} to my calendar for {day} at {time}.",
        "Can you book {title} for {day} at {time}?",
        "Put {title} on {day} at {time}, please.",
        "I need a calendar entry for {title} on {day} at {time}.",
    ),
}

JOINS_TRAIN = ("{first} {second}", "{first} Also: {second}", "{first} And then: {second}")
JOINS_HELD_OUT = ("{first} And also: {second}",)

OPERATOR_WORDS = {
    "plus": "+",
    "minus": "-",
    "times": "*",
    "divided by": "/",
    "+": "+",
    "-": "-",
    "*": "*",
    "/": "/",
}

CURRENCY_WORDS = {
    "euros": "EUR",
    "dollars": "USD",
    "sterling": "GBP",
    "yen": "JPY",
    "francs": "CHF",
    "kronor": "SEK",
    "kroner": "NOK",
    "zloty": "PLN",
    "rupees": "INR",
}

UNIT_GROUPS = (
    ("meters", "kilometers", "feet", "miles"),
    ("grams", "kilograms", "pounds", "ounces"),
    ("liters", "gallons", "cups", "pints"),
)

EVENTS = (
    "lunch",
    "dinner",
    "coffee",
    "meeting",
    "call",
    "interview",
    "review",
    "training",
    "walk",
    "chess",
)

PEOPLE = (
    "Ahmed",
    "Alice",
    "Anita",
    "Carlos",
    "Chen",
    "Elena",
    "Felix",
    "Hannah",
    "Ivan",
    "Julia",
    "Kenji",
    "Maria",
    "Noah",
    "Omar",
    "Priya",
    "Yara",
)
