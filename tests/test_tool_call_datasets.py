# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Datasets of tool conversations: ShareGPT's roles and OpenAI's messages, through Arrow and as streams."""

import importlib
import json

import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from llama_chat import (
    SEARCH,
    WEATHER,
    assistant,
    calls,
    identified,
    made,
    make_llama_tokenizer,
    result,
    system,
    user,
)

DATE = "26 Jul 2024"
TOOLS = [WEATHER, SEARCH]


@pytest.fixture(scope = "module")
def tokenizers():
    """(template name, mode) -> tokenizer."""
    from unsloth.chat_templates import get_chat_template

    return {
        (name, mode): get_chat_template(make_llama_tokenizer(), name, parallel_tool_calls = mode)
        for name in ("llama-3.1", "llama-3.2")
        for mode in ("split", "join")
    }


def rendered(tokenizer, messages, **options):
    """The text after the default system turn."""
    options = {"date_string": DATE, **options}
    text = tokenizer.apply_chat_template(messages, tokenize = False, **options)
    return text.partition("<|eot_id|>")[2]


ROME, OSLO = made("get_weather", {"city": "Rome"}), made("search.web", {"query": "Oslo"})


# ---------------------------------------------------------------- conversations in ShareGPT's and OpenAI's form
SHAREGPT = [
    [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "q"},
        {
            "from": "function_call",
            "value": '{"name": "get_weather", "arguments": {"city": "Rome"}}',
        },
        {"from": "observation", "value": "20"},
        {"from": "gpt", "value": "20 degrees."},
    ],
    [
        {"from": "human", "value": "r"},
        {"from": "function_call", "value": json.dumps([ROME["function"], OSLO["function"]])},
        {"from": "observation", "value": '["20", {"hits": 1}]'},
        {"from": "gpt", "value": "Done."},
    ],
    [
        {"from": "human", "value": "r"},
        {
            "from": "tool_call",
            "value": '{"name": "get_weather", "parameters": "{\\"city\\": \\"Rome\\"}"}',
        },
        {"from": "tool_call", "value": json.dumps(OSLO["function"])},
        {"from": "tool", "value": "20"},
        {"from": "Tool_Response", "value": "hits"},
    ],
]
OPENAI = [
    [system("S"), user("q"), calls(ROME), result("20"), assistant("20 degrees.")],
    [user("r"), calls(ROME, OSLO), result("20"), result('{"hits": 1}'), assistant("Done.")],
    [user("r"), calls(ROME, OSLO), result("20"), result("hits")],
]


@pytest.mark.parametrize("where", ["unsloth", "unsloth.chat_templates"])
@pytest.mark.parametrize("name", ["standardize_sharegpt", "standardize_data_formats"])
def test_sharegpt_tool_conversations(where, name, tokenizers):
    """function_call, observation and the like become OpenAI's messages, which Arrow keeps and all
    modes render."""
    datasets = pytest.importorskip("datasets")
    standardize = getattr(importlib.import_module(where), name)
    plain = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]]
    for rows in (SHAREGPT, plain * 12 + SHAREGPT):
        dataset = standardize(datasets.Dataset.from_list([{"conversations": row} for row in rows]))
        for conversation, expected in zip(dataset["conversations"][-3:], OPENAI):
            for mode in ("split", "join"):
                tokenizer = tokenizers["llama-3.2", mode]
                assert rendered(tokenizer, conversation) == rendered(tokenizer, expected)
            arguments = conversation[-3 if len(expected) != 5 else 1]
        assert json.loads(
            dataset[len(rows) - 1]["conversations"][1]["tool_calls"][0]["function"]["arguments"]
        ) == {"city": "Rome"}
    assert arguments


def test_openai_tool_conversations_are_standardized(tokenizers):
    """OpenAI's form passes through with its ids, its arguments as JSON text, and without Arrow's
    filling."""
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    rows = [
        [
            user("q"),
            calls(
                made("get_weather", {"city": "Rome"}, "x1"),
                made("search.web", {"query": "y"}, "x2"),
            ),
            identified("b", "x2"),
            identified("a", "x1"),
            assistant("Done."),
        ],
    ]
    dataset = datasets.Dataset.from_list([{"conversations": row, "tools": TOOLS} for row in rows])
    conversation = standardize(dataset)[0]["conversations"]
    texts = [one["function"]["arguments"] for one in conversation[1]["tool_calls"]]
    assert texts == ['{"city": "Rome"}', '{"query": "y"}']
    assert rendered(tokenizers["llama-3.1", "join"], conversation) == rendered(
        tokenizers["llama-3.1", "join"], rows[0]
    )


def test_streamed_datasets_are_standardized(tokenizers):
    """An IterableDataset converts too."""
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    stream = datasets.Dataset.from_list(
        [{"conversations": row} for row in SHAREGPT]
    ).to_iterable_dataset()
    for row, expected in zip(standardize(stream), OPENAI):
        tokenizer = tokenizers["llama-3.1", "join"]
        assert rendered(tokenizer, row["conversations"]) == rendered(tokenizer, expected)


def test_plain_datasets_are_standardized_as_before():
    """Without tools it is the stock function: same messages and columns. Tool roles are what
    differs."""
    datasets = pytest.importorskip("datasets")
    module = importlib.import_module("unsloth.chat_templates")
    plain = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]]
    dataset = module.standardize_sharegpt(
        datasets.Dataset.from_list([{"conversations": row} for row in plain])
    )
    assert dataset[0]["conversations"] == [user("hi"), assistant("ho")]
    assert module.standardize_sharegpt(datasets.Dataset.from_list([{"text": "x"}]))[0] == {
        "text": "x"
    }
    tools = datasets.Dataset.from_list([{"conversations": SHAREGPT[0]}])
    assert module.standardize_sharegpt(tools)[0]["conversations"][3]["role"] == "tool"


@pytest.mark.parametrize(
    "message, error, expected",
    [
        (
            {"from": "critic", "value": "x"},
            TypeError,
            r"conversation 1, messages\[1\]: role 'critic' is not known",
        ),
        (
            {"from": "function_call", "value": "weather!"},
            ValueError,
            r"conversation 1, messages\[1\]: the call is not JSON",
        ),
        (
            {"from": "function_call", "value": "[]"},
            ValueError,
            r"conversation 1, messages\[1\]: the call is '\[\]'; expected",
        ),
        (
            {"from": "function_call", "value": '{"name": "a\\\\b"}'},
            ValueError,
            r"conversation 1, messages\[1\], call 1: the name 'a\\\\b' cannot",
        ),
    ],
)
def test_sharegpt_errors_name_the_place(message, error, expected):
    """Unknown roles and broken calls name conversation and message."""
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    rows = [SHAREGPT[0], [{"from": "human", "value": "q"}, message]]
    dataset = datasets.Dataset.from_list([{"conversations": row} for row in rows])
    with pytest.raises(error, match = expected):
        standardize(dataset)


def test_decorating_twice_is_once():
    """standardize_sharegpt is the same function under another name; a host without torch has none."""
    decorate = importlib.import_module("unsloth.tool_calls.datasets").standardize_tool_calls
    assert decorate(None) is None
    once = decorate(lambda dataset: dataset)
    assert decorate(once) is once
    with pytest.raises(NotImplementedError, match = "dataset"):
        decorate(lambda other: None)
