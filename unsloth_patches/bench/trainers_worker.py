# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""One process of `bench trainers`: `steps_worker` with TRL's other trainers.

python -m unsloth_patches.bench.trainers_worker job.json [file descriptor of the line to it]
"""

from __future__ import annotations

from . import steps_worker
from .steps_worker import sequences, settings

NEW_TOKENS, GENERATIONS = 64, 4  # of GRPO


def _texts(rows: int, median: int, job: dict, model) -> list:
    """Random words, a text a row."""
    made = sequences(rows, median, job["longest"] // 4, model.config.vocab_size)
    return [" ".join(f"w{word}" for word in ids) for ids in made["input_ids"]]


def dpo(model, tokenizer, job: dict, case: dict, callback):
    """DPOTrainer; the reference is the model with the adapter as it is now."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = case["batch"] * job["accumulation"] * case["steps"]
    texts = _texts(3 * rows, case["median"], job, model)
    columns = ("prompt", "chosen", "rejected")
    pairs = {name: texts[i * rows : (i + 1) * rows] for i, name in enumerate(columns)}
    return DPOTrainer(
        model = model,
        ref_model = None,
        processing_class = tokenizer,
        train_dataset = Dataset.from_dict(pairs),
        args = DPOConfig(max_length = job["longest"], beta = 0.1, **settings(job, case)),
        callbacks = [callback],
    )


def even_words(completions, **kwargs) -> list:
    """GRPO's reward: the share of words with an even number."""
    words = [[int(w[1:]) for w in text.split() if w[1:].isdigit()] for text in completions]
    return [sum(w % 2 == 0 for w in each) / max(1, len(each)) for each in words]


def grpo(model, tokenizer, job: dict, case: dict, callback):
    """GRPOTrainer without vLLM."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts = _texts(
        case["batch"] * job["accumulation"] * case["steps"], case["median"], job, model
    )
    args = GRPOConfig(
        num_generations = GENERATIONS,
        max_completion_length = NEW_TOKENS,
        temperature = 1.0,
        **settings(job, case),
    )
    return GRPOTrainer(
        model = model,
        processing_class = tokenizer,
        reward_funcs = [even_words],
        train_dataset = Dataset.from_dict({"prompt": prompts}),
        args = args,
        callbacks = [callback],
    )


TRAINERS = {"SFT": steps_worker.trainer_for, "DPO": dpo, "GRPO": grpo}


def trainer_for(model, tokenizer, job: dict, case: dict, callback):
    return TRAINERS[case["trainer"]](model, tokenizer, job, case, callback)


if __name__ == "__main__":
    steps_worker.main(trainer_for = trainer_for)
