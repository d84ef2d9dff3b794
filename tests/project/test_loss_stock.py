# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""stock() means the stock loss, also for models that were loaded before and have options."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("unsloth_zoo") is None, reason = "needs Unsloth")


def test_stock_is_stock_for_a_model_that_was_loaded_before(with_patched_unsloth):
    code = """
        import unsloth_patches
        import unsloth, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from unsloth_zoo.cpu.loader import patch_chunked_causal_lm_loss
        from unsloth.fused_loss import set_loss_options

        torch.manual_seed(0)
        size = dict(vocab_size = 48, hidden_size = 16, intermediate_size = 16, num_hidden_layers = 1)
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads = 2, **size))
        tokens = torch.randint(0, 48, (1, 9))
        plain = model(input_ids = tokens, labels = tokens).loss.item()
        patch_chunked_causal_lm_loss(model)
        set_loss_options(model, z_loss = 1.0)
        ours = lambda: model(input_ids = tokens, labels = tokens).loss.item()
        before = ours()
        assert before > plain + 1
        with unsloth_patches.stock():
            assert abs(ours() - plain) < 1e-5, (ours(), plain)
        assert abs(ours() - before) < 1e-5
        """
    with_patched_unsloth(code)
