# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""``plan`` says what it leaves out of a model, and refuses what it cannot count."""

import json

import pytest

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
OTHER = {**SIZES, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
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
    assert "--model" in shown.err and name in shown.err and "no decoder" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("options", [{}, {"sweep": True}, {"table": True}])
@pytest.mark.parametrize(
    "config, words",
    [
        (SIZES, None),
        (LLAMA, None),
        (OTHER, "model type olmo2 is not one that the count was made for"),
        (VISION, "The language part only: weights and activations of its vision part"),
    ],
)
def test_what_is_left_out_is_said_last(folder, capsys, config, words, options):
    assert plan(folder(config), gpus = 2, **options) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert words in last if words else "Computed, not measured" in last
