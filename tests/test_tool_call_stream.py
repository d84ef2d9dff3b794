# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tool calls are handed out while a reply is written: each once, when complete, in linear time."""

import importlib
import json

import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from llama_chat import make_llama_tokenizer, parallel_calls

ROME = ("get_weather", {"city": "Rome"})
OSLO = ("get_weather", {"city": "Oslo"})
EOT, HEADER = "<|eot_id|>", "<|start_header_id|>%s<|end_header_id|>\n\n"


@pytest.fixture(scope = "module")
def make_stream():
    return importlib.import_module("unsloth.tool_calls.stream").ToolCallStream


@pytest.fixture(scope = "module")
def parse_tool_calls():
    return importlib.import_module("unsloth.tool_calls").parse_tool_calls


def make_turn(*calls):
    texts = [
        f'{{"name": "{name}", "parameters": {json.dumps(arguments, ensure_ascii = False)}}}'
        for name, arguments in calls
    ]
    return "; ".join(texts) + EOT


def split_reply(*calls, results):
    """Each call in a turn of its own, the results between them."""
    reply = make_turn(calls[0])
    for call, result in zip(calls[1:], results):
        reply += HEADER % "ipython" + result + EOT + HEADER % "assistant" + make_turn(call)
    return reply


REPLIES = {
    "one": make_turn(ROME),
    "joined": make_turn(ROME, ("f", {"q": '}; {"name": "g", "parameters": {}} \\ \\" {{'}), OSLO),
    "other separators": make_turn(ROME)[: -len(EOT)]
    + "\n"
    + make_turn(OSLO)[: -len(EOT)]
    + make_turn(ROME),
    "split": split_reply(ROME, OSLO, results = ['"20 degrees"']),
    "split, results with end tokens": split_reply(
        ROME,
        OSLO,
        ROME,
        results = [json.dumps({"a": f'{EOT}{HEADER % "assistant"}{{"name": "x"'}), "[1]"],
    ),
    "split, results that are no JSON": split_reply(
        ROME, OSLO, ROME, results = ['20 " degrees', "{a}"]
    ),
    "split, a result that Python cannot hold": split_reply(ROME, OSLO, results = ["9" * 5000]),
    "python tag": "<|python_tag|>" + make_turn(ROME),
    "built-in": '<|python_tag|>brave_search.call(query="a (b) }")<|eom_id|>',
    "header first": HEADER % "assistant" + make_turn(ROME),
    "character of several tokens": make_turn(("f", {"🦙": {"q": "你好🦙"}}), ROME),
}
TEXTS = {
    "text": "It is sunny in Rome.",
    "answer": '{"degrees": 22}',
    "text before a call": "Sure: " + make_turn(ROME),
    "cut off": make_turn(ROME)[:-20],
    "unknown role": HEADER % "user" + make_turn(ROME),
    "builtin that is none": '<|python_tag|>print("hi")',
    "empty": "",
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("key", [*REPLIES, *TEXTS])
def test_streams_give_what_the_whole_reply_gives(key, size, make_stream, parse_tool_calls):
    """As text and as ids, in pieces of any size: the calls of the whole reply, each once."""
    reply, tokenizer = {**REPLIES, **TEXTS}[key], make_llama_tokenizer()
    whole = parse_tool_calls(reply, tokenizer)
    ids = tokenizer(reply, add_special_tokens = False).input_ids
    for given in (reply, ids):
        stream, emitted = make_stream(tokenizer), []
        for start in range(0, len(given), size):
            emitted += stream.feed(given[start : start + size])
        assert stream.finish() == whole
        assert emitted == whole.get("tool_calls", []), key
    assert bool(whole.get("tool_calls")) == (key in REPLIES)


def test_calls_come_at_their_closing_brace(make_stream):
    """Not later: a server can run the first call while the second is written."""
    stream, reply = make_stream(), make_turn(ROME, OSLO)
    at = [n for n, char in enumerate(reply) if stream.feed(char)]
    assert at == [reply.index("; ") - 1, reply.index(EOT) - 1]


def test_what_makes_a_reply_broken_later_is_told_at_the_end(make_stream):
    stream = make_stream()
    assert (
        stream.feed(make_turn(ROME)[: -len(EOT)] + " There") == parallel_calls(ROME)["tool_calls"]
    )
    assert stream.feed(make_turn(OSLO)) == []
    assert "text after call 1" in stream.finish()["reason"]


def test_unknown_tools_end_a_stream(make_stream):
    stream = make_stream(tools = json.dumps([{"name": "get_weather", "parameters": {}}]))
    assert stream.feed(make_turn(ROME)[: -len(EOT)]) and not stream.feed(
        "; " + make_turn(("hack", {}))
    )
    assert "unknown tool 'hack'" in stream.finish()["reason"]


def test_bytes_that_are_no_text(make_stream):
    """A model can write half a character: the stream goes on after it."""
    tokenizer, stream = make_llama_tokenizer(), make_stream(make_llama_tokenizer())
    half = tokenizer("🦙", add_special_tokens = False).input_ids[:2]
    ids = tokenizer('{"name": "f", "parameters": {"a": "').input_ids
    ids = ids + half + tokenizer('"}}').input_ids
    ids = [i for i in ids if i != tokenizer.bos_token_id]
    calls = [call for one in ids for call in stream.feed([one])]
    assert [call["function"]["name"] for call in calls] == ["f"]
    assert stream.finish()["tool_calls"] == calls


def test_long_streams_are_read_in_linear_time(make_stream):
    """Work is counted, not time: the characters that are looked at grow with the reply's length."""
    stream_module = importlib.import_module("unsloth.tool_calls.stream")

    def looked_at(count):
        seen, marks = [], stream_module._Closing.feed

        def counting(self, piece):
            seen.append(len(piece))
            return marks(self, piece)

        stream_module._Closing.feed = counting
        try:
            reply, stream = make_turn(("f", {"a": [{"b": "}{"}] * count})), make_stream()
            emitted = [call for char in reply for call in stream.feed(char)]
        finally:
            stream_module._Closing.feed = marks
        assert len(emitted) == 1
        return sum(seen) / len(reply)

    assert looked_at(2000) <= 1.1 * looked_at(200) <= 2.2
