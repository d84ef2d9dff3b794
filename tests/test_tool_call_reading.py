# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Conversations of every usual format are read as OpenAI's messages."""

import copy
import dataclasses
import enum
import importlib
import json

import pandas
import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from conversation_formats import FORMATS, FORMATS_OF_SINGLE_CALLS, Conversations
from llama_chat import assistant, calls, identified, made, result, system, user


@pytest.fixture(scope = "module")
def read():
    """A conversation -> its messages, calls tidied: arguments are dicts."""
    reading = importlib.import_module("unsloth.tool_calls.reading")
    tidy_call = importlib.import_module("unsloth.tool_calls.calls").tidy_call

    def read(conversation):
        messages, places = reading.read_messages(conversation)
        for message, place in zip(messages, places):
            for number, call in enumerate(message.get("tool_calls", ()), 1):
                tidy_call(call, place, number)
        return messages

    return read


def meant(messages):
    """What a template renders: roles, texts and calls, without ids and other keys."""
    return [
        (
            message["role"],
            message.get("content") or "",
            [repr(call["function"]) for call in message.get("tool_calls", ())],
        )
        for message in messages
    ]


@pytest.mark.parametrize("name", [*FORMATS, *FORMATS_OF_SINGLE_CALLS])
def test_every_format_is_read(name, read):
    """300 seeded conversations in each format; what was given is not changed."""
    single = FORMATS_OF_SINGLE_CALLS.get(name)
    for seed in range(300):
        messages = Conversations(seed, several = 1 if single else 1 + seed % 3).messages()
        given = (single or FORMATS[name])(messages)
        before = copy.deepcopy(given)
        assert meant(read(given)) == meant(messages), (seed, given)
        assert given == before


def test_ids_are_kept(read):
    """Where a format has ids, results are paired by them."""
    messages = Conversations(4, several = 3).messages()
    ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    assert len(ids) > 2
    for name in set(FORMATS) - {"sharegpt"}:
        got = read(FORMATS[name](messages))
        assert [call["id"] for message in got for call in message.get("tool_calls", ())] == ids
        assert [
            message["tool_call_id"] for message in got if message["role"] == "tool"
        ] == ids, name


class Role(str, enum.Enum):
    USER = "user"


@dataclasses.dataclass
class Message:
    role: object
    content: str
    tool_calls: object = None


class Dumped:
    """Like a pydantic model."""

    def __init__(self, **fields):
        self._fields = fields

    def model_dump(self):
        return dict(self._fields)


class Prompt:
    def __init__(self, messages):
        self.messages = messages


ROME = made("get_weather", {"city": "Rome"})
NAN = float("nan")


@pytest.mark.parametrize(
    "given, expected",
    [
        ([Message(Role.USER, "q")], [user("q")]),
        ([Dumped(role = Role.USER, content = "q", name = None)], [user("q")]),
        (Prompt([Dumped(type = "human", content = "q")]), [user("q")]),
        ({"messages": [user("q")]}, [user("q")]),
        ({"conversations": [{"from": "human", "value": "q"}]}, [user("q")]),
        ('[{"role": "user", "content": "q"}]', [user("q")]),
        (['{"role": "user", "content": "q"}'], [user("q")]),
        ([Dumped(role = "assistant", content = None, tool_calls = [Dumped(**ROME)])], [calls(ROME)]),
        # Anthropic: results and then the user's text in one message.
        (
            [
                user(
                    [
                        {"type": "tool_result", "tool_use_id": "a", "content": "20"},
                        {"type": "tool_result", "tool_use_id": "b"},
                        {"type": "text", "text": "More?"},
                    ]
                )
            ],
            [identified("20", "a"), identified("", "b"), user("More?")],
        ),
        # LangChain with Anthropic's parts has each call twice.
        (
            [
                {
                    "type": "ai",
                    "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                    "tool_calls": [{"name": "f", "args": {}, "id": "a", "type": "tool_call"}],
                }
            ],
            [calls(made("f", {}))],
        ),
        # Calls one after the other, then a text.
        (
            [
                {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'},
                {"from": "tool_call", "value": '[{"name": "g"}]'},
                {"from": "Observation", "value": '["1", {"a": 2}]'},
                {"from": "gpt", "value": "Done."},
            ],
            [
                calls(made("f", {}), made("g", {})),
                result("1"),
                result('{"a": 2}'),
                assistant("Done."),
            ],
        ),
        # Three results of two calls, two that a tool returned as one list, and none that is a list.
        (
            [calls(ROME, ROME), result('["1", "2", "3"]')],
            [calls(ROME, ROME), result('["1", "2", "3"]')],
        ),
        ([calls(ROME), result('["1"]')], [calls(ROME), result('["1"]')]),
        (
            [calls(ROME, ROME), result('["1", "2"]'), result("3")],
            [calls(ROME, ROME), result('["1", "2"]'), result("3")],
        ),
        ([calls(ROME, ROME), result("1, 2")], [calls(ROME, ROME), result("1, 2")]),
        ([calls(ROME, ROME), identified('["1", "2"]', "x")],) * 2,
        # Nulls of JSON text were meant.
        (
            [{"from": "function_call", "value": '{"name": "f", "arguments": {"a": null}}'}],
            [calls(made("f", {"a": None}))],
        ),
        ([{"role": "critic", "content": "x"}], [{"role": "critic", "content": "x"}]),
        # Roles of other libraries, in any case.
        (
            [{"role": "User", "content": "q"}, {"role": "MODEL", "content": "a"}],
            [user("q"), assistant("a")],
        ),
        (
            [{"from": "input", "value": "q"}, {"from": "bot", "value": "a"}],
            [user("q"), assistant("a")],
        ),
        # What pandas has for a missing value.
        (
            [{**assistant("a"), "tool_calls": NAN, "tool_call_id": pandas.NA, "name": NAN}],
            [assistant("a")],
        ),
        ([{**calls(ROME), "content": NAN}], [calls(ROME)]),
        ([calls({"name": "f", "arguments": NAN, "args": {"a": 1}})], [calls(made("f", {"a": 1}))]),
        # One part without a list around it, and a part without a type.
        ([user({"type": "text", "text": "q"})], [user("q")]),
        ([user([{"text": "q"}, {"type": None, "text": "!"}])], [user("q!")]),
        # Anthropic's requests have the system text beside the messages.
        ({"system": "S", "messages": [user("q")]}, [system("S"), user("q")]),
        (
            {"system": [{"type": "text", "text": "S"}], "messages": [user("q")]},
            [system("S"), user("q")],
        ),
        ({"system": "", "messages": [user("q")]}, [user("q")]),
        # The Responses API: outputs of several parts; LlamaIndex: calls that are blocks.
        (
            [
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [{"type": "input_text", "text": "1"}],
                },
            ],
            [calls(made("f", {})), result("1")],
        ),
        (
            [
                {
                    "role": "assistant",
                    "blocks": [
                        {
                            "block_type": "tool_call",
                            "tool_call_id": "c",
                            "tool_name": "f",
                            "tool_kwargs": '{"a": 1}',
                        }
                    ],
                }
            ],
            [calls(made("f", {"a": 1}))],
        ),
        ([system(["a", {"type": "text", "text": "b"}])], [system("ab")]),
        # A key twice loses nothing where its values are the same.
        ([calls(made("f", '{"b": 1, "b": 1}'))], [calls(made("f", {"b": 1}))]),
    ],
)
def test_what_else_is_read(given, expected, read):
    assert meant(read(given)) == meant(expected)


@pytest.mark.parametrize(
    "given, expected",
    [
        ([{"from": "function_call", "value": "weather!"}], r"messages\[0\]: the call is not JSON"),
        ([{"from": "function_call", "value": "[]"}], r"the call is '\[\]'; expected"),
        ([{"from": "function_call", "value": "[1]"}], r"the call is '\[1\]'; expected"),
        (
            [user("q"), calls({"name": "f", "kwargs": {}})],
            r"call 1 \('f'\): the key 'kwargs' looks",
        ),
        (
            [calls({"name": "f", "input": {"a": 1}, "args": {}})],
            r"has args and input, which differ",
        ),
        (
            [assistant([{"type": "thinking", "thinking": "hm"}])],
            "part 1 of the content is 'thinking'",
        ),
        ([{**result([]), "content": [{"type": "image"}]}, user([None])], "part 1 .* 'NoneType'"),
        ([user({"a": 1})], r"messages\[0\]: part 1 of the content is 'dict of a'"),
        (
            [{"role": "user", "content": [{"toolResult": {}}]}],
            "part 1 of the content is 'dict of toolResult'",
        ),
        ("[1", "is a text that is not JSON"),
        ({"text": "x", "id": 1}, "the conversation is a dict with the keys text, id; give a list"),
        ({"system": "S", "messages": [user([3])]}, r"messages\[0\]: part 1"),
        (None, "the conversation is a NoneType"),
        # Readers of JSON keep the last value alone.
        (
            [user("q"), calls(made("f", '{"city": "Rome", "city": "Oslo"}'))],
            r"messages\[1\], call 1 \('f'\): .*the key 'city' comes twice; keep one",
        ),
        ([calls(made("f", '{"a": [{"b": 1, "b": 2}]}'))], "the key 'b' comes twice"),
        (
            [{"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1, "a": 2}}'}],
            "the key 'a' comes twice",
        ),
    ],
)
def test_what_cannot_be_read_is_named(given, expected, read):
    with pytest.raises(ValueError, match = expected):
        read(given)


@pytest.mark.parametrize(
    "key",
    [
        *("Arguments", "argument", "args_json", "arguments_json", "function_args", "tool_args"),
        *(
            "params",
            "parameters_json",
            "function_parameters",
            "inputs",
            "tool_input",
            "action_input",
        ),
        *("kwargs", "tool_arguments"),
    ],
)
def test_keys_that_look_like_arguments_are_not_lost(key, read):
    """Objects and texts, in the call and in its function."""
    for value in ({"a": 1}, '{"a": 1}'):
        for call in ({"name": "f", key: value}, {"function": {"name": "f", key: value}}):
            with pytest.raises(ValueError, match = f"call 1 .*key '{key}' looks like arguments"):
                read([user("q"), calls(call)])


@pytest.mark.parametrize(
    "key", ["calls", "tool_call", "toolCalls", "ToolCall", "function_calls", "invalid_tool_calls"]
)
def test_keys_that_look_like_calls_are_not_lost(key, read):
    for value in ([{"name": "f", "arguments": {}}], {"name": "f"}):
        with pytest.raises(
            ValueError, match = rf"messages\[1\]: the key '{key}' looks like tool calls"
        ):
            read([user("q"), {**assistant("a"), key: value}])
    for empty in ([], None, NAN):
        assert meant(read([{**assistant("a"), key: empty}])) == meant([assistant("a")])


def test_numbers_beside_messages_and_calls_are_no_calls_or_arguments(read):
    """Data sets count what they hold."""
    count = {"num_calls": 2, "has_tool_call": True, "parameter_count": 3, "requires_inputs": False}
    given = [user("q"), {**assistant("a"), **count}, user("q"), calls({**ROME, **count})]
    assert meant(read(given)) == meant([user("q"), assistant("a"), user("q"), calls(ROME)])


def test_schemas_decide_what_arrow_filled_in():
    """Each keyword that allows null, and each that does not."""
    schemas = importlib.import_module("unsloth.tool_calls.schemas")
    text, null = {"type": "string"}, {"type": "null"}
    root = {"$defs": {"T": text, "N": {"anyOf": [text, null]}, "Loop": {"$ref": "#/$defs/Loop"}}}
    allowed = [
        {},
        True,
        {"type": ["string", "null"]},
        {"anyOf": [text, null]},
        {"oneOf": [null, text]},
        {"$ref": "#/$defs/N"},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "#/$defs/Loop"},
        {"allOf": [{"$ref": "#/$defs/N"}, {}]},
        {"type": "string", "nullable": True},
        {"type": "string", "default": None},
        {"enum": ["a", None]},
        {"const": None},
    ]
    refused = [
        text,
        {"anyOf": [text, {"type": "integer"}]},
        {"oneOf": [text]},
        {"$ref": "#/$defs/T"},
        {"allOf": [{"type": ["string", "null"]}, text]},
        {"anyOf": [{}], "type": "string"},
        {"type": "string", "default": "a"},
        {"enum": ["a"]},
        {"const": "a"},
        {"type": "string", "nullable": False},
    ]
    for schema in (*allowed, *refused):
        whole = {**root, "properties": {"a": schema}}
        expected = {"a": None} if schema in allowed else {}
        assert schemas.without_filling({"a": None, "b": None}, whole) == expected, schema
        items = {**root, "properties": {"l": {"type": "array", "items": whole}}}
        assert schemas.without_filling({"l": [{"a": None}]}, items) == {"l": [expected]}
    assert schemas.without_filling({"a": None}, {**root, "additionalProperties": True}) == {
        "a": None
    }


def test_names_of_tools_in_every_form():
    """What apply_chat_template takes as tools, parse_tool_calls knows by name."""
    tool_names = importlib.import_module("unsloth.tool_calls.schemas").tool_names

    def f(a: int):
        """A tool."""

    schema = {"type": "function", "function": {"name": "f", "parameters": {}}}
    forms = (
        [f],
        [schema],
        (schema,),
        json.dumps([schema]),
        [json.dumps(schema)],
        {"tools": [schema]},
    )
    for tools in (*forms, [{"name": "f", "input_schema": {}}], [Dumped(**schema)], schema):
        assert tool_names(tools) == ["f"], tools
    assert tool_names(None) == tool_names([]) == []


@pytest.mark.parametrize("results", [["1"], ["1", "2", "3"], [], {"a": "1", "b": "2"}, None])
def test_a_list_with_more_or_fewer_results_than_calls_stays_one(results, read):
    """Which result is whose cannot be told, so it is one result, as it was written."""
    two = [user("q"), calls(made("f", {}), made("g", {})), result(json.dumps(results))]
    assert [message.get("content") for message in read(two)[2:]] == [json.dumps(results)]
    two[2] = result(json.dumps(["1", {"b": 2}]))
    assert [message.get("content") for message in read(two)[2:]] == ["1", '{"b": 2}']


TWEETS = [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("role", ["tool", "ipython", "function"])
def test_a_result_that_is_a_list_of_texts_stays_a_list(role, read):
    """Templates print it as JSON; text parts have a type each, or are Bedrock's only one."""
    typed = [{"type": "text", **one} for one in TWEETS]
    mixed = [typed[0], TWEETS[1]]
    for given, expected in ((TWEETS, TWEETS), (mixed, mixed), (typed, "onetwo")):
        messages = [calls(made("f", {})), result(given, role)]
        assert read(messages)[1]["content"] == expected
        part = {"type": "tool_result", "tool_use_id": "a", "content": given}
        assert read([user([part])])[0]["content"] == expected
    assert read([calls(made("f", {})), result(TWEETS[:1], role)])[1]["content"] == "one"
    assert read([user(TWEETS)])[0]["content"] == "onetwo"


def test_roles_that_are_enums_become_plain_texts(read):
    """A template would write ``Role.USER`` for a str that is an enum as well."""
    (message,) = read([{"role": Role.USER, "content": "q"}])
    assert type(message["role"]) is str and message["role"] == "user"


def test_a_call_needs_no_id_to_be_passed_as_clean():
    """What templates need of a call is its name and arguments; another key goes on to what reads it."""
    is_clean = importlib.import_module("unsloth.tool_calls.calls").is_clean_call
    function = {"name": "f", "arguments": {"a": 1}}
    assert is_clean({"function": function}) and is_clean({"type": "function", "function": function})
    assert not is_clean({"function": function, "index": 0})
