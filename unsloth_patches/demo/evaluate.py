# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Greedy replies to prompts, parsed into calls and compared with the calls that were expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

from .data import Call, Example
from .tools import TOOLS, execute


@dataclass(frozen = True)
class Answer:
    """A model's reply to an example: its text, the calls in it, and why there are none."""

    example: Example
    text: str
    calls: List[Call]
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether the calls are the expected ones: same order, names, and arguments with their types."""
        return _canonical(self.calls) == _canonical(self.example.calls)

    def as_dict(self) -> Dict[str, Any]:
        """For the JSON record."""
        return {
            "prompt": self.example.prompt,
            "tools": list(self.example.tools),
            "expected": list(self.example.calls),
            "reply": self.text,
            "calls": self.calls,
            "right": self.right,
            "reason": self.reason,
        }


def _canonical(calls: Sequence[Call]) -> list:
    # repr keeps 5, 5.0, "5" and True apart, which == does not.
    return [(c["name"], sorted((k, repr(v)) for k, v in c["arguments"].items())) for c in calls]


def count_right(answers: Sequence[Answer]) -> int:
    return sum(answer.right for answer in answers)


def prompt_messages(example: Example) -> List[Dict[str, Any]]:
    return [{"role": "user", "content": example.prompt}]


def example_tools(example: Example) -> list:
    return [TOOLS[name] for name in example.tools]


def parse(ids: Sequence[int], tokenizer, example: Example) -> Answer:
    """One reply's token ids, without the prompt, as an Answer."""
    from unsloth.tool_calls import parse_tool_calls

    message = parse_tool_calls(list(ids), tokenizer, tools = example_tools(example))
    calls = [dict(call["function"]) for call in message.get("tool_calls", ())]
    special = [token for token in (tokenizer.pad_token, tokenizer.eos_token) if token]
    text = tokenizer.decode(ids)
    for token in special:
        text = text.replace(token, "")
    return Answer(example, text.strip(), calls, message.get("reason", ""))


def answer(
    model,
    tokenizer,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Optional[Callable[[int], None]] = None,
) -> List[Answer]:
    """Greedy replies to the examples; ``progress(n)`` is called after each batch of n."""
    import torch
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    tokenizer.padding_side = "left"
    answers: List[Answer] = []
    try:
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            texts = [
                tokenizer.apply_chat_template(
                    prompt_messages(example),
                    tools = example_tools(example),
                    tokenize = False,
                    add_generation_prompt = True,
                )
                for example in batch
            ]
            inputs = tokenizer(
                texts, return_tensors = "pt", padding = True, add_special_tokens = False
            ).to(model.device)
            with torch.inference_mode():
                output = model.generate(
                    input_ids = inputs["input_ids"],
                    attention_mask = inputs["attention_mask"],
                    max_new_tokens = max_new_tokens,
                    do_sample = False,
                    use_cache = True,
                    pad_token_id = tokenizer.pad_token_id,
                )
            replies = output[:, inputs["input_ids"].shape[1] :].tolist()
            answers += [parse(ids, tokenizer, example) for ids, example in zip(replies, batch)]
            if progress is not None:
                progress(len(batch))
    finally:
        tokenizer.padding_side = "right"
        FastLanguageModel.for_training(model)
    return answers


def run_calls(answer_: Answer) -> List[Dict[str, Any]]:
    """Each call of the answer with what its tool returned."""
    return [{**call, "result": execute(call)} for call in answer_.calls]
