# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Small Llama, Mistral, Qwen2 and Qwen3 models on Unsloth's fast path, blocks compiled, and training steps.

Without a GPU the blocks are traced with PyTorch stand-ins for the Triton kernels, whose launches
Dynamo cannot trace there; everything else is Unsloth's own forward pass, and graphs run through
aot_eager. A test file that takes the fixture ``build`` imports ``unsloth_modules`` too.
"""

import contextlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import torch.utils.checkpoint
from backend import DEVICE
from small_models import VOCABULARY, add_lora, base_model
from torch._dynamo.utils import counters

torch.set_num_threads(1)
HEAD_DIM, LAYERS = 16, 4
# Without a GPU a step of these takes a tenth of a second.
LONGEST, MOST_TOKENS, STEPS = (4096, 200, 40) if DEVICE == "cuda" else (256, 40, 16)
# Of products whose width is no multiple of 8, Inductor asks on a GPU whether padding pays, which
# makes a graph for each range of lengths between the layer's widths.
RANK = 8
# alpha / r: 0.5, 1, 2, 4. Powers of two scale without rounding.
SCALES = {rf".*layers\.{layer}\..*": RANK * 2.0 ** (layer - 1) for layer in range(LAYERS)}


# --------------------------------------------------------------- what stands in for a GPU


def _norm(module, X, *unused, **unused_too):
    x = X.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim = True) + module.variance_epsilon)
    return module.weight * x.to(X.dtype)


def _rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _rope(
    Q,
    K,
    cos,
    sin,
    position_ids = None,
):  # fmt: skip
    if position_ids is None:
        cos, sin = cos[: Q.shape[-2]], sin[: Q.shape[-2]]
    else:
        cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    return _rotate(Q, cos, sin), _rotate(K, cos, sin)


def _norm_and_rope(
    q_norm,
    k_norm,
    Q,
    K,
    cos,
    sin,
    position_ids = None,
):  # fmt: skip
    Q, K = _norm(q_norm, Q).transpose(1, 2), _norm(k_norm, K).transpose(1, 2)
    return _rope(Q, K, cos, sin, position_ids)


def _dequantize(
    W,
    quant_state,
    out = None,
    use_global_buffer = False,
    dtype = None,
):  # fmt: skip
    if quant_state is None:
        return W
    from bitsandbytes.functional import dequantize_4bit

    transposed = W.shape[0] == 1
    dense = dequantize_4bit(W.t() if transposed else W, quant_state)
    dense = dense if dtype is None else dense.to(dtype)
    return dense.t() if transposed else dense


def _varlen(
    Q,
    K,
    V,
    offsets,
    longest,
    scale = None,
    window = None,
):
    token = torch.arange(Q.shape[0])
    document = (token[:, None] >= offsets[None, :]).sum(1)
    seen = (document[:, None] == document[None, :]) & (token[:, None] >= token[None, :])
    if window is not None:
        seen &= token[:, None] - token[None, :] < window
    K, V = (x.repeat_interleave(Q.shape[1] // K.shape[1], dim = 1) for x in (K, V))
    heads_first = (x.transpose(0, 1)[None] for x in (Q, K, V))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask = seen, scale = scale)
    return out[0].transpose(0, 1)


def _eager_varlen(Q, K, V, offsets, longest, *, scale, window_size, enable_gqa):
    return _varlen(Q, K, V, offsets, longest, scale, window_size[0] + 1 or None)


def _build_rope_cache(self, device_index):
    size = self.current_rope_size
    self._set_cos_sin_cache(
        seq_len = self._rope_cache_rows(),
        device = torch.device("cpu", 0),
        dtype = self._rope_cache_dtype,
    )
    self.current_rope_size = size
    self._rope_cache_versions[0] = self._rope_cache_version
    if hasattr(self, "_mark_rope_build"):  # Unsloth 2026.10.9 and newer
        self._mark_rope_build(0)


class _UnslothCheckpoint:
    """What stands behind torch's checkpoint once a model was loaded for checkpointing."""

    @staticmethod
    def apply(function, preserve_rng_state, *arguments):
        from unsloth_zoo.gradient_checkpointing import unsloth_gradient_checkpoint
        return unsloth_gradient_checkpoint(function, *arguments)


def _stand_in_for_flash(patch):
    try:
        from unsloth.utils import packed_attention
    except ImportError:  # that patch is not in
        return
    patch.setattr(packed_attention, "flash_varlen", _varlen)
    patch.setattr(packed_attention, "_varlen_runs", lambda *arguments: True)


def _fast_inner_training_loop(self, *args, **kwargs):
    raise NotImplementedError("these tests run no Trainer")


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
    if hasattr(llama, "_PerDeviceRopeCache"):  # Unsloth 2026.10.7 and newer
        patch.setattr(llama._PerDeviceRopeCache, "_build_rope_cache", _build_rope_cache)


@pytest.fixture(scope = "module")
def unsloth_modules():
    """Unsloth's modules; without a GPU with traceable stand-ins for its kernels."""
    from unsloth.kernels import fast_lora
    from unsloth.models import _block_compile, llama
    from unsloth.utils import attention_dispatch

    patch = pytest.MonkeyPatch()
    stand_in_for_kernels(patch)
    if DEVICE == "cpu":
        for module in (fast_lora, sys.modules["unsloth.kernels.utils"]):
            patch.setattr(module, "fast_dequantize", _dequantize)
        # Not in releases before 2026.10.9.
        patch.setattr(attention_dispatch, "_varlen_attn_call", _eager_varlen, raising = False)
        _stand_in_for_flash(patch)
        for name in ("_torch_varlen_takes", "_torch_varlen_beats_segments"):
            patch.setattr(attention_dispatch, name, lambda *arguments: True)
    yield SimpleNamespace(blocks = _block_compile, llama = llama)
    patch.undo()


@pytest.fixture
def build(unsloth_modules, monkeypatch):
    """build(family, ...) -> a small LoRA model on Unsloth's fast path, blocks compiled."""
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "1")
    monkeypatch.delenv("UNSLOTH_COMPILE_DISABLE", raising = False)
    torch._dynamo.reset()
    counters.clear()
    yield lambda family = "llama", **options: _build(unsloth_modules, monkeypatch, family, **options)
    torch._dynamo.reset()


def _build(
    modules,
    monkeypatch,
    family,
    bits = 16,
    checkpointing = False,
    backend = "aot_eager",
    **lora,
):
    if sys.modules["unsloth"].__version__ < "2026.10.8":
        pytest.skip("this Unsloth compiles no blocks of these families")
    model = base_model(family, LAYERS, (64, 96), torch.bfloat16, LONGEST, HEAD_DIM)
    if DEVICE == "cpu":  # a CPU has no device index, by which the RoPE cache is kept
        monkeypatch.setattr(modules.llama, "get_current_device", lambda: 0)
    if bits == 4:
        _quantize(model)
    model = add_lora(model, rank = RANK, **lora)
    with _as_on_a_gpu(modules.blocks, monkeypatch, backend):
        model = modules.llama.FastLlamaModel.patch_peft_model(model, checkpointing)
    assert getattr(type(get_layers(model)[0]).forward, modules.blocks._MARK, False)
    modules.llama.FastLlamaModel.for_training(model, use_gradient_checkpointing = checkpointing)
    return model


def _quantize(model):
    import bitsandbytes as bnb
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                quantized = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias = linear.bias is not None,
                    compute_dtype = torch.bfloat16,
                    quant_type = "nf4",
                )
                quantized.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad = False, quant_type = "nf4"
                )
                quantized.bias = linear.bias
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, quantized.to(DEVICE))


@contextlib.contextmanager
def _as_on_a_gpu(blocks, monkeypatch, backend):
    """Blocks are compiled only where there is a GPU; here by a backend that takes no options."""
    compile_for_real, patch_for_real = torch.compile, blocks.patch_block_compile

    def compile(
        function,
        options = None,
        **settings,
    ):  # fmt: skip
        return compile_for_real(function, backend = backend, **settings)

    def patch_block_compile(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compile)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return patch_for_real(model)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "patch_block_compile", patch_block_compile)
        yield


# ------------------------------------------------------------------------------------ steps


def get_layers(model):
    return model.base_model.model.model.layers


def step(
    model,
    rows,
    length,
    seed = 0,
    documents = 1,
):  # fmt: skip
    """(losses of the tokens, gradients of their mean) of one training step on random tokens, without the
    head's loss kernels.

    documents: rows become one row of so many documents each, packed as SFTTrainer packs.
    """
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator = make).to(DEVICE)
    extra = {}
    if documents > 1:
        ids = ids.reshape(1, -1)
        extra = packed(ids.shape[1], documents)
    hidden = model.base_model.model.model(input_ids = ids, **extra).last_hidden_state
    logits = (hidden @ model.get_input_embeddings().weight.t()).float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction = "none")
    if torch.is_grad_enabled():
        losses.mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none = True)
    return losses.detach(), gradients


def packed(total, documents):
    """Lengths that differ, and positions that start anew with each document."""
    lengths = [total // documents] * documents
    lengths[0], lengths[-1] = lengths[0] - 1, total - sum(lengths[:-1]) + 1
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {
        "packed_seq_lengths": torch.tensor(lengths, dtype = torch.int32),
        "position_ids": positions[None].to(DEVICE),
    }


@contextlib.contextmanager
def eager_blocks(model):
    """The blocks of ``model`` uncompiled, as if Unsloth had demoted them."""
    states = [layer.__dict__.get("_unsloth_block_mode") for layer in get_layers(model)]
    for layer in get_layers(model):
        layer.__dict__["_unsloth_block_mode"] = 0
    try:
        yield
    finally:
        for layer, state in zip(get_layers(model), states):
            layer.__dict__["_unsloth_block_mode"] = state


def eager(model, *arguments, **options):
    """The same step with block compile switched off."""
    os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
    try:
        return step(model, *arguments, **options)
    finally:
        os.environ["UNSLOTH_BLOCK_COMPILE"] = "1"


def graphs():
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def assert_bit_equal(ours, reference):
    assert torch.equal(ours[0], reference[0])
    assert len(ours[1]) == len(reference[1]) > 0
    for a, b in zip(ours[1], reference[1]):
        assert torch.equal(a, b)


def in_place(module, place, name):
    """Whether this module, which is there where its patch is skipped, too, decorates a function."""
    function = getattr(place, name, None)
    while function and not function.__globals__["__name__"].endswith(f".{module}"):
        function = getattr(function, "__wrapped__", None)
    return function is not None


def shares_graph_between_runs():
    """Whether both runs of a checkpoint take one graph."""
    from unsloth.models import _block_compile
    return in_place("checkpoint_shared_graph", _block_compile, "_wrap")


def many_steps(build, family, bits, checkpointing, packing):
    """Train a model and return it: batches of 1 to 4 rows, 5 to LONGEST tokens, four LoRA scales, an evaluation after step 13.

    One graph for one row and one for more, twice where a checkpoint's two runs have one each. Packed,
    every batch is one row, with position ids. Qwen2's q, k and v run PEFT's forward: one graph more.
    """
    from unsloth.models import _block_compile, llama

    # Going on through AOTAutograd, as other tests do, takes as long again. So do batches of one row.
    fewest = 2 if DEVICE == "cpu" and not packing and family != "llama" else 1
    scaled = in_place("compile_lora_scales", llama, "_legacy_block_compile")
    scales = {"alpha_pattern": SCALES} if scaled else {}
    model = build(family, bits = bits, checkpointing = checkpointing, backend = "eager", **scales)
    runs = 2 if checkpointing and not shares_graph_between_runs() else 1
    kinds = 1 if packing or fewest == 2 else 2
    if not packing and not hasattr(_block_compile, "_mark_batch_dynamic"):
        kinds += 1  # before 2026.10.9 the first batch's rows are a constant of its graph
    most = (2 if family == "qwen2" else 1) * runs * kinds
    any_length = in_place("compile_rope_tables", _block_compile, "_mark_seq_dynamic")
    shortest = 5 if any_length else HEAD_DIM + 1
    make = torch.Generator().manual_seed(0)
    for index in range(STEPS):
        rows = max(1 + (index + 1) % 4, fewest)
        length = int(torch.randint(5, 201, (), generator = make))
        length = HEAD_DIM if index in (7, 8) else min(length, 63 if packing else MOST_TOKENS)
        length = {10: LONGEST // 6, 11: LONGEST - 1, 15: LONGEST // 3}.get(index, length)
        length = max(length, shortest)
        documents = 2 + index % 3 if packing else 1
        losses, _ = step(model, rows, length, index, documents)
        assert 0 < graphs() <= most, f"step {index}: {rows} x {length}"
        if index == 13:
            model.eval()
            with torch.no_grad():
                step(model, 2, 50)
            model.train()
        if index in (0, 9) and DEVICE == "cpu":
            assert torch.equal(losses, eager(model, rows, length, index, documents)[0])
    assert all(x.__dict__["_unsloth_block_mode"] == 1 for x in get_layers(model)), "demoted"
    return model
