# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Patches of several subjects at once, in one process of Unsloth's CPU backend."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("unsloth_zoo") is None, reason = "needs Unsloth")


def test_threads_that_render_and_train_at_once_do_as_one_after_the_other(with_patched_unsloth):
    """Each training has loss options of its own, each tokenizer its mode; one tokenizer is shared."""
    code = """
        import unsloth_patches
        import copy, sys, threading
        import torch, unsloth
        from llama_chat import WEATHER, assistant, calls, made, make_llama_tokenizer, result, user
        from transformers import LlamaConfig, LlamaForCausalLM
        from unsloth.chat_templates import get_chat_template
        from unsloth.fused_loss import set_loss_options
        from unsloth_zoo.cpu.loader import patch_chunked_causal_lm_loss

        torch.set_num_threads(1)
        size = dict(vocab_size = 48, hidden_size = 16, intermediate_size = 16, num_hidden_layers = 1)
        first = LlamaForCausalLM(LlamaConfig(num_attention_heads = 2, **size))
        tokens = torch.randint(0, 48, (2, 9))
        two = [made("get_weather", {"city": city}) for city in ("Rome", "Oslo")]
        chat = [user("q"), calls(*two), result("20"), result("9"), assistant("Done.")]
        make = lambda mode: get_chat_template(
            make_llama_tokenizer(), "llama-3.1", parallel_tool_calls = mode
        )
        shared = make("join")

        def train(**options):
            model = copy.deepcopy(first)
            patch_chunked_causal_lm_loss(model)
            set_loss_options(model, **options)
            optimizer, losses = torch.optim.SGD(model.parameters(), lr = 0.1), []
            for _ in range(15):
                loss = model(input_ids = tokens, labels = tokens).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        def render(tokenizer):
            found = [tokenizer.apply_chat_template(chat, tools = [WEATHER], tokenize = False)]
            for number in range(30):
                messages = [user(f"{number}"), *chat[1:]]
                found.append(tokenizer.apply_chat_template(messages, tokenize = False))
            return found

        jobs = [
            lambda: train(z_loss = 0.5),
            lambda: train(label_smoothing = 0.5),
            lambda: train(class_weight = torch.linspace(0.1, 2, 48)),
            lambda: render(make("split")),
            lambda: render(shared),
            lambda: render(shared),
        ]
        expected = [job() for job in jobs]
        assert len({str(each) for each in expected}) == 5
        found = [None] * len(jobs)

        def run(number):
            found[number] = jobs[number]()

        sys.setswitchinterval(1e-5)
        threads = [threading.Thread(target = run, args = (n,)) for n in range(len(jobs))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert found == expected, [n for n in range(len(jobs)) if found[n] != expected[n]]
        """
    with_patched_unsloth(code)
