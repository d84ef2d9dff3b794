# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What Llama 3.x models write for tool calls is read as those calls, or comes back as text with the reason."""

import importlib
import json

import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from llama_chat import SEARCH, WEATHER, make_llama_tokenizer, parallel_calls

END_TOKENS = ("<|eot_id|>", "<|eom_id|>")
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.fixture(scope = "module")
def tool_calls():
    return importlib.import_module("unsloth.tool_calls")


# ---------------------------------------------------------------- one reply
ROME = ("get_weather", {"city": "Rome"})
OSLO = ("get_weather", {"city": "Oslo"})


def make_reply(*calls):
    """An assistant turn with these calls, as the chat templates write it."""
    texts = [
        f'{{"name": "{name}", "parameters": {json.dumps(arguments, ensure_ascii = False)}}}'
        for name, arguments in calls
    ]
    return "; ".join(texts) + "<|eot_id|>"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_weather", "parameters": {"city": "Rome"}}',
        '{"name":"get_weather","parameters":{"city":"Rome"}}<|eot_id|>',
        '  \n{"name": "get_weather", "parameters": {"city": "Rome"}}\n<|eot_id|>\n',
        '{"name": "get_weather", "arguments": {"city": "Rome"}}<|eom_id|>',
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Rome"}}',
        '{"name": "get_weather", "parameters": "{\\"city\\": \\"Rome\\"}"}',
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}<|eom_id|>',
        '<|python_tag|>get_weather.call(city="Rome")<|eom_id|>',
        HEADER + '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>',
        '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|><|finetune_right_pad_id|>'
        "<|finetune_right_pad_id|>",
    ],
)
def test_reads_one_call(text, tool_calls):
    """One call in the forms that Llama models drift into is read as that call."""
    tokenizer = make_llama_tokenizer()
    assert tool_calls.parse_tool_calls(text, tokenizer) == parallel_calls(ROME)
    ids = tokenizer(text, add_special_tokens = False).input_ids
    assert tool_calls.parse_tool_calls(ids, tokenizer) == parallel_calls(ROME)


@pytest.mark.parametrize("separator", ["; ", ";", "\n", "", " ;\n "])
def test_reads_several_calls_however_they_are_separated(separator, tool_calls):
    """The rendered separator is "; "; others are read too."""
    one, two = (
        '{"name": "get_weather", "parameters": {"city": "%s"}}' % c for c in ("Rome", "Oslo")
    )
    assert tool_calls.parse_tool_calls(one + separator + two) == parallel_calls(ROME, OSLO)


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"name": "get_weather", "parameters": {"city": "Ro', "call 1 is not complete"),
        ('{"name": "get_weather", "par', "call 1 is not complete"),
        (
            '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a"',
            "call 2 is not complete",
        ),
        ('{"name": "f", "parameters": {}} There you go!', "text after call 1"),
        ('Sure: {"name": "f", "parameters": {}}', "text around a tool call"),
        ('{"name": "f", "parameters": {"a": NaN}}', "NaN is not JSON"),
        ('{"name": "f", "parameters": {"a": 1, "a": 2}}', "key twice"),
        ('{"name": "f", "parameters": [1]}', "not an object"),
        ('{"name": "f", "parameters": "x"}', "not an object"),
        ('{"name": "f\\ng", "parameters": {}}', "no valid name"),
        ('{"name": "", "parameters": {}}', "no valid name"),
        ('{"name": 3, "parameters": {}}', "no valid name"),
        ('{"name": "f"}', "expected name, parameters"),
        ('{"name": "f", "parameters": {}, "arguments": {}}', "expected name, parameters"),
        ('{"name": "f", "parameters": {}, "note": 1}', "expected name, parameters"),
        ('<|python_tag|>print("hi")<|eom_id|>', "not a call of a built-in tool"),
        ("<|start_header_id|>user<|end_header_id|>\n\nHi", "turn of role 'user'"),
        ('{"name": "f", "parameters": ' + '{"a": ' * 5000, "not complete"),
        ('{"name": "f", "parameters": {"a": ' + "9" * 5000 + "}}", "not complete, valid JSON"),
        ('{"name": "f", "parameters": {"a": 1e400}}', "call 1 cannot be written again"),
        ('{"name": "f", "parameters": {"a": "\\ud800"}}', "call 1 cannot be written again"),
        ('{"name": "f", "parameters": {"a": ' + "[" * 201 + "]" * 201 + "}}", "over 200 levels"),
    ],
)
def test_broken_output_comes_back_as_text(text, reason, tool_calls):
    """Nothing is raised and nothing is guessed: the text, and why it is not a call."""
    message = tool_calls.parse_tool_calls(text)
    assert message["role"] == "assistant" and "tool_calls" not in message
    assert reason in message["reason"]
    for token in END_TOKENS:
        text = text.replace(token, "")
    assert message["content"] == text.strip()


@pytest.mark.parametrize("text", ["Hello!", "", '{"degrees": 22}', "[1, 2]", "a {b} ; c", "22"])
def test_answers_are_no_calls(text, tool_calls):
    """Text, JSON answers included, is content, without a reason."""
    expected = {"role": "assistant", "content": text}
    assert tool_calls.parse_tool_calls(text + "<|eot_id|>") == expected


def test_unknown_tools_are_refused(tool_calls):
    """With tools given, a call of another one is text; functions and schemas name tools alike."""

    def get_weather(city: str):
        """Weather."""

    text = '{"name": "get_weather", "parameters": {"city": "Rome"}}; '
    text += '{"name": "hack", "parameters": {}}'
    for tools in ([WEATHER, SEARCH], [get_weather]):
        message = tool_calls.parse_tool_calls(text, tools = tools)
        assert "tool_calls" not in message
        assert "unknown tool 'hack'" in message["reason"] and "get_weather" in message["reason"]
    known = tool_calls.parse_tool_calls(text[: text.index(";")], tools = [get_weather])
    assert known == parallel_calls(ROME)


# ---------------------------------------------------------------- ids and streams


@pytest.mark.parametrize("ids", ["list", "tensor", "row", "array"])
def test_ids_in_every_shape(ids, tool_calls):
    """Lists, tensors and arrays of shape (n,) and (1, n) are read alike."""
    import numpy
    import torch

    tokenizer = make_llama_tokenizer()
    given = tokenizer(make_reply(ROME, OSLO), add_special_tokens = False).input_ids
    shaped = {
        "list": given,
        "tensor": torch.tensor(given),
        "row": torch.tensor([given]),
        "array": numpy.array(given),
    }[ids]
    assert tool_calls.parse_tool_calls(shaped, tokenizer) == parallel_calls(ROME, OSLO)


def test_no_ids_are_an_empty_answer(tool_calls):
    expected = {"role": "assistant", "content": ""}
    assert tool_calls.parse_tool_calls([], make_llama_tokenizer()) == expected


def test_misuse_is_named(tool_calls):
    """Ids without a tokenizer, several rows and other types say what to pass."""
    with pytest.raises(TypeError, match = "needs the tokenizer"):
        tool_calls.parse_tool_calls([1, 2])
    with pytest.raises(ValueError, match = "2 rows"):
        tool_calls.parse_tool_calls([[1], [2]], make_llama_tokenizer())
    with pytest.raises(TypeError, match = "not dict"):
        tool_calls.parse_tool_calls({"input_ids": [1]}, make_llama_tokenizer())


def test_cleaning_up_spaces_does_not_reach_arguments(tool_calls):
    """Llama's tokenizer_config asks for clean_up_tokenization_spaces; arguments keep their spaces."""
    tokenizer = make_llama_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    spaced = ("f", {"q": "a , b . do n't ?"})
    reply = make_reply(spaced)
    ids = tokenizer(reply, add_special_tokens = False).input_ids
    assert tokenizer.decode(ids) != reply
    assert tool_calls.parse_tool_calls(ids, tokenizer) == parallel_calls(spaced)


@pytest.mark.parametrize("first, later", [END_TOKENS, END_TOKENS[::-1]])
def test_a_result_that_is_no_json_ends_at_the_first_end_token(first, later, tool_calls):
    """Of either kind: the call behind it is not lost to one that stands later."""
    call = '{"name": "get_weather", "parameters": {"city": "%s"}}'
    result = "<|start_header_id|>ipython<|end_header_id|>\n\nno JSON: {20" + first
    turns = (call % "Rome" + later, result, HEADER + call % "Oslo" + later, result)
    expected = parallel_calls(ROME, OSLO, ROME)
    assert tool_calls.parse_tool_calls("".join(turns) + HEADER + call % "Rome") == expected


def test_tools_are_read_from_json_text(tool_calls):
    """A list, an object, or null, which stands for none; nothing else."""
    reply = make_reply(ROME)
    for tools in (json.dumps([WEATHER]), json.dumps(WEATHER), [json.dumps(WEATHER)]):
        assert tool_calls.parse_tool_calls(reply, tools = tools) == parallel_calls(ROME)
        assert "reason" in tool_calls.parse_tool_calls(make_reply(("f", {})), tools = tools)
    assert "unknown tool" in tool_calls.parse_tool_calls(reply, tools = "null")["reason"]
    for tools in ('"get_weather"', "3", "no JSON", ["3"], ['"get_weather"']):
        with pytest.raises(ValueError, match = "the JSON of a (str|int); give a list|not JSON"):
            tool_calls.parse_tool_calls(reply, tools = tools)


def test_tools_of_anthropic_and_filled_ones_are_as_transformers_has_them(tool_calls):
    """``input_schema`` becomes ``parameters``; keywords that Arrow filled with null go, a null default of
    a schema without such keywords stays."""
    from unsloth.tool_calls.schemas import prepare_tools

    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert prepare_tools([{"name": "f", "input_schema": parameters}]) == [tool]
    described = {"type": "function", "function": {**tool["function"], "description": "d"}}
    given = {"name": "f", "description": "d", "input_schema": parameters}
    assert prepare_tools([given]) == [described]
    assert prepare_tools([{**tool, "function": {**tool["function"], "description": None}}]) == [
        tool
    ]
    parameters["properties"]["a"]["default"] = None
    assert prepare_tools([tool]) == [tool]


@pytest.mark.parametrize("union", [None, "allOf", "anyOf", "oneOf"])
def test_nulls_in_objects_that_a_schema_refers_to(tool_calls, union):
    """Filling goes and a meant null stays, however deep the schema's definition lies."""
    from unsloth.tool_calls.schemas import without_filling

    text, link = {"type": "string"}, {"$ref": "#/$defs/Person"}
    person = {"properties": {"a": text, "n": {"type": ["string", "null"]}, "next": link}}
    root = {"$defs": {"Person": person}}
    root["properties"] = {"p": link if union is None else {union: [link]}}
    given = {"a": None, "n": None, "other": None, "next": {"a": None, "n": None}}
    assert without_filling({"p": given}, root) == {"p": {"n": None, "next": {"n": None}}}


# ---------------------------------------------------------------- schemas


def weather(city: str, unit: str = "C"):
    """
    The weather of a city.

    Args:
        city: its name
        unit: of the degrees
    """


PROPERTIES = {"properties": {"a": {}}}


@pytest.mark.parametrize(
    "parameters, names",
    [
        (None, None),
        ("text", None),
        ({"type": "object"}, None),
        ({"properties": {}}, None),
        ({**PROPERTIES, "additionalProperties": True}, None),
        ({**PROPERTIES, "additionalProperties": {"type": "string"}}, None),
        ({**PROPERTIES, "patternProperties": {"^b": {}}}, None),
        ({"anyOf": [PROPERTIES, {"properties": {"b": {}}}]}, {"a", "b"}),
        ({"$ref": "#/$defs/B", "$defs": {"B": {"properties": {"b": {}}}}}, {"b"}),
        (PROPERTIES, {"a"}),
        ({**PROPERTIES, "additionalProperties": False}, {"a"}),
        ({"allOf": [PROPERTIES]}, {"a"}),
    ],
)
def test_argument_names_that_a_tool_declares(parameters, names):
    """None where it takes any; a schema that lists none is taken for one that was left out."""
    schemas = importlib.import_module("unsloth.tool_calls.schemas").Schemas
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    declared = schemas([tool])
    assert declared.arguments("f") == names
    for one in ("a", "b", "c"):
        assert declared.declare("f", {one: 1}) is (names is None or one in names)
    assert not declared.declare("g", {}) and schemas([]).declare("g", {"a": 1})


def test_functions_declare_their_arguments():
    declared = importlib.import_module("unsloth.tool_calls.schemas").Schemas([weather])
    assert declared.names() == ["weather"] and declared.arguments("weather") == {"city", "unit"}
    assert declared.declare("weather", {"city": "x"}) and declared.get("town") is None
    assert not declared.declare("weather", {"town": "x"})
