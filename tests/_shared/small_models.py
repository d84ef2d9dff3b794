# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Small random-weight LoRA models on Unsloth's fast path. Without a GPU, torch forms stand for the
Triton kernels of norm, rotation and activation."""

import torch
import torch.utils.checkpoint
from backend import DEVICE
from fast_models import PROJECTIONS, stand_in_for_kernels  # noqa: F401

VOCABULARY, LONGEST, RANK = 96, 1024, 4


def small_model(
    family,
    checkpointing = "unsloth",
    dtype = torch.float32,
    layers = 2,
    adapters = ("default",),
    **lora,
):
    """A PEFT model of ``layers`` blocks with LoRA on all projections, on Unsloth's fast path."""
    from peft import LoraConfig, get_peft_model
    from unsloth.models import llama, mistral, qwen2, qwen3

    fast = {
        "llama": llama.FastLlamaModel,
        "mistral": mistral.FastMistralModel,
        "qwen2": qwen2.FastQwen2Model,
        "qwen3": qwen3.FastQwen3Model,
    }
    fast[family].pre_patch()
    torch.manual_seed(0)
    device_of = llama.get_current_device
    if DEVICE == "cpu":  # a CPU has no device index, by which the RoPE cache is kept
        llama.get_current_device = lambda: "cpu"
    try:
        model = _base(family, dtype, layers)
    finally:
        llama.get_current_device = device_of
    if DEVICE == "cpu":
        llama.get_current_device = lambda: 0
    lora = {"r": RANK, "lora_alpha": RANK, "target_modules": PROJECTIONS, **lora}
    config = LoraConfig(task_type = "CAUSAL_LM", init_lora_weights = False, **lora)
    model = get_peft_model(model, config, adapter_name = adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() * 0.1
    model = llama.FastLlamaModel.patch_peft_model(model, checkpointing)
    llama.FastLlamaModel.for_training(model, use_gradient_checkpointing = checkpointing)
    return model


def _base(family, dtype, layers):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size = VOCABULARY,
        hidden_size = 32,
        intermediate_size = 48,
        num_hidden_layers = layers,
        num_attention_heads = 4,
        num_key_value_heads = 2,
        head_dim = 16,
        max_position_embeddings = LONGEST,
        pad_token_id = 0,
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(config).to(DEVICE)
    finally:
        torch.set_default_dtype(default)
    model.max_seq_length = LONGEST
    for layer in model.model.layers:
        layer.self_attn.__dict__.setdefault("rotary_emb", model.model.rotary_emb)
    return model
