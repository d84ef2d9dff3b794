# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Small random-weight LoRA models on Unsloth's fast path. Without a GPU, torch forms stand for the
Triton kernels of norm, rotation and activation."""

import sys
from types import SimpleNamespace

import torch
import torch.utils.checkpoint
from backend import DEVICE
from fast_models import (
    PROJECTIONS,
    _build_rope_cache,
    _norm,
    _norm_and_rope,
    _rope,
    _UnslothCheckpoint,
)
from torch.nn import functional as F

VOCABULARY, LONGEST, RANK = 96, 1024, 4


def _fast_inner_training_loop(self, *args, **kwargs):
    raise NotImplementedError("these models run in no Trainer")


def stand_in_for_kernels(patch):
    """Replaces what loading a model does, and without a GPU the kernels, by ``patch`` (a MonkeyPatch)."""
    from transformers.trainer import Trainer
    from unsloth.kernels import fast_lora, swiglu
    from unsloth.models import llama

    if Trainer._inner_training_loop.__name__ != "_fast_inner_training_loop":
        patch.setattr(Trainer, "_inner_training_loop", _fast_inner_training_loop)
    patch.setattr(torch.utils.checkpoint, "CheckpointFunction", _UnslothCheckpoint)
    patch.setattr(llama, "gc", SimpleNamespace(collect = lambda: 0))  # three a model, a second each
    if DEVICE != "cpu":
        return
    stand_ins = {
        "fast_rms_layernorm": _norm,
        "fast_rope_embedding": _rope,
        "fast_qk_norm_rope": _norm_and_rope,
    }
    for name, module in list(sys.modules.items()):
        for attribute, function in stand_ins.items():
            if name.startswith("unsloth.models") and hasattr(module, attribute):
                patch.setattr(module, attribute, function)
    patch.setattr(fast_lora, "swiglu_fg_kernel", lambda e, g: F.silu(e.float()).to(e.dtype) * g)
    patch.setattr(fast_lora, "swiglu_DWf_DW_dfg_kernel", swiglu._DWf_DW_dfg_traced)
    patch.setattr(llama, "DEVICE_COUNT", 1)
    patch.setattr(llama._PerDeviceRopeCache, "_build_rope_cache", _build_rope_cache)


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
