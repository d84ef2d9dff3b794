# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What the Llama 3.x templates render for tool calls is read back: parse(render(x)) == x."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from test_chat_template import SEARCH, WEATHER, call, make_llama_tokenizer, result, user

END_TOKENS = ("<|eot_id|>", "<|eom_id|>")
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.fixture(scope = "module")
def tool_calls():
    return importlib.import_module("unsloth.tool_calls")


@pytest.fixture(scope = "module")
def tokenizers():
    """(template name, mode) -> tokenizer."""
    from unsloth.chat_templates import get_chat_template

    return {
        (name, mode): get_chat_template(make_llama_tokenizer(), name, parallel_tool_calls = mode)
        for name in ("llama-3.1", "llama-3.2")
        for mode in ("split", "join")
    }


def several(*calls):
    """One assistant message with several calls, each (name, arguments)."""
    made = [call(name, arguments)["tool_calls"][0] for name, arguments in calls]
    return {"role": "assistant", "content": "", "tool_calls": made}


# ---------------------------------------------------------------- hostile conversations

FRAGMENTS = (
    "a",
    "é🦙你",
    '"',
    "\\",
    "'",
    "{",
    "}",
    "[",
    "]",
    ";",
    "; ",
    '}; {"name": "',
    '; {"name": "g", "parameters": {}}',
    '"}}',
    '{"name": "f", "parameters": {"a": 1}}',
    "<|eot_id|>",
    "<|eom_id|>",
    "}<|eot_id|>",
    "<|python_tag|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|begin_of_text|>",
    "\n",
    "\t\x00\x1f\x7f",
    "\u2028\ufeff",
    "</tool_call>",
    "{{ x }}{% y %}",
    "\\u003c",
    " ",
    "null",
)
NAMES = ("f", "get_weather", "search.web", "a-b", "name", "parameters", "x" * 40)
NUMBERS = (0, -1, 7, 2**53 + 1, -(10**30), 0.1, -1e-300, 1.7976931348623157e308, 3.0)


class Hostile:
    """Seeded hostile conversations: the same seed gives the same one again.

    Drawing all of 5,000 through hypothesis would take minutes.
    """

    def __init__(self, seed):
        self._random = random.Random(seed)

    def text(self):
        return "".join(self._random.choices(FRAGMENTS, k = self._random.choice((0, 1, 1, 2, 3, 6))))

    def value(self, depth = 0):
        kind = self._random.randrange(8 if depth < 3 else 5)
        if kind < 2:
            return self.text()
        if kind == 2:
            return self._random.choice(NUMBERS)
        if kind == 3:
            return self._random.choice((True, False, None))
        if kind == 4:
            return self._random.choice(("", [], {}))
        if kind == 5:
            return [self.value(depth + 1) for _ in range(self._random.randrange(4))]
        return self.object(depth + 1)

    def object(self, depth = 0):
        return {self.text(): self.value(depth) for _ in range(self._random.randrange(4))}

    def calls(self):
        return several(
            *(
                (self._random.choice(NAMES), self.object())
                for _ in range(self._random.randint(1, 4))
            )
        )

    def results(self, count):
        return [result(self._random.choice((self.text(), self.object()))) for _ in range(count)]

    def pick(self, *choices):
        return self._random.choice(choices)

    def mutated(self, text):
        """The text cut, or with a piece deleted, doubled or inserted."""
        start, end = sorted(self._random.randrange(len(text) + 1) for _ in range(2))
        return self.pick(
            text[:start],
            text[start:],
            text[:start] + text[end:],
            text[:end] + text[start:],
            text[:start] + self.text() + text[start:],
        )

    def pieces(self, text):
        """The text in pieces of random length, as a stream brings it."""
        position, pieces = 0, []
        while position < len(text):
            length = self._random.choice((1, 1, 2, 3, 8, 40))
            pieces.append(text[position : position + length])
            position += length
        return pieces


def reply_of(tokenizer, mode, question, message, results):
    """The assistant's reply as rendered, after the prompt; in "split" with the results between
    calls."""
    options = {"tokenize": False, "date_string": "26 Jul 2024"}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt = True, **options)
    between = results[: len(message["tool_calls"]) - 1] if mode == "split" else []
    text = tokenizer.apply_chat_template([question, message, *between], **options)
    assert text.startswith(prompt)
    return text[len(prompt) :]


def exact(message):
    """Equal only for the same types and key order too: 3 == 3.0 == True would not do."""
    return repr(message)


@pytest.mark.parametrize("mode", ["split", "join"])
@pytest.mark.parametrize("half", [0, 1])
def test_parse_render_round_trip(mode, half, tokenizers, tool_calls):
    """5,000 hostile conversations: text, ids, stream and parse_response all give the calls back."""
    for seed in range(half * 1250, (half + 1) * 1250):
        check_round_trip(mode, Hostile(f"{mode} {seed}"), tokenizers, tool_calls)


def check_round_trip(mode, hostile, tokenizers, tool_calls):
    tokenizer = tokenizers[hostile.pick("llama-3.1", "llama-3.2"), mode]
    message = hostile.calls()
    count = len(message["tool_calls"])
    reply = reply_of(tokenizer, mode, user(hostile.text()), message, hostile.results(count))
    assert exact(tool_calls.parse_tool_calls(reply)) == exact(message), reply

    ids = tokenizer(reply, add_special_tokens = False).input_ids
    assert exact(tool_calls.parse_tool_calls(ids, tokenizer)) == exact(message), reply

    stream = tool_calls.ToolCallStream()
    emitted = [made for piece in hostile.pieces(reply) for made in stream.feed(piece)]
    assert exact(emitted) == exact(message["tool_calls"]), reply
    assert exact(stream.finish()) == exact(message), reply

    if mode == "join" or count == 1:
        parsed = tokenizer.parse_response(reply, prefix = "")
        assert exact(parsed["tool_calls"]) == exact(message["tool_calls"]), reply
        for read in (vllm_calls, vllm_streamed_calls, sglang_calls):
            assert exact(read(without_end(reply))) == exact(names_and_arguments(message)), reply


texts = st.text(max_size = 12) | st.sampled_from(FRAGMENTS)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan = False, allow_infinity = False)
    | texts
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size = 3) | st.dictionaries(texts, inner, max_size = 3),
    max_leaves = 6,
)
drawn_calls = st.lists(
    st.tuples(
        st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch = True),
        st.dictionaries(texts, values, max_size = 3),
    ),
    min_size = 1,
    max_size = 4,
)


@settings(max_examples = 300, deadline = None, suppress_health_check = list(HealthCheck))
@given(calls = drawn_calls, mode = st.sampled_from(["split", "join"]), seed = st.integers(0))
def test_parse_render_round_trip_drawn(calls, mode, seed, tokenizers, tool_calls):
    """The same for conversations that hypothesis draws, and shrinks where one fails."""
    hostile = Hostile(seed)
    hostile.calls = lambda: several(*calls)
    check_round_trip(mode, hostile, tokenizers, tool_calls)


# ---------------------------------------------------------------- parsers of other projects, as doc


def names_and_arguments(message):
    functions = [made["function"] for made in message["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in functions]


def without_end(reply):
    """Servers hand the text to their parsers without special tokens at its end."""
    for token in END_TOKENS:
        reply = reply[: -len(token)] if reply.endswith(token) else reply
    return reply


def as_call(value):
    return value["name"], value["parameters"] if "parameters" in value else value["arguments"]


def vllm_calls(text):
    """vLLM --tool-call-parser llama3_json: from each brace that no object before it covers, one
    JSON object with name and parameters (or arguments); what stands between them is passed over."""
    calls, position = [], text.find("{")
    while position >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, position)
            calls.append(as_call(value))
        except ValueError:
            end = position + 1
        position = text.find("{", end)
    return calls


def vllm_streamed_calls(text):
    """The same parser on a stream: objects from the first character on, exactly "; " apart."""
    calls, position = [], len("<|python_tag|>") if text.startswith("<|python_tag|>") else 0
    while position < len(text):
        value, position = json.JSONDecoder().raw_decode(text, position)
        calls.append(as_call(value))
        position += len("; ")
    return calls


def sglang_calls(text):
    """SGLang --tool-call-parser llama3: JSON objects one character apart, else on from {"name":."""
    calls, position = [], 0
    while position < len(text):
        try:
            value, position = json.JSONDecoder().raw_decode(text, position)
        except ValueError:
            position = text.find('{"name":', position + 1)
            if position < 0:
                break
            continue
        calls.append(as_call(value))
        position += len(";")
    return calls


# ---------------------------------------------------------------- what models really write

ROME = ("get_weather", {"city": "Rome"})
OSLO = ("get_weather", {"city": "Oslo"})


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
    assert tool_calls.parse_tool_calls(text, tokenizer) == several(ROME)
    ids = tokenizer(text, add_special_tokens = False).input_ids
    assert tool_calls.parse_tool_calls(ids, tokenizer) == several(ROME)


@pytest.mark.parametrize("separator", ["; ", ";", "\n", "", " ;\n "])
def test_reads_several_calls_however_they_are_separated(separator, tool_calls):
    """The rendered separator is "; "; others are read too."""
    one, two = (
        '{"name": "get_weather", "parameters": {"city": "%s"}}' % c for c in ("Rome", "Oslo")
    )
    assert tool_calls.parse_tool_calls(one + separator + two) == several(ROME, OSLO)


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
        ('{"name": "f g", "parameters": {}}', "no valid name"),
        ('{"name": 3, "parameters": {}}', "no valid name"),
        ('{"name": "f"}', "expected name, parameters"),
        ('{"name": "f", "parameters": {}, "arguments": {}}', "expected name, parameters"),
        ('{"name": "f", "parameters": {}, "note": 1}', "expected name, parameters"),
        ('<|python_tag|>print("hi")<|eom_id|>', "not a call of a built-in tool"),
        ("<|start_header_id|>user<|end_header_id|>\n\nHi", "turn of role 'user'"),
        ('{"name": "f", "parameters": ' + '{"a": ' * 5000, "not complete"),
        ('{"name": "f", "parameters": {"a": ' + "9" * 5000 + "}}", "not complete, valid JSON"),
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
    assert known == several(ROME)


def test_mutated_output_never_raises(tokenizers, tool_calls):
    """Cut, doubled, deleted and inserted pieces: a message comes back, with calls or with its
    text."""
    tokenizer, broken = tokenizers["llama-3.1", "join"], 0
    for seed in range(1500):
        hostile = Hostile(seed)
        reply = reply_of(tokenizer, "join", user("q"), hostile.calls(), [])
        message = tool_calls.parse_tool_calls(hostile.mutated(reply), tokenizer)
        assert message["role"] == "assistant" and isinstance(message["content"], str)
        assert ("reason" in message) <= ("tool_calls" not in message)
        broken += "tool_calls" not in message
    assert broken > 300


def test_cut_off_replies_lose_no_call_silently(tokenizers, tool_calls):
    """A reply cut anywhere inside a call is text with a reason; the stream has given the calls
    before it."""
    message = several(ROME, ("f", {"q": '}; {"name": "g", "parameters": {}}'}), OSLO)
    reply = without_end(reply_of(tokenizers["llama-3.1", "join"], "join", user("q"), message, []))
    for cut in range(1, len(reply)):
        got, stream = tool_calls.parse_tool_calls(reply[:cut]), tool_calls.ToolCallStream()
        emitted = stream.feed(reply[:cut])
        assert emitted == message["tool_calls"][: len(emitted)]
        if "tool_calls" in got:
            assert got["tool_calls"] == emitted and reply[:cut].rstrip("; ").endswith("}")
        else:
            assert got["reason"]


@pytest.mark.parametrize("ids", ["list", "tensor", "row", "array"])
def test_ids_in_every_shape(ids, tokenizers, tool_calls):
    """Lists, tensors and arrays of shape (n,) and (1, n) are read alike."""
    import numpy
    import torch

    tokenizer = tokenizers["llama-3.1", "join"]
    given = tokenizer(
        reply_of(tokenizer, "join", user("q"), several(ROME, OSLO), []), add_special_tokens = False
    ).input_ids
    shaped = {
        "list": given,
        "tensor": torch.tensor(given),
        "row": torch.tensor([given]),
        "array": numpy.array(given),
    }[ids]
    assert tool_calls.parse_tool_calls(shaped, tokenizer) == several(ROME, OSLO)


def test_streams_of_ids(tokenizers, tool_calls):
    """Token by token, also where one character spans several tokens; each call comes once, when
    complete."""
    tokenizer = tokenizers["llama-3.1", "join"]
    message = several(("f", {"🦙": {"q": "你好🦙"}}), ROME)
    reply = reply_of(tokenizer, "join", user("q"), message, [])
    ids = tokenizer(reply, add_special_tokens = False).input_ids
    for size in (1, 2, 3, 5, 7, 1000):
        stream, emitted = tool_calls.ToolCallStream(tokenizer), []
        for start in range(0, len(ids), size):
            emitted += stream.feed(ids[start : start + size])
        assert emitted == message["tool_calls"] and stream.finish() == message


def test_misuse_is_named(tool_calls):
    """Ids without a tokenizer, several rows and other types say what to pass."""
    with pytest.raises(TypeError, match = "needs the tokenizer"):
        tool_calls.parse_tool_calls([1, 2])
    with pytest.raises(ValueError, match = "2 rows"):
        tool_calls.parse_tool_calls([[1], [2]], make_llama_tokenizer())
    with pytest.raises(TypeError, match = "not dict"):
        tool_calls.parse_tool_calls({"input_ids": [1]}, make_llama_tokenizer())


def test_cleaning_up_spaces_does_not_reach_arguments(tokenizers, tool_calls):
    """Llama's tokenizer_config asks for clean_up_tokenization_spaces; arguments keep their
    spaces."""
    tokenizer = make_llama_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    message = several(("f", {"q": "a , b . do n't ?"}))
    reply = reply_of(tokenizers["llama-3.1", "join"], "join", user("q"), message, [])
    ids = tokenizer(reply, add_special_tokens = False).input_ids
    assert tokenizer.decode(ids) != reply
    assert tool_calls.parse_tool_calls(ids, tokenizer) == message


# ---------------------------------------------------------------- transformers and TRL


def test_parse_response_reads_answers_and_builtin_calls(tokenizers):
    """tokenizer.parse_response, streams included: text, tagged calls, and no <|python_tag|> in the
    content."""
    tokenizer = tokenizers["llama-3.1", "join"]
    answer = tokenizer.parse_response("It is sunny.<|eot_id|>", prefix = "")
    assert answer == {"role": "assistant", "content": "It is sunny."}
    tagged = '<|python_tag|>{"name": "f", "parameters": {"a": "}<|eot_id|>"}}<|eom_id|>'
    made = tokenizer.parse_response(tagged, prefix = "...<|end_of_text|>" + HEADER)
    assert made == {
        "role": "assistant",
        "tool_calls": several(("f", {"a": "}<|eot_id|>"}))["tool_calls"],
    }
    builtin = tokenizer.parse_response(
        '<|python_tag|>brave_search.call(query="x")<|eom_id|>', prefix = ""
    )
    assert builtin == {"role": "assistant", "python_tag": 'brave_search.call(query="x")'}
    parser = tokenizer.get_response_parser(prefix = "")
    for (
        character
    ) in '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": 1}}<|eot_id|>':
        parser.feed(character)
    assert parser.finalize()[0]["tool_calls"] == several(("f", {}), ("g", {"a": 1}))["tool_calls"]


def test_trl_tools_work(tokenizers):
    """TRL's GRPO with tools: checks of the template, the response parser, and suffixes of tool
    results."""
    utils = pytest.importorskip("trl.chat_template_utils")
    for name in ("supports_tool_calling", "is_chat_template_prefix_preserving", "parse_response"):
        if not hasattr(utils, name):
            pytest.skip(f"the installed TRL has no {name}")
    for (_, mode), tokenizer in tokenizers.items():
        assert utils.supports_tool_calling(tokenizer)
        assert utils.is_chat_template_prefix_preserving(tokenizer)
        # GRPO sets a template of its own, by the text alone, only where there is none.
        assert tokenizer.response_template["fields"]["tool_calls"]
        message = several(ROME, OSLO) if mode == "join" else several(ROME)
        prompt = tokenizer.apply_chat_template(
            [user("q")], add_generation_prompt = True, return_dict = False
        )
        full = tokenizer.apply_chat_template([user("q"), message], return_dict = False)
        assert full[: len(prompt)] == prompt
        assert utils.parse_response(tokenizer, full[len(prompt) :], prefix = prompt) == message
        # How GRPO renders results: one empty call, and as many results as there were calls.
        dummy = several(("get_weather", {}))
        named = [{**result("20"), "name": "get_weather"}, {**result("5"), "name": "get_weather"}]
        text = tokenizer.apply_chat_template([user("q"), dummy, *named], tokenize = False)
        assert text.count("<|start_header_id|>ipython<|end_header_id|>") == 2


def test_saved_tokenizers_keep_template_and_parser(tokenizers, tmp_path):
    """After save_pretrained, plain transformers renders the joined form and parses it back."""
    from transformers import AutoTokenizer

    tokenizer = tokenizers["llama-3.1", "join"]
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding = "utf-8"))
    plain = make_llama_tokenizer()
    plain.save_pretrained(tmp_path / "plain")
    expected = json.loads(
        (tmp_path / "plain" / "tokenizer_config.json").read_text(encoding = "utf-8")
    )
    assert config["tokenizer_class"] == expected["tokenizer_class"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [user("q"), several(ROME, OSLO)]
    options = {"tokenize": False, "date_string": "x"}
    rendered = loaded.apply_chat_template(messages, **options)
    assert rendered == tokenizer.apply_chat_template(messages, **options)
    reply = rendered[rendered.index(HEADER) + len(HEADER) :]
    assert loaded.parse_response(reply, prefix = "")["tool_calls"] == messages[1]["tool_calls"]
