# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""assistant_only_loss: the same bytes, and exactly what train_on_responses_only trains."""

import importlib

import pytest
import unsloth  # has to come before transformers
from llama_chat import (
    CONVERSATIONS,
    assistant,
    calls,
    made,
    make_llama_tokenizer,
    make_tiny_llama,
    outcome,
    result,
    system,
    tool,
    user,
)

MODES = ("error", "split", "join")
NAMES = ("llama-3.1", "llama-3.2", "llama-3.3")
DATE = "26 Jul 2024"
ROME, OSLO = made("f", {"city": "Rome"}), made("g", {"q": 'a "b" <x>'})
SINGLE = [system("S"), user("q"), calls(ROME), result("1"), assistant(" Done. "), user("r")]
SEVERAL = [user("q"), calls(ROME, OSLO), result("1"), result("2"), assistant("Done.")]


def tokenizer_with(name, mode, **options):
    from unsloth.chat_templates import get_chat_template
    return get_chat_template(make_llama_tokenizer(), name, parallel_tool_calls = mode, **options)


@pytest.fixture(scope = "module")
def tokenizers():
    """(name, mode) -> (plain, marked)."""
    return {
        (name, mode): (
            tokenizer_with(name, mode),
            tokenizer_with(name, mode, assistant_only_loss = True),
        )
        for name in NAMES
        for mode in MODES
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bytes_are_rendered(name, mode, tokenizers):
    plain, marked = tokenizers[name, mode]
    assert "generation" in marked.chat_template.replace("add_generation_prompt", "")
    cases = [*CONVERSATIONS.values(), {"messages": SEVERAL, "options": {}}]
    for case in cases:
        options = {"date_string": DATE, **case["options"], "tokenize": False}
        texts = [
            outcome(lambda: one.apply_chat_template(case["messages"], **options))
            for one in (plain, marked)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_that_of_train_on_responses_only(name, mode, tokenizers):
    """Answers, calls and their end tokens, built-in calls included; nothing else."""
    module = importlib.import_module("unsloth.chat_templates")
    tokenizer = tokenizers[name, mode][1]
    function = module.train_on_responses_only(None, tokenizer = tokenizer, return_function = True)
    search = calls(made("brave_search", {"query": "x"}))
    cases = [(SINGLE, {}), ([user("q"), search, result("1"), assistant("Yes.")], {})]
    if name != "llama-3.2":
        cases.append((cases[1][0], {"builtin_tools": ["brave_search"]}))
    cases += [(SEVERAL, {})] if mode != "error" else []
    for messages, options in cases:
        options = {"date_string": DATE, "return_dict": True, **options}
        row = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask = True, **options)
        labels = function({"input_ids": [row["input_ids"]]})["labels"][0]
        assert row["assistant_masks"] == [int(label != -100) for label in labels]
        assert any(row["assistant_masks"])


def test_other_templates_are_refused():
    from unsloth.chat_templates import get_chat_template

    with pytest.raises(ValueError, match = "assistant_only_loss = True needs a Llama 3.x template"):
        get_chat_template(make_llama_tokenizer(), "chatml", assistant_only_loss = True)
    masks = importlib.import_module("unsloth.tool_calls.assistant_masks")
    with pytest.raises(NotImplementedError, match = "unknown way"):
        masks.with_generation("{{ messages }}")
    with pytest.raises(NotImplementedError, match = "chat_template"):
        masks.mark_assistant_turns(lambda other: None)


@pytest.mark.skipif(
    getattr(unsloth, "DEVICE_TYPE", "") != "cpu",
    reason = "elsewhere Unsloth's trainers want a model that Unsloth loaded; this one is made here",
)
@pytest.mark.parametrize("mode", ["split", "join"])
def test_sft_with_a_tools_column(mode, tokenizers, tmp_path):
    """A few real steps of TRL's SFT with assistant_only_loss and tools of each row."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = tokenizers["llama-3.1", mode][1]
    tools = [tool("f", city = {"type": "string"}), tool("g", q = {"type": "string"})]
    rows = [{"messages": SEVERAL, "tools": tools}] * 3
    config = trl.SFTConfig(
        output_dir = str(tmp_path),
        max_steps = 3,
        per_device_train_batch_size = 1,
        assistant_only_loss = True,
        max_length = 2048,
        report_to = "none",
        save_strategy = "no",
        use_cpu = True,
        bf16 = False,
        fp16 = False,
    )
    trainer = trl.SFTTrainer(
        model = make_tiny_llama(),
        args = config,
        train_dataset = datasets.Dataset.from_list(rows),
        processing_class = tokenizer,
    )
    row = trainer.train_dataset[0]
    batch = trainer.data_collator([row])  # whether TRL keeps masks or labels in the data set
    trained = batch["labels"][0][batch["labels"][0] != -100].tolist()
    text = tokenizer.decode(trained)
    assert text.count("<|eot_id|>") == (2 if mode == "join" else 3) and text.endswith(
        "Done.<|eot_id|>"
    )
    assert "Given the following functions" in tokenizer.decode(row["input_ids"])
    assert trainer.train().global_step == 3


@pytest.mark.skipif(
    getattr(unsloth, "DEVICE_TYPE", "") != "cpu",
    reason = "elsewhere Unsloth's trainers want a model that Unsloth loaded; this one is made here",
)
@pytest.mark.parametrize("mode", ["split", "join"])
def test_grpo_with_tools(mode, tokenizers, tmp_path):
    """Three real steps of TRL's GRPO, whose rollouts call tools: calls are read and executed, and
    their results rendered behind them. An untrained model calls nothing, so its first turn is given."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    if not hasattr(trl.GRPOTrainer, "_tool_call_loop"):
        pytest.skip("the installed TRL's GRPO has no tools")
    called, rewarded = [], []

    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: The city to look up.
        """
        called.append(city)
        return f"20 degrees in {city}"

    def reward(completions, **_):
        rewarded.extend(completions)
        return [float(number) for number in range(len(completions))]

    tokenizer = tokenizers["llama-3.1", mode][0]
    config = trl.GRPOConfig(
        output_dir = str(tmp_path),
        per_device_train_batch_size = 2,
        num_generations = 2,
        max_completion_length = 400,
        max_tool_calling_iterations = 1,
        max_steps = 3,
        logging_steps = 1,
        report_to = "none",
        save_strategy = "no",
        use_cpu = True,
        bf16 = False,
    )
    trainer = trl.GRPOTrainer(
        model = make_tiny_llama(),
        args = config,
        reward_funcs = reward,
        tools = [get_weather],
        train_dataset = datasets.Dataset.from_list([{"prompt": [user("Rome?")]}] * 4),
        processing_class = tokenizer,
    )
    cities = ("Rome", "Oslo") if mode == "join" else ("Rome",)
    asking = calls(*[made("get_weather", {"city": city}) for city in cities])
    generate = trainer._generate_single_turn
    trainer.generation_config.max_new_tokens = 24  # of what the model itself says in a turn

    def given_first(prompt_ids, *arguments, **options):
        done, logprobs = generate(prompt_ids, *arguments, **options)
        if "20 degrees" not in tokenizer.decode(prompt_ids[0]):
            tools = {"tools": [get_weather], "return_dict": False}
            start = tokenizer.apply_chat_template(
                [user("Rome?")], add_generation_prompt = True, **tools
            )
            assert prompt_ids[0] == start
            whole = tokenizer.apply_chat_template([user("Rome?"), asking], **tools)
            done = [whole[len(start) :]] * len(done)
        return done, logprobs

    trainer._generate_single_turn = given_first
    assert trainer.train().global_step == 3
    assert called == list(cities) * 6 and len(rewarded) == 6
    for completion in rewarded:
        assert completion[0]["tool_calls"] == asking["tool_calls"]
        results = [message for message in completion if message["role"] == "tool"]
        assert [one["content"] for one in results] == [f"20 degrees in {city}" for city in cities]
    logged = [entry for entry in trainer.state.log_history if "tools/call_frequency" in entry]
    assert [entry["tools/call_frequency"] for entry in logged] == [len(cities)] * 3
    assert all(entry["tools/failure_frequency"] == 0 for entry in logged)
    assert all(entry["grad_norm"] > 0 for entry in logged)
