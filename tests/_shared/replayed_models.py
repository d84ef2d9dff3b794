# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Small models whose blocks are replayed, their batches, and steps to compare with ordinary ones."""

import contextlib
import copy
import importlib
import os

import pytest
import torch
from backend import DEVICE, GPU
from fast_models import stand_in_for_kernels
from graph_tape import TapeRecorder
from small_models import VOCABULARY, fast_classes, small_model

torch.set_num_threads(1)


def give_back_transformers(patch):
    """Unsloth's ``pre_patch`` changes transformers' classes for the whole process: the next test file
    finds them as this one did."""
    for family in fast_classes():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name, found in list(vars(module).items()):
            if name.endswith("RotaryEmbedding"):
                patch.setattr(module, name, found)
            if isinstance(found, type) and found.__module__ == module.__name__:
                for method in {"__init__", "forward"} & set(vars(found)):
                    patch.setattr(found, method, vars(found)[method])


@pytest.fixture(scope = "module", autouse = True)
def kernels():
    patch = pytest.MonkeyPatch()
    give_back_transformers(patch)
    stand_in_for_kernels(patch)
    yield
    patch.undo()


@pytest.fixture(autouse = True)
def recorders(monkeypatch):
    """The recorders that were made; tapes without a GPU."""
    from unsloth.models import step_graphs_pool

    made, make = [], step_graphs_pool.make_recorder if GPU else TapeRecorder

    def recording(device):
        made.append(make(device))
        return made[-1]

    monkeypatch.setattr(step_graphs_pool, "make_recorder", recording)
    monkeypatch.setenv("UNSLOTH_STEP_GRAPHS", "1")
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "0")
    yield made


def recorder_class():
    from unsloth.models import step_graphs_pool
    return step_graphs_pool.CudaRecorder if GPU else TapeRecorder


def fit_on_host(monkeypatch, rows):
    """Buckets have inputs on the host, and so many rows at once."""
    from unsloth.models.step_graphs_capture import Bucket

    def fit_into(bucket, room, keeping):
        bucket.inputs_on_host()
        if rows:
            bucket.some_rows_at_once(rows)
        return True

    monkeypatch.setattr(Bucket, "fit_into", fit_into)


@pytest.fixture(scope = "module")
def made():
    models = {}

    def model(family = "llama", **options):
        key = (family, repr(options))
        if key not in models:
            models[key] = small_model(family, **options)
        return models[key]

    return model


@pytest.fixture
def llama(made):
    """A fresh copy of a small Llama."""
    return copy.deepcopy(made())


@contextlib.contextmanager
def graphs(value):
    before = os.environ["UNSLOTH_STEP_GRAPHS"]
    os.environ["UNSLOTH_STEP_GRAPHS"] = value
    try:
        yield
    finally:
        os.environ["UNSLOTH_STEP_GRAPHS"] = before


def summary(model):
    from unsloth.models.step_graphs import summary
    return summary(model)


def batch(
    rows,
    length,
    seed = 0,
    pads = 0,
):
    """Random tokens; the last ``pads`` of the last row are padding."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator = make)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if pads:
        ids[-1, -pads:], mask[-1, -pads:], labels[-1, -pads:] = 0, 0, -100
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: x.to(DEVICE) for name, x in found.items()}


def packed(lengths, seed = 0):
    found = batch(1, sum(lengths), seed)
    del found["attention_mask"]
    positions = torch.cat([torch.arange(n) for n in lengths])
    found["position_ids"] = positions[None].to(DEVICE)
    found["packed_seq_lengths"] = torch.tensor(lengths, dtype = torch.int32)
    return found


def backbone(model):
    return model.base_model.model.model


def forward(model, inputs):
    """The loss, without the head's kernels."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    backbone(model)._has_no_labels = False
    hidden = backbone(model)(**inputs).last_hidden_state
    logits = (hidden @ model.get_input_embeddings().weight.t()).float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index = -100
    )


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, inputs):
    """(loss, gradients) of one micro-batch from none."""
    model.zero_grad(set_to_none = True)
    loss = forward(model, inputs)
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none = True)
    return loss.detach(), found


def close(ours, reference):
    """Equal up to what float32 rounds differently at another shape."""
    assert torch.allclose(ours[0], reference[0], rtol = 2e-6, atol = 0)
    assert ours[1].keys() == reference[1].keys() and ours[1]
    for name, value in reference[1].items():
        assert (ours[1][name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def plain(model, inputs):
    with graphs("0"):
        return step(model, inputs)


def as_without(model, inputs):
    """The step is what it is without graphs."""
    close(step(model, inputs), plain(model, inputs))
