# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``plan`` says what it leaves out of a model, and refuses what it cannot count."""

import json

import pytest
from typer.testing import CliRunner

from unsloth_patches.cli import app
from unsloth_patches.plan import plan

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 32000,
}
BERT = {**SIZES, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
T5 = {**SIZES, "model_type": "t5", "is_encoder_decoder": True}
LLAMA = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
OTHER = {**SIZES, "model_type": "phi", "architectures": ["PhiForCausalLM"]}
VISION = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {**SIZES, "model_type": "gemma3_text"},
    "vision_config": {"hidden_size": 1152},
}


@pytest.fixture
def folder(tmp_path):
    """A function: config -> the folder that holds it."""

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding = "utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize("options", [{}, {"sweep": True}, {"table": True}])
@pytest.mark.parametrize("config, name", [(BERT, "BertForMaskedLM"), (T5, "t5")])
def test_what_is_no_decoder_is_refused(folder, capsys, config, name, options):
    assert plan(folder(config), gpus = 2, **options) == 2
    shown = capsys.readouterr()
    assert name in shown.err and "not known to be a decoder" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("options", [{}, {"sweep": True}, {"table": True}])
@pytest.mark.parametrize(
    "config, words",
    [
        (SIZES, None),
        (LLAMA, None),
        (OTHER, "model_type 'phi' is counted as if its blocks were Llama's"),
        (VISION, "not counted: vision_config (only the language part is); add its weights"),
    ],
)
def test_what_is_left_out_is_said(folder, capsys, config, words, options):
    assert plan(folder(config), gpus = 2, **options) == 0
    shown = capsys.readouterr().out
    assert words in shown if words else "Computed, not measured" in shown.splitlines()[-1]


LARGE = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LARGE.update(num_attention_heads = 64, num_key_value_heads = 8)


def test_one_gpu_is_not_called_a_rank(folder, capsys):
    assert plan(folder(LLAMA), gpus = 1) == 0
    shown = capsys.readouterr().out
    assert "fits on one GPU: " in shown and "rank" not in shown
    assert "Not counted: step graphs" in shown and "256 MiB plus 15%" in shown
    assert plan(folder(LLAMA), gpus = 2) == 0
    shown = capsys.readouterr().out
    assert "fits on 2 ranks" in shown and "smallest rank" in shown and "step graphs" not in shown


@pytest.mark.parametrize(
    "options, remedies",
    [
        ({"gpus": 1, "memory": 42.0}, {"tokens", "gpus", "memory"}),
        ({"gpus": 2, "memory": 24.0, "offload": "never"}, {"offload", "gpus", "memory"}),
        ({"gpus": 2, "memory": 24.0, "host": 1.0}, {"gpus", "host", "memory"}),
        (
            {"gpus": 2, "memory": 60.0, "checkpointing": "off"},
            {"checkpointing", "tokens", "memory"},
        ),
        ({"gpus": 2, "memory": 8.0}, {"memory"}),
    ],
)
def test_each_remedy_that_is_named_fits(folder, capsys, options, remedies):
    """And the numbers are the nearest: one token more, or a GiB less, does not."""
    config = folder(LARGE)
    assert plan(config, **options) == 1
    shown = capsys.readouterr().out
    assert "It would fit with any one of these" in shown
    named = dict(line.split()[:2] for line in shown.splitlines() if line.startswith("  --"))
    named = {name.removeprefix("--"): value for name, value in named.items()}
    assert remedies <= set(named)
    kinds = {"offload": str, "checkpointing": str, "host": float, "memory": float}
    for name, value in named.items():
        changed = {**options, name: kinds.get(name, int)(value)}
        assert plan(config, **changed) == 0, name
        if name in ("tokens", "host", "memory"):
            changed[name] += 1 if name == "tokens" else -1
            assert plan(config, **changed) == 1, name


def test_help_says_what_is_required_and_what_is_not_counted():
    shown = CliRunner().invoke(app, ["plan", "--help"], env = {"COLUMNS": "200"}).output
    assert shown.count("Required without --table") == 2
    assert "step graphs" in shown and "256 MiB" in shown
