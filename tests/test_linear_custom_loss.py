# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Any loss of a head that treats rows by themselves, computed in chunks."""

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require
from loss_problems import assert_same, problem

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture
def linear_loss():
    from unsloth.kernels.linear_custom_loss import linear_loss
    return linear_loss


@pytest.fixture
def chunk_size():
    from unsloth.kernels import loss_chunk_size
    return loss_chunk_size


@pytest.mark.parametrize("per_row", [False, True])
def test_linear_loss_passes_gradcheck_also_by_row_arguments(linear_loss, per_row):
    """A loss given as a function gets its gradients from autograd, its row arguments' too."""
    hidden, weight, bias, _ = problem(ignored = ())
    teacher = torch.rand(7, 11, dtype = torch.float64, device = DEVICE).requires_grad_()

    def distance(logits, wanted):
        rows = ((logits.softmax(1) - wanted) ** 2).sum(1) + logits.logsumexp(1)
        return rows if per_row else rows.sum()

    def loss(*tensors):
        hidden, weight, bias, wanted = tensors
        return linear_loss(hidden, weight, distance, wanted, bias = bias, chunk_rows = 3)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias, teacher))


def test_linear_loss_serves_a_focal_loss_and_skips_rows(linear_loss):
    """A loss that PyTorch lacks, on the rows that count."""
    hidden, weight, bias, labels = problem()
    keep = labels != -100

    def focal(logits, targets):
        log_p = torch.log_softmax(logits, 1).gather(1, targets.unsqueeze(1)).squeeze(1)
        return -((1 - log_p.exp()) ** 2 * log_p)

    ours = linear_loss(
        hidden, weight, focal, labels.clamp(min = 0), bias = bias, keep = keep, chunk_rows = 2
    )
    dense = focal(F.linear(hidden, weight, bias), labels.clamp(min = 0)) * keep
    assert_same(ours, dense, (hidden, weight, bias))


def test_linear_loss_refuses_what_it_would_get_wrong(linear_loss):
    """Means over rows, lost gradients and wrong shapes are errors, not wrong numbers."""
    hidden, weight, _, labels = problem(ignored = ())
    with pytest.raises(ValueError, match = "not separable over rows"):
        linear_loss(hidden, weight, F.cross_entropy, labels)
    temperature = torch.ones((), dtype = torch.float64, device = DEVICE, requires_grad = True)
    for reduce in (torch.sum, lambda rows: rows):
        with pytest.raises(ValueError, match = "its gradient would be lost"):
            linear_loss(hidden, weight, lambda logits: reduce((logits * temperature).logsumexp(1)))
    with pytest.raises(ValueError, match = "one loss a row or their sum"):
        linear_loss(hidden, weight, lambda logits: logits)
    with pytest.raises(TypeError, match = "row argument 0 must be a tensor"):
        linear_loss(hidden, weight, F.cross_entropy, 3)
    with pytest.raises(ValueError, match = "must begin with hidden's"):
        linear_loss(hidden, weight, F.cross_entropy, labels[:-1])


def test_chunk_rows_come_from_caller_environment_and_store(chunk_size, monkeypatch, tmp_path):
    """Explicit value, then the environment, then the stored choice; never more than the rows."""
    choose = chunk_size.choose_chunk_rows
    cpu = torch.device("cpu")
    assert choose(100, 1000, 2, cpu, 7) == 7
    assert choose(5, 1000, 2, cpu, 7) == 5
    assert choose(0, 1000, 2, cpu) == 1
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_ROWS", "9")
    assert choose(100, 1000, 2, cpu) == 9
    assert choose(100, 1000, 2, cpu, 7) == 7
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_ROWS", "many")
    with pytest.raises(ValueError, match = "UNSLOTH_LOSS_CHUNK_ROWS must be a positive number"):
        choose(100, 1000, 2, cpu)
    monkeypatch.delenv("UNSLOTH_LOSS_CHUNK_ROWS")
    large = choose(10**6, 128256, 2, cpu)
    assert large * 128256 * 2 <= 64 << 20 < (large + 1) * 128256 * 2
    stored = tmp_path / "chunk.json"
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_FILE", str(stored))
    assert chunk_size.stored_budget("A GPU") is None
    for text, found in (('{"A GPU": 384}', 384), ('{"A GPU": "x"}', None), ("[384]", None)):
        stored.write_text(text)
        assert chunk_size.stored_budget("A GPU") == found
    fitted = {most: chunk_size.fit_rows(most) for most in (1, 20, 130, 300, 511, 700, 1308)}
    assert fitted == {1: 16, 20: 20, 130: 128, 300: 256, 511: 384, 700: 512, 1308: 1280}


def test_chunk_rows_follow_the_memory_that_is_free(chunk_size, monkeypatch):
    """A quarter of what is free at most; a roomy GPU is not asked before every loss."""
    gpu, asked = torch.device("cuda", 0), []
    free = {"driver": 100 << 30, "held": 0}

    def ask(index):
        asked.append(index)
        return free["driver"], 0

    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    monkeypatch.setattr(chunk_size, "_held_bytes", lambda index: free["held"])
    monkeypatch.setattr(chunk_size, "_gpu_budget", lambda index: 320)
    monkeypatch.setattr(chunk_size, "_room", {})
    rows = [chunk_size.choose_chunk_rows(10**6, 128256, 2, gpu) for _ in range(70)]
    assert set(rows) == {1280} and len(asked) == 3
    # A trained head takes as much as its gradient has, up to 1 GiB.
    assert chunk_size.choose_chunk_rows(10**6, 128256, 2, gpu, None, 1 << 40) == 4096
    free.update(driver = 100 << 20, held = 300 << 20)
    chunk_size._room.clear()
    assert chunk_size.choose_chunk_rows(10**6, 128256, 2, gpu) == 384  # 100 MiB of logits
    free["driver"] = 100 << 30
    assert chunk_size.choose_chunk_rows(10**6, 128256, 2, gpu) == 1280  # a tight GPU is asked again
