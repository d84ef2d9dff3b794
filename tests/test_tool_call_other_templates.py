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
from llama_chat import (  # noqa: E402
    assistant,
    calls,
    identified,
    made,
    make_llama_tokenizer,
    result,
    user,
)

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
    monkeypatch.setattr(module, "_warned", set())
    monkeypatch.setattr(module.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger = module.logger.name):
        yield lambda: [r.message for r in caplog.records if r.name == module.logger.name]


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


ROME, OSLO = made("w", {"city": "Rome"}, "c1"), made("now", {"city": "Oslo"}, "c2")
HIDES_FURTHER_CALLS = "'gpt-oss' shows one tool call a message"
HIDES_TEXT = "'gpt-oss' does not show a text beside tool calls"


def test_calls_that_a_template_leaves_out_are_told(warnings):
    """gpt-oss shows the first of several; the remedy that the warning names shows all."""
    tokenizer = made_for("gpt-oss")
    several = [user("q"), calls(ROME, OSLO), result("20"), result("5"), assistant("Done.")]
    for _ in range(2):
        text = tokenizer.apply_chat_template(several, tokenize = False)
    assert "Rome" in text and "Oslo" not in text
    (said,) = warnings()
    assert HIDES_FURTHER_CALLS in said and "a message of its own, its result after it" in said
    apart = [user("q"), calls(ROME), result("20"), calls(OSLO), result("5"), assistant("Done.")]
    text = tokenizer.apply_chat_template(apart, tokenize = False)
    shown = ("Rome", "functions.w ", ">20<", "Oslo", "functions.now ", ">5<")
    places = [text.index(part) for part in shown]
    assert places == sorted(places) and len(warnings()) == 1


def test_a_text_beside_a_call_that_a_template_leaves_out_is_told(warnings):
    """gpt-oss shows it only where no answer comes later, and then nothing is said."""
    tokenizer = made_for("gpt-oss")
    beside = [user("q"), calls(ROME, content = "Let me check."), result("20")]
    assert "Let me check." in tokenizer.apply_chat_template(beside, tokenize = False)
    assert warnings() == []
    answered = [*beside, assistant("Done.")]
    assert "Let me check." not in tokenizer.apply_chat_template(answered, tokenize = False)
    (said,) = warnings()
    assert HIDES_TEXT in said and "a message of its own, before" in said
    apart = [user("q"), assistant("Let me check."), calls(ROME), result("20"), assistant("Done.")]
    assert "Let me check." in tokenizer.apply_chat_template(apart, tokenize = False)
    assert len(warnings()) == 1


@pytest.mark.parametrize("name", ["qwen-2.5", "qwen-3", "gemma-4"])
def test_nothing_is_said_where_all_is_shown(name, warnings):
    beside = calls(ROME, OSLO, content = "Let me check.")
    given = [user("q"), beside, result("20"), result("5"), assistant("Done.")]
    text = made_for(name).apply_chat_template(given, tokenize = False)
    assert "Let me check." in text and "Oslo" in text and warnings() == []


LEGACY = {"name": "get_weather", "arguments": '{"city": "Rome"}'}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("name", SHOWING)
def test_legacy_function_calls_are_shown(name, content, warnings):
    """function_call and role function, of which no template of Unsloth shows anything."""
    called = {"role": "assistant", **content, "function_call": LEGACY}
    answer = {"role": "function", "name": "get_weather", "content": "20"}
    filled = {**assistant("Done."), "function_call": None}
    given = [user("q"), called, answer, filled]
    before = copy.deepcopy(given)
    text = made_for(name).apply_chat_template(given, tokenize = False)
    clean = copy.deepcopy(OPENAI)
    clean[1]["content"], clean[2]["name"] = "", "get_weather"
    assert text == rendered_by_plain(name, clean) and "Rome" in text and "20" in text
    assert given == before and warnings() == []


def test_legacy_function_calls_that_are_not_read_are_told(warnings):
    """One is unknown; a template that reads them itself gets them; one without calls warns."""
    given = [user("q"), {**assistant("Hm."), "function_call": {"name": "f", "kwargs": {"a": 1}}}]
    tokenizer = made_for("qwen-2.5")
    assert tokenizer.apply_chat_template(given, tokenize = False) == rendered_by_plain(
        "qwen-2.5", given
    )
    (said,) = warnings()
    assert "function_call is missing" in said and "'qwen-2.5'" in said and "'kwargs'" in said
    given[1].update(content = None, function_call = LEGACY)
    assert "None" not in made_for("gemma").apply_chat_template(given, tokenize = False)
    assert "'gemma' cannot show tool calls" in warnings()[1]
    given[1]["function_call"] = {"name": None, "arguments": None}  # an object that Arrow filled in
    given[1]["content"] = "Hi"
    assert "None" not in tokenizer.apply_chat_template(given, tokenize = False)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.function_call %}{{ m.function_call.name }}{% else %}"
        "{{ m.role + ':' + m.content + ';' }}{% endif %}{% endfor %}"
    )
    given[1].update(content = None, function_call = LEGACY)
    given.append({"role": "function", "name": "f", "content": "20"})
    text = tokenizer.apply_chat_template(given, tokenize = False)
    assert text == "user:q;get_weatherfunction:20;" and len(warnings()) == 2


def test_results_stand_in_the_order_of_their_calls():
    """qwen prints no ids. Where ids do not tell which result is whose, results stay as they are."""
    tokenizer = made_for("qwen-2.5")
    called = calls(ROME, OSLO, content = "")

    def order(*results):
        given = [user("q"), called, *results, assistant("Done."), called, result("last")]
        text = tokenizer.apply_chat_template(given, tokenize = False)
        return [r["content"] for r in sorted(results, key = lambda r: text.index(r["content"]))]

    rome, oslo = identified("R20", "c1"), identified("O5", "c2")
    assert order(oslo, rome) == order(rome, oslo) == ["R20", "O5"]
    legacy = {**oslo, "role": "function"}
    assert order(legacy, rome) == ["R20", "O5"]
    for unknown in (identified("R20", "c3"), identified("R20", "c2"), result("R20")):
        assert order(oslo, unknown) == ["O5", "R20"]
    called["tool_calls"][0] = {**ROME, "id": "c2"}
    assert order(oslo, rome) == ["O5", "R20"]


@pytest.mark.parametrize("empty", [[], (), None, float("nan")])
@pytest.mark.parametrize("name", SHOWING)
def test_a_list_of_no_calls_is_no_call(name, empty):
    given = [user("q"), {**assistant("Hm."), "tool_calls": empty}]
    text = made_for(name).apply_chat_template(given, tokenize = False)
    assert text == rendered_by_plain(name, [user("q"), assistant("Hm.")])


@pytest.mark.parametrize("missing", [{}, {"arguments": None}], ids = ["absent", "none"])
@pytest.mark.parametrize("name", SHOWING)
def test_a_call_without_arguments_has_an_empty_object(name, missing, warnings):
    def with_arguments(**given):
        one = {"type": "function", "function": {"name": "now", **given}}
        return [user("q"), calls(one, content = "")]

    tokenizer = made_for(name)
    text = tokenizer.apply_chat_template(with_arguments(**missing), tokenize = False)
    assert text == rendered_by_plain(name, with_arguments(arguments = {}))
    other_name = with_arguments(**missing, parameters = {"city": "Rome"})
    assert "Rome" in tokenizer.apply_chat_template(other_name, tokenize = False)
    assert warnings() == []
    unknown = with_arguments(arguments = None, kwargs = {"city": "Rome"})
    assert tokenizer.apply_chat_template(unknown, tokenize = False) == rendered_by_plain(
        name, unknown
    )
    (said,) = warnings()
    assert repr(name) in said and "the key 'kwargs' looks like arguments" in said


def test_calls_in_arrays_are_read():
    """As rows of pandas hold them."""
    numpy = pytest.importorskip("numpy")
    one = made("get_weather", '{"city": "Rome"}')
    given = [user("q"), {**calls(one), "tool_calls": numpy.array([one, one], dtype = object)}]
    text = made_for("qwen-2.5").apply_chat_template(given, tokenize = False)
    assert text.count('"arguments": {"city": "Rome"}') == 2


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("city: Rome", "Expecting value"),
        ('{"city": "Rome", "city": "Oslo"}', "the key 'city' comes twice"),
        ('{"a": [{"b": 1, "b": 2}]}', "the key 'b' comes twice"),
        ('{"a": 1e400}', "Out of range float"),
        ('["Rome"]', "it is a list"),
    ],
)
def test_arguments_that_are_no_object_are_told(arguments, reason, warnings):
    """They render as stock renders them; one warning a template, with the first one's reason."""
    given = [user("q"), calls(made("w", arguments), content = ""), result("20")]
    tokenizer = made_for("qwen-2.5")
    text = tokenizer.apply_chat_template(given, tokenize = False)
    assert text == rendered_by_plain("qwen-2.5", given)
    tokenizer.apply_chat_template([user("q"), calls(made("w", "{"))], tokenize = False)
    (said,) = warnings()
    assert "'qwen-2.5'" in said and "no JSON object" in said
    assert arguments in said and reason in said


def test_a_key_twice_with_one_value_loses_nothing(warnings):
    given = [user("q"), calls(made("w", '{"a": 1, "a": 1}')), result("20")]
    text = made_for("qwen-2.5").apply_chat_template(given, tokenize = False)
    assert '"arguments": {"a": 1}' in text and warnings() == []


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
