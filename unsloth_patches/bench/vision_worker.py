# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""One process of `bench families` for a model that sees: `steps_worker` with FastVisionModel and a picture
in every row.

    python -m unsloth_patches.bench.vision_worker job.json [file descriptor of the line to it]
"""

from __future__ import annotations

from pathlib import Path

from . import steps_worker
from .fsdp2_checkpoint import save_word_tokenizer
from .steps_worker import sequences, settings
from .train_worker import RANK

# Of Qwen2-VL's processor; the word tokenizer numbers them from 4 on.
SPECIAL = (
    "<|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
)
PIXELS = 224  # a side of each picture: 64 tokens
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
)


def config(shape: dict):
    """Of Qwen2.5-VL with a text model of this shape and a small vision tower."""
    from transformers import Qwen2_5_VLConfig

    shape = dict(shape)
    head = shape.pop("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    section = [head // 8, 3 * head // 16, 3 * head // 16]  # of half a head: time, height, width
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}
    tower = {"depth": 4, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4}
    tower.update(out_hidden_size = shape["hidden_size"], fullatt_block_indexes = [1, 3])
    numbers = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    numbers.update(vision_start = "<|vision_start|>", vision_end = "<|vision_end|>")
    return Qwen2_5_VLConfig(
        text_config = {**shape, "rope_parameters": rope},
        vision_config = tower,
        **{f"{name}_token_id": 4 + SPECIAL.index(word) for name, word in numbers.items()},
    )


def save_processor(folder: Path, vocab: int) -> None:
    """Qwen2.5-VL's processor with a tokenizer of so many words."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    save_word_tokenizer(folder, vocab, SPECIAL)
    Qwen2_5_VLProcessor(
        image_processor = Qwen2VLImageProcessor(),
        tokenizer = AutoTokenizer.from_pretrained(folder),
        video_processor = Qwen2VLVideoProcessor(),
        chat_template = TEMPLATE,
    ).save_pretrained(folder)


def load(job: dict):
    """(model with LoRA on the vision tower's linears and the text model's, processor)"""
    from unsloth import FastVisionModel

    model, processor = FastVisionModel.from_pretrained(
        job["checkpoint"],
        max_seq_length = job["longest"],
        load_in_4bit = True,
        use_gradient_checkpointing = "unsloth",
    )
    model = FastVisionModel.get_peft_model(
        model, r = RANK, lora_alpha = RANK, lora_dropout = 0, random_state = 3407
    )
    return model, processor


def conversations(rows: int, case: dict, job: dict, vocab_size: int) -> list:
    """A picture of noise and a question of some words in each, and an answer of the row's length."""
    import numpy
    from PIL import Image

    drawn = numpy.random.default_rng(0)
    made = []
    for ids in sequences(rows, case["median"], job["longest"], vocab_size)["input_ids"]:
        noise = drawn.integers(0, 256, (PIXELS, PIXELS, 3), dtype = numpy.uint8)
        question, answer = (" ".join(f"w{i + 6}" for i in part) for part in (ids[:16], ids[16:]))
        seen = {"type": "image", "image": Image.fromarray(noise)}
        asked = [seen, {"type": "text", "text": question}]
        said = [{"type": "text", "text": answer}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        made.append({"messages": messages})
    return made


def trainer_for(model, processor, job: dict, case: dict, callback):
    """SFTTrainer with Unsloth's collator of pictures."""
    from trl import SFTConfig, SFTTrainer
    from unsloth.trainer import UnslothVisionDataCollator

    rows = case["batch"] * job["accumulation"] * case["steps"]
    vocab_size = model.config.text_config.vocab_size
    collate, counts = UnslothVisionDataCollator(model, processor), []

    def counted(examples):
        batch = collate(examples)
        counts.append(int(batch["attention_mask"].sum()))
        return batch

    trainer = SFTTrainer(
        model = model,
        processing_class = processor.tokenizer,
        train_dataset = conversations(rows, case, job, vocab_size),
        data_collator = counted,
        args = SFTConfig(
            max_length = job["longest"],
            remove_unused_columns = False,
            dataset_kwargs = {"skip_prepare_dataset": True},
            **settings(job, case),
        ),
        callbacks = [callback],
    )
    trainer.rows_tokens = counts
    return trainer


if __name__ == "__main__":
    steps_worker.main(load, trainer_for)
