# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Seeded conversations with tool calls, and what other formats make of them."""

import json
import random

NAMES = ("get_weather", "search.web", "a-b", "f", "Market Trends API", "météo")
TEXTS = ("q", "Hi there!", "é🦙", 'a "b" \\ {c}; d', "line\nline", "{}", "[1, 2]", "null")


class Conversations:
    """The same seed gives the same conversation again, in OpenAI's form.

    several, turns: the most calls of one message, and questions. Every call has an id, a result and no
    null in it.
    """

    def __init__(
        self,
        seed,
        several = 1,
        turns = 3,
    ):
        self._random, self._turns = random.Random(seed), turns
        self._several = several
        self._calls = 0

    def text(self):
        return self._random.choice(TEXTS)

    def value(self, depth = 0):
        kind = self._random.randrange(7 if depth < 2 else 4)
        if kind < 2:
            return self.text()
        if kind == 2:
            return self._random.choice((0, -1, 2**53, 0.5, 1e-300))
        if kind == 3:
            return self._random.choice((True, False, "", [], {}))
        if kind == 4:
            return [self.value(depth + 1) for _ in range(self._random.randrange(3))]
        return {self.text(): self.value(depth + 1) for _ in range(self._random.randrange(3))}

    def call(self):
        self._calls += 1
        names = [self.text() for _ in range(self._random.randrange(4))]
        function = {
            "name": self._random.choice(NAMES),
            "arguments": {name: self.value() for name in names},
        }
        return {"id": f"call_{self._calls}", "type": "function", "function": function}

    def messages(self):
        messages = (
            [{"role": "system", "content": self.text()}] if self._random.random() < 0.3 else []
        )
        for _ in range(self._random.randint(1, self._turns)):
            messages.append({"role": "user", "content": self.text()})
            if self._random.random() < 0.7:
                calls = [self.call() for _ in range(self._random.randint(1, self._several))]
                messages.append({"role": "assistant", "content": "", "tool_calls": calls})
                messages += [
                    {"role": "tool", "tool_call_id": call["id"], "content": self.text()}
                    for call in calls
                ]
            if self._random.random() < 0.8:
                messages.append({"role": "assistant", "content": self.text()})
        return messages


# ---------------------------------------------------------------- the formats


def _each(messages, change):
    return [change(message) for message in json.loads(json.dumps(messages))]  # a fast copy


def openai_text_arguments(messages):
    """As OpenAI's API has it: arguments as JSON text, content None beside calls."""

    def change(message):
        for call in message.get("tool_calls", ()):
            function = call["function"]
            function["arguments"] = json.dumps(function["arguments"])
            message["content"] = None
        return message

    return _each(messages, change)


def openai_parts(messages):
    def change(message):
        if isinstance(message["content"], str) and "tool_calls" not in message:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    return _each(messages, change)


def openai_responses(messages):
    """Items of the Responses API: calls and their outputs stand beside messages."""
    items = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"])
            one = {
                "type": "function_call",
                "name": call["function"]["name"],
                "arguments": arguments,
            }
            items.append({"id": "fc_1", "status": "completed", "call_id": call["id"], **one})
        if message["role"] == "tool":
            output = {"call_id": message["tool_call_id"], "output": message["content"]}
            items.append({"type": "function_call_output", **output})
        elif "tool_calls" not in message:
            part = "output_text" if message["role"] == "assistant" else "input_text"
            content = [{"type": part, "text": message["content"]}]
            items.append({"type": "message", "role": message["role"], "content": content})
    return items


def legacy_function_call(messages):
    """OpenAI before tools: one call a message, results with a name and no id."""

    def change(message):
        if "tool_calls" in message:
            (call,) = message.pop("tool_calls")
            message["content"] = None
            arguments = json.dumps(call["function"]["arguments"])
            message["function_call"] = {"name": call["function"]["name"], "arguments": arguments}
        if message["role"] == "tool":
            message = {"role": "function", "name": "f", "content": message["content"]}
        return message

    return _each(messages, change)


def langchain(messages):
    """Dumps of HumanMessage, AIMessage and so on."""
    types = {"user": "human", "assistant": "ai", "system": "system", "tool": "tool"}

    def change(message):
        dump = {"content": message["content"], "additional_kwargs": {}, "response_metadata": {}}
        dump.update(type = types[message["role"]], name = None, id = None)
        if message["role"] == "assistant":
            dump["tool_calls"] = [
                {
                    "name": call["function"]["name"],
                    "args": call["function"]["arguments"],
                    "id": call["id"],
                    "type": "tool_call",
                }
                for call in message.get("tool_calls", ())
            ]
            dump["invalid_tool_calls"] = []
        if message["role"] == "tool":
            dump.update(tool_call_id = message["tool_call_id"], artifact = None, status = "success")
        return dump

    return _each(messages, change)


def langchain_dicts(messages):
    """messages_to_dict."""
    return [{"type": one["type"], "data": one} for one in langchain(messages)]


def langchain_serialised(messages):
    """dumpd: the class's name stands in the id."""
    names = {"human": "HumanMessage", "ai": "AIMessage", "system": "SystemMessage"}
    return [
        {
            "lc": 1,
            "type": "constructor",
            "id": ["langchain", "schema", "messages", names.get(one["type"], "ToolMessage")],
            "kwargs": {key: value for key, value in one.items() if key != "type"},
        }
        for one in langchain(messages)
    ]


def llama_index(messages):
    """Dumps of ChatMessage, whose calls stand in additional_kwargs."""

    def change(message):
        extra = {}
        if "tool_calls" in message:
            extra["tool_calls"] = openai_text_arguments([message])[0]["tool_calls"]
        if "tool_call_id" in message:
            extra["tool_call_id"] = message["tool_call_id"]
        blocks = [{"block_type": "text", "text": message["content"]}]
        return {"role": message["role"], "additional_kwargs": extra, "blocks": blocks}

    return _each(messages, change)


def anthropic(messages):
    """Content parts: tool_use of the assistant, tool_result of the user."""
    converted = []
    for message in messages:
        content = message["content"]
        if "tool_calls" in message:
            content = [
                {
                    "type": "tool_use",
                    "id": call["id"],
                    "name": call["function"]["name"],
                    "input": call["function"]["arguments"],
                }
                for call in message["tool_calls"]
            ]
        if message["role"] == "tool":
            part = {"type": "tool_result", "tool_use_id": message["tool_call_id"]}
            part["content"] = [{"type": "text", "text": content}]
            before = converted[-1]
            if before["role"] == "user" and isinstance(before["content"], list):
                before["content"].append(part)
                continue
            content = [part]
        role = "user" if message["role"] == "tool" else message["role"]
        converted.append({"role": role, "content": content})
    return converted


def sharegpt(messages):
    """from and value, with function_call and observation."""
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    converted = []
    for message in messages:
        calls = [
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for call in message.get("tool_calls", ())
        ]
        if calls:
            value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii = False)
            converted.append({"from": "function_call", "value": value})
        else:
            converted.append({"from": names[message["role"]], "value": message["content"]})
    return converted


FORMATS = {
    "openai, text arguments": openai_text_arguments,
    "openai, parts": openai_parts,
    "openai responses": openai_responses,
    "langchain": langchain,
    "langchain dicts": langchain_dicts,
    "langchain serialised": langchain_serialised,
    "llama-index": llama_index,
    "anthropic": anthropic,
    "sharegpt": sharegpt,
    "json text": json.dumps,
}
# Of conversations with one call a message only.
FORMATS_OF_SINGLE_CALLS = {"legacy function_call": legacy_function_call}
