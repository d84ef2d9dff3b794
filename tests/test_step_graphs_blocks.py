# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Blocks that run forward and backward by hand: autograd's numbers, whatever waits where."""

import threading

import pytest
import torch
from backend import DEVICE, GPU, require

require("interpreter")
import unsloth  # noqa: F401, E402
from graph_tape import TapeRecorder  # noqa: E402
from hand_blocks import Block, blocks, by_autograd  # noqa: E402, F401


def backward(runs, grad):
    """(the input's gradient, those of all parameters)"""
    taken = {}
    input_grad = runs.backward(grad, taken.__setitem__)
    return input_grad, [g for _, grads in sorted(taken.items()) for g in grads]


@pytest.mark.parametrize("keep", [(0, 0, 0), (1, 1, 1), (0, 1, 1)])
@pytest.mark.parametrize("wants_input", [True, False])
def test_blocks_by_hand_are_autograds(blocks, keep, wants_input):
    from unsloth.models.step_graphs_blocks import BlockRuns

    x = torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)
    grad = torch.randn(2, 5, 8, device = DEVICE)
    y, input_grad, grads = by_autograd(blocks, x, grad)
    runs = BlockRuns(list(blocks), {"scale": 0.5}, keep, wants_input)
    assert torch.equal(runs.forward(x.detach()), y)
    ours, found = backward(runs, grad)
    assert torch.equal(ours, input_grad) if wants_input else ours is None
    assert [g is None for g in found] == [g is None for g in grads] and None in found
    assert all(g is None or torch.equal(g, h) for g, h in zip(found, grads))
    assert all(p.grad is None for p in blocks.parameters())


@pytest.mark.parametrize("rows", [None, 1, 2, 3])
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("keep", [(0, 0, 0), (0, 1, 1)])
def test_some_rows_at_once_and_inputs_on_the_host(blocks, monkeypatch, rows, on_host, keep):
    """Five rows; an input lies on two pages, or three."""
    from unsloth.models import step_graphs_blocks

    monkeypatch.setattr(step_graphs_blocks, "PAGE", 100)
    x = torch.randn(5, 1, 8, device = DEVICE, requires_grad = True)
    grad = torch.randn_like(x)
    y, input_grad, grads = by_autograd(blocks, x, grad)
    runs = step_graphs_blocks.BlockRuns(list(blocks), {"scale": 0.5}, keep, True)
    runs.activation_bytes(x, TapeRecorder(DEVICE))
    assert runs.input_bytes == x.nbytes == 160
    if on_host:
        runs.host = step_graphs_blocks.HostInputs()
        runs.host.reserve(3 * runs.input_bytes, x.device)
    if rows:
        runs.some_rows_at_once(rows)
    assert torch.allclose(runs.forward(x.detach()), y, rtol = 1e-6, atol = 1e-6)
    ours, found = backward(runs, grad)
    assert [g is None for g in found] == [g is None for g in grads] and None in found
    for g, reference in zip([ours, *found], [input_grad, *grads]):
        assert g is None or torch.allclose(g, reference, rtol = 1e-5, atol = 1e-5)


@pytest.mark.parametrize("fails", ["forward", "backward", "wide"])
def test_copies_are_waited_for_where_a_block_raises(blocks, monkeypatch, fails):
    """Or an input is wider than its place on the host: the next one's would be written over."""
    from unsloth.models.step_graphs_blocks import BlockRuns, HostInputs

    waited, run = [], BlockRuns._run
    runs = BlockRuns(list(blocks), {"scale": 0.5}, (0, 0, 0), True)
    x = torch.randn(2, 5, 8, device = DEVICE)
    runs.activation_bytes(x, TapeRecorder(DEVICE))
    runs.host = HostInputs()
    runs.host.reserve(3 * runs.input_bytes, x.device)
    monkeypatch.setattr(HostInputs, "wait", lambda host: waited.append(1))

    def raising(
        runs,
        number,
        x,
        kept = True,
        rows = slice(None),
    ):
        if number == 1 and kept is (fails == "backward"):
            raise torch.OutOfMemoryError("full")
        return run(runs, number, x, kept, rows)

    if fails == "wide":
        runs.input_bytes -= 1
        with pytest.raises(RuntimeError, match = "block 0's input takes more"):
            runs.forward(x)
        return
    monkeypatch.setattr(BlockRuns, "_run", raising)
    with pytest.raises(torch.OutOfMemoryError):
        y = runs.forward(x)
        waited.clear()
        runs.backward(torch.ones_like(y), lambda *gradients: None)
    assert len(waited) == (2 if fails == "forward" else 3)


def test_a_block_of_each_kind_warms_up(blocks, monkeypatch):
    from unsloth.models.step_graphs_blocks import BlockRuns

    ran, forward = [], Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, *a, **k: (ran.append(self), forward(self, *a, **k))[1]
    )
    blocks[1].frozen.requires_grad_(True)
    BlockRuns(list(blocks), {"scale": 0.5}, (0, 0, 0), True).warm_up(
        torch.ones(2, 8, device = DEVICE)
    )
    assert {id(x) for x in ran} == {id(blocks[1]), id(blocks[2])}
    assert len(ran) == 4 and all(p.grad is None for p in blocks.parameters())


def test_parameters_are_back_after_a_capture_that_fails(blocks):
    from unsloth.models.step_graphs_blocks import own_leaves

    before = dict(blocks.named_parameters())
    blocks[0].A.mark = "kept"
    with pytest.raises(ValueError), own_leaves(blocks):
        for name, parameter in blocks.named_parameters():
            assert (parameter is before[name]) != before[name].requires_grad
            assert parameter.data_ptr() == before[name].data_ptr()
        assert blocks[0].A.mark == "kept"
        raise ValueError
    assert all(p is before[name] for name, p in blocks.named_parameters())


def test_an_unsloth_zoo_without_its_mark_is_replayed_without(monkeypatch):
    """The mark only spares work."""
    import contextlib

    from unsloth.models.step_graphs_blocks import _recompute_marker
    from unsloth_zoo import gradient_checkpointing

    mark = "_gradient_checkpoint_recompute_marker"
    assert _recompute_marker() is not contextlib.nullcontext
    monkeypatch.delattr(gradient_checkpointing, mark)
    assert _recompute_marker() is contextlib.nullcontext


@pytest.mark.skipif(not GPU, reason = "autograd has a thread of its own for a GPU")
def test_a_backward_pass_by_hand_stays_in_its_thread(blocks):
    """So that it uses the same cuBLAS workspace as the forward pass."""
    from unsloth.models.step_graphs_blocks import BlockRuns

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            threads.append(threading.get_ident())
            return 2 * grad

    threads, forward = [], blocks[0].forward
    blocks[0].forward = lambda x, scale: (Double.apply(forward(x, scale)[0]),)
    runs = BlockRuns(list(blocks), {"scale": 0.5}, (0, 0, 0), True)
    y = runs.forward(torch.randn(2, 5, 8, device = DEVICE))
    backward(runs, torch.ones_like(y))
    assert threads == [threading.get_ident()]
