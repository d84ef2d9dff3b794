# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``check-chats`` says which rows cannot be trained on, and writes those that can."""

import json
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "_shared"))

from unsloth_patches import chat_rows, check_chats  # noqa: E402

GOOD = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"name": "f", "args": {"a": None, "b": 1}, "id": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"b": {}}}}}
CALLING = [GOOD[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
ROWS = [
    {"messages": GOOD, "id": 1},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": CALLING, "tools": [TOOL]},
    {"conversations": [{"from": "human", "value": "q"}]},
    {"text": "no conversation"},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    {"messages": [*CALLING, GOOD[0]], "tools": json.dumps([TOOL])},
]
BAD = [1, 4, 5]


REAL_TOKENIZER = check_chats._tokenizer


@pytest.fixture(autouse = True)
def llama(monkeypatch):
    """The template without Unsloth, whose import takes seconds."""
    from llama_chat import make_llama_tokenizer, published_templates

    def tokenizer(template, mode, model):
        from unsloth_patches.unsloth.tool_calls.parallel import set_mode

        if template != "llama-3.1":
            raise KeyError(template)
        made = make_llama_tokenizer()
        made.chat_template = published_templates()[template]
        set_mode(made, mode)
        return made

    monkeypatch.setattr(check_chats, "_tokenizer", tokenizer)


def written(folder, kind):
    """ROWS as a file or folder of that kind."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding = "utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding = "utf-8")
    elif kind == "folder":
        path.mkdir()
        written(path, "jsonl")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "folder"])
def test_every_bad_row_is_named(kind, tmp_path, capsys):
    assert check_chats.run(written(tmp_path, kind), as_json = True) == check_chats.BAD_ROWS
    report = json.loads(capsys.readouterr().out)
    assert [bad["row"] for bad in report["bad_rows"]] == BAD
    assert (report["rows"], report["bad"]) == (len(ROWS), len(BAD))
    assert "messages[0]: the user message has neither" in report["bad_rows"][0]["reason"]
    assert "--messages" in report["bad_rows"][1]["reason"]
    assert sorted(row for rows in report["kinds"].values() for row in rows) == BAD
    assert any("has no result" in kind for kind in report["notices"])
    assert report["first_rendered"].endswith("a<|eot_id|>")
    assert sum(report["lengths"].values()) == len(ROWS) - len(BAD)


def calling(name, **arguments):
    """A conversation with one call, in the form that needs no reading."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [GOOD[0], {"role": "assistant", "content": "", "tool_calls": [call]}]


def test_every_summary_line_names_its_subject(tmp_path, capsys):
    """Errors and notices say which message or call they are about, and of which row that is true."""
    answered = {"role": "tool", "tool_call_id": "y", "content": "1"}
    rows = [
        *ROWS[1:4],
        *[{"messages": [*CALLING, GOOD[0]], "tools": [TOOL]}] * 2,
        {"messages": [*CALLING, answered], "tools": [TOOL]},
        {"messages": [{"role": "developer", "content": "s"}, *GOOD]},
        {"messages": [*GOOD, answered]},
        {"messages": [GOOD[0], {"role": "tool", "content": "16"}, GOOD[1]]},
        *[{"messages": calling("g", b = 1), "tools": [TOOL]}] * 2,
        {"messages": calling("f", c = json.dumps([1])), "tools": [TOOL]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding = "utf-8")
    assert check_chats.run(path) == check_chats.BAD_ROWS
    screen = " ".join(capsys.readouterr().out.split())
    for line in (
        "1 x messages[0]: the user message has neither",
        "2 x messages[1], call 1 ('f'): has no result.",
        "rows 3, 4; the text is of row 3",
        "1 x messages[2]: is the result of call id 'y', and the only call",
        "1 x messages[0]: has role 'developer'",
        "1 x messages[2]: is the result of call id 'y', but no call",
        "1 x messages[1]: is a tool result, but no call stands before it",
        "2 x messages[1], call 1 ('g'): calls a tool that is not among those given (f)",
        "1 x messages[1], call 1 ('f'): has arguments that its tool does not declare: ['c']",
    ):
        assert line in screen, line


def test_findings_come_after_the_example(tmp_path, capsys):
    """A row that is rendered is long: what was found has to be on the screen when the command ends."""
    check_chats.run(written(tmp_path, "jsonl"))
    screen = capsys.readouterr().out
    parts = ["first row that renders", "longest: ", "\nerrors\n", "but unusual\n", "4 of 7 rows"]
    places = [screen.index(part) for part in parts]
    assert places == sorted(places)


def test_a_column_that_is_not_there_is_named(tmp_path, capsys):
    """Of tools for the whole data, since rows may have none; of chats for each row."""
    data, fixed = written(tmp_path, "jsonl"), tmp_path / "fixed.jsonl"
    assert check_chats.run(data, tools = "tool", fix = fixed) == check_chats.MISUSE
    screen = " ".join(capsys.readouterr().out.split())
    assert (
        "--tools tool: no row has that column; the rows have conversations, id, messages" in screen
    )
    assert not fixed.exists()
    data.write_text('{"messages": [], "schemas": null}\n' + json.dumps({"messages": GOOD}) + "\n")
    assert check_chats.run(data, tools = "schemas") != check_chats.MISUSE
    data.write_text(json.dumps(GOOD) + "\n")
    assert check_chats.run(data) == check_chats.DONE
    assert check_chats.run(data, tools = "schemas") == check_chats.MISUSE
    assert "the rows have none" in " ".join(capsys.readouterr().out.split())
    rows = [{"messages": GOOD, "n": 1}, {"messages": GOOD}, {"chat": None, "id": 1}, 3]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check_chats.run(data, messages = "chat") == check_chats.BAD_ROWS
    screen = " ".join(capsys.readouterr().out.split())
    assert (
        "4 x the row has no chat under the column chat (its columns: messages, n); name" in screen
    )


@pytest.mark.parametrize("level", ["error", "warn", "off"])
def test_checks_of_the_environment_do_not_change_what_is_found(
    level, tmp_path, capsys, monkeypatch
):
    """The command says what training would say with checks on."""
    monkeypatch.setenv("UNSLOTH_TOOL_CHECKS", level)
    test_every_bad_row_is_named("jsonl", tmp_path, capsys)


def test_parquet_and_saved_datasets(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": GOOD}, {"messages": [{"role": "user", "content": None}]}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    for data in ("rows.parquet", "saved"):
        assert check_chats.run(tmp_path / data, as_json = True) == check_chats.BAD_ROWS
        assert json.loads(capsys.readouterr().out)["bad_rows"][0]["row"] == 1


def test_fix_writes_what_can_be_read(tmp_path, capsys):
    """In OpenAI's form, other columns kept; what is written has no bad row."""
    out = tmp_path / "fixed.jsonl"
    check_chats.run(written(tmp_path, "jsonl"), fix = out)
    screen = " ".join(capsys.readouterr().out.split())
    assert "4 of 7 rows" in screen and "; 4 written to " in screen
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows[0] == ROWS[0]
    assert rows[1]["messages"][1]["tool_calls"] == [
        {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"b": 1}'}}
    ]
    assert rows[2]["conversations"] == [{"role": "user", "content": "q"}]
    assert check_chats.run(out, as_json = True) == check_chats.DONE


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("missing.jsonl", None, "is not there"),
        ("broken.json", "[", "is not JSON"),
        ("empty", None, "no jsonl, json or parquet files"),
        ("empty.jsonl", "\n", "empty.jsonl has no rows"),
        (
            "script.py",
            "import json\n\nprint(1)\n" * 9,
            "script.py is no jsonl, json or parquet file",
        ),
        ("one.txt", '{"messages": [', "none of its first lines is JSON (Expecting value"),
        ("wrong.parquet", "{}", "wrong.parquet is no jsonl, json or parquet file"),
        ("binary.jsonl", b"\x80\xff", "it is not UTF-8 text"),
        ("late.jsonl", b'{"messages": []}\n' * 5000 + b"\x80", "it is not UTF-8 text"),
    ],
)
def test_data_that_cannot_be_read(name, text, expected, tmp_path, capsys):
    data = tmp_path / name
    if text is not None:
        data.write_bytes(text if isinstance(text, bytes) else text.encode())
    elif name == "empty":
        data.mkdir()
    fixed = tmp_path / "fixed.jsonl"
    fixed.write_text("as it was", encoding = "utf-8")
    assert check_chats.run(data, fix = fixed) == check_chats.MISUSE
    assert expected in " ".join(capsys.readouterr().out.split())
    assert fixed.read_text(encoding = "utf-8") == "as it was"


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n{\n" + json.dumps(ROWS[0]) + "\n", encoding = "utf-8")
    assert check_chats.run(data, as_json = True) == check_chats.BAD_ROWS
    report = json.loads(capsys.readouterr().out)
    assert [bad["row"] for bad in report["bad_rows"]] == [1] and report["rows"] == 3
    data.write_text("{\n" * 2 + json.dumps(ROWS[0]) + "\n{\n", encoding = "utf-8")
    check_chats.run(data, as_json = True)
    assert [bad["row"] for bad in json.loads(capsys.readouterr().out)["bad_rows"]] == [0, 1, 3]
    data.write_text("{\n" * 4 + json.dumps(ROWS[0]) + "\n", encoding = "utf-8")
    assert check_chats.run(data, fix = tmp_path / "fixed.jsonl") == check_chats.BAD_ROWS
    assert len((tmp_path / "fixed.jsonl").read_text("utf-8").splitlines()) == 1


def test_several_calls_name_the_option_of_the_command(tmp_path, capsys):
    """The error is training's, whose remedy is an argument of get_chat_template."""
    data = tmp_path / "rows.jsonl"
    several = [GOOD[0], {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "y"}]}]
    data.write_text(json.dumps({"messages": several}), encoding = "utf-8")
    assert check_chats.run(data) == check_chats.BAD_ROWS
    assert "Here: --parallel-tool-calls split, or join" in capsys.readouterr().out
    assert check_chats.run(data, mode = "join") == check_chats.DONE


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    data = written(tmp_path, "jsonl")
    assert check_chats.run(data, fix = tmp_path / "no" / "fixed.jsonl") == check_chats.MISUSE
    assert "name a file in one that is" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("llama-9", "error", None), "there are .*llama-3.1"),
        (("llama-3.1", "error", Path("no")), "no such"),
    ],
)
def test_a_template_or_tokenizer_that_is_not_there_is_named(monkeypatch, arguments, words):
    """Before the Hub is asked for it."""
    known = types.SimpleNamespace(CHAT_TEMPLATES = {"llama-3.1": ()}, get_chat_template = None)
    monkeypatch.setitem(sys.modules, "unsloth.chat_templates", known)
    with pytest.raises(ValueError, match = words):
        REAL_TOKENIZER(*arguments)


def test_an_unknown_template_is_named(tmp_path, capsys):
    assert check_chats.run(written(tmp_path, "jsonl"), template = "llama-9") == check_chats.MISUSE
    assert "llama-9" in capsys.readouterr().out


def demo_rows():
    return list(chat_rows.read_rows(ROOT / "unsloth_patches" / "demo" / "conversations.jsonl"))


def test_the_demos_data_passes():
    """In the mode that the demo trains with; many of its messages have two calls."""
    rows = demo_rows()
    assert len(rows) > 200
    tokenizer = check_chats._tokenizer("llama-3.1", "join", None)
    *_, (report, _) = check_chats.check(iter(rows), tokenizer, None, "tools", False)
    assert report.bad == 0 and report.rows == len(rows)
    # Its tools are looked up by name; nothing else is unusual.
    ((notice, numbers),) = report.notices.items()
    assert "tools holds names and no schemas" in notice and len(numbers) == len(rows)


def test_reasons_that_differ_in_names_only_are_one_kind(capsys):
    """Its first reason is shown whole, with the remedy, and the rows that it holds for."""
    rows = demo_rows()
    several = [
        number
        for number, row in enumerate(rows)
        if any(len(m.get("tool_calls") or ()) > 1 for m in row["messages"])
    ]
    data = ROOT / "unsloth_patches" / "demo" / "conversations.jsonl"
    assert len(several) > 20 and check_chats.run(data) == check_chats.BAD_ROWS
    screen = " ".join(capsys.readouterr().out.split())
    assert f"{len(several)} x messages[1]: has 2 tool calls" in screen
    assert 'parallel_tool_calls = "split"' in screen and f"rows {several[0]}, " in screen


def test_the_data_itself_can_be_mended_and_survives_what_cannot_be_read(
    tmp_path, capsys, monkeypatch
):
    """--fix with the data's own name: all of it is read first, and after an error it is as it was."""
    data = written(tmp_path, "jsonl")
    assert check_chats.run(data, fix = data) == check_chats.BAD_ROWS
    mended = data.read_text()
    assert len(mended.splitlines()) == len(ROWS) - len(BAD)
    assert check_chats.run(data, fix = data) == check_chats.DONE and data.read_text() == mended

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for place, name in ((Path, "replace"), (check_chats, "as_stored")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, full)
            capsys.readouterr()
            assert check_chats.run(data, fix = data) == check_chats.MISUSE
        assert "No space left on device" in capsys.readouterr().out
        assert data.read_text() == mended
        assert [path.name for path in tmp_path.iterdir()] == [data.name]
