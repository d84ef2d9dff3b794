# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""FastModel's models: the forwards that unsloth_zoo's compiler writes, beside plain transformers."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require

require("interpreter")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)

VOCAB = 64
SIZE = dict(
    vocab_size = VOCAB,
    hidden_size = 16,
    intermediate_size = 16,
    num_hidden_layers = 1,
    num_attention_heads = 2,
    num_key_value_heads = 2,
    # Logits large enough that every option moves the loss far more than rounding does.
    initializer_range = 0.5,
    pad_token_id = 0,
    bos_token_id = 1,
    eos_token_id = 2,
)
EXPERTS = dict(num_experts_per_tok = 2, output_router_logits = False)


def qwen2_5_vl(transformers):
    rope = {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = dict(depth = 1, hidden_size = 16, intermediate_size = 16, num_heads = 2, out_hidden_size = 16)
    return transformers.Qwen2_5_VLConfig(
        text_config = {**SIZE, "rope_scaling": rope},
        vision_config = vision,
        **{name: VOCAB - 1 - number for number, name in enumerate(tokens)},
    )


# Module of transformers: class, configuration.
FAMILIES = {
    "gemma3": (
        "Gemma3ForCausalLM",
        lambda t: t.Gemma3TextConfig(**SIZE, head_dim = 8, final_logit_softcapping = 2.0),
    ),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        lambda t: t.Qwen3MoeConfig(
            **SIZE, **EXPERTS, head_dim = 8, num_experts = 4, moe_intermediate_size = 8
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        lambda t: t.GptOssConfig(**SIZE, **EXPERTS, head_dim = 8, num_local_experts = 4),
    ),
    "granite": ("GraniteForCausalLM", lambda t: t.GraniteConfig(**SIZE, logits_scaling = 4.0)),
    "cohere": ("CohereForCausalLM", lambda t: t.CohereConfig(**SIZE, logit_scale = 0.25)),
    "phi3": ("Phi3ForCausalLM", lambda t: t.Phi3Config(**SIZE)),
}


@pytest.fixture(params = list(FAMILIES))
def models(request, monkeypatch, tmp_path):
    """(a model of the compiled class, as FastModel loads it; plain transformers' with its weights)."""
    import transformers
    from unsloth.models import vision
    from unsloth.models._utils import unsloth_compile_transformers

    # "1" leaves out the written forwards too before 2026.10.9.
    monkeypatch.setenv("UNSLOTH_COMPILE_DISABLE", "partial")
    monkeypatch.chdir(tmp_path)  # where the compiler writes
    name, config = FAMILIES[request.param]
    module = importlib.import_module(
        f"transformers.models.{request.param}.modeling_{request.param}"
    )
    before = dict(vars(module))
    forwards = {kind: kind.forward for kind in before.values() if "forward" in vars_of(kind)}
    config = config(transformers)
    torch.manual_seed(0)
    plain = before[name](config).to(DEVICE)
    plain.forward = forwards[before[name]].__get__(plain)
    try:
        unsloth_compile_transformers(
            torch.float32,
            request.param,
            [request.param],
            fast_residual_stream = False,
            fast_lora_forwards = False,
        )
        model = getattr(module, name)(config).to(DEVICE)
        model.load_state_dict(plain.state_dict())
        # Stock compiles some attentions all the same, which are not under test.
        with torch.compiler.set_stance("force_eager"):
            yield vision.post_patch_loss_function(model), plain
    finally:
        for added in vars(module).keys() - before.keys():
            delattr(module, added)
        vars(module).update(before)
        for kind, forward in forwards.items():
            kind.forward = forward


def vars_of(kind):
    return vars(kind) if isinstance(kind, type) else {}


def batch():
    make = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB - 8, (2, 9), generator = make).to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def dense_loss(plain, arguments, **options):
    """Cross entropy of plain transformers' logits, which stay in the graph."""
    arguments = dict(arguments)
    labels = arguments.pop("labels")
    logits = plain(**arguments).logits[:, :-1].reshape(-1, VOCAB).float()
    return logits, F.cross_entropy(logits, labels[:, 1:].reshape(-1), **options)


def test_a_compiled_forward_takes_the_loss_and_its_options(models, monkeypatch):
    """Losses and gradients of the model's inputs and head: plain, by arguments, and set once.

    With UNSLOTH_RETURN_LOGITS=1 the loss comes from the logits; a setting of the stock loss refuses.
    """
    from unsloth.fused_loss import calls, set_loss_options

    model, plain = models
    arguments = batch()
    weight = torch.linspace(0.1, 2.0, VOCAB, device = DEVICE)
    before = calls().get("fused", 0)

    def compare(found, expected):
        torch.testing.assert_close(found.float(), expected, rtol = 1e-4, atol = 1e-4)
        model.zero_grad()
        plain.zero_grad()
        found.backward()
        expected.backward()
        for part in ("get_input_embeddings", "get_output_embeddings"):
            got, wanted = (getattr(m, part)().weight.grad for m in (model, plain))
            torch.testing.assert_close(got, wanted, rtol = 1e-3, atol = 1e-5)

    compare(model(**arguments).loss, dense_loss(plain, arguments)[1])
    logits, expected = dense_loss(plain, arguments, weight = weight, label_smoothing = 0.2)
    keep = arguments["labels"][:, 1:].reshape(-1) != -100
    expected = expected + 0.1 * logits[keep].logsumexp(1).square().mean()
    options = {"class_weight": weight, "label_smoothing": 0.2, "z_loss": 0.1}
    compare(model(**arguments, **options).loss, expected)
    assert calls()["fused"] - before == 2
    set_loss_options(model, **options)
    again = dense_loss(plain, arguments, weight = weight, label_smoothing = 0.2)[1]
    square = 0.1 * logits[keep].logsumexp(1).square().mean().item()
    assert model(**arguments).loss.item() == pytest.approx(again.item() + square, rel = 1e-4)
    with pytest.raises(TypeError, match = "'class_weights' would be ignored; 'class_weight'"):
        model(**arguments, class_weights = weight)
    each = model(**arguments, reduction = "none", z_loss = 0.0, class_weight = weight).loss
    assert each.shape == (2, 9) and not each[:, -1].any()
    set_loss_options(model, reset = True)
    expected = dense_loss(plain, arguments, label_smoothing = 0.3)[1].item()
    monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "1")
    outputs = model(**arguments, label_smoothing = 0.3)
    assert outputs.loss.item() == pytest.approx(expected, rel = 1e-4)
    assert outputs.logits.shape == (2, 9, VOCAB)
    monkeypatch.delenv("UNSLOTH_RETURN_LOGITS")
    monkeypatch.setenv("UNSLOTH_CE_LOSS_TARGET_GB", "1")
    with pytest.raises(NotImplementedError, match = "z_loss cannot be honoured .*memory target"):
        model(**arguments, z_loss = 0.1)


def test_a_forward_with_another_loss_takes_options_from_its_logits():
    """The first call finds out; both have the options' loss."""
    import transformers
    from unsloth import fused_loss

    name, config = FAMILIES["granite"]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(transformers)).to(DEVICE)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.float().mean()
    arguments = batch()
    expected = dense_loss(model, arguments, label_smoothing = 0.3)[1].item()
    fused_loss.take_options_from_logits(model, computes_loss = lambda model: None)
    for _ in range(2):
        found = model(**arguments, label_smoothing = 0.3).loss.item()
        assert found == pytest.approx(expected, rel = 1e-4)


def test_an_encoder_with_a_decoder_is_refused():
    """T5's and Whisper's labels are in their places; options would shift them."""
    from transformers import T5Config, T5ForConditionalGeneration
    from unsloth.fused_loss import set_loss_options

    size = dict(vocab_size = 32, d_model = 16, d_kv = 8, d_ff = 16, num_layers = 1, num_heads = 2)
    with pytest.raises(ValueError, match = "no causal language model"):
        set_loss_options(T5ForConditionalGeneration(T5Config(**size)), z_loss = 0.1)
