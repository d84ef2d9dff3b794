# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The tools of the demo: small real functions that run without a network, and their schemas.

``TOOLS`` is what a chat template takes as ``tools`` (OpenAI's function format). ``execute`` runs
one call ``{"name": str, "arguments": dict}`` and returns a JSON-serialisable dict; a call that a
tool cannot run gives ``{"error": reason}``, as a model would have to be told.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Dict, List

# city -> (IANA time zone, typical January and July daytime temperature in degrees Celsius, rounded)
CITIES: Dict[str, tuple] = {
    "Adelaide": ("Australia/Adelaide", 29, 15),
    "Amsterdam": ("Europe/Amsterdam", 6, 22),
    "Athens": ("Europe/Athens", 13, 33),
    "Bangkok": ("Asia/Bangkok", 32, 33),
    "Barcelona": ("Europe/Madrid", 14, 28),
    "Berlin": ("Europe/Berlin", 3, 25),
    "Boston": ("America/New_York", 2, 28),
    "Brussels": ("Europe/Brussels", 6, 23),
    "Cairo": ("Africa/Cairo", 19, 35),
    "Chicago": ("America/Chicago", 0, 29),
    "Copenhagen": ("Europe/Copenhagen", 3, 22),
    "Delhi": ("Asia/Kolkata", 20, 35),
    "Dubai": ("Asia/Dubai", 24, 41),
    "Dublin": ("Europe/Dublin", 8, 19),
    "Geneva": ("Europe/Zurich", 5, 27),
    "Hamburg": ("Europe/Berlin", 4, 23),
    "Hanoi": ("Asia/Ho_Chi_Minh", 20, 33),
    "Helsinki": ("Europe/Helsinki", -1, 22),
    "Istanbul": ("Europe/Istanbul", 9, 29),
    "Jakarta": ("Asia/Jakarta", 30, 32),
    "Kyoto": ("Asia/Tokyo", 9, 32),
    "Lagos": ("Africa/Lagos", 33, 29),
    "Lima": ("America/Lima", 26, 19),
    "Lisbon": ("Europe/Lisbon", 15, 28),
    "London": ("Europe/London", 8, 24),
    "Madrid": ("Europe/Madrid", 10, 33),
    "Miami": ("America/New_York", 25, 33),
    "Milan": ("Europe/Rome", 6, 30),
    "Montreal": ("America/Toronto", -5, 27),
    "Nairobi": ("Africa/Nairobi", 27, 23),
    "Oslo": ("Europe/Oslo", -1, 23),
    "Paris": ("Europe/Paris", 8, 26),
    "Porto": ("Europe/Lisbon", 14, 25),
    "Prague": ("Europe/Prague", 2, 25),
    "Quito": ("America/Guayaquil", 19, 20),
    "Rome": ("Europe/Rome", 12, 31),
    "Seoul": ("Asia/Seoul", 2, 29),
    "Sydney": ("Australia/Sydney", 27, 17),
    "Tokyo": ("Asia/Tokyo", 10, 30),
    "Vienna": ("Europe/Vienna", 4, 27),
}

# Units of each currency for one euro: a fixed example table, not live rates.
EURO_RATES = {
    "EUR": 1.0,
    "USD": 1.1,
    "GBP": 0.85,
    "JPY": 160.0,
    "CHF": 0.95,
    "SEK": 11.2,
    "NOK": 11.5,
    "PLN": 4.3,
    "INR": 92.0,
    "CAD": 1.5,
}

# unit -> (dimension, factor to the dimension's base unit)
UNITS = {
    "meters": ("length", 1.0),
    "kilometers": ("length", 1000.0),
    "feet": ("length", 0.3048),
    "miles": ("length", 1609.344),
    "grams": ("mass", 0.001),
    "kilograms": ("mass", 1.0),
    "pounds": ("mass", 0.45359237),
    "ounces": ("mass", 0.028349523125),
    "liters": ("volume", 1.0),
    "gallons": ("volume", 3.785411784),
    "cups": ("volume", 0.2365882365),
    "pints": ("volume", 0.473176473),
}

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
CALENDAR: List[Dict[str, str]] = []


def _known(name: str, table, what: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}")
    return table[name]


def get_weather(city: str) -> Dict[str, Any]:
    """Typical daytime temperature of the season, from a table (no forecast)."""
    _, january, july = _known(city, CITIES, "city")
    day = datetime.now(timezone.utc).timetuple().tm_yday
    # Coldest and warmest about 20 January and 20 July.
    share = 0.5 - 0.5 * math.cos(2 * math.pi * (day - 20) / 365.25)
    return {"city": city, "celsius": round(january + share * (july - january))}


def get_time(city: str) -> Dict[str, Any]:
    """The local time."""
    from zoneinfo import ZoneInfo

    zone = ZoneInfo(_known(city, CITIES, "city")[0])
    return {"city": city, "time": datetime.now(zone).strftime("%A %H:%M")}


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _evaluate(node: ast.AST) -> float:
    if isinstance(node, ast.Expression):
        return _evaluate(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    raise ValueError("only numbers and + - * / are allowed")


def calculate(expression: str) -> Dict[str, Any]:
    """The value of an expression of numbers, + - * / and parentheses."""
    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")
    value = _evaluate(ast.parse(expression, mode = "eval"))
    return {"result": round(value, 6)}


def convert_currency(amount: float, from_currency: str, to_currency: str) -> Dict[str, Any]:
    """The amount in another currency, at fixed example rates."""
    euros = amount / _known(from_currency, EURO_RATES, "currency")
    return {
        "amount": round(euros * _known(to_currency, EURO_RATES, "currency"), 2),
        "currency": to_currency,
    }


def convert_units(value: float, from_unit: str, to_unit: str) -> Dict[str, Any]:
    """A length, mass or volume in another unit."""
    kind, factor = _known(from_unit, UNITS, "unit")
    other_kind, other_factor = _known(to_unit, UNITS, "unit")
    if kind != other_kind:
        raise ValueError(f"{from_unit} measure {kind}, {to_unit} measure {other_kind}")
    return {"value": round(value * factor / other_factor, 3), "unit": to_unit}


def add_event(title: str, day: str, time: str) -> Dict[str, Any]:
    """Put an event of the coming week into the calendar (kept in memory)."""
    if day not in DAYS:
        raise ValueError(f"unknown day {day!r}")
    datetime.strptime(time, "%H:%M")
    today = datetime.now(timezone.utc).date()
    date = today + timedelta(days = (DAYS.index(day) - today.weekday()) % 7 or 7)
    CALENDAR.append({"title": title, "date": date.isoformat(), "time": time})
    return {"added": title, "date": date.isoformat(), "time": time, "events": len(CALENDAR)}


def _schema(function: Callable, description: str, **parameters: str) -> Dict[str, Any]:
    """OpenAI-style schema; ``parameters`` maps each argument to its JSON type."""
    assert list(parameters) == list(inspect.signature(function).parameters)
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {name: {"type": kind} for name, kind in parameters.items()},
                "required": list(parameters),
            },
        },
    }


FUNCTIONS: Dict[str, Callable] = {
    function.__name__: function
    for function in (get_weather, get_time, calculate, convert_currency, convert_units, add_event)
}

TOOLS: Dict[str, Dict[str, Any]] = {
    "get_weather": _schema(get_weather, "Weather in a city", city = "string"),
    "get_time": _schema(get_time, "Local time in a city", city = "string"),
    "calculate": _schema(calculate, "Evaluate arithmetic", expression = "string"),
    "convert_currency": _schema(
        convert_currency,
        "Convert money",
        amount = "number",
        from_currency = "string",
        to_currency = "string",
    ),
    "convert_units": _schema(
        convert_units,
        "Convert measures",
        value = "number",
        from_unit = "string",
        to_unit = "string",
    ),
    "add_event": _schema(
        add_event, "Add to the calendar", title = "string", day = "string", time = "string"
    ),
}


def execute(call: Dict[str, Any]) -> Dict[str, Any]:
    """Run one call ``{"name": str, "arguments": dict}``; ``{"error": reason}`` where it cannot run."""
    function = FUNCTIONS.get(call["name"])
    if function is None:
        return {"error": f"unknown tool {call['name']!r}"}
    try:
        return function(**call["arguments"])
    except (TypeError, ValueError, ArithmeticError, SyntaxError, LookupError, RecursionError) as e:
        return {"error": f"{type(e).__name__}: {e}"}
