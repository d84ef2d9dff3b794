# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A toy model whose decoder blocks go through Unsloth's block compile, by aot_eager, and its Trainer."""

from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)
MODE = "UNSLOTH_BLOCK_FULLGRAPH"


@pytest.fixture
def fresh_dynamo(monkeypatch):
    """No graph, no counter and no mode of an earlier test."""
    from torch._dynamo.utils import counters

    monkeypatch.delenv("UNSLOTH_COMPILE_DISABLE", raising = False)

    monkeypatch.delenv(MODE, raising = False)
    monkeypatch.delenv("UNSLOTH_COMPILE_REPORT", raising = False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def aot_eager(fresh_dynamo, monkeypatch):
    """torch.compile without Inductor: graphs are traced and differentiated, and run bit for bit."""
    compile_ = torch.compile
    allowed = ("fullgraph", "dynamic", "isolate_recompiles", "recompile_limit")

    def without_inductor(function, *args, **options):
        kept = {name: value for name, value in options.items() if name in allowed}
        return compile_(function, backend = "aot_eager", **kept)

    monkeypatch.setattr(torch, "compile", without_inductor)


class Block(torch.nn.Module):
    """A decoder layer of two linears; `between` runs between them."""

    def __init__(self, width = 8):
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)
        self.between = torch.nn.functional.silu

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.down(self.between(self.up(hidden_states)))


class Toy(torch.nn.Module):
    def __init__(
        self,
        block = Block,
        layers = 2,
    ):
        super().__init__()
        self.config = SimpleNamespace(model_type = "toy", num_hidden_layers = layers)
        self.embed = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList(block() for _ in range(layers))
        self.head = torch.nn.Linear(8, 16)

    def forward(
        self,
        input_ids,
        labels = None,
        block_arguments = None,
        **kwargs,
    ):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, **(block_arguments or {}))
        logits = self.head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(loss = loss, logits = logits)


def breaking(hidden):
    torch._dynamo.graph_break()
    return torch.nn.functional.silu(hidden)


BREAK_LINE = breaking.__code__.co_firstlineno + 1
BREAK = f"toy_blocks.py:{BREAK_LINE}"  # as it is told


@pytest.fixture
def toy(aot_eager, monkeypatch):
    """toy(mode, between = None) -> a model whose blocks went through Unsloth's block compile."""

    def make(mode = "auto", between = None):
        from unsloth.models import _block_compile

        monkeypatch.setenv(MODE, mode)
        block = type("ToyDecoderLayer", (Block,), {"forward": Block.forward})
        torch.manual_seed(0)
        model = Toy(block).train()
        for layer in model.layers:
            layer.between = between or layer.between
        _block_compile._wrap(block, {})
        return model

    return make


def batch(
    length = 5,
    rows = 2,
    seed = 0,
):
    make = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 16, (rows, length), generator = make)
    return {"input_ids": tokens, "labels": tokens}


@pytest.fixture
def train(tmp_path):
    """train(model, **settings) -> the Trainer after three steps, patched as Unsloth does it."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator
    from unsloth.trainer import _backwards_compatible_trainer

    samples = [batch(7, 1, seed) for seed in range(8)]
    rows = Dataset.from_list([{k: v[0].tolist() for k, v in one.items()} for one in samples])

    def run(model, **settings):
        subclass = type("ToySFTTrainer", (Trainer,), {})
        subclass.__init__ = _backwards_compatible_trainer(subclass, TrainingArguments)
        given = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "report_to": "none"}
        given.update(per_device_train_batch_size = 2, save_strategy = "no", use_cpu = True)
        given.update(remove_unused_columns = False, disable_tqdm = True, **settings)
        trainer = subclass(
            model = model,
            args = TrainingArguments(**given),
            train_dataset = rows,
            data_collator = default_data_collator,
        )
        trainer.train()
        return trainer

    return run
