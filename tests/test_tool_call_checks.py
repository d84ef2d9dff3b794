# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Conversations with tool calls are read, checked and tidied before a Llama 3.x template renders them.

What is put right, what is refused, what is rendered with a notice, and what UNSLOTH_TOOL_CHECKS changes.
"""

import copy
import importlib
import json
import logging
import pickle
import types

import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from llama_chat import (
    CONVERSATIONS,
    REFERENCE_FILE,
    SEARCH,
    WEATHER,
    assert_parity,
    assistant,
    calls,
    developer,
    identified,
    made,
    make_llama_tokenizer,
    published_templates,
    result,
    system,
    user,
)
from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"
ROME, OSLO = made("get_weather", {"city": "Rome"}), made("search.web", {"query": "Oslo"})
ROME_TEXT = '{"name": "get_weather", "parameters": {"city": "Rome"}}'


@pytest.fixture(scope = "module")
def tokenizer():
    from unsloth.chat_templates import get_chat_template
    return get_chat_template(make_llama_tokenizer(), "llama-3.1")


@pytest.fixture
def notices():
    """Texts of the warnings, each kind of them anew."""
    module, records = importlib.import_module("unsloth.tool_calls.checks"), []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    module._warned.clear()
    module.logger.addHandler(handler)
    yield records
    module.logger.removeHandler(handler)


def rendered(tokenizer, messages, **options):
    """The text after the default system turn."""
    options = {"date_string": DATE, **options}
    text = tokenizer.apply_chat_template(messages, tokenize = False, **options)
    return text.partition("<|eot_id|>")[2]


def as_published(messages, tokenizer, **options):
    """The same without the checks: what the template itself makes of clean messages."""
    options = {"tokenize": False, "date_string": DATE, **options}
    render = PreTrainedTokenizerBase.apply_chat_template
    text = tokenizer.chat_template
    full = render(make_llama_tokenizer(), messages, chat_template = text, **options)
    return full.partition("<|eot_id|>")[2]


def nested(levels):
    return [nested(levels - 1)] if levels else 1


def made_after_arrow(key):
    """A call of one shape in a table that also has calls of other shapes."""
    function = dict.fromkeys(("arguments", "parameters", "args", "input"))
    return {
        "type": None,
        "id": None,
        "function": {"name": "get_weather", **function, key: {"city": "Rome"}},
    }


@pytest.mark.parametrize("name", REFERENCE_FILE)
def test_clean_conversations_render_as_published(name):
    """The checks change nothing where there is nothing to change."""
    from unsloth.chat_templates import get_chat_template

    references = published_templates()
    checked = get_chat_template(make_llama_tokenizer(), name)
    for case in CONVERSATIONS.values():
        if not case["hazard"]:
            assert_parity(checked, references[name], case)


# ---------------------------------------------------------------- put right before rendering

NULLABLE = {"type": ["string", "null"]}
TOOLS = [
    WEATHER,
    {
        "type": "function",
        "function": {
            "name": "search.web",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "lang": NULLABLE,
                    "ref": {"$ref": "#/$defs/Pair"},
                    "any": {"anyOf": [{"$ref": "#/$defs/Pair"}, {"type": "null"}]},
                    "one": {"oneOf": [{"type": "string"}, {"$ref": "#/$defs/Pair"}]},
                    "all": {"allOf": [{"minLength": 1}, {"type": "string"}]},
                    "nullable": {"type": "string", "nullable": True},
                    "choice": {"enum": ["a", None]},
                    "fixed": {"const": "a"},
                    "with_default": {"type": "string", "default": None},
                    "free": {"type": "object", "additionalProperties": True, "properties": {}},
                    "tree": {"$ref": "#/$defs/Tree"},
                    "limit": {"type": "integer"},
                    "filters": {
                        "type": "object",
                        "properties": {"a": {"type": "string"}, "b": NULLABLE},
                    },
                    "many": {
                        "type": "array",
                        "items": {"type": "object", "properties": {"x": {"type": "integer"}}},
                    },
                },
                "$defs": {
                    "Pair": {
                        "type": "object",
                        "properties": {"a": {"type": "string"}, "b": NULLABLE},
                    },
                    "Tree": {
                        "type": "object",
                        "properties": {"a": {"type": "string"}, "next": {"$ref": "#/$defs/Tree"}},
                    },
                },
            },
        },
    },
]


def search(**arguments):
    return calls(made("search.web", arguments))


@pytest.mark.parametrize(
    "given, clean",
    [
        ({"role": "assistant", "content": "hi", "tool_calls": None}, assistant("hi")),
        ({"role": "assistant", "content": "hi", "tool_calls": []}, assistant("hi")),
        ({**assistant("hi"), "name": None, "tool_call_id": None}, assistant("hi")),
        (calls(ROME, content = None), calls(ROME)),
        (calls(made("get_weather", '{"city": "Rome"}')), calls(ROME)),
        (calls(made("get_weather", ' {"city":\n"Rome"} ')), calls(ROME)),
        (calls(made("get_weather", None)), calls(made("get_weather", {}))),
        (calls(made("get_weather", "")), calls(made("get_weather", {}))),
        (calls({"name": "get_weather", "arguments": {"city": "Rome"}}), calls(ROME)),
        (calls({**ROME, "id": None}), calls(ROME)),
        (calls(made("get_weather", {"city": "Rome", "query": None})), calls(ROME)),
        (search(query = "x", city = None, limit = None), search(query = "x")),
        (search(query = "x", lang = None), search(query = "x", lang = None)),
        (search(filters = {"a": None, "b": None}), search(filters = {"b": None})),
        ({**assistant(None), "function_call": ROME["function"]}, calls(ROME)),
        (calls({"name": "get_weather", "args": {"city": "Rome"}, "id": "c"}), calls(ROME)),
        (calls(made_after_arrow("parameters")), calls(ROME)),
        (calls(made_after_arrow("input")), calls(ROME)),
        (
            calls({"name": "get_weather", "function": None, "arguments": {"city": "Rome"}}),
            calls(ROME),
        ),
        (calls({"function": "get_weather", "arguments": {"city": "Rome"}}), calls(ROME)),
        (calls(json.dumps(ROME)), calls(ROME)),
        ({"role": "assistant", "tool_calls": json.dumps([ROME])}, calls(ROME)),
        ({"role": "assistant", "tool_calls": ROME}, calls(ROME)),
        (calls(made("get_weather", json.dumps(json.dumps({"city": "Rome"})))), calls(ROME)),
        (calls(made("get_weather", [("city", "Rome")])), calls(ROME)),
        # JSON text was not made by Arrow: its null was meant.
        (calls(made("get_weather", '{"city": null}')), calls(made("get_weather", {"city": None}))),
        (search(ref = {"a": None, "b": None}), search(ref = {"b": None})),
        (search(any = None, one = None), search(any = None)),
        (search(any = {"a": None, "b": None}, all = None), search(any = {"b": None})),
        (search(nullable = None, choice = None, fixed = None), search(nullable = None, choice = None)),
        (search(with_default = None, free = {"x": None}), search(with_default = None, free = {"x": None})),
        (search(tree = {"next": {"next": {"a": None}}}), search(tree = {"next": {"next": {}}})),
        (
            assistant([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]),
            assistant("hi"),
        ),
        (assistant(["h", {"type": "text", "text": "i", "image": None}]), assistant("hi")),
        (search(many = [{"x": 1, "y": None}, {"x": None}]), search(many = [{"x": 1}, {}])),
    ],
)
def test_put_right_before_rendering(given, clean, tokenizer):
    """Datasets' None, JSON text and Arrow's filling render as the clean message; nothing is changed
    in place."""
    before = copy.deepcopy(given)
    # The clean message is rendered without the checks, or they would hide in both what they do.
    render = PreTrainedTokenizerBase.apply_chat_template
    options = {"tools": TOOLS, "tokenize": False, "date_string": DATE}
    text = {"chat_template": tokenizer.chat_template, **options}
    expected = render(make_llama_tokenizer(), [user("q"), clean], **text)
    assert tokenizer.apply_chat_template([user("q"), given], **options) == expected
    assert given == before


@pytest.mark.parametrize("role", ["tool", "ipython", "function", "observation", "tool_response"])
@pytest.mark.parametrize(
    "content", ["22", [{"type": "text", "text": "22"}], ["two", 2], {"a": 1}, 22]
)
def test_results(role, content, tokenizer):
    """Each role that means a result, and each content: text parts are their text, lists stay JSON."""
    is_parts = isinstance(content, list) and isinstance(content[0], dict)
    clean = [user("q"), calls(ROME), result("22" if is_parts else content), assistant("Done.")]
    given = [*clean[:2], {"role": role, "content": content, "name": "get_weather"}, clean[3]]
    assert rendered(tokenizer, given) == as_published(clean, tokenizer)


def test_null_arguments_without_a_schema_stay(tokenizer, notices):
    text = rendered(tokenizer, [user("q"), calls(made("f", {"a": None, "b": 1}))])
    assert '"parameters": {"a": null, "b": 1}' in text and "null arguments" in notices[0]


def test_tools_in_every_form(tokenizer):
    """Schemas, their JSON text, numpy, Anthropic's form; an empty list is no tools."""
    import numpy

    messages = [user("q"), calls(made("search.web", {"query": "x", "limit": None}))]
    expected = as_published(
        [user("q"), calls(made("search.web", {"query": "x"}))], tokenizer, tools = [SEARCH]
    )
    function = SEARCH["function"]
    anthropic = {
        "name": function["name"],
        "description": function["description"],
        "input_schema": function["parameters"],
    }
    array = numpy.empty(1, dtype = object)
    array[0] = SEARCH
    for tools in (
        [SEARCH],
        (SEARCH,),
        json.dumps([SEARCH]),
        [json.dumps(SEARCH)],
        array,
        {"tools": [SEARCH]},
        SEARCH,
        [anthropic],
    ):
        assert rendered(tokenizer, messages, tools = tools) == expected
    plain = rendered(tokenizer, [user("q")])
    for tools in ([], (), "", "[]", "null", numpy.array([])):
        assert rendered(tokenizer, [user("q")], tools = tools) == plain
    for tools in ("[{", "3", 3):
        with pytest.raises(ValueError, match = "tools is .*[Gg]ive a list"):
            rendered(tokenizer, [user("q")], tools = tools)


def test_a_row_of_a_dataset_brings_its_tools(tokenizer):
    """A dict with messages, system and tools renders as these given one by one."""
    row = {"system": "S", "messages": [user("q")], "tools": json.dumps([WEATHER])}
    options = {"tokenize": False, "date_string": DATE}
    expected = tokenizer.apply_chat_template([system("S"), user("q")], tools = [WEATHER], **options)
    assert tokenizer.apply_chat_template(row, **options) == expected
    row["tools"] = float("nan")  # pandas' way to say that a row has none
    expected = tokenizer.apply_chat_template([system("S"), user("q")], **options)
    assert tokenizer.apply_chat_template(row, **options) == expected


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_batch_of_rows_brings_its_tools(tokenizer, column):
    """All rows are rendered with one list of tools, so rows that differ in it are refused by name."""
    rows = [{column: [user(text)], "tools": [WEATHER]} for text in "pq"]
    rows[1]["tools"] = json.dumps(rows[1]["tools"])  # the same, as another column type holds it
    options = {"tokenize": False, "date_string": DATE}
    expected = [
        tokenizer.apply_chat_template([user(text)], tools = [WEATHER], **options) for text in "pq"
    ]
    assert tokenizer.apply_chat_template(rows, **options) == expected
    rows[1]["tools"] = None
    with pytest.raises(ValueError, match = "rows 0 and 1 .*different tools.*one by one"):
        tokenizer.apply_chat_template(rows, **options)
    assert tokenizer.apply_chat_template(rows, tools = [WEATHER], **options) == expected


def test_null_default_of_a_tool_is_kept(tokenizer):
    """ "default": null is a value; a null type is Arrow's filling, and goes with all the others."""
    schema = {"type": "string", "default": None, "enum": ["a", None]}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"x": schema}}},
    }
    assert '"default": null' in rendered(tokenizer, [user("q")], tools = [tool])
    schema["title"] = None
    text = rendered(tokenizer, [user("q")], tools = [tool])
    assert "title" not in text and "default" not in text and '"enum"' in text


def test_numpy_and_pandas(tokenizer):
    """As parquet files are read: arrays of dicts with arrays in them."""
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    clean = [
        user("q"),
        calls(made("f", {"a": [1, 2], "b": 0.5, "c": True})),
        result("1"),
        assistant("Done."),
    ]
    arguments = {"a": numpy.array([1, 2]), "b": numpy.float64(0.5), "c": numpy.bool_(True)}
    call = numpy.empty(1, dtype = object)
    call[0] = made("f", arguments)
    given = numpy.empty(4, dtype = object)
    given[:] = [
        clean[0],
        {"role": "assistant", "content": None, "tool_calls": call},
        clean[2],
        clean[3],
    ]
    expected = as_published(clean, tokenizer)
    assert rendered(tokenizer, given) == expected
    assert rendered(tokenizer, pandas.Series(list(given))) == expected
    batch = numpy.empty(2, dtype = object)
    batch[:] = [given, given]
    for texts in (
        batch,
        pandas.Series([given, given]),
        [json.dumps(clean)] * 2,
        [{"messages": clean}] * 2,
    ):
        texts = tokenizer.apply_chat_template(texts, tokenize = False, date_string = DATE)
        assert [text.partition("<|eot_id|>")[2] for text in texts] == [expected] * 2
    with pytest.raises(ValueError, match = r"arguments\['a'\]\[0\] is nan"):
        rendered(tokenizer, [user("q"), calls(made("f", {"a": numpy.array([float("nan")])}))])


ROWS = [
    [
        user("q"),
        calls(made("get_weather", {"city": "Rome"})),
        result("20"),
        assistant("20 degrees."),
    ],
    [
        user("r"),
        calls(made("search.web", {"query": "x", "filters": {"a": "y"}})),
        result("1"),
    ],
    [system("S"), user("no tools"), assistant("Hi.")],
]


def test_arrow_round_trip(tokenizer):
    """Through Arrow, which merges all keys, conversations and tools render as before; an error in a
    map names the row."""
    datasets = pytest.importorskip("datasets")
    tools = copy.deepcopy(TOOLS)
    # Of a null default in a table nobody knows whether it was there.
    del tools[1]["function"]["parameters"]["properties"]["with_default"]
    direct = [rendered(tokenizer, row, tools = tools) for row in ROWS]
    dataset = datasets.Dataset.from_list([{"messages": row, "tools": tools} for row in ROWS])
    first = dataset[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert first != ROWS[0][1]["tool_calls"][0]["function"]["arguments"], "Arrow did not merge keys"

    def format_row(row):
        options = {"tools": row["tools"], "date_string": DATE, "tokenize": False}
        return {"text": tokenizer.apply_chat_template(row["messages"], **options)}

    texts = dataset.map(format_row)["text"]
    assert [text.partition("<|eot_id|>")[2] for text in texts] == direct
    bad = datasets.Dataset.from_list([{"messages": [user("q")]}] * 7 + [{"messages": [user(None)]}])
    for batched in (False, True):
        with pytest.raises(ValueError, match = r"messages\[0\].*row 7 of the data set"):
            bad.map(
                lambda row: {
                    "text": tokenizer.apply_chat_template(row["messages"], tokenize = False)
                },
                batched = batched,
                batch_size = 4,
            )


def test_the_row_of_a_map_is_told_only_where_it_is_known():
    """Indices that are none, or fewer than the conversations, name no row."""
    checks = importlib.import_module("unsloth.tool_calls.checks")

    def apply_function(
        indices,
        number,
        offset = 0,
    ):
        return checks._row_of_map(number)

    assert [apply_function([3, 4], 1), apply_function(range(2), 1, 8), apply_function(5, 0)] == [
        4,
        9,
        5,
    ]
    assert apply_function([3, 4], 2) is None and apply_function(None, 0) is None
    assert checks._row_of_map(0) is None


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "messages, expected",
    [
        (["text"], r"messages\[0\]: is a str; expected a dict"),
        ([{"content": "x"}], r"messages\[0\]: has the role None; give it a role"),
        (3, r"the conversation is a int; give a list of messages"),
        ("[{", r"the conversation is a text that is not JSON"),
        ([user("q"), calls(made('a"b', {}))], r"messages\[1\], call 1: the name 'a\"b'.*no quotes"),
        ([user("q"), calls(made("a\\b", {}))], r"messages\[1\], call 1: the name"),
        ([user("q"), calls(made("a\nb", {}))], r"messages\[1\], call 1: the name"),
        ([user("q"), calls(made("", {}))], r"messages\[1\], call 1: the name ''"),
        ([user("q"), calls(made(None, {}))], r"messages\[1\], call 1: the name None"),
        ([user("q"), calls("f")], r"messages\[1\], call 1: is a str; expected"),
        ([user("q"), {"role": "assistant", "tool_calls": {"a": 1}}], r"call 1: the name None"),
        (
            [user("q"), {"role": "assistant", "tool_calls": 3}],
            r"messages\[1\]: tool_calls is a int",
        ),
        (
            [user("q"), calls(made("f", [1]))],
            r"call 1 \('f'\): the arguments are \[1\], a list; give an object",
        ),
        ([user("q"), calls(made("f", "[1]"))], r"call 1 \('f'\): the arguments are \[1\], a list"),
        (
            [user("q"), calls(made("f", "{a"))],
            r"call 1 \('f'\): the arguments are a text that is not JSON",
        ),
        (
            [user("q"), calls(made("f", {"a": float("nan")}))],
            r"arguments\['a'\] is nan, which JSON cannot",
        ),
        ([user("q"), calls(made("f", {"a": [1, float("inf")]}))], r"arguments\['a'\]\[1\] is inf"),
        ([user("q"), calls(made("f", '{"a": NaN}'))], r"arguments\['a'\] is nan"),
        ([user("q"), calls(made("f", '{"a": 1e400}'))], r"arguments\['a'\] is inf"),
        ([user("q"), calls(made("f", {"a": {1, 2}}))], r"arguments\['a'\] is a set.*convert"),
        ([user("q"), calls(made("f", {1: 2}))], r"the key 1 of arguments is a"),
        ([user("q"), calls(made("f", {"a": {1: 2}}))], r"the key 1 of arguments\['a'\] is a"),
        ([user("q"), calls(made("f", {"a": "\ud800"}))], "cannot be written as JSON in UTF-8"),
        ([user("q"), calls(made("f", {"a": nested(300)}))], "nested more than 200 levels"),
        (
            [user("q"), calls({"name": "f", "params": {"a": 1}})],
            r"key 'params' looks like arguments",
        ),
        (
            [user("q"), calls({"name": "f", "values": {"a": 1}})],
            r"key 'values' looks like arguments",
        ),
        (
            [user("q"), calls({"name": "f", "args": {"a": 1}, "arguments": {"a": 2}})],
            r"call 1 \('f'\): has arguments and args, which differ",
        ),
        (
            [user("q"), {"role": "assistant", "content": None}],
            r"messages\[1\]: .*neither content nor tool_calls",
        ),
        ([user(None)], r"messages\[0\]: the user message has neither content"),
        (
            [user("q"), calls(ROME), result(None)],
            r"messages\[2\]: the tool message has neither content",
        ),
        ([{**user("q"), "tool_calls": [ROME]}], r"messages\[0\]: role 'user' cannot call tools"),
        (
            [user([{"type": "text", "text": "what?"}, {"type": "image", "url": "x.png"}])],
            r"messages\[0\]: part 2 of the content is 'image'",
        ),
        ([user([3])], r"messages\[0\]: part 1 of the content is 'int'"),
        (
            [user([{"type": "tool_use", "name": "f", "input": {}}])],
            r"messages\[0\]: part 1 of the content is 'tool_use'",
        ),
        (
            [user("q"), calls(ROME, OSLO), result("1"), result("2")],
            r"messages\[1\]: has 2 tool calls \(get_weather, search.web\)",
        ),
    ],
)
def test_refused_before_rendering(messages, expected, tokenizer):
    """What cannot be rendered faithfully names the message, the call and what to do."""
    with pytest.raises(ValueError, match = expected) as error:
        rendered(tokenizer, messages)
    assert str(error.value).startswith("Unsloth: ")
    with pytest.raises(ValueError, match = r"^Unsloth: conversation 1, "):
        tokenizer.apply_chat_template([[user("fine")], messages], tokenize = False)


def test_builtin_arguments_without_escapes(tokenizer):
    """name.call(key="text") has no escapes: quotes, numbers and odd keys are refused."""
    for arguments in ({"query": 'a "b"'}, {"query": 3}, {"a b": "x"}):
        with pytest.raises(
            ValueError, match = r"call 1 \('brave_search'\): argument .* built-in form"
        ):
            rendered(
                tokenizer,
                [user("q"), calls(made("brave_search", arguments))],
                builtin_tools = ["brave_search"],
            )


UNUSUAL = {
    "text beside tool_calls": [user("q"), calls(ROME, content = "Let me look.")],
    "null arguments": [user("q"), calls(made("f", {"a": None}))],
    "special token": [user("q"), calls(made("f", {"a": "<|eot_id|>"}))],
    "result too many": [user("q"), calls(ROME), result("1"), result("2")],
    "some parsers of tool calls refuse": [user("q"), calls(made("Market Trends API", {}))],
    "has no result": [user("q"), calls(ROME), user("r")],
    "but no call stands before it": [user("q"), identified("1", "x9")],
    "is a tool result, but no call stands": [user("q"), result("16"), assistant("A")],
    "a tool result, but no call": [user("q"), calls(ROME), result("1"), user("r"), result("2")],
    "rendered as a pair": [user("q"), calls({**ROME, "id": "a"}), identified("1", "b")],
    "not the first one": [user("q"), system("S")],
    "'developer'": [developer("D"), user("q")],
    "'critic'": [user("q"), {"role": "critic", "content": "x"}],
    "as Hermes and Qwen write calls": [
        user("q"),
        assistant('<tool_call>{"name": "f"}</tool_call>'),
    ],
}


@pytest.mark.parametrize("notice", UNUSUAL)
def test_unusual_conversations_are_rendered_with_one_notice(notice, tokenizer, notices):
    """As stock rendered them; the place and the remedy are said once."""
    messages = UNUSUAL[notice]
    for _ in range(3):
        assert rendered(tokenizer, messages) == as_published(messages, tokenizer)
    assert len(notices) == 1 and notice in notices[0] and "messages[" in notices[0]


WRONG_NAME, WRONG_ARGUMENT = (
    made("get_weathr", {"city": "Rome"}),
    made("get_weather", {"town": "Rome"}),
)


def as_text(call):
    """The call with arguments as JSON text, which have to be read first."""
    return made(call["function"]["name"], json.dumps(call["function"]["arguments"]))


@pytest.mark.parametrize("form", [lambda call: call, as_text], ids = ["clean", "read"])
@pytest.mark.parametrize(
    "call, expected",
    [
        (WRONG_NAME, "('get_weathr'): calls a tool that is not among those given (get_weather, "),
        (WRONG_ARGUMENT, "not declare: ['town'], where it declares ['city']. Correct"),
    ],
)
def test_calls_that_no_tool_declares_are_noticed(call, expected, form, tokenizer, notices):
    """Once, with the place, in every way to give tools; what is rendered stays the same."""
    messages = [user("q"), calls(form(call)), result("16"), assistant("A")]
    clean = [user("q"), calls(call), *messages[2:]]
    plain = rendered(tokenizer, messages)
    assert not notices and plain == as_published(clean, tokenizer)
    for tools in (TOOLS, tuple(TOOLS), json.dumps(TOOLS)):
        text = rendered(tokenizer, messages, tools = tools)
        assert text == as_published(clean, tokenizer, tools = TOOLS)
    assert len(notices) == 1 and expected in notices[0] and "messages[1], call 1" in notices[0]
    checks = importlib.import_module("unsloth.tool_calls.checks")
    fine = [user("q"), calls(ROME)]
    for given, options in (
        ([fine, messages], {"tools": TOOLS}),
        ({"messages": messages, "tools": TOOLS}, {}),
        (messages, {"custom_tools": TOOLS}),
    ):
        checks._warned.clear()
        tokenizer.apply_chat_template(given, tokenize = False, **options)
    assert len(notices) == 4 and all(expected in notice for notice in notices)


def test_builtin_tools_need_no_schema(tokenizer, notices):
    """They are declared by name; and Arrow's filling is no argument."""
    search = calls(made("brave_search", {"query": "x"}))
    options = {"tools": TOOLS, "builtin_tools": ["brave_search"]}
    rendered(tokenizer, [user("q"), search], **options)
    rendered(
        tokenizer, [user("q"), calls(made("get_weather", {"city": "x", "b": None}))], **options
    )
    assert not notices


@pytest.mark.parametrize(
    "name", ["Market Trends API", "ns:tool/x", "météo", "天气", "a{b}", "x" * 300]
)
def test_unusual_names_are_read_back(name, tokenizer):
    parse_tool_calls = importlib.import_module("unsloth.tool_calls").parse_tool_calls
    text = rendered(tokenizer, [user("q"), calls(made(name, {"a": 1}))])
    reply = text.rpartition("<|end_header_id|>\n\n")[2]
    assert parse_tool_calls(reply)["tool_calls"] == [made(name, {"a": 1})]


def test_levels(tokenizer, notices, monkeypatch):
    """error raises, warn says it once and renders what the template can, off looks at nothing. What is
    only unusual is noticed at the first two, and raises at none."""
    for level, count in (("off", 0), ("warn", 1), ("error", 2)):
        monkeypatch.setenv("UNSLOTH_TOOL_CHECKS", level)
        for unusual in (UNUSUAL["has no result"], [user("q"), calls(WRONG_NAME)]):
            importlib.import_module("unsloth.tool_calls.checks")._warned.clear()
            assert "Rome" in rendered(tokenizer, unusual, tools = [WEATHER])
        assert len(notices) == 2 * count
    notices.clear()
    bad = [user("q"), calls(made("f", {"a": float("nan")})), assistant("x")]
    parts = [user([{"type": "text", "text": "Hi"}])]
    monkeypatch.setenv("UNSLOTH_TOOL_CHECKS", "warn")
    for _ in range(2):
        assert rendered(tokenizer, bad) == as_published(bad, tokenizer)
    assert len(notices) == 1 and "is nan" in notices[0] and "UNSLOTH_TOOL_CHECKS=warn" in notices[0]
    assert rendered(tokenizer, parts) == rendered(tokenizer, [user("Hi")])
    batch = tokenizer.apply_chat_template([bad, parts], tokenize = False)
    assert "NaN" in batch[0] and "Hi" in batch[1]
    monkeypatch.setenv("UNSLOTH_TOOL_CHECKS", "off")
    assert "'type': 'text'" in rendered(tokenizer, parts)
    monkeypatch.setenv("UNSLOTH_TOOL_CHECKS", "error")
    with pytest.raises(ValueError, match = "is nan"):
        rendered(tokenizer, bad)
    monkeypatch.setenv("UNSLOTH_TOOL_CHECKS", "strict")
    get_chat_template = importlib.import_module("unsloth.chat_templates").get_chat_template
    for told in (
        lambda: rendered(tokenizer, parts),
        lambda: get_chat_template(make_llama_tokenizer(), "llama-3.1"),
    ):
        with pytest.raises(ValueError, match = "'strict'; choose error, warn, off"):
            told()


# ---------------------------------------------------------------- the tokenizer


def test_other_templates_are_untouched():
    """Another template, also after a Llama one, leaves a tokenizer without these checks; an error on
    the way leaves them."""
    from unsloth.chat_templates import get_chat_template

    plain = type(make_llama_tokenizer())
    tokenizer = get_chat_template(make_llama_tokenizer(), "llama-3.1")
    assert type(tokenizer) is not plain and isinstance(tokenizer, plain)
    assert type(tokenizer).__name__ == plain.__name__
    parts = [user([{"type": "text", "text": "Hi"}])]
    with pytest.raises(KeyError):
        get_chat_template(tokenizer, "no-such-template")
    assert rendered(tokenizer, parts) == rendered(tokenizer, [user("Hi")])
    # A template of the caller's own is rendered as it is.
    own = "{{ messages[0].tool_calls }}"
    assert tokenizer.apply_chat_template([{"role": "x"}], chat_template = own, tokenize = False) == ""
    tokenizer = get_chat_template(tokenizer, "llama-3", map_eos_token = False)
    checks = importlib.import_module("unsloth.tool_calls.checks")
    assert isinstance(tokenizer, plain) and not isinstance(tokenizer, checks.ChecksToolCalls)
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    mapped = get_chat_template(tokenizer, "llama-3.1", mapping = mapping)
    assert "Hi" in mapped.apply_chat_template([{"from": "human", "value": "Hi"}], tokenize = False)


def test_processors_are_checked_too():
    """A processor, and the tokenizer in it; other objects are left alone."""
    checks = importlib.import_module("unsloth.tool_calls.checks")
    transformers = importlib.import_module("transformers")

    class Processor(transformers.ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    processor = Processor(make_llama_tokenizer())
    assert checks.checkable_parts(processor) == [processor, processor.tokenizer]
    assert checks.checkable_parts(types.SimpleNamespace()) == []
    with pytest.raises(NotImplementedError, match = "parameters"):
        checks.check_tool_calls(lambda other: None)


def test_copies_and_pickles_keep_the_checks(tokenizer):
    """datasets sends tokenizers to worker processes: a copy renders and checks as the original."""
    for twin in (
        copy.copy(tokenizer),
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert type(twin) is type(tokenizer)
        with pytest.raises(ValueError, match = "cannot be written"):
            rendered(twin, [user("q"), calls(made('a"b', {}))])


def test_positional_arguments(tokenizer):
    """tools and chat_template may be given by position; a template of the caller's own is not checked."""
    message = calls(made("get_weather", {"city": "Rome", "query": None}))
    named = tokenizer.apply_chat_template([user("q"), message], tools = TOOLS, tokenize = False)
    assert ROME_TEXT in named
    own = tokenizer.chat_template
    assert (
        tokenizer.apply_chat_template([user("q"), message], TOOLS, None, own, tokenize = False)
        == named
    )
    with pytest.raises(TypeError, match = "name them"):
        tokenizer.apply_chat_template([user("q")], *[None] * 30)
    assert (
        tokenizer.apply_chat_template([{"role": "x"}], None, None, "{{ 1 + 1 }}", tokenize = False)
        == "2"
    )


def test_calls_that_are_answered_in_part_are_not_passed_as_clean():
    """Results of all calls or of none yet; a part of them goes on to what warns of it."""
    from unsloth.tool_calls.messages import is_clean

    two = {"role": "assistant", "tool_calls": [made("f", {}), made("f", {})]}
    for number, call in enumerate(two["tool_calls"]):
        call["id"] = f"id{number:07}"
    answers = [
        {"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in two["tool_calls"]
    ]
    start = json.loads(json.dumps([{"role": "user", "content": "q"}, two]))  # texts of its own
    clean = [is_clean(start + answers[:count], (), True) for count in range(3)]
    assert clean == [True, False, True]


@pytest.mark.parametrize("fault", ["a call that cannot be rendered", "a worker that is killed"])
def test_rendering_goes_on_after_a_fault_in_one_of_four_workers(fault, tokenizer):
    """The row is named. Of a killed worker datasets tells, or Unsloth's map starts again without
    workers. The same map over the other rows then works."""
    import os
    import signal

    datasets, main = pytest.importorskip("datasets"), os.getpid()
    rows = [{"messages": json.dumps([user(f"q{n}"), calls(ROME), result("1")])} for n in range(12)]
    broken = {"messages": json.dumps([user("q"), calls(made("f", "no JSON")), result("1")])}

    def render(row):
        messages = json.loads(row["messages"])
        if "no JSON" in row["messages"] and fault.startswith("a worker"):
            if os.getpid() != main:
                os.kill(os.getpid(), signal.SIGKILL)
            messages = messages[:1]
        return {"text": tokenizer.apply_chat_template(messages, tokenize = False)}

    dataset = datasets.Dataset.from_list([*rows[:7], broken, *rows[7:]])
    try:
        found = dataset.map(render, num_proc = 4)["text"]
        assert fault.startswith("a worker") and found == [render(row)["text"] for row in dataset]
    except (ValueError, RuntimeError) as error:
        words = "row 7 of the data set" if fault.startswith("a call") else "abruptly died"
        assert words in str(error)
    good = datasets.Dataset.from_list(rows)
    assert good.map(render, num_proc = 4)["text"] == [render(row)["text"] for row in rows]


def test_long_conversations_end_in_results():
    """More messages than Python keeps small numbers for."""
    from unsloth.tool_calls.messages import prepare_conversation

    messages = [user("q"), calls(ROME), result("1")] * 120
    assert len(prepare_conversation(messages)) == 360
