# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Llama 3.1, 3.2 and 3.3 chat templates render bit for bit as Meta publishes them.

The reference is the text of Meta's templates in TRL, rendered by transformers' apply_chat_template.
"""

import ast
import importlib
import inspect
import logging
from pathlib import Path

import pytest
import unsloth  # has to come before transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_chat import (
    CONVERSATIONS,
    LLAMA_31,
    REFERENCE_FILE,
    SEARCH,
    TEXTS,
    WEATHER,
    assert_parity,
    assistant,
    call,
    make_llama_tokenizer,
    published_templates,
    result,
    system,
    user,
)


@pytest.fixture(scope = "module")
def references():
    return published_templates()


@pytest.fixture(scope = "module")
def tokenizers_by_name():
    from unsloth.chat_templates import get_chat_template
    return {name: get_chat_template(make_llama_tokenizer(), name) for name in REFERENCE_FILE}


def test_enough_conversations(tokenizers_by_name):
    """At least 80 conversations are compared, and the six names carry two different templates."""
    assert len(CONVERSATIONS) >= 80
    assert len({tokenizer.chat_template for tokenizer in tokenizers_by_name.values()}) == 2


@pytest.mark.parametrize("name", REFERENCE_FILE)
@pytest.mark.parametrize("key", CONVERSATIONS)
def test_renders_as_published(name, key, tokenizers_by_name, references):
    """Text and ids, or the error, are those of Meta's template under apply_chat_template."""
    tokenizer, case = tokenizers_by_name[name], CONVERSATIONS[key]
    assert_parity(tokenizer, references[name], case, case["hazard"])
    assert tokenizer.chat_template == references[name]


texts = st.text(max_size = 40) | st.sampled_from(sorted(TEXTS.values()))
names = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch = True)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan = False, allow_infinity = False)
)
json_values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size = 3) | st.dictionaries(texts, inner, max_size = 3),
    max_leaves = 6,
)
objects = st.dictionaries(texts, json_values, max_size = 3)
exchange = st.one_of(
    st.builds(lambda q, a: [user(q), assistant(a)], texts, texts),
    st.builds(
        lambda q, n, a, r, role: [user(q), call(n, a), result(r, role)],
        texts,
        names,
        objects,
        texts | objects | st.lists(json_values, max_size = 3),
        st.sampled_from(["tool", "ipython"]),
    ),
)
option_sets = st.fixed_dictionaries(
    {},
    optional = {
        "add_generation_prompt": st.booleans(),
        "date_string": texts,
        "tools": st.lists(st.sampled_from([WEATHER, SEARCH]), min_size = 1, max_size = 2),
        "tools_in_user_message": st.booleans(),
    },
)


@settings(max_examples = 150, deadline = None, suppress_health_check = list(HealthCheck))
@given(
    name = st.sampled_from(sorted(REFERENCE_FILE)),
    opening = st.lists(st.builds(system, texts), max_size = 1),
    exchanges = st.lists(exchange, min_size = 1, max_size = 3),
    options = option_sets,
)
def test_renders_as_published_generated(
    name, opening, exchanges, options, tokenizers_by_name, references
):
    """Generated conversations, hostile strings included, render as Meta's template renders them."""
    messages = opening + [message for part in exchanges for message in part]
    case = {"messages": messages, "options": options}
    assert_parity(tokenizers_by_name[name], references[name], case)


@pytest.mark.parametrize("name", REFERENCE_FILE)
@pytest.mark.parametrize(
    "text", [None, "", "Be kind.", ' It\'s "quoted" \\ \n{x} ', "{system_message}"]
)
def test_system_message(name, text, references):
    """system_message fills the default system turn; a system turn of the data goes before it."""
    from unsloth.chat_templates import get_chat_template

    tokenizer = get_chat_template(make_llama_tokenizer(), name, system_message = text)
    plain = make_llama_tokenizer()
    plain.chat_template = references[name]
    options = {"tokenize": False, "date_string": "26 Jul 2024"}
    with_default = plain.apply_chat_template([system("%s"), user("Hi")], **options)
    got = tokenizer.apply_chat_template([user("Hi")], **options)
    assert got == with_default.replace("%s", text or "")
    own = [system(" Mine. "), user("Hi")]
    assert tokenizer.apply_chat_template(own, **options) == plain.apply_chat_template(
        own, **options
    )


def test_mapping_still_works(references):
    """ShareGPT keys, mapped by get_chat_template, render as the OpenAI keys do."""
    from unsloth.chat_templates import get_chat_template

    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    tokenizer = get_chat_template(make_llama_tokenizer(), "llama-3.1", mapping = mapping)
    plain = make_llama_tokenizer()
    plain.chat_template = references["llama-3.1"]
    shared = [{"from": "human", "value": " Hi "}, {"from": "gpt", "value": " Hello\n"}]
    expected = plain.apply_chat_template([user(" Hi "), assistant(" Hello\n")], tokenize = False)
    assert tokenizer.apply_chat_template(shared, tokenize = False) == expected


def stock_chat_templates():
    """CHAT_TEMPLATES of unsloth.chat_templates without the line that changes it as a whole."""
    module = importlib.import_module("unsloth.chat_templates")
    tree = ast.parse(Path(module.__file__).read_text(encoding = "utf-8"))

    def replaces(node):
        return (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and [getattr(target, "id", "") for target in node.targets] == ["CHAT_TEMPLATES"]
        )

    tree.body = [node for node in tree.body if not replaces(node)]
    namespace = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(tree, module.__file__, "exec"), namespace)
    return namespace["CHAT_TEMPLATES"]


def test_other_templates_are_byte_identical():
    """Exactly the six Llama names change, and of those only the template text."""
    from unsloth.chat_templates import CHAT_TEMPLATES

    stock = stock_chat_templates()
    assert list(CHAT_TEMPLATES) == list(stock)
    assert len(stock) > 50
    changed = {name for name in stock if CHAT_TEMPLATES[name][0] != stock[name][0]}
    assert changed == set(REFERENCE_FILE)
    for name in set(stock) - changed:
        assert CHAT_TEMPLATES[name] == stock[name]
    for name in changed:
        assert CHAT_TEMPLATES[name][1:3] == stock[name][1:3]


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ('"26 July 2024"', '"27 July 2024"', "default date"),
        ("message['content'] + '<", "message['content'] | trim + '<", "trimmed content"),
        ("Do not use variables.", "Do not use any variables.", "md5"),
        ("Environment: ipython", "Environment: python", "md5"),
        ("", None, "different templates"),
    ],
)
def test_unknown_upstream_text_is_refused(old, new, reason):
    """A changed upstream template is not edited: the reason is named, and stock stays as it was."""
    replace = importlib.import_module("unsloth.llama_chat_templates").published_llama_templates
    stock = stock_chat_templates()
    names = LLAMA_31[:1] if new is None else tuple(REFERENCE_FILE)
    for name in names:
        text = stock[name][0] + "\n" if new is None else stock[name][0].replace(old, new)
        stock[name] = (text,) + stock[name][1:]
    before = dict(stock)
    with pytest.raises(NotImplementedError, match = reason):
        replace(stock)
    assert stock == before


def test_names_and_marks_that_are_gone_are_refused():
    """Another release without a name, a parameter or an end mark: each is named, nothing is edited."""
    module = importlib.import_module("unsloth.llama_chat_templates")
    stock = stock_chat_templates()
    del stock[LLAMA_31[0]]
    with pytest.raises(NotImplementedError, match = f"CHAT_TEMPLATES has no {LLAMA_31[0]}$"):
        module.published_llama_templates(stock)
    with pytest.raises(NotImplementedError, match = "get_chat_template has no parameter chat_temp"):
        module.announce_published_llama_templates(lambda tokenizer, template: tokenizer)
    for text in ("one of them alone: <", "the other one: >", "><"):
        with pytest.raises(NotImplementedError, match = "renders tool calls in an unknown way"):
            module._between(text, "<", ">")
    with pytest.raises(NotImplementedError, match = "edit 'a date' .*'>' not found"):
        module._edit_span("a < b", "a date", "<", ">", str.upper)
    assert module._edit_span("a < b > c", "a date", "<", ">", str.upper) == "a < B > c"


def test_says_once_what_changed():
    """The first use of a Llama 3.x template announces the change; other templates stay silent."""
    module = importlib.import_module("unsloth.chat_templates")
    logging.Logger.warning_once.cache_clear()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    module.logger.addHandler(handler)
    try:
        module.get_chat_template(make_llama_tokenizer(), "chatml", map_eos_token = False)
        assert not [text for text in records if "Meta" in text]
        for name in ("llama-3.2", "llama-3.1", "llama-3.1"):
            module.get_chat_template(make_llama_tokenizer(), chat_template = name)
    finally:
        module.logger.removeHandler(handler)
    said = [text for text in records if "as Meta publishes" in text]
    assert len(said) == 1
    assert "26 Jul 2024" in said[0] and "trimmed" in said[0] and "date_string" in said[0]


def test_signature_is_kept(tokenizers_by_name):
    """get_chat_template is documented and inspectable as before, and the package exports it."""
    module = importlib.import_module("unsloth.chat_templates")
    parameters = list(inspect.signature(module.get_chat_template).parameters)
    assert parameters[:5] == [
        "tokenizer",
        "chat_template",
        "mapping",
        "map_eos_token",
        "system_message",
    ]
    tokenizer = unsloth.get_chat_template(make_llama_tokenizer(), "llama-3.2")
    assert tokenizer.chat_template == tokenizers_by_name["llama-3.2"].chat_template
    assert tokenizer.chat_template != tokenizers_by_name["llama-3.1"].chat_template
