# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""get_chat_template(..., parallel_tool_calls = "error" | "split" | "join") for Llama 3.1, 3.2 and
3.3.

What each mode renders, what is put right before rendering, and what is refused.
"""

import copy
import importlib
import inspect
import pickle
from types import SimpleNamespace

import pytest
import unsloth  # has to come before transformers
from llama_chat import (
    CONVERSATIONS,
    REFERENCE_FILE,
    assert_parity,
    assistant,
    calls,
    identified,
    made,
    make_llama_tokenizer,
    published_templates,
    result,
    user,
)

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
    """The table of the documentation: several calls are refused, split into turns, or joined in one."""
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
@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2"])  # the others have one of these two
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


TWO_IDS = (made("f", {}, "x1"), made("g", {}, "x2"))


@pytest.mark.parametrize(
    "messages, expected",
    [
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
def test_results_that_cannot_be_paired(messages, expected, mode, tokenizers):
    """Which result belongs to which call is never guessed."""
    with pytest.raises(ValueError, match = expected) as error:
        rendered(tokenizers["llama-3.1", mode], messages)
    assert str(error.value).startswith("Unsloth: messages[")
    with pytest.raises(ValueError, match = r"^Unsloth: conversation 1, messages\["):
        batch = [[user("fine")], messages]
        tokenizers["llama-3.1", mode].apply_chat_template(batch, tokenize = False)


def test_missing_results(tokenizers):
    """Rendered as they are, at the end and before another turn; "split" needs all but the last one,
    and "join" none that is followed by another."""
    join, split = tokenizers["llama-3.1", "join"], tokenizers["llama-3.1", "split"]
    both, done = f"{ROME_TEXT}; {OSLO_TEXT}", turn("assistant", "Done.")
    ask, first = turn("user", "q"), turn("ipython", '"1"')
    for after, end in ((False, ""), (True, done)):
        assert rendered(join, with_results(after = after)) == ask + turn("assistant", both) + end
        one = with_results(result("1"), after = after)
        assert rendered(join, one) == ask + turn("assistant", both) + first + end
        pieces = turn("assistant", ROME_TEXT) + first + turn("assistant", OSLO_TEXT)
        assert rendered(split, one) == ask + pieces + end
        with pytest.raises(
            ValueError, match = r"call 1 .*Splitting needs a result after every call but the last"
        ):
            rendered(split, with_results(after = after))


def test_another_template_takes_the_response_template_away():
    """So does an error on the way leave everything as it was."""
    from unsloth.chat_templates import get_chat_template

    tokenizer = get_chat_template(make_llama_tokenizer(), "llama-3.1", parallel_tool_calls = "join")
    with pytest.raises(KeyError):
        get_chat_template(tokenizer, "no-such-template")
    assert f"{ROME_TEXT}; {OSLO_TEXT}" in rendered(tokenizer, [user("q"), calls(ROME, OSLO)])
    tokenizer = get_chat_template(tokenizer, "llama-3", map_eos_token = False)
    assert getattr(tokenizer, "response_template", None) is None
    parallel = importlib.import_module("unsloth.tool_calls.parallel")
    with pytest.raises(NotImplementedError, match = "not on SimpleNamespace"):
        parallel.set_mode(SimpleNamespace(), "join")
    with pytest.raises(NotImplementedError, match = "parameters"):
        parallel.render_parallel_tool_calls(lambda other: None)
    with pytest.raises(NotImplementedError, match = "no branch for messages with tool_calls"):
        importlib.import_module("unsloth.tool_calls.templates").join_template("{{ messages }}")
