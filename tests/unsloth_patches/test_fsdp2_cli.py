# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The `plan` command and scripts/train_fsdp2.py, run as users run them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


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
    [{"gpus": 0}, {"memory": 1}, {"checkpointing": "maybe"}, {"offload": "most"}, {"tokens": 0}],
)
def test_plan_names_bad_values(config, capsys, changes):
    """A value that cannot be counted is named on stderr, exit code 2."""
    from unsloth_patches.plan import plan

    assert plan(config, **{"gpus": 2, "memory": 80, **changes}) == 2
    assert str(next(iter(changes.values()))) in capsys.readouterr().err


def _toy(folder):
    code = (
        "import sys; from pathlib import Path; from unsloth_patches.bench.fsdp2 import TOY, "
        "make_checkpoint;"
        "make_checkpoint(Path(sys.argv[1]), TOY, 2)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check = True, timeout = 120, cwd = ROOT)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason = "needs Unsloth")
def test_train_script_runs_on_two_ranks(tmp_path):
    """scripts/train_fsdp2.py as it stands under torchrun on two CPU ranks: it trains, saves, and
    resumes.
    """
    toy = _toy(tmp_path / "toy")
    data = tmp_path / "data.jsonl"
    rows = [
        json.dumps({"text": " ".join(f"w{4 + (i * j) % 400}" for j in range(40))})
        for i in range(1, 17)
    ]
    data.write_text("\n".join(rows) + "\n", encoding = "utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    command += ["scripts/train_fsdp2.py", "--model", str(toy), "--data", str(data)]
    command += [
        "--output",
        str(tmp_path / "out"),
        "--length",
        "32",
        "--accumulate",
        "2",
        "--save-steps",
        "2",
    ]
    environment = {
        **os.environ,
        "UNSLOTH_FSDP2": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    for extra in (["--steps", "2"], ["--steps", "4", "--resume"]):
        done = subprocess.run(
            [*command, *extra],
            env = environment,
            cwd = ROOT,
            timeout = 240,
            capture_output = True,
            text = True,
            encoding = "utf-8",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "'fsdp2-sharded-4bit': 'applied'" in done.stdout, done.stdout[-2000:]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
