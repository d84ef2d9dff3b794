# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Tool calls after standardize_sharegpt in templates other than Llama 3.x: shown right, or one warning."""

import copy
import importlib
import json
import logging
import pickle

from backend import require

require("cpu")

import pytest  # noqa: E402
import unsloth  # noqa: E402, F401  (has to come before transformers)
from llama_chat import assistant, calls, made, make_llama_tokenizer, result, user  # noqa: E402

SHOWING = ["qwen-2.5", "qwen-3", "gemma-4", "gpt-oss"]
BLIND = ["chatml", "phi-4", "llama-3", "mistral", "gemma", "gemma-3"]
OPENAI = [
    user("q"),
    calls(made("get_weather", {"city": "Rome"})),
    result("20"),
    assistant("Done."),
]
SHAREGPT = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Rome"}}'},
    {"from": "observation", "value": "20"},
    {"from": "gpt", "value": "Done."},
]


def made_for(name):
    from unsloth.chat_templates import get_chat_template
    return get_chat_template(make_llama_tokenizer(), name, map_eos_token = False)


def standardized():
    datasets = pytest.importorskip("datasets")
    standardize = importlib.import_module("unsloth.chat_templates").standardize_sharegpt
    return standardize(datasets.Dataset.from_list([{"conversations": SHAREGPT}] * 2))


def rendered_by_plain(name, messages):
    """What the template's text gives in a tokenizer that nothing was mixed into."""
    plain = make_llama_tokenizer()
    plain.chat_template = made_for(name).chat_template
    return plain.apply_chat_template(messages, tokenize = False)


@pytest.mark.parametrize("name", SHOWING)
def test_calls_are_rendered_as_objects(name):
    """Arguments that were stored as JSON text render as those of OpenAI messages with a dict."""
    tokenizer = made_for(name)
    if "tool_calls" not in tokenizer.chat_template:  # Gemma 4's before Unsloth 2026.10.7
        pytest.skip(f"this Unsloth's template {name} has no place for calls")
    conversation = standardized()[0]["conversations"]
    clean = [dict(message) for message in OPENAI]
    clean[1] = {**clean[1], "content": ""}
    text = tokenizer.apply_chat_template(conversation, tokenize = False)
    assert text == rendered_by_plain(name, clean)
    assert "Rome" in text and '\\"city' not in text
    batch = tokenizer.apply_chat_template([conversation, clean], tokenize = False)
    assert batch == [text, text]


def test_arguments_become_text_where_a_template_joins_them():
    """DeepSeek's way: arguments are added to a text, so that a dict raises."""
    own = (
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c['function']['name'] + ' ' + c['function']['arguments'] }}"
        "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = made_for("chatml")
    tokenizer.chat_template = own
    expected = 'qget_weather {"city": "Rome"}20Done.'
    assert tokenizer.apply_chat_template(OPENAI, tokenize = False) == expected


@pytest.mark.parametrize("missing", [{}, {"content": None}], ids = ["absent", "none"])
@pytest.mark.parametrize("name", SHOWING + BLIND)
def test_a_call_without_content_renders_as_one_with_an_empty_text(name, missing):
    """OpenAI's format allows both; most templates stop there, or print None."""
    one = made("get_weather", {"city": "Rome"})
    text = made_for(name).apply_chat_template(
        [user("q"), calls(one, **missing), user("And?")], tokenize = False
    )
    expected = [user("q"), calls(one, content = ""), user("And?")]
    assert text == rendered_by_plain(name, expected)


@pytest.mark.parametrize(
    "missing", [{}, {"content": None}, {"content": ""}], ids = ["absent", "none", "empty"]
)
def test_calls_are_shown_where_a_template_wants_no_content(missing, warnings):
    """DeepSeek's way again: a text beside calls, even an empty one, hides them; one warning says so."""
    tokenizer = made_for("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is none %}{% for c in m.tool_calls %}"
        "{{ c['function']['name'] + ' ' + c['function']['arguments'] }}"
        "{% endfor %}{% else %}{{ m['content'] + ';' }}{% endif %}{% endfor %}"
    )
    given = [user("q"), calls(made("get_weather", {"city": "Rome"}), **missing)]
    expected = 'q;get_weather {"city": "Rome"}'
    assert tokenizer.apply_chat_template(given, tokenize = False) == expected
    assert warnings() == []
    given[1]["content"] = "A moment."
    assert tokenizer.apply_chat_template(given, tokenize = False) == "q;A moment.;"
    (said,) = warnings()
    assert "beside a text" in said and "message of their own" in said


@pytest.fixture
def warnings(caplog, monkeypatch):
    """warnings() -> what the module has said so far in this test."""
    module = importlib.import_module("unsloth.tool_calls.other_templates")
    module._warn_once.cache_clear()
    monkeypatch.setattr(module.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger = module.logger.name):
        yield lambda: [r.message for r in caplog.records if r.name == module.logger.name]
    module._warn_once.cache_clear()


def renders(tokenizer, messages):
    """Whether the template takes the roles: some refuse tool's, as in stock."""
    try:
        return bool(tokenizer.apply_chat_template(messages, tokenize = False))
    except Exception as error:
        assert "role" in str(error)
        return False


@pytest.mark.parametrize("name", BLIND)
def test_templates_without_calls_warn_once(name, warnings):
    """One warning, which names the template and what to do; refused is only what stock refuses."""
    tokenizer, plain = made_for(name), make_llama_tokenizer()
    plain.chat_template = tokenizer.chat_template
    for row in standardized():
        messages = row["conversations"]
        assert renders(tokenizer, messages) == renders(plain, messages)
    renders(tokenizer, [user("q"), result("20")])
    (said,) = warnings()
    assert f"{name!r} cannot show tool calls" in said and "qwen-2.5" in said


def test_arguments_that_are_no_object_are_told(warnings):
    """They render as stock renders them."""
    given = copy.deepcopy(OPENAI)
    given[1].update(content = "")
    given[1]["tool_calls"][0]["function"]["arguments"] = "city: Rome"
    text = made_for("qwen-2.5").apply_chat_template(given, tokenize = False)
    assert text == rendered_by_plain("qwen-2.5", given)
    (said,) = warnings()
    assert "'city: Rome'" in said and "no JSON object" in said


def test_tools_by_position_and_conversations_as_arrays():
    """Neither is a way around."""
    numpy = pytest.importorskip("numpy")
    tokenizer = made_for("qwen-2.5")
    conversation = standardized()[0]["conversations"]
    text = tokenizer.apply_chat_template(conversation, tokenize = False)
    assert '\\"city' not in text
    assert tokenizer.apply_chat_template(conversation, None, tokenize = False) == text
    array = numpy.array(conversation, dtype = object)
    assert tokenizer.apply_chat_template(array, tokenize = False) == text


@pytest.mark.parametrize("name", SHOWING + BLIND)
def test_other_conversations_render_as_before(name, caplog):
    """Without calls nothing changes, and nothing is said."""
    messages = [user("Hi"), assistant("Ho"), user("And?")]
    with caplog.at_level(logging.WARNING):
        text = made_for(name).apply_chat_template(messages, tokenize = False)
    assert text == rendered_by_plain(name, messages)
    assert "cannot show" not in caplog.text


def test_data_and_tokenizer_are_left_alone(monkeypatch, tmp_path):
    """Conversations are not changed; copies, pickles, saving and another template work."""
    from unsloth.chat_templates import get_chat_template

    tokenizer = made_for("qwen-2.5")
    given = copy.deepcopy(OPENAI)
    given[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"city": "Rome"})
    before = copy.deepcopy(given)
    text = tokenizer.apply_chat_template(given, tokenize = False)
    assert given == before and '\\"city' not in text
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.apply_chat_template(given, tokenize = False) == text
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding = "utf-8"))
    plain = type(make_llama_tokenizer())
    make_llama_tokenizer().save_pretrained(tmp_path / "plain")
    text_of_plain = (tmp_path / "plain" / "tokenizer_config.json").read_text(encoding = "utf-8")
    assert saved["tokenizer_class"] == json.loads(text_of_plain)["tokenizer_class"]
    with pytest.raises(KeyError):
        get_chat_template(tokenizer, "no-such-template")
    assert tokenizer.apply_chat_template(given, tokenize = False) == text
    monkeypatch.setenv("UNSLOTH_TOOL_CHECKS", "off")
    assert '\\"city' in tokenizer.apply_chat_template(given, tokenize = False)
    monkeypatch.delenv("UNSLOTH_TOOL_CHECKS")
    llama = get_chat_template(tokenizer, "llama-3.1")
    assert isinstance(llama, plain) and type(llama).__name__ == plain.__name__
    assert "Rome" in llama.apply_chat_template(given, tokenize = False)


def test_a_get_chat_template_of_another_release_is_refused():
    show = importlib.import_module("unsloth.tool_calls.other_templates").show_tool_calls
    with pytest.raises(NotImplementedError, match = "other parameters"):
        show(lambda other: None)
