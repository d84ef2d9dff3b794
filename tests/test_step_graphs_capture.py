# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What step graphs are made of: lengths, layouts, and blocks that run forward and backward by hand."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from backend import DEVICE, GPU, require

require("interpreter")
import unsloth  # noqa: F401, E402
from graph_tape import TapeRecorder  # noqa: E402

# ------------------------------------------------------------------------------------- buckets


def test_buckets_waste_little():
    from unsloth.models.step_graphs_buckets import bucket_length

    for length in range(1, 9000):
        bucket = bucket_length(length)
        assert bucket >= length and bucket_length(bucket) == bucket
        assert bucket - length < 128 if length <= 512 else bucket - length <= 0.12 * length
    assert all(bucket_length(2**n) == 2**n for n in range(6, 14))
    assert len({bucket_length(n) for n in range(1, 2049)}) <= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_write_zeros_behind_and_read_back(dtype):
    from unsloth.models.step_graphs_buckets import PaddedRows, SeparatedDocuments

    values = torch.randn(2, 5, 3).to(dtype)
    buffer = torch.full((2, 8, 3), float("nan"), dtype = dtype)
    layout = PaddedRows(2, 5, 8)
    layout.write(values, buffer)
    assert torch.equal(layout.read(buffer), values) and not buffer[:, 5:].any()
    row = values.reshape(1, 10, 3)
    layout = SeparatedDocuments((7, 3), 8, torch.device("cpu"))
    layout.write(row, buffer.fill_(float("nan")))
    assert torch.equal(layout.read(buffer), row)
    assert not buffer[0, 7:].any() and not buffer[1, 3:].any()
    assert torch.equal(buffer[1, :3], row[0, 7:])


def test_packed_lengths_beyond_the_row():
    from unsloth.models.step_graphs_buckets import split_documents
    assert split_documents(torch.tensor([3, 4]), 6) is None
    assert split_documents(torch.tensor([3, 0, 4]), 9) == (3, 4, 2)


# ------------------------------------------------------------------------------------- blocks


class Block(torch.nn.Module):
    """x + B A x + shift, of which one layer's shift takes no part."""

    def __init__(self, uses_shift):
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(4, 8))
        self.B = torch.nn.Parameter(torch.randn(8, 4))
        self.shift = torch.nn.Parameter(torch.randn(8))
        self.frozen = torch.nn.Parameter(torch.randn(8), requires_grad = False)
        self.uses_shift = uses_shift

    def forward(self, x, scale):
        y = torch.tanh(x * self.frozen) @ self.A.t() @ self.B.t() * scale + x
        return ((y + self.shift) if self.uses_shift else y,)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return torch.nn.ModuleList(Block(n != 1) for n in range(3)).to(DEVICE)


def by_autograd(blocks, x, grad):
    y = x
    for block in blocks:
        (y,) = block(y, 0.5)
    trained = [p for p in blocks.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y, [x, *trained], grad, allow_unused = True)
    return y.detach(), grads[0], list(grads[1:])


@pytest.mark.parametrize("keep", [(0, 0, 0), (1, 1, 1), (0, 1, 1)])
@pytest.mark.parametrize("wants_input", [True, False])
def test_blocks_by_hand_are_autograds(blocks, keep, wants_input):
    from unsloth.models.step_graphs_blocks import BlockRuns

    x = torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)
    grad = torch.randn(2, 5, 8, device = DEVICE)
    y, input_grad, grads = by_autograd(blocks, x, grad)
    runs = BlockRuns(list(blocks), {"scale": 0.5}, keep, wants_input)
    assert torch.equal(runs.forward(x.detach()), y)
    ours, found = runs.backward(grad)
    assert torch.equal(ours, input_grad) if wants_input else ours is None
    assert [g is None for g in found] == [g is None for g in grads] and None in found
    assert all(g is None or torch.equal(g, h) for g, h in zip(found, grads))
    assert all(p.grad is None for p in blocks.parameters())


@pytest.mark.parametrize("compiled", [True, False])
def test_buckets_of_a_pool_share_their_buffers(blocks, compiled):
    """A small bucket, a large one, and the small one's pending pass again."""
    from unsloth.models.step_graphs_buckets import PaddedRows
    from unsloth.models.step_graphs_capture import Bucket, Pool, make_recorder, replay_blocks

    pool = Pool(
        (make_recorder if GPU else TapeRecorder)(torch.device(DEVICE, 0) if GPU else DEVICE), 0.5
    )
    inputs, buckets, layouts = [], [], []
    for length in (8, 16):
        x = torch.randn(2, length - 3, 8, device = DEVICE, requires_grad = True)
        bucket = Bucket(pool, list(blocks), (2, length, 8), {"scale": 0.5}, x, False, compiled)
        assert bucket.capture()
        inputs.append(x)
        buckets.append(bucket)
        layouts.append(PaddedRows(2, length - 3, length))
    assert buckets[0].gradients is buckets[1].gradients
    state = SimpleNamespace(readable = lambda: True, moved = lambda: False)
    passes = [
        replay_blocks(b, layout, x, None, state) for b, layout, x in zip(buckets, layouts, inputs)
    ]
    trained = [p for p in blocks.parameters() if p.requires_grad]
    for x, y in zip(inputs, passes):
        grad = torch.randn_like(y)
        expected = by_autograd(blocks, x, grad)
        assert torch.allclose(y, expected[0], rtol = 1e-5, atol = 1e-5)
        found = torch.autograd.grad(y, [x, *trained], grad, allow_unused = True)
        for ours, reference in zip(found, [expected[1], *expected[2]]):
            assert (ours is None) == (reference is None)
            assert ours is None or torch.allclose(ours, reference, rtol = 1e-4, atol = 1e-4)


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


def test_a_batch_gets_the_next_length_or_the_one_that_is_given():
    from unsloth.models.step_graphs_buckets import bucket_length, lay_out, unknown_argument

    hidden = torch.zeros(2, 100, 8)
    for longer, length in ((0, bucket_length(100)), (256, 256)):
        reason, layout = lay_out(hidden, {}, longer)
        assert reason == "" and (layout.rows, layout.bucket) == (2, length)
    table = torch.zeros(99, 4)
    reason, layout = lay_out(hidden, {"position_embeddings": (table, table)})
    assert layout is None and "rope tables" in reason
    for name, reason in (("attention_mask", "an attention mask"), ("other", "the argument other")):
        assert unknown_argument({name: table}) == reason


def test_an_unsloth_zoo_without_its_mark_is_replayed_without(monkeypatch):
    """The mark only spares work."""
    import contextlib

    from unsloth.models.step_graphs_blocks import _recompute_marker
    from unsloth_zoo import gradient_checkpointing

    mark = "_gradient_checkpoint_recompute_marker"
    assert _recompute_marker() is not contextlib.nullcontext
    monkeypatch.delattr(gradient_checkpointing, mark)
    assert _recompute_marker() is contextlib.nullcontext


def test_a_capture_that_raises_holds_nothing_and_the_next_one_is_whole(blocks, monkeypatch):
    """Its blocks and their runs are let go, and no pass is taken for the pool's owner."""
    from unsloth.models.step_graphs_capture import Bucket, Pool, make_recorder

    recorder = make_recorder(torch.device(DEVICE, 0)) if GPU else TapeRecorder(DEVICE)
    pool, x = Pool(recorder, 0.5), torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)

    def bucket():
        return Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False)

    def full():
        raise torch.OutOfMemoryError("no room")

    failed, pool.owner = bucket(), object()
    monkeypatch.setattr(recorder, "reserved", full)
    with pytest.raises(torch.OutOfMemoryError, match = "no room"):
        failed.capture()
    assert pool.owner is None and failed._runs is None and failed._layers is None
    monkeypatch.undo()
    assert bucket().capture()


@pytest.mark.parametrize("gpu, captured", [(2.0, True), (2.1, False)])
def test_a_gpu_that_takes_longer_than_its_bound_is_not_captured(blocks, monkeypatch, gpu, captured):
    """And the next length is, with the memory of the pool as it was."""
    from unsloth.models.step_graphs_capture import Bucket, Pool, make_recorder

    recorder = make_recorder(torch.device(DEVICE, 0)) if GPU else TapeRecorder(DEVICE)
    pool = Pool(recorder, 0.5)
    monkeypatch.setattr(recorder, "timed", lambda run: (1.0, gpu))
    x = torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)

    def capture(bound):
        return Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False).capture(bound)

    assert capture(2.0) is captured and pool.owner is None
    gc.collect()  # no graph is left that holds the pool
    assert capture(None)


@pytest.mark.skipif(not GPU, reason = "asks the GPU's allocator")
def test_what_the_allocator_gave_back_meanwhile_is_not_taken_off_the_pool(blocks):
    from unsloth.models.step_graphs_capture import Bucket, Pool, make_recorder

    recorder = make_recorder(torch.device(DEVICE, 0))
    pool, x = Pool(recorder, 0.5), torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)
    bucket = Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False)
    torch.empty(256 << 20, dtype = torch.uint8, device = DEVICE)  # in the allocator's cache now
    assert bucket.capture()
    segments = torch.cuda.memory_snapshot()
    held = [s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == recorder._handle]
    assert pool.bytes >= sum(held) > 0


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
    runs.backward(torch.ones_like(y))
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize("captured", [True, False])
def test_chunked_losses_know_a_pool_in_which_something_was_captured(blocks, monkeypatch, captured):
    from unsloth.models.step_graphs_capture import Bucket, Pool, make_recorder

    chunk_size = pytest.importorskip("unsloth.kernels.loss_chunk_size")
    recorder = make_recorder(torch.device(DEVICE, 0)) if GPU else TapeRecorder(DEVICE)
    monkeypatch.setattr(recorder, "timed", lambda run: (1.0, 2.0))
    pool, x = Pool(recorder, 0.5), torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)
    bucket = Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False)
    assert bucket.capture(2.0 if captured else 1.9) is captured
    assert (pool in chunk_size.graph_pools) is captured
    gone = weakref.ref(pool)
    del pool, bucket
    gc.collect()
    assert gone() is None  # losses hold no pool
