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
