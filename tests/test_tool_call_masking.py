# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Training on tool calls: exactly calls, answers and their end tokens are labels."""

import functools
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
import unsloth  # has to come before transformers
from llama_chat import assistant, call, make_llama_tokenizer, make_tiny_llama, result, system, user

ROME_TEXT = '{"name": "f", "parameters": {"city": "Rome"}}'
OSLO_TEXT = '{"name": "g", "parameters": {"city": "Oslo"}}'
DATE = "26 Jul 2024"


def tokenizer_with(
    mode,
    eos_token = "<|eot_id|>",
    name = "llama-3.1",
):
    from unsloth.chat_templates import get_chat_template
    return get_chat_template(make_llama_tokenizer(eos_token), name, parallel_tool_calls = mode)


def two_calls():
    both = call("f", {"city": "Rome"})
    both["tool_calls"] += call("g", {"city": "Oslo"})["tool_calls"]
    return both


QUESTION = [system("S"), user("Weather?")]
CALLED = [*QUESTION, two_calls()]
ANSWERED = [*CALLED, result("20"), result("5"), assistant("Warm and cold.")]
LATER = [*QUESTION, assistant("Where?"), user("Both."), two_calls(), result("20")]


def make_rows(tokenizer, *conversations):
    return [
        tokenizer.apply_chat_template(messages, date_string = DATE, return_dict = False)
        for messages in conversations
    ]


def trained_texts(tokenizer, ids, labels):
    """The runs of trained tokens as texts; a trained label is the token itself."""
    runs, before = [], None
    for position, (token, label) in enumerate(zip(ids, labels)):
        if label == -100:
            continue
        assert label == token
        if before == position - 1 and runs:
            runs[-1].append(token)
        else:
            runs.append([token])
        before = position
    return [tokenizer.decode(run) for run in runs]


def masked(tokenizer, ids, **options):
    train_on_responses_only = importlib.import_module(
        "unsloth.chat_templates"
    ).train_on_responses_only
    options = {"tokenizer": tokenizer, "return_function": True, **options}
    function = train_on_responses_only(None, **options)
    return trained_texts(tokenizer, ids, function({"input_ids": [ids]})["labels"][0])


EOT = "<|eot_id|>"
JOINED = f"{ROME_TEXT}; {OSLO_TEXT}{EOT}"
PIECES = [ROME_TEXT + EOT, OSLO_TEXT + EOT]


@pytest.mark.parametrize("eos_token", ["<|eot_id|>", "<|end_of_text|>"])
@pytest.mark.parametrize(
    "mode, messages, every, last",
    [
        ("join", CALLED, [JOINED], [JOINED]),
        ("join", ANSWERED, [JOINED, "Warm and cold." + EOT], ["Warm and cold." + EOT]),
        ("split", ANSWERED, [*PIECES, "Warm and cold." + EOT], ["Warm and cold." + EOT]),
        ("split", LATER, ["Where?" + EOT, *PIECES], PIECES),
        ("split", [*QUESTION, assistant("Hi.")], ["Hi." + EOT], ["Hi." + EOT]),
        (
            "split",
            [*ANSWERED, user("Thanks")],
            [*PIECES, "Warm and cold." + EOT],
            ["Warm and cold." + EOT],
        ),
    ],
)
def test_exactly_calls_and_answers_are_trained(mode, messages, every, last, eos_token):
    """Calls, answers and their end tokens; never results; the last response is a whole run of calls."""
    tokenizer = tokenizer_with(mode, eos_token)
    (ids,) = make_rows(tokenizer, messages)
    assert masked(tokenizer, ids) == every
    assert masked(tokenizer, ids, last_response_only = True) == last


def test_end_of_message_tokens_are_trained():
    """With built-in tools calls end in <|eom_id|>, which is learned too."""
    tokenizer = tokenizer_with("split")
    messages = [*QUESTION, call("brave_search", {"query": "x"}), result("1"), assistant("Done.")]
    ids = tokenizer.apply_chat_template(
        messages, builtin_tools = ["brave_search"], date_string = DATE, return_dict = False
    )
    builtin = '<|python_tag|>brave_search.call(query="x")<|eom_id|>'
    assert masked(tokenizer, ids) == [builtin, "Done." + EOT]


def test_masking_returns_tensors_for_tensors():
    """Collators pass tensors and other columns: labels come back as a tensor of the same shape."""
    tokenizer = tokenizer_with("split")
    (ids,) = make_rows(tokenizer, LATER)
    train_on_responses_only = importlib.import_module(
        "unsloth.chat_templates"
    ).train_on_responses_only
    function = train_on_responses_only(
        None, tokenizer = tokenizer, return_function = True, last_response_only = True
    )
    batch = {"input_ids": torch.tensor([ids, ids])}
    labels = function(batch)["labels"]
    assert (
        isinstance(labels, torch.Tensor)
        and labels.shape == (2, len(ids))
        and labels.dtype == torch.int64
    )
    for row in labels.tolist():
        assert trained_texts(tokenizer, ids, row) == PIECES


def test_hosts_without_torch():
    """There chat_templates has None, and importing it has to go on; another function is refused."""
    masking = importlib.import_module("unsloth.tool_calls.masking")
    with pytest.raises(NotImplementedError, match = "parameters"):
        masking.keep_every_call_of_last_response(lambda other: None)


def test_what_the_last_response_cannot_be_found_in_is_named():
    """A data set that is not tokenized, and a tokenizer without Llama's headers."""
    masking = importlib.import_module("unsloth.tool_calls.masking")
    for row, words in (({"text": "Hi"}, r"eval_dataset, which has \['text'\]"), ({}, r"has \[\]")):
        with pytest.raises(ValueError, match = words):
            masking._mapped([row], print, "eval_dataset")
    tokenizer = make_llama_tokenizer()
    masking.LastRun(tokenizer)
    ids = {"<|start_header_id|>": 1}
    for known, missing in (({}, "start"), (ids, "end")):
        other = SimpleNamespace(
            convert_tokens_to_ids = known.get, convert_ids_to_tokens = lambda _: "<|start_header_id|>"
        )
        with pytest.raises(ValueError, match = rf"has no <\|{missing}_header_id\|>"):
            masking.LastRun(other)


cpu_backend = pytest.mark.skipif(
    getattr(unsloth, "DEVICE_TYPE", "") != "cpu",
    reason = "elsewhere Unsloth's trainers want a model that Unsloth loaded; this one is made here",
)


@pytest.fixture(scope = "module")
def tiny_model():
    return make_tiny_llama()


@cpu_backend
@pytest.mark.parametrize("mode, last", [("join", [JOINED]), ("split", PIECES)])
def test_trainer_is_masked(mode, last, tiny_model, tmp_path):
    """Through SFTTrainer, as users call it, evaluation set included; and the model learns where to
    stop."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = tokenizer_with(mode, "<|end_of_text|>")
    later = LATER if mode == "split" else LATER[:-1]
    texts = [tokenizer.apply_chat_template(later, tokenize = False, date_string = DATE)] * 3
    dataset = datasets.Dataset.from_dict({"text": texts})
    tiny_model.generation_config.eos_token_id = 257
    config = trl.SFTConfig(
        output_dir = str(tmp_path),
        max_steps = 1,
        per_device_train_batch_size = 1,
        dataset_text_field = "text",
        max_length = 1024,
        report_to = "none",
        use_cpu = True,
        bf16 = False,
        fp16 = False,
    )
    trainer = trl.SFTTrainer(
        model = tiny_model,
        args = config,
        train_dataset = dataset,
        eval_dataset = {"a": dataset},
        processing_class = tokenizer,
    )
    chat_templates = importlib.import_module("unsloth.chat_templates")
    options = {"last_response_only": True, "num_proc": 1}
    trainer = chat_templates.train_on_responses_only(trainer, **options)
    for rows in (trainer.train_dataset, trainer.eval_dataset["a"]):
        for row in rows:
            # TRL ends a text with the tokenizer's eos token, which stock masking may leave in.
            got = trained_texts(tokenizer, row["input_ids"], row["labels"])
            assert [
                text.replace("<|end_of_text|>", "") for text in got if text != "<|end_of_text|>"
            ] == last
    stop = tiny_model.generation_config.eos_token_id
    tiny_model.generation_config.eos_token_id = 257
    assert stop[0] == 257 and tokenizer.convert_ids_to_tokens(stop) == [
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
    ]


# ---------------------------------------------------------------- GRPO


def get_weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name
    """
    return f"{city}: 20"


def get_time(zone: str, short: bool = False) -> str:
    """Time in a zone.

    Args:
        zone: its name
        short: hours alone
    """
    return f"{zone}: noon"


class Scripted:
    """Makes any model write the given replies: the first one, and the last one after results."""

    def __init__(self, tokenizer, first, last):
        self._tokenizer, self._first, self._last = tokenizer, first, last

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e9)
        for row, ids in enumerate(input_ids.tolist()):
            text = self._tokenizer.decode(ids)
            written = text.rpartition("assistant<|end_header_id|>\n\n")[2]
            reply = self._last if "<|start_header_id|>ipython" in text else self._first
            plan = self._tokenizer(reply, add_special_tokens = False).input_ids
            position = len(self._tokenizer(written, add_special_tokens = False).input_ids)
            forced[
                row, plan[position] if position < len(plan) else self._tokenizer.pad_token_id
            ] = 0
        return forced


@cpu_backend
def test_grpo_calls_several_tools_at_once(tiny_model, tmp_path):
    """TRL's GRPO executes both calls of a joined turn, and shows the model both results."""
    import transformers

    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    if "tools" not in inspect.signature(trl.GRPOTrainer.__init__).parameters:
        pytest.skip("the installed TRL's GRPOTrainer has no tools")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 13):
        pytest.skip("TRL reads calls of its own templates alone, with transformers below 5.13")
    tokenizer = tokenizer_with("join")
    both = (
        '{"name": "get_weather", "parameters": {"city": "Rome"}}; '
        '{"name": "get_time", "parameters": {"zone": "UTC", "short": true}}<|eot_id|>'
    )
    seen = []

    def reward(completions, **options):
        seen.extend(completions)
        return [1.0] * len(completions)

    generate, script = tiny_model.generate, [Scripted(tokenizer, both, "Done.<|eot_id|>")]
    tiny_model.generate = functools.partial(generate, logits_processor = script)
    config = trl.GRPOConfig(
        output_dir = str(tmp_path),
        max_steps = 1,
        per_device_train_batch_size = 2,
        num_generations = 2,
        max_completion_length = 600,
        report_to = "none",
        save_strategy = "no",
        use_cpu = True,
        bf16 = False,
    )
    try:
        trl.GRPOTrainer(
            model = tiny_model,
            args = config,
            train_dataset = datasets.Dataset.from_list([{"prompt": QUESTION}] * 2),
            reward_funcs = reward,
            tools = [get_weather, get_time],
            processing_class = tokenizer,
        ).train()
    finally:
        tiny_model.generate = generate
    for completion in seen:
        roles = [message["role"] for message in completion]
        assert roles == ["assistant", "tool", "tool", "assistant"]
        assert [one["function"]["name"] for one in completion[0]["tool_calls"]] == [
            "get_weather",
            "get_time",
        ]
        texts = [message["content"] for message in completion[1:]]
        assert texts == ["Rome: 20", "UTC: noon", "Done."]
    assert len(seen) == 2
