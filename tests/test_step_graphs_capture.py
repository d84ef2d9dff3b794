# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""What step graphs are made of: lengths, layouts, and buckets that share memory."""

import gc
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from backend import DEVICE, GPU, require

require("interpreter")
import unsloth  # noqa: F401, E402
from graph_tape import TapeRecorder  # noqa: E402
from hand_blocks import blocks, by_autograd  # noqa: E402, F401

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


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("compiled", [True, False])
def test_buckets_of_a_pool_share_their_buffers(blocks, compiled, rows):
    """A small bucket, a large one, and the small one's pending pass again.

    With rows: so many at once, and inputs on the host.
    """
    from unsloth.models.step_graphs_buckets import PaddedRows
    from unsloth.models.step_graphs_capture import Bucket, replay_blocks
    from unsloth.models.step_graphs_pool import Pool, make_recorder

    pool = Pool(
        (make_recorder if GPU else TapeRecorder)(torch.device(DEVICE, 0) if GPU else DEVICE), 0.5
    )
    inputs, buckets, layouts = [], [], []
    for length in (8, 16):
        x = torch.randn(2, length - 3, 8, device = DEVICE, requires_grad = True)
        bucket = Bucket(pool, list(blocks), (2, length, 8), {"scale": 0.5}, x, False, compiled)
        if rows:
            bucket.measure()
            bucket.inputs_on_host()
            assert bucket.host_has_room()
            bucket.some_rows_at_once(rows)
        bucket.capture()
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


@pytest.mark.parametrize(
    "room, chosen",
    [  # 2 MiB of work, and four inputs or three; 4 MiB that a kept block's activations may fill, of it
        (10, (2, False, None)),
        (6, (0, False, None)),
        (5.9, (0, True, None)),
        (5, (0, True, None)),
        (4.9, (0, True, 2)),
        (4, (0, True, 2)),
        (3.9, (0, True, 1)),
        (3.5, (0, True, 1)),
        (3.4, None),
    ],
)
def test_what_is_held_where_a_bucket_fits(blocks, monkeypatch, room, chosen):
    """(kept blocks, inputs on the host, rows at once)"""
    from unsloth.models import step_graphs_capture
    from unsloth.models.step_graphs_pool import Pool

    monkeypatch.setattr(step_graphs_capture, "WORKSPACE", 0)
    monkeypatch.setattr(step_graphs_capture, "WORK", 1.0)
    pool, x = Pool(TapeRecorder(DEVICE), 0.5), torch.randn(4, 5, 8, device = DEVICE)
    layers = [*blocks, blocks[0]]
    bucket = step_graphs_capture.Bucket(pool, layers, (4, 8, 8), {"scale": 0.5}, x, False, False)
    bucket.block_bytes, bucket._runs.input_bytes = 2 << 20, 1 << 20
    fits, runs = bucket.fit_into(room * 2**20, room * 2**20), bucket._runs
    assert fits is (chosen is not None)
    if fits:
        assert (sum(runs.keep), runs.host is not None, runs.rows) == chosen
        assert bucket.split is (runs.rows is not None)
        assert bucket.graph_bytes() <= room * 2**20


def test_an_allocator_that_splits_no_large_piece_reserves_none(monkeypatch):
    """Captures would be given their memory beside it."""
    from unsloth.models.step_graphs_pool import CudaRecorder

    recorder, captured = CudaRecorder.__new__(CudaRecorder), []
    monkeypatch.setattr(CudaRecorder, "__call__", lambda self, take: captured.append(take))
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising = False)
    recorder.reserve(1 << 20)
    assert len(captured) == 1
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    recorder.reserve(1 << 20)
    assert len(captured) == 1


def test_the_peak_is_that_of_passes_whoever_captures_or_resets_it(monkeypatch):
    from unsloth.models import step_graphs_pool
    from unsloth.models.step_graphs_pool import CudaRecorder, apart

    peak, recorder = [100], CudaRecorder.__new__(CudaRecorder)
    recorder.device = torch.device("cpu")
    monkeypatch.setattr(step_graphs_pool, "_peaks", {})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    with pytest.raises(RuntimeError), apart(recorder):
        peak[0] = 150
        raise RuntimeError("while a length is captured")
    assert recorder.peak() == 100
    for now, known in ((120, 120), (30, 120), (130, 130)):  # a pass after a reset, then another
        peak[0] = now
        assert recorder.peak() == known


def test_what_blocks_need_outside_of_the_pool_is_free_before_it_is_reserved(blocks, monkeypatch):
    from unsloth.models.step_graphs_capture import Bucket
    from unsloth.models.step_graphs_pool import Pool, make_recorder

    recorder = make_recorder(torch.device(DEVICE, 0)) if GPU else TapeRecorder(DEVICE)
    pool, x = Pool(recorder, 0.5), torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)
    bucket, order, warm_up, record = (
        Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False),
        [],
        Bucket._warm_up,
        type(recorder).__call__,
    )
    monkeypatch.setattr(Bucket, "_warm_up", lambda self: (order.append("run"), warm_up(self)))
    monkeypatch.setattr(type(recorder), "reserve", lambda self, size: order.append(size))
    recording = lambda self, run: (order.append("capture"), record(self, run))[1]
    monkeypatch.setattr(type(recorder), "__call__", recording)
    bucket.capture(8 << 20)
    assert order == ["run", 8 << 20, "capture", "capture"] and pool.size == 8 << 20


@pytest.mark.skipif(not GPU, reason = "times a GPU")
def test_a_gpu_does_not_wait_for_the_host_while_it_is_timed():
    from unsloth.models.step_graphs_pool import make_recorder

    x = torch.zeros(8, device = DEVICE)

    def slow_launches():
        for _ in range(10):
            time.sleep(2e-3)
            x.add_(1)

    host, gpu = make_recorder(torch.device(DEVICE, 0)).timed(slow_launches)
    assert host > 0.02 and gpu < 0.25 * host


def test_a_host_without_memory_has_no_room(blocks, monkeypatch):
    from unsloth.models.step_graphs_blocks import HostInputs
    from unsloth.models.step_graphs_capture import Bucket
    from unsloth.models.step_graphs_pool import Pool

    def full(*arguments):
        raise RuntimeError("out of memory")

    pool, x = Pool(TapeRecorder(DEVICE), 0.5), torch.randn(4, 5, 8, device = DEVICE)
    bucket = Bucket(pool, [*blocks], (4, 8, 8), {"scale": 0.5}, x, False, False)
    bucket.measure()
    monkeypatch.setattr(HostInputs, "reserve", full)
    assert bucket.host_has_room()  # nothing is to be there
    bucket.inputs_on_host()
    assert not bucket.host_has_room()


def test_what_a_bucket_is_expected_to_hold(blocks):
    """Inputs of all blocks, or three; kept activations; a block's work; two decoded 4-bit weights."""
    from unsloth.models.step_graphs_capture import WORK, WORKSPACE, Bucket
    from unsloth.models.step_graphs_pool import Pool

    blocks[1].frozen.quant_state = SimpleNamespace(shape = (40, 8), dtype = torch.bfloat16)
    pool, x = Pool(TapeRecorder(DEVICE), 0.5), torch.randn(2, 5, 8, device = DEVICE)
    bucket = Bucket(pool, [*blocks] * 2, (4, 8, 8), {"scale": 0.5}, x, False, False)
    bucket.measure()
    bucket.block_bytes, each = 1 << 20, 4 * 8 * 8 * 4
    gradients = 2 * sum(p.nbytes for p in blocks.parameters() if p.requires_grad)
    fixed = 2 * 40 * 8 * 2 + WORKSPACE
    assert bucket.outside_bytes() == 2 * each * 1024 // 32 + gradients  # for 1024 tokens, not 32
    pool.tokens = 16  # too short: the next is for somewhat more than the bucket needs
    assert bucket.outside_bytes() == 2 * each * 40 // 32 + gradients
    assert bucket.graph_bytes() == 6 * each + int(WORK * 2**20) + fixed
    bucket.keep_last(2)
    assert bucket.graph_bytes() == 4 * each + int((WORK + 2) * 2**20) + fixed
    bucket.keep_last(0)
    bucket.inputs_on_host()
    bucket.some_rows_at_once(1)
    assert bucket.graph_bytes() == 3 * each + int(WORK / 4 * 2**20) + fixed


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


def test_a_capture_that_raises_holds_nothing_and_the_next_one_is_whole(blocks, monkeypatch):
    """Its blocks and their runs are let go, and no pass is taken for the pool's owner."""
    from unsloth.models.step_graphs_capture import Bucket
    from unsloth.models.step_graphs_pool import Pool, make_recorder

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
    bucket().capture()


def test_both_times_are_asked_and_the_next_length_is_captured(blocks, monkeypatch):
    from unsloth.models.step_graphs_capture import Bucket
    from unsloth.models.step_graphs_pool import Pool, make_recorder

    recorder = make_recorder(torch.device(DEVICE, 0)) if GPU else TapeRecorder(DEVICE)
    pool = Pool(recorder, 0.5)
    monkeypatch.setattr(recorder, "timed", lambda run: (2.0, 5.0))
    x = torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)

    def bucket():
        return Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False)

    asked = bucket()
    assert asked.seconds() == (2.0, 5.0)
    asked.close()
    asked.close()  # by whoever has made it, whatever became of it
    assert pool.owner is None
    gc.collect()  # no graph is left that holds the pool
    bucket().capture()


@pytest.mark.skipif(not GPU, reason = "asks the GPU's allocator")
def test_what_the_allocator_gave_back_meanwhile_is_not_taken_off_the_pool(blocks):
    from unsloth.models.step_graphs_capture import Bucket
    from unsloth.models.step_graphs_pool import Pool, make_recorder

    recorder = make_recorder(torch.device(DEVICE, 0))
    pool, x = Pool(recorder, 0.5), torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)
    bucket = Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False)
    torch.empty(256 << 20, dtype = torch.uint8, device = DEVICE)  # in the allocator's cache now
    bucket.capture()
    segments = torch.cuda.memory_snapshot()
    held = [s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == recorder._handle]
    assert pool.bytes >= sum(held) > 0


@pytest.mark.parametrize("captured", [True, False])
def test_chunked_losses_know_a_pool_in_which_something_was_captured(blocks, captured):
    from unsloth.models.step_graphs_capture import Bucket
    from unsloth.models.step_graphs_pool import Pool, make_recorder

    chunk_size = pytest.importorskip("unsloth.kernels.loss_chunk_size")
    recorder = make_recorder(torch.device(DEVICE, 0)) if GPU else TapeRecorder(DEVICE)
    pool, x = Pool(recorder, 0.5), torch.randn(2, 5, 8, device = DEVICE, requires_grad = True)
    bucket = Bucket(pool, list(blocks), (2, 8, 8), {"scale": 0.5}, x, False, False)
    bucket.capture() if captured else bucket.close()
    assert (pool in chunk_size.graph_pools) is captured
    gone = weakref.ref(pool)
    del pool, bucket
    gc.collect()
    assert gone() is None  # losses hold no pool
