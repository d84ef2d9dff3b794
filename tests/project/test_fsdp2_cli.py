# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The ``plan`` command and scripts/train_fsdp2.py, run as users run them."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason = "needs Unsloth"
)
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}

TEXT = {"text": "w4 w5"}
MESSAGES = {"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B), encoding = "utf-8")
    return tmp_path


def test_plan_prints_the_count_and_the_decision(config, capsys):
    """A model that fits exits 0 with the table; one that does not exits 1 and says what is short."""
    from unsloth_patches.plan import plan

    assert plan(config, gpus = 8, memory = 80) == 0
    text = capsys.readouterr().out
    assert "frozen 4-bit blocks, shard" in text and "fits on 8 ranks" in text and "Computed" in text
    assert plan(config, gpus = 2, memory = 8) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_plan_sweeps(config, capsys):
    """--sweep prints one line for each power of two, and larger groups hold smaller shards."""
    from unsloth_patches.plan import plan

    assert plan(config, gpus = 64, memory = 24, sweep = True) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [int(line.split("|")[1]) for line in lines] == [2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    "changes",
    [
        {"gpus": 0},
        {"gpus": -3},
        {"gpus": 0, "table": True},
        {"gpus": 0, "sweep": True},
        {"memory": 1},
        {"memory": float("inf")},
        {"checkpointing": "maybe"},
        {"offload": "most"},
        {"offload": "blocks:99"},
        {"tokens": 0},
        {"rank": 0},
        {"gpus_per_host": 0},
        {"host": -1.0},
    ],
)
def test_plan_names_bad_values(config, capsys, changes):
    """A value that cannot be counted is named on stderr with its option, exit code 2."""
    from unsloth_patches.plan import plan

    assert plan(config, **{"gpus": 2, "memory": 80, **changes}) == 2
    error = capsys.readouterr().err
    name, value = next(iter(changes.items()))
    assert f"--{name.replace('_', '-')}" in error and str(value) in error
    assert "memory plan" not in error and "UNSLOTH_" not in error


@pytest.mark.parametrize("memory", [79, 24, 8])
def test_plan_and_its_tables_show_the_same_figures(config, capsys, memory):
    """What a plan says in full, a line of --sweep and of --table say: the allocator's loss included,
    by which the decision is made, and also where it does not fit."""
    from unsloth_patches.plan import plan

    fits = plan(config, gpus = 8, memory = memory)
    full = capsys.readouterr().out
    (needed,) = [line for line in full.splitlines() if line.startswith("with allocator loss")]
    assert plan(config, gpus = 8, memory = memory, sweep = True) == fits
    assert plan(config, gpus = 8, memory = memory, table = True) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    sweep, table = (
        line[line.index("8") + 1 :]
        for line in ([cell.strip("| ") for cell in line] for line in lines)
        if "8" in line[:2]
    )
    assert sweep == table[1:]
    assert float(sweep[0]) == pytest.approx(float(needed.split()[-2]), abs = 0.051)
    assert ("does not fit" in sweep[-1]) == bool(fits)


def test_plan_says_what_it_does_not_know(tmp_path, capsys):
    """An encoder is no decoder and is refused; of a model with a vision tower the language part is
    counted, and the plan says so.
    """
    from unsloth_patches.plan import plan

    config = tmp_path / "config.json"
    bert = {**LLAMA_70B, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
    config.write_text(json.dumps(bert), encoding = "utf-8")
    assert plan(tmp_path, gpus = 2) == 2
    assert "plan: model_type = 'bert'" in capsys.readouterr().err
    tower = {"hidden_size": 1024, "num_hidden_layers": 24}
    text = {**LLAMA_70B, "model_type": "llama"}
    vision = {"model_type": "llava", "text_config": text, "vision_config": tower}
    vision["architectures"] = ["LlavaForConditionalGeneration"]
    config.write_text(json.dumps(vision), encoding = "utf-8")
    assert plan(tmp_path, gpus = 8) == 0
    assert "not counted: vision_config" in capsys.readouterr().out


@pytest.fixture(scope = "module")
def toy(tmp_path_factory):
    """A small Llama's checkpoint."""
    from unsloth_patches.bench.fsdp2_cells import TOY
    from unsloth_patches.bench.fsdp2_checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("toy"), TOY, 2)


# Two ranks without a GPU, as torchrun starts them, but forked for each run from a process that imports once.
RANKS = """
import gc, os, sys, traceback
sys.path[:0] = ["scripts"]
gc.disable()
import train_fsdp2
gc.freeze()
gc.enable()
for (load, arguments), port in zip({runs!r}, {ports!r}):
    children = []
    for rank in "01":
        child = os.fork()
        if not child:
            os.environ.update(UNSLOTH_FSDP2_SHARDED_LOAD = load, MASTER_PORT = port)
            os.environ.update(RANK = rank, LOCAL_RANK = rank)
            said = os.open(f"{folder}/said-{{load}}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(said, 1), os.dup2(said, 2)
            sys.argv[1:], code = arguments, 0
            try:
                train_fsdp2.main()
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(open(f"{folder}/said-{{load}}").read())
"""
LAUNCHED = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0"}
LAUNCHED.update(WORLD_SIZE = "2", LOCAL_WORLD_SIZE = "2")


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def _run(*command, **environment):
    """What a script says whose ranks find a launch of two."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"UNSLOTH_FSDP2": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, *command],
        env = {**os.environ, **environment},
        cwd = ROOT,
        timeout = 480,
        stdout = subprocess.PIPE,
        stderr = subprocess.STDOUT,
        text = True,
        encoding = "utf-8",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def _free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    [one.close() for one in sockets]
    return ports


@needs_unsloth
def test_train_script_runs_on_two_ranks(tmp_path, toy):
    """scripts/train_fsdp2.py on two ranks (of torchrun where there are two GPUs), each with its shard only: it
    trains, saves the adapter and (with two GPUs: Unsloth merges no 4-bit model on the CPU) the merged model,
    and resumes; undecided, the toy stays whole.
    """
    import torch

    gpus = torch.cuda.device_count() >= 2
    data = tmp_path / "data.jsonl"
    rows = [
        json.dumps({"text": " ".join(f"w{4 + (i * j) % 400}" for j in range(40))})
        for i in range(1, 17)
    ]
    data.write_text("\n".join(rows) + "\n", encoding = "utf-8")
    options = f"--model {toy} --data {data} --output {tmp_path / 'out'} --length 32 --accumulate 2"
    merged = f"--merged {tmp_path / 'merged'}" if gpus else ""
    runs = [
        ("1", f"{options} --save-steps 2 --steps 2 {merged}".split()),
        ("auto", f"{options} --save-steps 2 --steps 4 --resume".split()),
    ]
    if gpus:
        said = [
            _run(*TORCHRUN, "scripts/train_fsdp2.py", *arguments, UNSLOTH_FSDP2_SHARDED_LOAD = load)
            for load, arguments in runs
        ]
    else:
        code = RANKS.format(runs = runs, ports = _free_ports(2), folder = tmp_path)
        _run("-c", code, **LAUNCHED)
        said = [(tmp_path / f"said-{load}").read_text(encoding = "utf-8") for load, _ in runs]
    for (load, _), text in zip(runs, said):
        assert "'fsdp2-sharded-4bit': 'applied'" in text, text[-2000:]
        assert ("Loading this rank's 4-bit shards" in text) == (load == "1")
        assert ("whole on each of 2 ranks" in text) == (load == "auto")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    if gpus:
        _check_merged(toy, tmp_path / "out" / "checkpoint-2", tmp_path / "merged")


def _check_merged(toy, adapter, merged):
    """Merged weights are the checkpoint's 16-bit ones plus the adapter, rounded once."""
    from safetensors.torch import load_file

    def read(folder):
        files = [load_file(path) for path in Path(folder).glob("*.safetensors")]
        return {key: value.float() for file in files for key, value in file.items()}

    base, lora, new = read(toy), read(adapter), read(merged)
    assert base.keys() == new.keys()
    for name in (name for name in base if "_proj" in name):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        change = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]  # alpha is the rank
        assert change.abs().max() > 0
        error = (new[name] - base[name] - change).abs()
        assert (error <= 2**-8 * (base[name].abs() + change.abs()) + 1e-6).all(), name


def _train_script():
    spec = importlib.util.spec_from_file_location("train_fsdp2", ROOT / "scripts/train_fsdp2.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_train_script_takes_float16_on_a_t4(monkeypatch):
    """On a GPU without bfloat16 the script's dtype and training settings are float16's."""
    import types

    import torch

    script = _train_script()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        assert script.compute_dtype() == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "SFTConfig", lambda **settings: types.SimpleNamespace(**settings))
    options = types.SimpleNamespace(
        output = "x", length = 8, batch = 1, accumulate = 1, steps = 5, save_steps = 5, learning_rate = 1e-4
    )
    settings = script.training_settings(options, torch.float16)
    assert settings.fp16 and not settings.bf16
    assert not script.training_settings(options, torch.bfloat16).fp16


@needs_unsloth
@pytest.mark.parametrize(
    "model, rows, words",
    [
        ("toy", [MESSAGES], "no chat template, and --data has messages"),
        ("missing", [TEXT], "there is no such folder"),
        ("owner/missing", [TEXT], "the Hub does not give it"),
        ("toy", None, "data.jsonl cannot be read"),
        ("toy", [{"words": "w4"}], "1 rows with words"),
    ],
)
def test_train_script_checks_before_it_loads(
    tmp_path, toy, monkeypatch, capsys, model, rows, words
):
    """A model or data that cannot be trained on is named, with a remedy, before anything is loaded."""
    script = _train_script()
    monkeypatch.setattr(script.FastLanguageModel, "from_pretrained", lambda *_, **__: pytest.fail())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.chdir(tmp_path)
    if rows is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data.jsonl").write_text(lines, encoding = "utf-8")
    name = {"toy": str(toy), "missing": str(tmp_path / "missing")}.get(model, model)
    monkeypatch.setattr(sys, "argv", ["train_fsdp2.py", "--model", name, "--data", "data.jsonl"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("train_fsdp2: --") and words in error
    assert "Name a" in error or "Write one" in error, "no remedy"


@pytest.mark.parametrize("rank, waits", [("0", []), ("1", [60])])
def test_train_script_lets_the_first_rank_tell(monkeypatch, capsys, rank, waits):
    """torchrun ends all ranks with the first that ends: another one must not be that."""
    script, slept = _train_script(), []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(script.time, "sleep", slept.append)
    with pytest.raises(SystemExit):
        script.stop("--data x: is empty.")
    assert slept == waits and "train_fsdp2: --data x: is empty." in capsys.readouterr().err


def _call(number):
    return {"type": "function", "function": {"name": "look", "arguments": {"x": number}}}


LOOK = {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}
LOOK["parameters"]["properties"] = {"x": {"type": "integer"}}
USER = {"role": "user", "content": "w4"}
ONE, TWO = (
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [_call(n) for n in range(count)]},
        ],
        "tools": [{"type": "function", "function": LOOK}],
    }
    for count in (1, 2)
)
SINGLE = "{% for m in messages %}{% if m.tool_calls and m.tool_calls|length > 1 %}"
SINGLE += "{{ raise_exception('one call, please!') }}{% endif %}{{ m.content }}{% endfor %}"


@needs_unsloth
@pytest.mark.parametrize(
    "own, given, words",
    [
        (
            SINGLE,
            "",
            ["row 1 (rows count from 0)", "one call, please!", "--parallel-tool-calls join"],
        ),
        (SINGLE, "--template llama-3.1", ["row 1 (", "--template llama-3.1 --parallel-tool-calls"]),
        (SINGLE, "--parallel-tool-calls join", ["needs a template", "Add --template llama-3.1"]),
        (None, "--template nothing", ["--template nothing is unknown. Name one of", "llama-3.1"]),
        (None, "--template chatml --parallel-tool-calls join", ["needs one of the templates"]),
        (None, "--template llama-3.1 --parallel-tool-calls join", None),
        (
            None,
            "--template llama-3.3 --parallel-tool-calls split",
            ["has no result", "Mend or remove"],
        ),
    ],
)
def test_train_script_renders_before_it_loads(
    tmp_path, toy, monkeypatch, capsys, own, given, words
):
    """One message that names the row and the remedy, before anything is loaded; without words: it loads."""
    from transformers import AutoTokenizer

    script = _train_script()
    tokenizer = AutoTokenizer.from_pretrained(toy)
    tokenizer.chat_template = own
    monkeypatch.setattr(script, "read_tokenizer", lambda _: tokenizer)

    def load(*_, **__):
        assert words is None
        raise KeyboardInterrupt

    monkeypatch.setattr(script.FastLanguageModel, "from_pretrained", load)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("UNSLOTH_FSDP2_BATCH_TOKENS", "1")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ONE) + "\n" + json.dumps(TWO) + "\n", encoding = "utf-8")
    arguments = ["train_fsdp2.py", "--model", str(toy), "--data", str(data), *given.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(KeyboardInterrupt if words is None else SystemExit):
        script.main()
    if words:
        (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert error.startswith("train_fsdp2: --") and all(word in error for word in words), error


def test_plan_table_is_computed_markdown(config, capsys):
    """--table prints the same figures as the plan, for both Llamas on 2 to 64 GPUs, and says that
    they are computed.
    """
    from unsloth_patches.plan import LLAMAS, RESERVED_GIB, plan
    from unsloth_patches.unsloth.models.fsdp2_memory_count import Training
    from unsloth_patches.unsloth.models.fsdp2_offload_plan import plan_offload

    assert plan(table = True, memory = 79) == 0
    text = capsys.readouterr().out
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| Llama")]
    counts = [2, 4, 8, 16, 32, 64]
    assert [(row[0], int(row[1])) for row in rows] == [
        (f"| {name}", count) for name in LLAMAS for count in counts
    ]
    for row in rows:
        found = plan_offload(
            LLAMAS[row[0][2:]],
            Training(world = int(row[1]), tokens = 4096, checkpointing = "unsloth"),
            device_memory = int((79 - RESERVED_GIB) * 2**30),
        )
        assert (
            row[3] == f"{found.needed / 2**30:.1f}" and row[4] == f"{found.after_load / 2**30:.1f}"
        )
        assert ("does not fit" in row[6]) == (not found.fits)
    assert "Computed, not measured" in text
    # What is published is what the command prints now.
    published = ROOT / "docs/results/fsdp2_plan_table.md"
    assert published.read_text(encoding = "utf-8") == text
    assert plan(model = config, gpus = 4, memory = 79, table = True) == 0
    assert plan(gpus = 4) == 2 and "--table" in capsys.readouterr().err
