# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Small random-weight Llama, Mistral, Qwen2, Qwen3 and Gemma models with LoRA, on Unsloth's fast path."""

import torch
import torch.utils.checkpoint
from backend import DEVICE

VOCABULARY = 96
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fast_classes():
    """Family -> Unsloth's class of it."""
    from unsloth.models import gemma, llama, mistral, qwen2, qwen3
    return {
        "llama": llama.FastLlamaModel,
        "mistral": mistral.FastMistralModel,
        "qwen2": qwen2.FastQwen2Model,
        "qwen3": qwen3.FastQwen3Model,
        "gemma": gemma.FastGemmaModel,
    }


def base_model(
    family,
    layers,
    sizes = (32, 48),
    dtype = torch.float32,
    longest = 1024,
    head_dim = 16,
):
    """A model of ``layers`` blocks, whose hidden states and MLP have these sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from unsloth.models import llama

    fast_classes()[family].pre_patch()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size = VOCABULARY,
        hidden_size = sizes[0],
        intermediate_size = sizes[1],
        num_hidden_layers = layers,
        num_attention_heads = 4,
        num_key_value_heads = 2,
        head_dim = head_dim,
        max_position_embeddings = longest,
        pad_token_id = 0,
    )
    config._attn_implementation = "sdpa"
    default, device_of = torch.get_default_dtype(), llama.get_current_device
    torch.set_default_dtype(dtype)
    if DEVICE == "cpu":  # a CPU has no device index, by which the RoPE cache is kept
        llama.get_current_device = lambda: "cpu"
    try:
        model = AutoModelForCausalLM.from_config(config).to(DEVICE)
    finally:
        torch.set_default_dtype(default)
        llama.get_current_device = device_of
    model.max_seq_length = longest
    for layer in model.model.layers:
        layer.self_attn.__dict__.setdefault("rotary_emb", model.model.rotary_emb)
    return model


def add_lora(
    model,
    adapters = ("default",),
    rank = 4,
    **settings,
):
    """A PEFT model with small random float32 adapters on all projections."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": rank, "lora_alpha": rank, "target_modules": PROJECTIONS, **settings}
    config = LoraConfig(task_type = "CAUSAL_LM", init_lora_weights = False, **settings)
    model = get_peft_model(model, config, adapter_name = adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() * 0.1
    return model


def small_model(
    family,
    checkpointing = "unsloth",
    dtype = torch.float32,
    layers = 2,
    adapters = ("default",),
    **lora,
):
    """A PEFT model of ``layers`` blocks, patched and ready to train."""
    from unsloth.models import llama

    model = add_lora(base_model(family, layers, dtype = dtype), adapters, **lora)
    if DEVICE == "cpu":
        llama.get_current_device = lambda: 0
    model = llama.FastLlamaModel.patch_peft_model(model, checkpointing)
    llama.FastLlamaModel.for_training(model, use_gradient_checkpointing = checkpointing)
    return model
