# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What QLoRA training holds on a GPU, counted from a model's sizes; what cannot be counted is
refused.
"""

import json

import pytest
from llama_shapes import GIB, LLAMA_8B, LLAMA_405B


@pytest.fixture
def read_shape(monkeypatch):
    import unsloth  # noqa: F401

    # Without a GPU the first to import unsloth.models; rewriting TRL's trainers would take ten seconds.
    with monkeypatch.context() as patch:
        patch.setenv("UNSLOTH_ALLOW_CPU", "1")
        from unsloth.models.fsdp2_model_shape import read_shape
    return read_shape


def test_parameters_are_those_of_the_published_models(read_shape):
    """The shape that is read from a config has Meta's parameter counts."""
    assert read_shape(LLAMA_8B).parameters == 8_030_261_248
    assert read_shape(LLAMA_405B).parameters == 405_853_388_800


def test_config_from_a_file_an_object_and_a_nested_dict(read_shape, tmp_path):
    """A folder, a config.json, a transformers config and a config with text_config read alike."""
    from transformers import LlamaConfig

    shape = read_shape(LLAMA_8B)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding = "utf-8")
    sources = [
        tmp_path,
        str(tmp_path / "config.json"),
        LlamaConfig(**LLAMA_8B),
        {"text_config": LLAMA_8B},
    ]
    assert all(read_shape(source) == shape for source in sources)


def test_models_it_does_not_know_are_refused(read_shape, tmp_path):
    """A mixture of experts or a config without sizes is an error, not a wrong count."""
    with pytest.raises(ValueError, match = "num_local_experts"):
        read_shape({**LLAMA_8B, "num_local_experts": 8})
    with pytest.raises(ValueError, match = "hidden_size"):
        read_shape({"vocab_size": 5})
    with pytest.raises(ValueError, match = "no config at"):
        read_shape("/nowhere/at/all")
    (tmp_path / "config.json").write_text('{"hidden_size": 64', encoding = "utf-8")
    with pytest.raises(ValueError, match = "config.json is not JSON"):
        read_shape(tmp_path)
    with pytest.raises(ValueError, match = "cannot read a config from int; give a model"):
        read_shape(8)


@pytest.mark.parametrize("source", ["dict", "object"])
def test_encoders_are_refused(read_shape, source):
    """An encoder has a decoder's sizes, and no count of a decoder's training holds for it."""
    from transformers import BertConfig, T5Config

    bert = BertConfig(architectures = ["BertForMaskedLM"])
    with pytest.raises(ValueError, match = "'bert'.*not known to be a decoder"):
        read_shape(bert.to_dict() if source == "dict" else bert)
    with pytest.raises(ValueError, match = "'t5'"):
        read_shape(T5Config(architectures = ["T5ForConditionalGeneration"]))


def test_what_a_count_assumes_or_leaves_out_is_noted(read_shape):
    """A decoder of another kind is counted as a Llama, and of a model with a vision tower the
    language part only; both are said. A Llama has nothing to say.
    """
    other = {**LLAMA_8B, "model_type": "newlm", "architectures": ["NewLMForCausalLM"]}
    assert "'newlm'" in read_shape(other).notes[0]
    vision = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**LLAMA_8B, "model_type": "llama"},
        "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24},
        "quantization_config": {"load_in_4bit": True},
    }
    (note,) = read_shape(vision).notes
    assert "vision_config" in note and "quantization_config" not in note
    assert read_shape({**LLAMA_8B, "model_type": "llama"}).notes == ()


def test_the_last_backward_holds_all_gradients(read_shape):
    """Every gradient of the adapter is there at the end of a backward: the phase that holds most
    where the rank is large. While gradients accumulate they are there in every phase of a step.
    """
    from unsloth.models.fsdp2_memory_count import Training, largest_phase, sharded_phases

    shape, last = read_shape(LLAMA_8B), "last block's backward"
    job = Training(world = 2, tokens = 16, lora_rank = 1024)
    phases, _ = sharded_phases(shape, job)
    factors = 1024 * sum(sum(sizes) for sizes in shape.linears.values())
    gradients = ("LoRA gradients", 32 * factors * 4 // 2)
    assert gradients in phases[last] and gradients not in phases["first block's backward"]
    assert largest_phase(phases)[0] == last
    several, _ = sharded_phases(
        shape, Training(world = 2, tokens = 16, lora_rank = 1024, accumulates = True)
    )
    assert all(gradients in lines for phase, lines in several.items() if phase != "wrap")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"world": 0}, "world = 0"),
        ({"tokens": -1}, "tokens = -1"),
        ({"lora_rank": 1.5}, "lora_rank = 1.5"),
        ({"lora_targets": ("up",)}, "'up'"),
        ({"checkpointing": "maybe"}, "'maybe'"),
    ],
)
def test_bad_values_of_a_training_are_named(read_shape, changes, words):
    """Every value that cannot be counted raises an error that names it."""
    from unsloth.models.fsdp2_memory_count import Training
    with pytest.raises(ValueError, match = words):
        Training(**{"world": 2, "tokens": 64, **changes})


def test_what_cannot_be_measured_or_counted_is_named(monkeypatch):
    """No GPU; tokens of a batch that are none."""
    import torch
    import unsloth  # noqa: F401
    from unsloth.models import fsdp2_load_choice as choice
    from unsloth.models.fsdp2_memory_count import usable_device_memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match = "no CUDA device to measure; pass device_memory"):
        usable_device_memory()
    for value in ("many", "0", "-1", "1.5"):
        monkeypatch.setenv(choice.TOKENS_ENV, value)
        with pytest.raises(ValueError, match = f"='{value}': has to be a positive whole number"):
            choice._batch_tokens({})
    monkeypatch.setenv(choice.TOKENS_ENV, "12")
    assert choice._batch_tokens({"max_seq_length": 99}) == 12


def test_usable_memory_is_free_and_under_the_fraction(monkeypatch):
    """Free memory plus what torch holds, under the memory fraction, less a reserve; before a load
    also less what is allocated for something else.
    """
    import torch
    import unsloth  # noqa: F401
    from unsloth.models.fsdp2_memory_count import usable_device_memory

    seen = {"free": 40 * GIB, "reserved": 10 * GIB, "allocated": 4 * GIB, "fraction": 1.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (seen["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: seen["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: seen["allocated"])
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda _: seen["fraction"], raising = False
    )
    assert usable_device_memory() == 50 * GIB
    assert usable_device_memory(reserve = GIB) == 49 * GIB
    assert usable_device_memory(fresh = True) == 46 * GIB
    seen["fraction"] = 0.25
    assert usable_device_memory() == 20 * GIB
    assert usable_device_memory(fresh = True) == 16 * GIB


@pytest.mark.parametrize("tied", [False, True])
def test_tables_and_checkpoint_buffers_are_whole_bytes_counted_by_hand(read_shape, tied):
    """Embedding, head and last norm in 16 bits; at most Unsloth's buffers, and those of its
    checkpoints alone.
    """
    from unsloth.models.fsdp2_memory_count import UNSLOTH_BUFFERS, Training, sharded_phases

    shape = read_shape({**LLAMA_8B, "tie_word_embeddings": tied})
    tables = ((1 if tied else 2) * 128256 + 1) * 4096 * 2
    for checkpointing in ("unsloth", True, False):
        job = Training(world = 2, tokens = 64, checkpointing = checkpointing)
        phases, _ = sharded_phases(shape, job)
        lines = dict(phases["gather of the tables"])
        assert lines["frozen embedding and head, shard"] == tables // 2
        assert lines["embedding and head, gathered and flat"] == 2 * tables
        buffers = UNSLOTH_BUFFERS * 64 * 4096 * 2 if checkpointing == "unsloth" else 0
        assert lines["buffers of offloaded checkpoints"] == buffers


@pytest.mark.parametrize("nested", [True, False])
def test_bytes_of_a_weight_are_bitsandbytes_own(nested):
    """Packed numbers, scales, and the scales' own."""
    import torch
    import unsloth  # noqa: F401
    from bitsandbytes.functional import quantize_4bit
    from unsloth.models.fsdp2_memory_count import weight_bytes

    packed, state = quantize_4bit(
        torch.randn(512, 512), compress_statistics = nested, quant_type = "nf4"
    )
    scales = [state.absmax, *([state.state2.absmax] if nested else [])]
    assert weight_bytes(512 * 512, nested) == sum(part.nbytes for part in (packed, *scales))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_of_llama_8b_is_counted_as_by_hand(read_shape, checkpointing):
    """Two ranks, 64 tokens in 16 bits, LoRA of rank 16: every line that is no table's."""
    from unsloth.models import fsdp2_memory_count as count

    hidden, wide, layers = 4096, 14336, 32
    linears = 2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * wide
    lora = 16 * (2 * 2 * hidden + 2 * (hidden + 1024) + 3 * (hidden + wide))
    block = count.weight_bytes(linears, True) + 2 * 2 * hidden + 2 * lora
    row, saved = 64 * 2, 4 * hidden + 4 * hidden + 2 * wide
    job = count.Training(world = 2, tokens = 64, checkpointing = checkpointing)
    phases, _ = count.sharded_phases(read_shape(LLAMA_8B), job)
    backward = dict(phases["first block's backward"])
    in_flight = 3 if checkpointing else 2  # the flat buffer, the block, the next one's buffer
    assert backward["gathered blocks in flight"] == in_flight * block
    kept = layers * hidden if checkpointing else (layers - 1) * saved
    assert backward["activations"] == row * (kept + saved + hidden + wide)
    assert backward["dequantized weight and workspaces"] == 2 * hidden * wide + 2 * 32 * 2**20
    assert backward["LoRA and Adam, float32"] == layers * lora * (4 + 8) // 2
    alone, _ = count.sharded_phases(read_shape(LLAMA_8B), count.Training(world = 1, tokens = 64))
    assert dict(alone["loss"])["gathered blocks in flight"] == 0
    few = read_shape({**LLAMA_8B, "num_hidden_layers": 1})
    assert dict(count.sharded_phases(few, job)[0]["loss"])["gathered blocks in flight"] == block
    whole = dict(count.whole_model_phases(read_shape(LLAMA_8B), job)["loss"])
    adapter = layers * lora * (4 + 8) // 2 + layers * lora * (4 + 4)
    assert whole["LoRA, gradients and Adam, float32"] == adapter
