# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Models stop at the end tokens that their chat template writes."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import unsloth  # noqa: F401  (has to come before transformers)
from llama_chat import LLAMA_SPECIAL_TOKENS, make_llama_tokenizer, make_tiny_llama


def tokenizer_with(eos_token, name = "llama-3.1"):
    from unsloth.chat_templates import get_chat_template
    return get_chat_template(make_llama_tokenizer(eos_token), name)


def model_with(eos_token_id):
    return SimpleNamespace(generation_config = SimpleNamespace(eos_token_id = eos_token_id))


@pytest.fixture(scope = "module")
def add_stop_tokens():
    return importlib.import_module("unsloth.tool_calls").add_stop_tokens


@pytest.fixture(scope = "module")
def tiny_model():
    return make_tiny_llama()


def test_stop_tokens_are_found_by_name_and_added(add_stop_tokens):
    """Ids follow the vocabulary; only what the template writes is added, and what is there stays."""
    from unsloth.chat_templates import get_chat_template

    for specials in (LLAMA_SPECIAL_TOKENS, tuple(reversed(LLAMA_SPECIAL_TOKENS))):
        plain = make_llama_tokenizer("<|end_of_text|>", special_tokens = specials)
        tokenizer = get_chat_template(plain, "llama-3.1")
        eot, eom = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>"])
        for before, after in (
            (5, [5, eot, eom]),
            ([5, 6], [5, 6, eot, eom]),
            ([5, eom], [5, eom, eot]),
        ):
            model = model_with(before)
            assert set(add_stop_tokens(model, tokenizer)) <= {eot, eom}
            assert model.generation_config.eos_token_id == after
            assert add_stop_tokens(model, tokenizer) == ()
    model = model_with(5)
    assert add_stop_tokens(model, tokenizer_with("<|eot_id|>", "llama-3.2")) != ()
    names = make_llama_tokenizer().convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert names[1:] == ["<|eot_id|>"]


def test_nothing_is_added_where_nothing_fits(add_stop_tokens):
    """No stop set, no generation config, no such tokens, another template: nothing changes."""
    from unsloth.chat_templates import get_chat_template

    tokenizer = tokenizer_with("<|eot_id|>")
    for eos in (None, []):
        model = model_with(eos)
        assert (
            add_stop_tokens(model, tokenizer) == () and model.generation_config.eos_token_id == eos
        )
    assert add_stop_tokens(SimpleNamespace(), tokenizer) == ()
    assert add_stop_tokens(None, tokenizer) == ()
    few = LLAMA_SPECIAL_TOKENS[:5]
    lacking = get_chat_template(make_llama_tokenizer("<|end_of_text|>", few), "llama-3.1")
    chatml = get_chat_template(make_llama_tokenizer(), "chatml", map_eos_token = False)
    for other in (lacking, chatml):
        model = model_with(5)
        assert add_stop_tokens(model, other) == () and model.generation_config.eos_token_id == 5


def test_generation_stops_after_the_call(add_stop_tokens, tiny_model):
    """A base model that writes <|eot_id|> forever stops at the first one once the stop tokens are in."""
    tokenizer = tokenizer_with("<|end_of_text|>")
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ids = torch.tensor([[256, 1, 2]])
    tiny_model.generation_config.eos_token_id = 257

    def only_eot(input_ids, scores):
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([eot]), 0.0)

    options = {
        "logits_processor": [only_eot],
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 258,
    }
    assert tiny_model.generate(ids, **options).shape[1] == 11
    add_stop_tokens(tiny_model, tokenizer)
    assert tiny_model.generate(ids, **options)[0].tolist() == [256, 1, 2, eot]


def test_train_on_responses_only_adds_them():
    """The trainer's model gets the stop tokens of its tokenizer, given or the trainer's own; with a
    template that calls no tools, and without a trainer, nothing changes."""
    from unsloth.chat_templates import get_chat_template

    decorate = importlib.import_module("unsloth.tool_calls.stop_tokens").stop_at_end_of_turn
    train_on_responses_only = decorate(lambda trainer, tokenizer = None: trainer)
    llama = tokenizer_with("<|end_of_text|>")
    older = get_chat_template(make_llama_tokenizer("<|end_of_text|>"), "llama-3")
    for tokenizer, widened in ((llama, True), (older, False)):
        for given, own in ((tokenizer, None), (None, tokenizer)):
            trainer = SimpleNamespace(model = model_with(257), processing_class = own)
            assert train_on_responses_only(trainer, tokenizer = given) is trainer
            stops = trainer.model.generation_config.eos_token_id
            assert (stops == 257) != widened, (widened, given is None)
    assert train_on_responses_only(None, tokenizer = llama) is None
    with pytest.raises(NotImplementedError, match = "parameters"):
        decorate(lambda other: None)
