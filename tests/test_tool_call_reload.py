# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A saved tokenizer renders and checks tool calls after a reload as it did in training."""

import importlib
import json

import pytest
import unsloth  # has to come before transformers
from llama_chat import calls, made, make_llama_tokenizer, make_tiny_llama, result, user

ROME, OSLO = made("f", {"city": "Rome"}), made("g", {"city": "Oslo"})
MESSAGES = [user("q"), calls(ROME, OSLO), result("1"), result("2")]


def tokenizer_with(mode):
    from unsloth.chat_templates import get_chat_template
    tokenizer = make_llama_tokenizer("<|end_of_text|>")
    return get_chat_template(tokenizer, "llama-3.1", parallel_tool_calls = mode)


def rendered(tokenizer, messages = MESSAGES):
    return tokenizer.apply_chat_template(messages, tokenize = False)


@pytest.fixture(scope = "module")
def reload():
    return importlib.import_module("unsloth.tool_calls.reload")


@pytest.mark.parametrize("mode", ["error", "split", "join"])
def test_mode_and_checks_survive(mode, reload, tmp_path):
    """Through tokenizer_config.json, twice; plain transformers loads it and renders what it can."""
    from transformers import AutoTokenizer

    tokenizer = tokenizer_with(mode)
    for turn in ("first", "second"):
        tokenizer.save_pretrained(tmp_path / turn)
        config = json.loads((tmp_path / turn / "tokenizer_config.json").read_text("utf-8"))
        assert config["parallel_tool_calls"] == mode
        loaded = AutoTokenizer.from_pretrained(tmp_path / turn)
        single = [user("q"), calls(ROME), result("1")]
        assert rendered(loaded, single) == rendered(tokenizer, single)
        assert reload.restore(loaded)
        if mode != "error":
            assert rendered(loaded) == rendered(tokenizer)
        with pytest.raises(ValueError, match = "^Unsloth: messages"):
            rendered(loaded, [user(None)])
        tokenizer = loaded


def test_other_templates_show_calls_after_a_reload(reload, tmp_path):
    """Arguments that are JSON text are printed as objects, before and after."""
    from transformers import AutoTokenizer
    from unsloth.chat_templates import get_chat_template

    text = {**made("f", json.dumps({"city": "Rome"})), "id": "call_1"}
    messages = [user("q"), {"role": "assistant", "content": "", "tool_calls": [text]}]
    tokenizer = get_chat_template(make_llama_tokenizer(), "qwen-2.5", map_eos_token = False)
    assert '\\"city' not in rendered(tokenizer, messages)
    for turn in ("first", "second"):
        tokenizer.save_pretrained(tmp_path / turn)
        loaded = AutoTokenizer.from_pretrained(tmp_path / turn)
        assert not reload.restore(loaded)  # no mode, and no stop tokens of Llama
        assert rendered(loaded, messages) == rendered(tokenizer, messages)
        tokenizer = loaded
    llama = get_chat_template(tokenizer, "llama-3.1", map_eos_token = False)
    llama.save_pretrained(tmp_path / "llama")
    assert "qwen" not in (tmp_path / "llama" / "tokenizer_config.json").read_text("utf-8")


def test_other_tokenizers_are_left_alone(reload, tmp_path, monkeypatch):
    """None saved, another template since (which is told), or no tokenizer at all."""
    from transformers import AutoTokenizer
    from unsloth.chat_templates import get_chat_template

    plain = make_llama_tokenizer()
    assert not reload.restore(plain) and type(plain) is type(make_llama_tokenizer())
    tokenizer = tokenizer_with("join")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template, told = "{{ messages }}", []
    monkeypatch.setattr(reload.logger, "warning", told.append)
    assert not reload.restore(loaded) and not reload.restore(None)
    assert len(told) == 1 and "parallel_tool_calls = 'join'" in told[0]
    assert "Call get_chat_template" in told[0]
    chatml = get_chat_template(tokenizer, "chatml", map_eos_token = False)
    chatml.save_pretrained(tmp_path)
    assert "parallel_tool_calls" not in (tmp_path / "tokenizer_config.json").read_text("utf-8")
    assert reload.restore_tool_call_mode(lambda: 3)() == 3


@pytest.mark.skipif(
    getattr(unsloth, "DEVICE_TYPE", "") != "cpu", reason = "the tiny model is for the CPU backend"
)
def test_adapters_and_merged_models(tmp_path):
    """FastLanguageModel loads a saved LoRA and a merged model: same text, same stop tokens."""
    base = tmp_path / "base"
    make_tiny_llama().save_pretrained(base)
    make_llama_tokenizer("<|end_of_text|>").save_pretrained(base)
    options = {"max_seq_length": 256, "load_in_4bit": False}
    model, _ = unsloth.FastLanguageModel.from_pretrained(str(base), **options)
    tokenizer = tokenizer_with("join")
    model = unsloth.FastLanguageModel.get_peft_model(model, r = 4, target_modules = ["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, save_method = "merged_16bit")
    for folder in ("adapter", "merged"):
        model, loaded = unsloth.FastLanguageModel.from_pretrained(str(tmp_path / folder), **options)
        assert rendered(loaded) == rendered(tokenizer)
        with pytest.raises(ValueError, match = "^Unsloth: messages"):
            rendered(loaded, [user(None)])
        stops = loaded.convert_ids_to_tokens(model.generation_config.eos_token_id)
        assert {"<|eot_id|>", "<|eom_id|>"} <= set(stops), folder
        # Inference's prompt and reply are the tokens that training has seen.
        trained = tokenizer.apply_chat_template(MESSAGES, return_dict = False)
        prompt = loaded.apply_chat_template(
            MESSAGES[:1], add_generation_prompt = True, return_dict = False
        )
        assert trained[: len(prompt)] == prompt
        assert loaded.apply_chat_template(MESSAGES, return_dict = False) == trained


def test_the_tokenizer_of_a_processor_is_restored(reload):
    """The processor itself says nothing of a mode; its tokenizer, which comes second, does."""
    transformers = importlib.import_module("transformers")

    class Processor(transformers.ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    plain = make_llama_tokenizer("<|end_of_text|>")
    plain.chat_template = tokenizer_with("split").chat_template
    plain.init_kwargs["parallel_tool_calls"] = "split"
    assert reload.restore(Processor(plain))
    assert rendered(plain) == rendered(tokenizer_with("split"))
