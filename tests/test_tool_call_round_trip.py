# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What the Llama 3.x templates render for tool calls is read back: parse(render(x)) == x."""

import importlib
import json
import random

import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from conversation_formats import FORMATS, FORMATS_OF_SINGLE_CALLS, Conversations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_chat import make_llama_tokenizer, parallel_calls, result, user

END_TOKENS = ("<|eot_id|>", "<|eom_id|>")
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
ROME = ("get_weather", {"city": "Rome"})
OSLO = ("get_weather", {"city": "Oslo"})


@pytest.fixture(scope = "module")
def tool_calls():
    return importlib.import_module("unsloth.tool_calls")


def stream_of_calls():
    return importlib.import_module("unsloth.tool_calls.stream").ToolCallStream()


@pytest.fixture(scope = "module")
def tokenizers():
    """(template name, mode) -> tokenizer."""
    from unsloth.chat_templates import get_chat_template
    return {
        (name, mode): get_chat_template(make_llama_tokenizer(), name, parallel_tool_calls = mode)
        for name in ("llama-3.1", "llama-3.2")
        for mode in ("split", "join")
    }


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

    Drawing all of them through hypothesis would take minutes.
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
        return parallel_calls(
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


def make_reply(tokenizer, mode, question, message, results):
    """The assistant's reply as rendered, after the prompt; in "split" with the results between calls."""
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
def test_parse_render_round_trip(mode, tokenizers, tool_calls):
    """1,000 hostile conversations: text, ids, stream and parse_response all give the calls back."""
    for seed in range(500):
        check_round_trip(mode, Hostile(f"{mode} {seed}"), tokenizers, tool_calls)


def check_round_trip(mode, hostile, tokenizers, tool_calls):
    tokenizer = tokenizers[hostile.pick("llama-3.1", "llama-3.2"), mode]
    message = hostile.calls()
    count = len(message["tool_calls"])
    reply = make_reply(tokenizer, mode, user(hostile.text()), message, hostile.results(count))
    assert exact(tool_calls.parse_tool_calls(reply)) == exact(message), reply

    ids = tokenizer(reply, add_special_tokens = False).input_ids
    assert exact(tool_calls.parse_tool_calls(ids, tokenizer)) == exact(message), reply

    stream = stream_of_calls()
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


@settings(max_examples = 150, deadline = None, suppress_health_check = list(HealthCheck))
@given(calls = drawn_calls, mode = st.sampled_from(["split", "join"]), seed = st.integers(0))
def test_parse_render_round_trip_drawn(calls, mode, seed, tokenizers, tool_calls):
    """The same for conversations that hypothesis draws, and shrinks where one fails."""
    hostile = Hostile(seed)
    hostile.calls = lambda: parallel_calls(*calls)
    check_round_trip(mode, hostile, tokenizers, tool_calls)


def shown(messages):
    """All that the templates print of prepared messages; repr, since 1 == 1.0 == True."""
    return [
        (
            message["role"],
            [call["function"] for call in message["tool_calls"]]
            if message.get("tool_calls")
            else message["content"],
        )
        for message in messages
    ]


@pytest.mark.parametrize("mode", ["split", "join"])
def test_every_format_renders_the_same(mode, tokenizers, tool_calls):
    """5,000 seeded conversations, each in all formats: what is printed of it is what is printed of
    OpenAI's form, to the byte in one of the formats, and every assistant turn reads back."""
    prepare = importlib.import_module("unsloth.tool_calls.messages").prepare_conversation
    arrange = importlib.import_module("unsloth.tool_calls.parallel").MODES[mode]
    options = {"tokenize": False, "date_string": "x"}
    for seed in range(2500):
        tokenizer = tokenizers["llama-3.1" if seed % 2 else "llama-3.2", mode]
        messages = Conversations(f"{mode} {seed}", 1 + seed % 3, turns = 1 + seed % 2).messages()
        expected = repr(shown(prepare(messages, arrange = arrange)))
        single = all(len(message.get("tool_calls", ())) < 2 for message in messages)
        formats = {**FORMATS, **(FORMATS_OF_SINGLE_CALLS if single else {})}
        text = tokenizer.apply_chat_template(messages, **options)
        for number, (name, convert) in enumerate(formats.items()):
            given = convert(messages)
            assert repr(shown(prepare(given, arrange = arrange))) == expected, (seed, name, given)
            if number == seed % len(formats):
                assert tokenizer.apply_chat_template(given, **options) == text, (seed, name, given)
        turns = [part.partition("<|eot_id|>")[0] for part in text.split(HEADER)[1:]]
        read = [tool_calls.parse_tool_calls(turn) for turn in turns]
        made = [call["function"] for one in read for call in one.get("tool_calls", ())]
        assert exact(made) == exact(
            [call["function"] for one in messages for call in one.get("tool_calls", ())]
        ), seed


# ---------------------------------------------------------------- parsers of other projects, as documented


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


# ---------------------------------------------------------------- broken replies


def test_mutated_output_never_raises(tokenizers, tool_calls):
    """Cut, doubled, deleted and inserted pieces: a message comes back, with calls or with its text."""
    tokenizer, broken = tokenizers["llama-3.1", "join"], 0
    for seed in range(1500):
        hostile = Hostile(seed)
        reply = make_reply(tokenizer, "join", user("q"), hostile.calls(), [])
        message = tool_calls.parse_tool_calls(hostile.mutated(reply), tokenizer)
        assert message["role"] == "assistant" and isinstance(message["content"], str)
        assert ("reason" in message) <= ("tool_calls" not in message)
        broken += "tool_calls" not in message
    assert broken > 300


HOSTILE_VALUES = (
    *("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1E5", "-0.0", "1e-400", "5e-324", "01"),
    *("9" * 4300, "9" * 5000, "-" + "9" * 400, "true", "null", "[]", "{}", "", "'a'", "[1,]"),
    *(r'"\ud800"', r'"\udc00\ud800"', r'"\ud83e\udd99"', '"\ud800"', r'"\u0000"', '"\x00"', '"\n"'),
    *('"<|eot_id|>"', '"<|start_header_id|>"', r'"}; {\"name\": \""', '"é🦙"', r'{"\udfff": 1}'),
    *('{"a": 1, "a": 2}', '{"": {"": ""}}', '"NaN"', '["null", null]'),
)
HOSTILE_NAMES = (
    *('"f"',) * 12,
    *('"Market Trends API"', '"<|eot_id|>"', r'"\u0041"', r'"f\ud800"', '"\ud800"'),
    *(r'"a\"b"', r'"a\nb"', '""', "null", '"{"', '"; "', '"x" '),
)


def hostile_call(pick):
    """Text that looks like a call, of what models and attackers write."""
    value = pick(HOSTILE_VALUES)
    depth = pick((0, 0, 0, 0, 0, 0, 1, 3, 197, 198, 199, 200, 2000))
    value = pick(("[" * depth + value + "]" * depth, '{"a":' * depth + value + "}" * depth))
    key = pick(("parameters", "parameters", "parameters", "arguments", "args"))
    objects = (f'{{"a": {value}}}', f'{{"a": {value}, "b": {pick(HOSTILE_VALUES)}}}')
    inner = pick((*objects, *objects, value))
    return f'{{"name": {pick(HOSTILE_NAMES)}, "{key}": {inner}}}'


def test_what_is_accepted_can_be_rendered_again(tokenizers, tool_calls):
    """2,000 hostile replies: each is calls that the checks let through and that read back, or it is
    text with the reason; the stream says the same."""
    tokenizer, accepted = tokenizers["llama-3.1", "join"], 0
    for seed in range(2000):
        pick = random.Random(seed).choice
        reply = pick(("; ", ";", "\n", "")).join(hostile_call(pick) for _ in range(pick((1, 1, 2))))
        reply = pick(("", "", "<|python_tag|>")) + reply + pick(("", "<|eot_id|>", "<|eom_id|>"))
        message = tool_calls.parse_tool_calls(reply)
        stream = stream_of_calls()
        emitted = [made for piece in Hostile(seed).pieces(reply) for made in stream.feed(piece)]
        assert exact(stream.finish()) == exact(message), reply[:200]
        if "tool_calls" not in message:
            assert message["reason"] and message["content"], reply[:200]
            continue
        accepted += 1
        assert exact(emitted) == exact(message["tool_calls"])
        text = tokenizer.apply_chat_template([user("q"), message], tokenize = False)
        text.encode("utf-8")
        again = tool_calls.parse_tool_calls(text.rpartition(HEADER)[2])
        assert exact(again) == exact(message), reply[:200]
    assert 200 < accepted < 1600


def test_cut_off_replies_lose_no_call_silently(tokenizers, tool_calls):
    """A reply cut anywhere inside a call is text with a reason; the stream has given the calls
    before it."""
    message = parallel_calls(ROME, ("f", {"q": '}; {"name": "g", "parameters": {}}'}), OSLO)
    reply = without_end(make_reply(tokenizers["llama-3.1", "join"], "join", user("q"), message, []))
    for cut in range(1, len(reply)):
        got, stream = tool_calls.parse_tool_calls(reply[:cut]), stream_of_calls()
        emitted = stream.feed(reply[:cut])
        assert emitted == message["tool_calls"][: len(emitted)]
        if "tool_calls" in got:
            assert got["tool_calls"] == emitted and reply[:cut].rstrip("; ").endswith("}")
        else:
            assert got["reason"]


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
        "tool_calls": parallel_calls(("f", {"a": "}<|eot_id|>"}))["tool_calls"],
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
    assert (
        parser.finalize()[0]["tool_calls"]
        == parallel_calls(("f", {}), ("g", {"a": 1}))["tool_calls"]
    )


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
        message = parallel_calls(ROME, OSLO) if mode == "join" else parallel_calls(ROME)
        prompt = tokenizer.apply_chat_template(
            [user("q")], add_generation_prompt = True, return_dict = False
        )
        full = tokenizer.apply_chat_template([user("q"), message], return_dict = False)
        assert full[: len(prompt)] == prompt
        assert utils.parse_response(tokenizer, full[len(prompt) :], prefix = prompt) == message
        # How GRPO renders results: one empty call, and as many results as there were calls.
        dummy = parallel_calls(("get_weather", {}))
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
    messages = [user("q"), parallel_calls(ROME, OSLO)]
    options = {"tokenize": False, "date_string": "x"}
    rendered = loaded.apply_chat_template(messages, **options)
    assert rendered == tokenizer.apply_chat_template(messages, **options)
    reply = rendered[rendered.index(HEADER) + len(HEADER) :]
    assert loaded.parse_response(reply, prefix = "")["tool_calls"] == messages[1]["tool_calls"]
