# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The demo's data, tokenizer, model, tools, checks and reports; not the training itself."""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from unsloth_patches import demo
from unsloth_patches.demo import checks, data, job, model, phrases, report, tools, train
from unsloth_patches.demo.checks import DemoError, check_model, check_numbers, check_out
from unsloth_patches.demo.evaluate import Answer, count_right, run_calls


@pytest.fixture(scope = "module")
def generated():
    return data.generate(6000, seed = 3407, pairs = 0.4)


@pytest.fixture(scope = "module")
def tokenizer():
    return model.make_tokenizer(model.corpus())


def all_calls(conversation):
    return [
        call["function"]
        for message in conversation["messages"]
        for call in message.get("tool_calls", ())
    ]


def reserved(call):
    """The combination of values that a held-out call may not share with any training call."""
    name, given = call["name"], call["arguments"]
    if name == "add_event":
        return (name, given["title"])
    if name == "calculate":
        left, _, right = given["expression"].split(" ")
        return (name, left, right)
    return (name, *given.values())


# ---------------------------------------------------------------- data


def test_held_out_prompts_share_no_combination_of_values_with_training(generated):
    """No pair of numbers, amount with its units, title, or city with its tool is in both."""
    trained = [call for example in generated for call in example.calls]
    trained += [call for row in data.bundled() for call in all_calls(row)]
    held = [c for pairs in (False, True) for e in data.held_out(240, pairs) for c in e.calls]
    assert not set(map(reserved, trained)) & set(map(reserved, held))


def test_held_out_wordings_are_not_in_training_but_their_words_are(generated):
    """A held-out wording matches no training prompt; each of its words occurs in training wordings."""
    held = [w for group in phrases.HELD_OUT_PHRASES.values() for w in group]
    trained = [w for group in phrases.TRAIN_PHRASES.values() for w in group]
    assert not set(held) & set(trained)
    slots = {"title": r"\w+ with \w+", "op": r"(divided by|\S+)"}
    patterns = [
        re.compile(
            re.sub(r"\\\{(\w+)\\\}", lambda m: slots.get(m[1], r"[\w:]+"), re.escape(w)) + "$"
        )
        for w in held
    ]
    assert any(p.match(e.prompt) for p in patterns for e in data.held_out(6))
    prompts = [e.prompt for e in generated if len(e.calls) == 1]
    prompts += [m["content"] for r in data.bundled() for m in r["messages"] if m["role"] == "user"]
    assert not [(p.pattern, text) for p in patterns for text in prompts if p.match(text)]

    def words(texts):
        return set(re.findall(r"[a-z']+", re.sub(r"\{\w+\}", "", " ".join(texts)).lower()))

    assert words(held) <= words(trained)


def test_names_and_numbers_of_held_out_calls_occur_in_training(generated):
    """A model cannot know a word it never saw: only their combinations are new."""
    seen = " ".join(json.dumps(e.calls) for e in generated)
    for example in data.held_out(240):
        for value in example.calls[0]["arguments"].values():
            for part in re.findall(r"[\w:]+", str(value)):
                assert re.search(rf"(?<![\w:]){part}(?![\w:])", seen), (part, example.prompt)


def test_bundled_conversations_are_many_and_their_calls_run():
    """At least 200 conversations, each tool often, some with two calls; every call executes."""
    rows = data.bundled()
    assert len(rows) >= 200
    calls = [call for row in rows for call in all_calls(row)]
    for name in tools.TOOLS:
        assert sum(call["name"] == name for call in calls) >= 30
    assert sum(len(m.get("tool_calls", ())) == 2 for r in rows for m in r["messages"]) >= 30
    assert sum(m["role"] == "tool" for r in rows for m in r["messages"]) >= 20
    assert not [c for c in calls if "error" in tools.execute(c)]
    for row in rows:
        offered = {tool["function"]["name"] for tool in row["tools"]}
        assert {call["name"] for call in all_calls(row)} <= offered
    first = [row["messages"][0]["content"] for row in rows]
    assert len(set(first)) >= 200


def test_generator_is_deterministic_and_its_calls_run(generated):
    """The same seed gives the same examples, another seed others; calls execute, tools are offered."""
    assert data.generate(50, 1, 0.4) == data.generate(50, 1, 0.4) != data.generate(50, 2, 0.4)
    for example in generated[:500] + data.held_out(60) + data.held_out(30, pairs = True):
        assert {call["name"] for call in example.calls} < set(example.tools)
        for call in example.calls:
            result = tools.execute(call)
            assert "error" not in result, (example, result)
    share = sum(len(e.calls) == 2 for e in generated) / len(generated)
    assert 0.35 < share < 0.45


def test_training_set_holds_the_bundled_conversations_and_the_asked_number():
    rows = data.training_set(600, seed = 5, pairs = 0.4)
    assert len(rows) == 600 and rows == data.training_set(600, seed = 5, pairs = 0.4)
    prompts = {row["messages"][0]["content"] for row in rows}
    assert {row["messages"][0]["content"] for row in data.bundled()} <= prompts
    assert len(data.training_set(16, seed = 5, pairs = 0.4)) == 16


def test_batches_hold_conversations_of_similar_length():
    """All of them once, in batches that need little padding and are not in order of length."""
    rows = data.training_set(512, seed = 5, pairs = 0.5)
    ordered = train.bucket(rows, batch_size = 16, seed = 5)
    assert sorted(map(str, ordered)) == sorted(map(str, rows))

    def longest(order):
        words = [len(str(row["messages"]).split()) for row in order]
        return [max(words[i : i + 16]) for i in range(0, len(words), 16)]

    assert sum(longest(ordered)) < 0.85 * sum(longest(rows))
    assert longest(ordered) != sorted(longest(ordered))


# ---------------------------------------------------------------- tools


@pytest.mark.parametrize(
    "call, expected",
    [
        (("calculate", {"expression": "84 / 4 + -3 * 2"}), {"result": 15.0}),
        (
            ("convert_units", {"value": 10, "from_unit": "miles", "to_unit": "kilometers"}),
            {"value": 16.093, "unit": "kilometers"},
        ),
        (
            ("convert_currency", {"amount": 50, "from_currency": "EUR", "to_currency": "USD"}),
            {"amount": 55.0, "currency": "USD"},
        ),
    ],
)
def test_tools_compute(call, expected):
    assert tools.execute({"name": call[0], "arguments": call[1]}) == expected


@pytest.mark.parametrize(
    "name, arguments, reason",
    [
        ("calculate", {"expression": "__import__('os').getcwd()"}, "only numbers"),
        ("calculate", {"expression": "2 ** 99999"}, "only numbers"),
        ("calculate", {"expression": "1 / 0"}, "ZeroDivisionError"),
        ("calculate", {"expression": "(" * 150}, "SyntaxError"),
        ("calculate", {"expression": 5}, "TypeError"),
        ("convert_units", {"value": 1, "from_unit": "cups", "to_unit": "miles"}, "volume"),
        (
            "convert_currency",
            {"amount": "9", "from_currency": "EUR", "to_currency": "USD"},
            "TypeError",
        ),
        ("get_weather", {"city": "Atlantis"}, "unknown city"),
        ("get_time", {"town": "Oslo"}, "TypeError"),
        ("add_event", {"title": "x", "day": "someday", "time": "10:00"}, "unknown day"),
        ("add_event", {"title": "x", "day": "friday", "time": "25:00"}, "ValueError"),
        ("rm", {}, "unknown tool"),
    ],
)
def test_calls_that_cannot_run_say_why(name, arguments, reason):
    """A model's wrong call comes back as an error for it to read; nothing raises."""
    assert reason in tools.execute({"name": name, "arguments": arguments})["error"]


def test_all_cities_have_a_time_and_a_temperature():
    for city in tools.CITIES:
        assert re.fullmatch(
            r"\w+day \d\d:\d\d",
            tools.execute({"name": "get_time", "arguments": {"city": city}})["time"],
        )
        assert (
            -30
            < tools.execute({"name": "get_weather", "arguments": {"city": city}})["celsius"]
            < 50
        )


# ---------------------------------------------------------------- tokenizer and model


def test_tokenizer_has_llamas_special_tokens_and_loses_nothing(tokenizer):
    for token in model.SPECIAL_TOKENS:
        assert tokenizer(token, add_special_tokens = False).input_ids == [
            tokenizer.convert_tokens_to_ids(token)
        ]
    for text in (
        "naïve Ωmega 漢字 🙂\n\n  tabs\tand   spaces ",
        'a "quoted"\\n {json: [1, 2.5e-3]}',
        "Zürich 12345",
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens = False).input_ids) == text


def test_pieces_of_the_chat_template_become_single_tokens():
    """Else every prompt would begin with dozens of tokens that are always the same."""
    template = (
        "{% for t in tools %}{{ t | tojson(indent = 4) }}\n\n{% endfor %}"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "Answer with JSON, please.\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    )
    tokenizer = model.make_tokenizer(model.corpus(), model.template_pieces(template))
    schemas = [json.dumps(tool, indent = 4) + "\n\n" for tool in tools.TOOLS.values()]
    text = "\n\nAnswer with JSON, please.\n\n"
    assert tokenizer.tokenize("".join([*schemas, text])) == [*schemas, text]
    changed = text + schemas[0].replace("city", "town")
    assert tokenizer.decode(tokenizer(changed).input_ids) == changed
    for role in ("system", "user", "assistant", "ipython", "\n\n"):
        assert len(tokenizer.tokenize(role)) == 1


def test_values_are_the_same_tokens_in_a_question_and_in_a_call(tokenizer):
    """Else copying a city would need a table from one spelling to the other."""

    def tokens(text):
        return tokenizer.tokenize(text)

    for city in list(tools.CITIES)[::9]:
        assert city in tokens(f"Is it cold in {city} right now?") and city in tokens(
            f'{{"city": "{city}"}}'
        )
    for value in (*data.NUMBERS, *data.TIMES):
        for text in (
            f"How much is {value} plus 2?",
            f'{{"amount": {value}, ',
            f'{{"time": "{value}"',
        ):
            assert str(value) in tokens(text), text


def test_model_is_llama_3_1_shaped_and_seeded(tokenizer):
    import torch

    state = torch.get_rng_state()
    first, second = model.make_model(tokenizer, seed = 1), model.make_model(tokenizer, seed = 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())
    )
    config = first.config
    assert config.model_type == "llama" and config.rope_parameters["rope_type"] == "llama3"
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert not config.tie_word_embeddings and config.eos_token_id == tokenizer.eos_token_id
    other = model.make_model(tokenizer, seed = 2).model.embed_tokens.weight
    assert not torch.equal(first.model.embed_tokens.weight, other)


# ---------------------------------------------------------------- optimizer


def test_help_says_how_many_steps_there_are():
    import inspect

    from unsloth_patches import cli

    told = inspect.signature(cli.demo).parameters["steps"].default.help
    assert f"{train.SCRATCH.steps} for the small model, {train.CHECKPOINT.steps} for" in told


def test_orthogonalize_brings_singular_values_near_one():
    import torch

    from unsloth_patches.demo.muon import orthogonalize

    torch.manual_seed(0)
    for shape in ((64, 256), (256, 64), (8, 8)):
        left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices = False)
        matrix = left @ torch.diag(torch.logspace(0, -1, min(shape))) @ right
        values = torch.linalg.svdvals(orthogonalize(torch.stack([matrix, 5 * matrix])))
        assert 0.6 < values.min() and values.max() < 1.3


def test_muon_trains_matrices_and_adam_the_rest():
    """Both kinds of parameters fit a linear map, and LoRA's matrices are told from the embeddings."""
    import torch

    from unsloth_patches.demo.muon import Muon, for_lora

    torch.manual_seed(0)
    inputs, target = torch.randn(256, 16), torch.randn(16, 12)
    weight, bias = torch.zeros(16, 12, requires_grad = True), torch.zeros(12, requires_grad = True)
    optimizer = Muon([weight], [bias], lr = 0.05, adam_lr = 0.05)
    first = None
    for _ in range(150):
        loss = ((inputs @ weight + bias - inputs @ target - 1) ** 2).mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first
    with pytest.raises(ValueError, match = r"\(12,\)"):
        Muon([bias], [])
    module = torch.nn.ModuleDict(
        {"lora_A": torch.nn.Linear(4, 2, bias = False), "lm_head": torch.nn.Linear(4, 3, bias = False)}
    )
    holder = torch.nn.Module()
    holder.q = module
    groups = for_lora(holder, 0.1, 0.2).param_groups
    assert groups[0]["params"] == [module["lora_A"].weight] and groups[0]["orthogonal"]
    assert groups[1]["params"] == [module["lm_head"].weight] and groups[1]["lr"] == 0.2


# ---------------------------------------------------------------- arguments


def write_checkpoint(folder):
    folder.mkdir(exist_ok = True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_whole_checkpoint_passes(tmp_path):
    check_model(write_checkpoint(tmp_path / "m"))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "names no model_type"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "has no weights"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    ],
)
def test_a_broken_checkpoint_is_named(tmp_path, spoil, reason):
    folder = write_checkpoint(tmp_path / "m")
    spoil(folder)
    with pytest.raises(DemoError, match = reason):
        check_model(folder)


def test_an_adapter_folder_says_to_name_the_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DemoError, match = "base model"):
        check_model(tmp_path)


def test_wrong_arguments_give_one_line_and_exit_code_2(tmp_path, capsys):
    """Before anything slow is imported, and without a traceback."""
    a_file = tmp_path / "file"
    a_file.write_text("")
    for arguments, reason in (
        ({"model": tmp_path / "nowhere", "out": tmp_path}, "no such folder"),
        ({"model": a_file, "out": tmp_path}, "is a file"),
        ({"out": a_file / "below"}, "cannot write there"),
        ({"out": a_file}, "cannot write there"),
        ({"out": tmp_path, "steps": 0}, "--steps 0"),
        ({"out": tmp_path, "prompts": 0}, "--prompts 0"),
        ({"out": tmp_path, "prompts": 241}, "--prompts 241"),
    ):
        assert demo.run(**arguments) == 2
        assert reason in capsys.readouterr().out


def test_a_library_that_is_missing_stops_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "LIBRARIES", ("matplotlib", "no_such_plotter"))
    assert demo.run(out = tmp_path) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "no_such_plotter not installed" in printed and "pip install no_such_plotter" in printed


def test_a_model_that_was_not_loaded_in_4_bits_stops_before_training(tmp_path):
    from unsloth_patches.demo.job import _require_4bit
    _require_4bit(14, tmp_path)
    with pytest.raises(DemoError, match = "not QLoRA.*doctor"):
        _require_4bit(0, tmp_path)


def test_out_is_made_and_left_empty(tmp_path):
    assert list(check_out(tmp_path / "a" / "b").iterdir()) == []
    check_numbers(None, 30)


# ---------------------------------------------------------------- Ctrl-C


def test_first_interrupt_stops_after_the_step_and_the_second_raises():
    callbacks = []
    control = SimpleNamespace(should_training_stop = False)
    before = signal.getsignal(signal.SIGINT)
    with train.stop_on_interrupt(SimpleNamespace(add_callback = callbacks.append)) as state:
        callbacks[0].on_step_end(None, None, control)
        assert not state["stopped"] and not control.should_training_stop
        signal.raise_signal(signal.SIGINT)
        callbacks[0].on_step_end(None, None, control)
        assert state["stopped"] and control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- answers and reports


def example_answers():
    one, two = data.held_out(1)[0], data.held_out(1, pairs = True)[0]
    return {
        "one call": [Answer(one, "right", list(one.calls)), Answer(one, "no idea", [], "not JSON")],
        "two calls": [Answer(two, "half", list(two.calls[:1]))],
    }


def test_only_exactly_the_expected_calls_are_right():
    expected = ({"name": "f", "arguments": {"a": 5, "b": "x"}}, {"name": "g", "arguments": {}})
    example = data.Example("?", ("f", "g"), expected)

    def right(*calls):
        return Answer(example, "", [{"name": n, "arguments": a} for n, a in calls]).right

    assert right(("f", {"b": "x", "a": 5}), ("g", {}))
    for wrong in ("5", 5.0, True, 6):
        assert not right(("f", {"a": wrong, "b": "x"}), ("g", {}))
    assert not right(("g", {}), ("f", {"a": 5, "b": "x"}))
    assert not right(("f", {"a": 5, "b": "x"}))
    assert not right(("f", {"a": 5, "b": "x", "c": None}), ("g", {}))
    assert not right(("h", {"a": 5, "b": "x"}), ("g", {}))
    assert not right()


def test_smooth_is_a_trailing_mean():
    assert report.smooth([4, 2, 0], window = 2) == [4, 3, 1]


def test_plot_and_record_are_written(tmp_path):
    """Also without answers after training, as when Ctrl-C skipped them."""
    answers = example_answers()
    for after in ({}, answers):
        report.write(tmp_path, {"seed": 1, "model": tmp_path}, [3.0, 2.0], answers, after)
        assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    document = json.loads((tmp_path / "report.json").read_text())
    assert [a["right"] for a in document["after"]["one call"]] == [True, False]
    assert document["losses"] == [3.0, 2.0]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_output_fits_the_terminal(capsys, width):
    """Tables, the curve and the progress, at the widths of usual terminals."""
    answers = example_answers()
    console = Console(width = width)
    console.print(
        report.terminal_plot([5 - i / 100 for i in range(400)], min(width, 100), color = False)
    )
    with job._bar(console) as bar:
        for what, note in (("prompts before training", ""), ("training", "loss 0.012")):
            bar.update(bar.add_task(what, total = 1000, note = note), completed = 1000)
    console.print(report.score_table(answers, answers))
    console.print(report.settings_table({"model": "m"}))
    console.print(report.files_table(Path("out"), Path("m")))
    for kind, group in answers.items():
        console.print(report.answers_table(kind, group))
        console.print(report.call_table(kind, group[0], run_calls(group[0])))
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= width
    assert re.search(r"1 +50 +100 +150 +200 +250 +300 +350 +400", output)
    assert re.search(r"prompts before training .*1000/1000 .*left 0:00:00", output)
    assert re.search(r"training .*1000/1000 loss 0.012 .*left 0:00:00", output)
    assert "1 of 2" in output and "0 of 1" in output and count_right(answers["one call"]) == 1
    assert "training loss" in output and "wrong" in output and "result" in output
