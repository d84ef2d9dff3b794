# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Random events of a training, for a model whose blocks are replayed and its uncaptured twin."""

import copy
import random

import torch
from replayed_models import backbone, batch, close, forward, gradients, graphs, packed


def move(model):
    for parameter in backbone(model).layers[1].self_attn.parameters():
        parameter.data = parameter.data.clone()


class Walk:
    """A model and its uncaptured twin, through the same events; compares after each."""

    def __init__(self, model, seed):
        self.models = {"1": model, "0": copy.deepcopy(model)}
        self.random = random.Random(seed)
        self.optimizers = {
            value: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr = 1e-2)
            for value, m in self.models.items()
        }
        self.lengths = [33, 40, 60, 64, 65, 100]

    def both(self, event):
        found = {}
        for value, model in self.models.items():
            with graphs(value):
                found[value] = event(model)
        return found

    def compare(self, losses):
        close(*(
            (torch.as_tensor(losses[value]).detach(), gradients(self.models[value]))
            for value in ("1", "0")
        ))  # fmt: skip

    def micro_batch(self):
        rows, length = self.random.choice([1, 2, 2, 2]), self.random.choice(self.lengths)
        inputs = batch(rows, length, self.random.randrange(99), pads = self.random.randrange(5))
        if self.random.random() < 0.3:
            documents = [self.random.choice(self.lengths) for _ in range(2)]
            inputs = packed(documents, self.random.randrange(99))

        def event(model):
            loss = forward(model, inputs)
            loss.backward()
            return loss

        self.compare(self.both(event))

    def zero_grad(self):
        set_to_none = self.random.random() < 0.5
        self.both(lambda model: model.zero_grad(set_to_none = set_to_none))

    def optimizer_step(self):
        for optimizer in self.optimizers.values():
            optimizer.step()

    def evaluate(self):
        inputs = batch(2, self.random.choice(self.lengths), self.random.randrange(99))

        def event(model):
            model.eval()
            with torch.no_grad():
                loss = forward(model, inputs)
            model.train()
            return loss

        losses = self.both(event)
        assert torch.allclose(losses["1"], losses["0"], rtol = 1e-5)

    def without_adapters(self):
        inputs = batch(2, 40, self.random.randrange(99))

        def event(model):
            with torch.no_grad(), model.disable_adapter():
                return forward(model, inputs)

        losses = self.both(event)
        assert torch.allclose(losses["1"], losses["0"], rtol = 1e-5)

    def scale(self):
        scale = self.random.choice([0.5, 1.0, 2.0])

        def event(model):
            for layer in backbone(model).layers:
                layer.mlp.down_proj.set_scale("default", scale)

        self.both(event)

    def load(self):
        seed = self.random.randrange(99)

        def event(model):
            make = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        new = torch.randn(parameter.shape, generator = make) * 0.1
                        parameter.copy_(new.to(parameter.device))

        self.both(event)

    def move(self):
        self.both(move)

    def checkpointing(self):
        on = self.random.random() < 0.5

        def event(model):
            for layer in backbone(model).layers:
                layer.gradient_checkpointing = on

        self.both(event)

    def two_passes(self):
        inputs = [batch(2, self.random.choice(self.lengths), n) for n in range(2)]

        def event(model):
            losses = [forward(model, one) for one in inputs]
            sum(losses).backward()
            return losses[1]

        self.compare(self.both(event))

    def dropped_pass(self):
        inputs = batch(2, 40, 1)
        self.both(lambda model: forward(model, inputs))
