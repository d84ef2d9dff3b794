# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""get_chat_template(..., parallel_tool_calls = "error" | "split" | "join") for Llama 3.1, 3.2 and
3.3.

What each mode renders, what is put right before rendering, and what is refused.
"""

import copy
import importlib
import inspect
import json
import logging
import pickle

import pytest
import unsloth  # has to come before transformers
from llama_chat import (
    CONVERSATIONS,
    REFERENCE_FILE,
    WEATHER,
    assert_parity,
    assistant,
    make_llama_tokenizer,
    published_templates,
    result,
    system,
    user,
)
from transformers import PreTrainedTokenizerBase

MODES = ("error", "split", "join")
DATE = "26 Jul 2024"


@pytest.fixture(scope = "module")
def references():
    return published_templates()


@pytest.fixture(scope = "module")
def tokenizers():
    """(template name, mode) -> tokenizer."""
    from unsloth.chat_templates import get_chat_template

    return {
        (name, mode): get_chat_template(make_llama_tokenizer(), name, parallel_tool_calls = mode)
        for name in REFERENCE_FILE
        for mode in MODES
    }


def made(
    name,
    arguments,
    call_id = None,
):
    one = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return one if call_id is None else {"id": call_id, **one}


def calls(*several, **keys):
    return {"role": "assistant", "tool_calls": list(several), **keys}


def rendered(tokenizer, messages, **options):
    """The text after the default system turn."""
    options = {"date_string": DATE, **options}
    text = tokenizer.apply_chat_template(messages, tokenize = False, **options)
    return text.partition("<|eot_id|>")[2]


def turn(role, text):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


ROME, OSLO = made("get_weather", {"city": "Rome"}), made("search.web", {"query": "Oslo"})
ROME_TEXT = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
OSLO_TEXT = '{"name": "search.web", "parameters": {"query": "Oslo"}}'


@pytest.mark.parametrize("name", REFERENCE_FILE)
def test_what_each_mode_renders(name, tokenizers):
    """The table of the documentation: several calls are refused, split into turns, or joined in
    one."""
    messages = [user("q"), calls(ROME, OSLO), result("20"), result({"hits": 1}), assistant("Done.")]
    ask, done = turn("user", "q"), turn("assistant", "Done.")
    first, second = turn("ipython", '"20"'), turn("ipython", '{"hits": 1}')
    split = turn("assistant", ROME_TEXT) + first + turn("assistant", OSLO_TEXT) + second
    joined = turn("assistant", f"{ROME_TEXT}; {OSLO_TEXT}") + first + second
    assert rendered(tokenizers[name, "split"], messages) == ask + split + done
    assert rendered(tokenizers[name, "join"], messages) == ask + joined + done
    with pytest.raises(ValueError) as error:
        rendered(tokenizers[name, "error"], messages)
    for part in ("messages[1]", "2 tool calls", "get_weather, search.web", '"split"', '"join"'):
        assert part in str(error.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFERENCE_FILE)
def test_single_calls_render_as_published(name, mode, tokenizers, references):
    """Conversations with at most one call a message are those of Meta's template in all modes."""
    for case in CONVERSATIONS.values():
        if not case["hazard"]:
            assert_parity(tokenizers[name, mode], references[name], case)


def test_split_and_error_keep_the_published_text(tokenizers, references):
    """Only "join" adds to the template's text, and it adds one branch."""
    for name in REFERENCE_FILE:
        assert tokenizers[name, "error"].chat_template == references[name]
        assert tokenizers[name, "split"].chat_template == references[name]
        joined, published = tokenizers[name, "join"].chat_template, references[name]
        branch = joined[joined.index("    {%- elif 'tool_calls' in message and ") :]
        branch = branch[: branch.index("    {%- elif 'tool_calls' in message %}")]
        assert joined.replace(branch, "") == published
        assert ("eom_id" in branch) == ("3.2" not in name and "32" not in name)


def test_builtin_tools(tokenizers):
    """Built-in calls end in eom, are split like others, and cannot be joined; 3.2 has none."""
    search = made("brave_search", {"query": "x"})
    messages = [user("q"), calls(search, ROME), result("1"), result("2")]
    options = {"builtin_tools": ["brave_search"]}
    split = rendered(tokenizers["llama-3.1", "split"], messages, **options)
    assert '<|python_tag|>brave_search.call(query="x")<|eom_id|>' in split
    assert f"{ROME_TEXT}<|eom_id|>" in split
    with pytest.raises(ValueError, match = r"messages\[1\], call 1 \('brave_search'\).*split"):
        rendered(tokenizers["llama-3.1", "join"], messages, **options)
    two = rendered(tokenizers["llama-3.1", "join"], [user("q"), calls(ROME, OSLO)], **options)
    assert two.endswith(f"{ROME_TEXT}; {OSLO_TEXT}<|eom_id|>")
    assert "python_tag" not in rendered(tokenizers["llama-3.2", "join"], messages, **options)


def test_keyword_from_everywhere():
    """unsloth.get_chat_template and the module's take the keyword, show it, and check it."""
    module = importlib.import_module("unsloth.chat_templates")
    for function in (unsloth.get_chat_template, module.get_chat_template):
        tokenizer = function(make_llama_tokenizer(), "llama-3.1", parallel_tool_calls = "join")
        assert f"{ROME_TEXT}; {OSLO_TEXT}" in rendered(tokenizer, [user("q"), calls(ROME, OSLO)])
        with pytest.raises(
            ValueError, match = "'both' is unknown; choose one of 'error', 'split', 'join'"
        ):
            function(make_llama_tokenizer(), "llama-3.1", parallel_tool_calls = "both")
        with pytest.raises(ValueError, match = "llama-3.1.*not chatml"):
            function(make_llama_tokenizer(), "chatml", parallel_tool_calls = "join")
    parameter = inspect.signature(module.get_chat_template).parameters["parallel_tool_calls"]
    assert parameter.default == "error" and parameter.kind is parameter.KEYWORD_ONLY


def test_another_get_chat_template_is_refused():
    """A function that takes other arguments than the known ones is not wrapped."""
    decorate = importlib.import_module("unsloth.tool_calls.rendering").render_parallel_tool_calls
    with pytest.raises(NotImplementedError, match = "parameters"):
        decorate(lambda other: None)


def test_other_templates_are_untouched(tokenizers):
    """Another template, also after a Llama one, leaves a plain tokenizer; so does an error on the
    way."""
    from unsloth.chat_templates import get_chat_template

    plain = type(make_llama_tokenizer())
    tokenizer = get_chat_template(make_llama_tokenizer(), "llama-3.1", parallel_tool_calls = "join")
    assert type(tokenizer) is not plain and isinstance(tokenizer, plain)
    assert type(tokenizer).__name__ == plain.__name__
    with pytest.raises(KeyError):
        get_chat_template(tokenizer, "no-such-template")
    assert f"{ROME_TEXT}; {OSLO_TEXT}" in rendered(tokenizer, [user("q"), calls(ROME, OSLO)])
    tokenizer = get_chat_template(tokenizer, "llama-3", map_eos_token = False)
    assert type(tokenizer) is plain and getattr(tokenizer, "response_template", None) is None
    # A template of the caller's own is rendered as it is.
    own = "{{ messages[0].tool_calls }}"
    joining = tokenizers["llama-3.1", "join"]
    assert joining.apply_chat_template([{"role": "x"}], chat_template = own, tokenize = False) == ""


@pytest.mark.parametrize("mode", ["split", "join"])
def test_copies_and_pickles_keep_the_checks(mode, tokenizers):
    """datasets sends tokenizers to worker processes: a copy renders and checks as the original."""
    tokenizer = tokenizers["llama-3.1", mode]
    messages = [user("q"), calls(ROME, OSLO), result("1")]
    messages = messages if mode == "split" else messages + [result("2")]
    for twin in (
        copy.copy(tokenizer),
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert type(twin) is type(tokenizer)
        assert rendered(twin, messages) == rendered(tokenizer, messages)
        with pytest.raises(ValueError, match = "no name|cannot be written"):
            rendered(twin, [user("q"), calls(made("a b", {}))])


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
            },
        },
    },
]


def search(**arguments):
    return calls(made("search.web", arguments))


@pytest.mark.parametrize("mode", MODES)
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
        (search(many = [{"x": 1, "y": None}, {"x": None}]), search(many = [{"x": 1}, {}])),
    ],
)
def test_put_right_before_rendering(given, clean, mode, tokenizers):
    """Datasets' None, JSON text and Arrow's filling render as the clean message; nothing is changed
    in place."""
    before, tokenizer = copy.deepcopy(given), tokenizers["llama-3.1", mode]
    # The clean message is rendered without the checks, or they would hide in both what they do.
    render = PreTrainedTokenizerBase.apply_chat_template
    options = {"tools": TOOLS, "tokenize": False, "date_string": DATE}
    text = {"chat_template": tokenizer.chat_template, **options}
    expected = render(make_llama_tokenizer(), [user("q"), clean], **text)
    assert tokenizer.apply_chat_template([user("q"), given], **options) == expected
    assert given == before


@pytest.mark.parametrize("mode", ["split", "join"])
def test_results_are_paired_by_id(mode, tokenizers):
    """Results in any order stand behind their calls in call order."""
    turnaround = [
        user("q"),
        calls(made("f", {"a": 1}, "x1"), made("g", {}, "x2"), made("h", {}, "x3")),
        {**result("three"), "tool_call_id": "x3"},
        {**result("one"), "tool_call_id": "x1"},
        {**result("two"), "tool_call_id": "x2"},
        assistant("Done."),
    ]
    ordered = turnaround[:2] + [turnaround[3], turnaround[4], turnaround[2]] + turnaround[5:]
    text = rendered(tokenizers["llama-3.1", mode], turnaround)
    assert text == rendered(tokenizers["llama-3.1", mode], ordered)
    assert text.index('"one"') < text.index('"two"') < text.index('"three"')


def with_results(
    *results,
    mode_calls = (ROME, OSLO),
    after = True,
):
    return [user("q"), calls(*mode_calls), *results] + ([assistant("Done.")] if after else [])


def identified(text, call_id):
    return {**result(text), "tool_call_id": call_id}


TWO_IDS = (made("f", {}, "x1"), made("g", {}, "x2"))


@pytest.mark.parametrize(
    "messages, expected",
    [
        (["text"], r"messages\[0\]: is a str; expected a dict"),
        ([user("q"), calls(made("a b", {}))], r"messages\[1\], call 1: the name 'a b'.*letters"),
        ([user("q"), calls(made(None, {}))], r"messages\[1\], call 1: the name None"),
        ([user("q"), calls(made('f", "x": "', {}))], r"messages\[1\], call 1: the name"),
        ([user("q"), calls("f")], r"messages\[1\], call 1: is a str; expected"),
        (
            [user("q"), {"role": "assistant", "tool_calls": {"a": 1}}],
            r"messages\[1\]: tool_calls is a dict",
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
        ([user("q"), calls(made("f", {"a": {1, 2}}))], r"arguments\['a'\] is a set.*convert"),
        ([user("q"), calls(made("f", {1: 2}))], r"the key 1 of arguments is a"),
        ([user("q"), calls(made("f", {"a": "\ud800"}))], "cannot be written as JSON in UTF-8"),
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
            [user("q"), identified("1", "x9")],
            r"messages\[1\]: is the result of call id 'x9', but no call",
        ),
        (
            with_results(identified("1", "x1"), identified("2", "x1"), mode_calls = TWO_IDS),
            r"messages\[3\]: is a second result of call id 'x1'",
        ),
        (
            with_results(identified("1", "x1"), identified("2", "x7"), mode_calls = TWO_IDS),
            r"messages\[3\]: tool_call_id 'x7' is no call of messages\[1\].*\['x1', 'x2'\]",
        ),
        (
            with_results(identified("1", "x1"), result("2"), mode_calls = TWO_IDS),
            r"messages\[3\]: has no tool_call_id",
        ),
        (
            with_results(result("1"), result("2"), mode_calls = (TWO_IDS[0], TWO_IDS[0])),
            r"messages\[1\], call 1 \('f'\): the id 'x1' is used twice",
        ),
        (with_results(), r"messages\[1\], call 1 \('get_weather'\): has no result"),
        (
            with_results(mode_calls = (ROME,)),
            r"messages\[1\], call 1 \('get_weather'\): has no result",
        ),
        (with_results(result("1")), r"messages\[1\], call 2 \('search.web'\): has no result"),
        (
            with_results(identified("1", "x2"), mode_calls = TWO_IDS),
            r"messages\[1\], call 1 \('f'\): has no result",
        ),
        (
            with_results({**result("1"), "name": "search.web"}, result("2")),
            r"messages\[2\]: is named 'search.web' and stands where the result of 'get_weather'",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["split", "join"])
def test_refused_before_rendering(messages, expected, mode, tokenizers):
    """What cannot be rendered faithfully names the message, the call and what to do."""
    with pytest.raises(ValueError, match = expected) as error:
        rendered(tokenizers["llama-3.1", mode], messages)
    assert str(error.value).startswith("Unsloth: messages[")
    with pytest.raises(ValueError, match = r"^Unsloth: conversation 1, messages\["):
        batch = [[user("fine")], messages]
        tokenizers["llama-3.1", mode].apply_chat_template(batch, tokenize = False)


def test_builtin_arguments_without_escapes(tokenizers):
    """name.call(key="text") has no escapes: quotes, numbers and odd keys are refused."""
    for arguments in ({"query": 'a "b"'}, {"query": 3}, {"a b": "x"}):
        with pytest.raises(
            ValueError, match = r"call 1 \('brave_search'\): argument .* built-in form"
        ):
            rendered(
                tokenizers["llama-3.1", "error"],
                [user("q"), calls(made("brave_search", arguments))],
                builtin_tools = ["brave_search"],
            )


def test_positional_arguments(tokenizers):
    """tools and chat_template may be given by position; a template of the caller's own is not
    checked."""
    tokenizer = tokenizers["llama-3.1", "join"]
    message = calls(made("get_weather", {"city": "Rome", "query": None}), OSLO)
    named = tokenizer.apply_chat_template([user("q"), message], tools = TOOLS, tokenize = False)
    assert f"{ROME_TEXT}; {OSLO_TEXT}" in named
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


def test_open_ends(tokenizers):
    """At the conversation's end results may be missing: all in "join", the last one in "split"."""
    join, split = tokenizers["llama-3.1", "join"], tokenizers["llama-3.1", "split"]
    assert rendered(join, with_results(after = False)).endswith(f"{OSLO_TEXT}<|eot_id|>")
    assert rendered(split, with_results(result("1"), after = False)).endswith(
        f"{OSLO_TEXT}<|eot_id|>"
    )
    with pytest.raises(ValueError, match = r"call 2 \('search.web'\): has no result"):
        rendered(join, with_results(result("1"), after = False))
    with pytest.raises(
        ValueError, match = r"call 1 .*Splitting needs a result after every call but the last"
    ):
        rendered(split, with_results(after = False))


@pytest.mark.parametrize(
    "messages, notice",
    [
        ([user("q"), calls(ROME, content = "Let me look.")], "text beside tool_calls"),
        ([user("q"), calls(made("f", {"a": None}))], "null arguments"),
        ([user("q"), calls(made("f", {"a": "<|eot_id|>"}))], "special token"),
        ([user("q"), calls(ROME), result("1"), result("2")], "result too many"),
    ],
)
def test_notices(messages, notice, tokenizers):
    """What is rendered but hardly meant is said once, with its place."""
    module = importlib.import_module("unsloth.tool_calls.rendering")
    module._warned.clear()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    module.logger.addHandler(handler)
    try:
        for _ in range(3):
            rendered(tokenizers["llama-3.1", "join"], messages)
    finally:
        module.logger.removeHandler(handler)
    assert len(records) == 1 and notice in records[0] and "messages[" in records[0]


ROWS = [
    [
        user("q"),
        calls(made("get_weather", {"city": "Rome"})),
        result("20"),
        assistant("20 degrees."),
    ],
    [
        user("r"),
        calls(made("search.web", {"query": "x", "filters": {"a": "y"}}), ROME),
        result("1"),
        result("2"),
    ],
    [system("S"), user("no tools"), assistant("Hi.")],
]


@pytest.mark.parametrize("mode", ["split", "join"])
def test_arrow_round_trip(mode, tokenizers):
    """Through Arrow, which merges all keys, conversations and tools render as before."""
    datasets = pytest.importorskip("datasets")
    tokenizer = tokenizers["llama-3.1", mode]
    direct = [rendered(tokenizer, row, tools = TOOLS) for row in ROWS]
    dataset = datasets.Dataset.from_list([{"messages": row, "tools": TOOLS} for row in ROWS])
    first = dataset[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert first != ROWS[0][1]["tool_calls"][0]["function"]["arguments"], "Arrow did not merge keys"

    def format_row(row):
        options = {"tools": row["tools"], "date_string": DATE, "tokenize": False}
        return {"text": tokenizer.apply_chat_template(row["messages"], **options)}

    texts = dataset.map(format_row)["text"]
    assert [text.partition("<|eot_id|>")[2] for text in texts] == direct
    # TRL also stores tools as JSON text.
    as_text = rendered(tokenizer, ROWS[0], tools = json.dumps(TOOLS))
    assert as_text == direct[0]
    with pytest.raises(ValueError, match = "tools is a text that is not JSON"):
        rendered(tokenizer, ROWS[0], tools = "[{")
