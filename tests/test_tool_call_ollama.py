# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The exported Ollama modelfile renders tool conversations as the chat template does.

Ollama's TEMPLATE is a Go text/template; the few constructs that the modelfile uses are evaluated
here.
"""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import unsloth  # noqa: F401  (has to come before transformers)
from llama_chat import (
    CONVERSATIONS,
    LLAMA_31,
    LLAMA_32,
    SEARCH,
    WEATHER,
    assistant,
    call,
    make_llama_tokenizer,
    result,
    system,
    user,
)

DATE = "26 Jul 2024"


# ------------------------------------------------------- a small part of Go's text/template


def parse_template(text):
    """Nested nodes: a str; ("do", expression); ("if"/"range", expression, body, else body)."""
    text = re.sub(r"\s*\{\{- ", "{{ ", text)
    text = re.sub(r" -\}\}\s*", " }}", text)
    parts = re.split(r"\{\{\s*(.*?)\s*\}\}", text, flags = re.DOTALL)
    tokens = [(i % 2, part) for i, part in enumerate(parts) if part or i % 2]
    nodes, rest = parse_nodes(tokens)
    assert not rest, rest
    return nodes


def parse_nodes(tokens):
    nodes = []
    while tokens:
        (is_action, part), tokens = tokens[0], tokens[1:]
        word, _, expression = part.partition(" ") if is_action else ("", "", "")
        if not is_action:
            nodes.append(part)
        elif word in ("end", "else"):
            return nodes, [(is_action, part)] + tokens
        elif word in ("if", "range"):
            node, tokens = parse_block(word, expression, tokens)
            nodes.append(node)
        else:
            nodes.append(("do", part))
    return nodes, []


def parse_block(word, expression, tokens):
    body, tokens = parse_nodes(tokens)
    (_, part), tokens = tokens[0], tokens[1:]
    otherwise = []
    if part.startswith("else if "):
        node, tokens = parse_block("if", part[len("else if ") :], tokens)
        otherwise = [node]
    elif part == "else":
        otherwise, tokens = parse_nodes(tokens)
        assert tokens[0][1] == "end"
        tokens = tokens[1:]
    else:
        assert part == "end", part
    return (word, expression, body, otherwise), tokens


OPERAND = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)|\d+|\$?\w*(?:\.\w+)+|\$\w*|\.|\w+)')


class GoTemplate:
    """Evaluates parsed nodes on Go-like values: dicts with field names, lists, str, int, bool.

    to_json: what Ollama's function ``json`` writes.
    """

    def __init__(self, nodes, to_json):
        self._nodes = nodes
        self._functions = {
            "json": to_json,
            "len": len,
            "index": lambda items, i: items[i],
            "slice": self._slice,
            "eq": lambda a, b: a == b,
            "ne": lambda a, b: a != b,
            "not": lambda value: not value,
            "lt": lambda a, b: a < b,
            "gt": lambda a, b: a > b,
            "and": lambda *values: next((v for v in values if not v), values[-1]),
        }

    @staticmethod
    def _slice(items, start):
        assert 0 <= start <= len(items), "Go panics on a slice out of range"
        return items[start:]

    def render(self, data):
        return self._run(self._nodes, data, [{"$": data}])

    def _run(self, nodes, dot, scopes):
        scopes = scopes + [{}]
        return "".join(
            node if isinstance(node, str) else self._node(node, dot, scopes) for node in nodes
        )

    def _node(self, node, dot, scopes):
        if node[0] == "do":
            assignment = re.match(r"(\$\w+) (:?=) (.*)", node[1], re.DOTALL)
            if assignment is None:
                return self._text(self._value(node[1], dot, scopes))
            name, operator, expression = assignment.groups()
            scope = (
                scopes[-1] if operator == ":=" else next(s for s in reversed(scopes) if name in s)
            )
            scope[name] = self._value(expression, dot, scopes)
            return ""
        kind, expression, body, otherwise = node
        if kind == "if":
            return self._run(
                body if self._value(expression, dot, scopes) else otherwise, dot, scopes
            )
        names = re.match(r"(\$\w+), (\$\w+) := (.*)", expression)
        index, item, expression = names.groups() if names else ("$_", "$_", expression)
        items = self._value(expression, dot, scopes)
        return "".join(
            self._run(body, v, scopes + [{index: i, item: v}]) for i, v in enumerate(items)
        )

    @staticmethod
    def _text(value):
        assert isinstance(value, str), f"{value!r} would print in Go's own form"
        return value

    def _value(self, expression, dot, scopes):
        tokens = OPERAND.findall(expression)
        assert re.sub(r"\s", "", expression) == re.sub(r"\s", "", "".join(tokens)), expression
        value, rest = self._command(tokens, dot, scopes)
        assert not rest, expression
        return value

    def _command(self, tokens, dot, scopes):
        values = []
        while tokens and tokens[0] != ")":
            value, tokens = self._operand(tokens, dot, scopes)
            values.append(value)
        return (values[0](*values[1:]) if callable(values[0]) else values[0]), tokens

    def _operand(self, tokens, dot, scopes):
        token, tokens = tokens[0], tokens[1:]
        if token == "(":
            value, tokens = self._command(tokens, dot, scopes)
            tokens = tokens[1:]
            if tokens and tokens[0].startswith(".") and len(tokens[0]) > 1:
                return self._fields(value, tokens[0]), tokens[1:]
            return value, tokens
        if token.startswith('"'):
            return json.loads(token), tokens
        if token.isdigit():
            return int(token), tokens
        if token.startswith("$"):
            name, dotted, path = token.partition(".")
            value = next(scope[name] for scope in reversed(scopes) if name in scope)
            return self._fields(value, dotted + path), tokens
        if token.startswith("."):
            return self._fields(dot, token), tokens
        return self._functions[token], tokens

    @staticmethod
    def _fields(value, path):
        for field in filter(None, path.split(".")):
            value = value[field]
        return value


def test_the_go_evaluator():
    """Trimming, scopes, chained fields, else if, and the errors that Go would raise."""
    text = """{{- $n := 0 }}{{ range $i, $x := .Items -}}
    {{ if eq $i 1 }}{{ $n = 5 }}two {{- else if lt $i 1 }}one{{ else }}{{ json .Name }}{{ end }};
    {{- end }} {{ (index .Items 0).Name }} {{ json (len (slice $.Items 1)) }} {{ if eq $n 5 }}five{{ end }}"""
    data = {"Items": [{"Name": "a"}, {"Name": "b"}, {"Name": "c"}]}
    assert GoTemplate(parse_template(text), json.dumps).render(data) == 'one;two;"c"; a 2 five'
    with pytest.raises(AssertionError, match = "out of range"):
        GoTemplate(parse_template("{{ json (slice .Items 4) }}"), json.dumps).render(data)
    with pytest.raises(AssertionError, match = "own form"):
        GoTemplate(parse_template("{{ .Items }}"), json.dumps).render(data)
    # Ollama's modelfiles need this one: it is what stock did not have.
    replace = importlib.import_module("unsloth.tool_calls.ollama").render_tool_calls_in_modelfiles
    with pytest.raises(NotImplementedError, match = "has no llama-3"):
        replace({})
    with pytest.raises(NotImplementedError, match = "not the known one"):
        replace(importlib.import_module("unsloth.ollama_template_mappers").OLLAMA_TEMPLATES)


# ---------------------------------------------------------------- modelfiles


def read_modelfile(tokenizer):
    """(TEMPLATE, parameters) of the Modelfile, as FROM/TEMPLATE/PARAMETER lines give them."""
    text = tokenizer._ollama_modelfile
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL).group(1)
    parameters = re.findall(r"^PARAMETER (\w+) (.*)$", text, re.MULTILINE)
    assert text.strip().startswith("FROM {__FILE_LOCATION__}")
    return template, parameters


def python_json(value):
    """As the chat template writes JSON: tools over several lines, all else in one with spaces."""
    is_tool = isinstance(value, dict) and value.get("type") == "function"
    return json.dumps(value, ensure_ascii = False, indent = 4 if is_tool else None)


def go_json(value):
    """As Go's json.Marshal writes it: compact, with <, > and & escaped."""
    text = json.dumps(value, ensure_ascii = False, separators = (",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def go_message(message):
    calls = [
        {"Function": {"Name": one["function"]["name"], "Arguments": one["function"]["arguments"]}}
        for one in message.get("tool_calls") or ()
    ]
    role = "tool" if message["role"] == "ipython" else message["role"]
    return {"Role": role, "Content": message.get("content") or "", "ToolCalls": calls}


def ollama_text(
    tokenizer,
    messages,
    tools = None,
    to_json = python_json,
):
    """What Ollama sends to the model for a chat: it collates messages, and adds <|begin_of_text|>."""
    data = {
        "Messages": [go_message(message) for message in messages],
        "Tools": tools or [],
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        "Prompt": "",
        "Response": "",
    }
    nodes = parse_template(read_modelfile(tokenizer)[0])
    return "<|begin_of_text|>" + GoTemplate(nodes, to_json).render(data)


def get(name, mode):
    from unsloth.chat_templates import get_chat_template
    return get_chat_template(make_llama_tokenizer(), name, parallel_tool_calls = mode)


def chat_text(
    tokenizer,
    messages,
    tools = None,
):
    options = {"tokenize": False, "date_string": DATE, "tools": tools}
    asks = messages[-1]["role"] != "assistant"
    return tokenizer.apply_chat_template(messages, add_generation_prompt = asks, **options)


def several(*names):
    both = call(names[0], {"q": 'é " } ; <b>', "n": 1})
    both["tool_calls"] += [
        call(name, {"x": [1, {"y": None}]})["tool_calls"][0] for name in names[1:]
    ]
    return both


ASK = user("What now?")
DIALOGUES = {
    "ask": [ASK],
    "system": [system("Be kind."), ASK],
    "turns": [system("Be kind."), ASK, assistant("Hello."), user("And now?")],
    "call": [ASK, several("f")],
    "result": [ASK, several("f"), result("22")],
    "answer": [ASK, several("f"), result('{"a": 1}'), assistant("Done."), user("More.")],
    "two": [system("S"), ASK, several("f", "g"), result("1"), result("2")],
    "three": [
        ASK,
        several("f", "g", "h"),
        result("1"),
        result("2"),
        result("3"),
        assistant("Done."),
        user("x"),
    ],
    "chain": [
        ASK,
        several("f"),
        result("1"),
        several("g"),
        result("2"),
        several("f", "g"),
        result("3"),
        result("4"),
    ],
    "late-system": [ASK, assistant("Yes."), system("Be brief."), user("Go on.")],
}
OPEN_ENDED = {
    "join": [ASK, several("f", "g")],
    "split": [ASK, several("f", "g", "h"), result("1"), result("2")],
}


@pytest.mark.parametrize("tools", [None, [WEATHER, SEARCH]], ids = ["plain", "tools"])
@pytest.mark.parametrize("mode", ["split", "join"])
@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2", "llama-3.3"])
def test_renders_the_same_conversations(name, mode, tools):
    """Text for text the chat template's, wherever Ollama can write the same JSON."""
    tokenizer = get(name, mode)
    for key, messages in {**DIALOGUES, "open": OPEN_ENDED[mode]}.items():
        expected = chat_text(tokenizer, messages, tools)
        if tools:
            # The template's prompt has no line break here, and a blank line more before each tool.
            assert "for a function call " in expected
        got = ollama_text(tokenizer, messages, tools)
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            got += "<|eot_id|>"  # a final text is one to be continued
        assert got == expected, key


def test_single_call_conversations_of_the_parity_test():
    """The same for the conversations that the chat template is compared on, as far as Ollama can
    have them."""
    tokenizer, compared = get("llama-3.1", "join"), 0
    for key, case in CONVERSATIONS.items():
        messages, options = case["messages"], case["options"]
        texts = [m.get("content", "") for m in messages]
        roles = {message["role"] for message in messages}
        known = set(options) <= {"add_generation_prompt", "tools"} and roles <= {
            "system",
            "user",
            "assistant",
            "tool",
            "ipython",
        }
        trimmed = all(isinstance(text, str) and text == text.strip() for text in texts)
        alternating = all(a["role"] != b["role"] for a, b in zip(messages, messages[1:]))
        if case["hazard"] or not (known and trimmed and alternating) or roles == {"system"}:
            continue
        expected = chat_text(tokenizer, messages, options.get("tools"))
        got = ollama_text(tokenizer, messages, options.get("tools"))
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            got += "<|eot_id|>"
        assert got == expected, key
        compared += 1
    assert compared >= 25


@pytest.mark.parametrize("mode", ["split", "join"])
def test_what_ollama_writes_reads_back(mode):
    """With Go's own JSON (no spaces, <, > and & escaped) the calls are still the same calls."""
    parse_tool_calls = importlib.import_module("unsloth.tool_calls").parse_tool_calls
    tokenizer = get("llama-3.1", mode)
    messages = DIALOGUES["three"][: 5 if mode == "split" else 2]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    text = ollama_text(tokenizer, messages, to_json = go_json)
    assert "\\u003cb\\u003e" in text
    reply = text.partition(header)[2]
    reply = reply[: -len(header)] if reply.endswith(header) else reply
    assert parse_tool_calls(reply, tokenizer)["tool_calls"] == messages[1]["tool_calls"]


@pytest.mark.parametrize("name", LLAMA_31 + LLAMA_32)
def test_parameters_and_the_first_text_of_a_call(name):
    """Stop tokens are Llama's; and Ollama, which takes the first text inside `if .ToolCalls` for
    the form of a call, finds the call itself there."""
    from unsloth.chat_templates import get_chat_template

    for mode in ("error", "split", "join"):
        template, parameters = read_modelfile(get(name, mode))
        stops = [json.loads(value) for key, value in parameters if key == "stop"]
        assert {"<|eot_id|>", "<|eom_id|>"} <= set(stops)
        others = {key: float(value) for key, value in parameters if key != "stop"}
        assert others == {"temperature": 0.6, "top_p": 0.9}

        def first_text(nodes):
            for node in nodes:
                if isinstance(node, str):
                    return node
                return first_text(node[2]) if node[0] in ("if", "range") else None

        def find(nodes):
            for node in nodes:
                if isinstance(node, tuple) and node[0] == "if" and ".ToolCalls" in node[1]:
                    return node
                for inner in (
                    (node[2], node[3]) if isinstance(node, tuple) and len(node) > 2 else ()
                ):
                    found = find(inner)
                    if found:
                        return found

        assert first_text(find(parse_template(template))[2]).strip().split("{")[0] == ""
    default = get_chat_template(make_llama_tokenizer(), name)
    assert read_modelfile(default) == read_modelfile(get(name, "join"))


def test_exported_modelfile():
    """create_ollama_modelfile writes the file, whatever the base model's name; other models keep
    theirs."""
    mappers = importlib.import_module("unsloth.ollama_template_mappers")
    source = Path(mappers.__file__).with_name("save.py").read_text(encoding = "utf-8")
    function = source[source.index("def create_ollama_modelfile(") :]
    namespace = {
        "OLLAMA_TEMPLATES": mappers.OLLAMA_TEMPLATES,
        "MODEL_TO_OLLAMA_TEMPLATE_MAPPER": mappers.MODEL_TO_OLLAMA_TEMPLATE_MAPPER,
    }
    exec(function[: function.index("\ndef ", 5)], namespace)
    create = namespace["create_ollama_modelfile"]
    for mode in ("join", "split"):
        tokenizer = get("llama-3.2", mode)
        for base in ("unsloth/Llama-3.2-1B-Instruct", "mine/model"):
            text = create(tokenizer, base, "./model.gguf")
            assert (
                text
                == tokenizer._ollama_modelfile.replace(
                    "{__FILE_LOCATION__}", "./model.gguf"
                ).rstrip()
            )
            assert text.startswith("\nFROM ./model.gguf") and '"parameters": {{ json' in text
    unnamed = SimpleNamespace(_ollama_modelfile = None, eos_token = "x")
    assert '"parameters": {{ json' in create(unnamed, "unsloth/Meta-Llama-3.1-8B-Instruct", "m")
    assert '"parameters": {{ json' not in create(unnamed, "unsloth/Qwen2.5-7B-Instruct", "m")
