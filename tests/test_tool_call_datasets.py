# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
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
    result,
    system,
    user,
)

TOOLS = [WEATHER, SEARCH]


def meant(conversation):
    """Roles, texts and calls of a conversation, arguments as dicts."""
    arguments = [
        [
            (one["function"]["name"], one["function"]["arguments"])
            for one in m.get("tool_calls") or ()
        ]
        for m in conversation
    ]
    return [
        (
            message["role"],
            message.get("content") or "",
            [(name, json.loads(a) if isinstance(a, str) else a) for name, a in made],
        )
        for message, made in zip(conversation, arguments)
    ]


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
def test_sharegpt_tool_conversations(where, name):
    """function_call, observation and the like become OpenAI's messages, which Arrow keeps."""
    datasets = pytest.importorskip("datasets")
    standardize = getattr(importlib.import_module(where), name)
    plain = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]]
    for rows in (SHAREGPT, plain * 12 + SHAREGPT):
        dataset = standardize(datasets.Dataset.from_list([{"conversations": row} for row in rows]))
        for conversation, expected in zip(dataset["conversations"][-3:], OPENAI):
            assert meant(conversation) == meant(expected)
        assert json.loads(
            dataset[len(rows) - 1]["conversations"][1]["tool_calls"][0]["function"]["arguments"]
        ) == {"city": "Rome"}


def test_openai_tool_conversations_are_standardized():
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
    assert meant(conversation) == meant(rows[0])
    assert [one["id"] for one in conversation[1]["tool_calls"]] == ["x1", "x2"]
    assert [message["tool_call_id"] for message in conversation[2:4]] == ["x2", "x1"]


def test_streamed_datasets_are_standardized():
    """An IterableDataset converts too."""
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    stream = datasets.Dataset.from_list(
        [{"conversations": row} for row in SHAREGPT]
    ).to_iterable_dataset()
    for row, expected in zip(standardize(stream), OPENAI):
        assert meant(row["conversations"]) == meant(expected)


def test_calls_behind_plain_rows_of_a_stream_are_found():
    """A stream is looked into further than its first row."""
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    plain = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    rows = [{"conversations": plain}] * 5 + [{"conversations": SHAREGPT[0]}]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    last = list(standardize(stream))[-1]["conversations"]
    assert [message["role"] for message in last] == [message["role"] for message in OPENAI[0]]


def test_plain_datasets_are_standardized_as_before():
    """Without tools it is the stock function: same messages and columns. Tool roles are what differs."""
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
    """standardize_sharegpt is the same function under another name."""
    decorate = importlib.import_module("unsloth.tool_calls.datasets").standardize_tool_calls
    once = decorate(lambda dataset: dataset)
    assert decorate(once) is once
    with pytest.raises(NotImplementedError, match = "dataset"):
        decorate(lambda other: None)


def test_an_alias_of_two_roles_is_refused():
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    dataset = datasets.Dataset.from_list([{"conversations": SHAREGPT[0]}])
    with pytest.raises(TypeError, match = "the alias 'gpt' of 'assistant' also means 'user'"):
        standardize(dataset, aliases_for_user = ["user", "human", "gpt"])


def test_a_row_that_raises_in_one_of_four_workers_is_named():
    """Conversation and message come out of the worker; without that row four workers do as one does."""
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    rows = [{"conversations": row} for row in SHAREGPT * 4]
    broken = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    broken["conversations"][1] = {"from": "function_call", "value": "weather!"}
    dataset = datasets.Dataset.from_list([*rows[:8], broken, *rows[8:]])
    with pytest.raises(ValueError, match = r"conversation 8, messages\[1\]: the call is not JSON"):
        standardize(dataset, num_proc = 4)
    good = datasets.Dataset.from_list(rows)
    assert standardize(good, num_proc = 4)[:] == standardize(good)[:]
