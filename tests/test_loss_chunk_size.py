# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""How many rows of logits a chunked loss holds at once."""

import types
import warnings
import weakref

import pytest
import torch
from backend import require

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture
def chunk_size():
    from unsloth.kernels import loss_chunk_size
    return loss_chunk_size


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
    stored.write_text('{"A GPU": 384}')
    assert (chunk_size.stored_budget("A GPU"), chunk_size.stored_budget("B GPU")) == (384, None)
    fitted = {most: chunk_size.fit_rows(most) for most in (1, 20, 130, 300, 511, 700, 1308)}
    assert fitted == {1: 16, 20: 20, 130: 128, 300: 256, 511: 384, 700: 512, 1308: 1280}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[384]",
        b"[" * 10**5,
        b"{}",
        b'{"A GPU": "x"}',
        b'{"A GPU": true}',
        "folder",
        None,
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_file_without_sizes_is_named_and_passed_over(
    chunk_size, monkeypatch, tmp_path, content, named
):
    """Empty, garbage, of another type, a folder in its place, or none where a variable names one."""
    path = tmp_path / "unsloth" / "loss_chunk.json"
    path.parent.mkdir()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UNSLOTH_LOSS_CHUNK_FILE", "~/unsloth/loss_chunk.json" if named else "")
    with warnings.catch_warnings(record = True) as told:
        warnings.simplefilter("always")
        assert chunk_size.stored_budget("A GPU") is None
    assert len(told) == (named or content is not None)
    for warning in told:
        assert f"{path} is ignored" in str(warning.message) and "A GPU" in str(warning.message)


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


def test_beside_step_graphs_logits_take_half(chunk_size, monkeypatch):
    """While their pool is there, and unless a size was stored for this GPU."""
    gpu, stored = torch.device("cuda", 0), {"mib": None}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 << 30, 0))
    monkeypatch.setattr(chunk_size, "_held_bytes", lambda index: 0)
    monkeypatch.setattr(chunk_size, "_gpu_budget", lambda index: stored["mib"])
    monkeypatch.setattr(chunk_size, "graph_pools", weakref.WeakSet())

    def rows():
        return chunk_size.choose_chunk_rows(10**6, 128256, 2, gpu)

    assert rows() == 1024
    pool = type("Pool", (), {})()
    chunk_size.graph_pools.add(pool)
    assert rows() == 512
    stored["mib"] = 320
    assert rows() == 1280
    stored["mib"] = None
    del pool
    assert rows() == 1024


def test_a_buffer_that_does_not_fit_is_halved(chunk_size, monkeypatch):
    """Until it fits; from 16 rows on the error is the caller's."""
    from unsloth.kernels.loss_chunking import _logits_buffer

    empty, tried, room = torch.empty, [], {"rows": 20}

    def limited(shape, **options):
        tried.append(shape[0])
        if shape[0] > room["rows"]:
            raise torch.OutOfMemoryError("no room")
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", limited)
    buffer = _logits_buffer(50, 100, torch.float32, torch.device("cpu"))
    assert buffer.shape == (12, 112) and tried == [50, 25, 12]
    room["rows"] = 0
    for rows in (16, 17):
        with pytest.raises(torch.OutOfMemoryError, match = "no room"):
            _logits_buffer(rows, 100, torch.float32, torch.device("cpu"))
    assert tried[3:] == [16, 17, 8]


@pytest.mark.parametrize("every", [1, 3])
def test_each_row_is_in_one_chunk(every):
    """Of those that take part, in their order; the last chunk is what is left."""
    from unsloth.kernels.loss_chunking import iterate_chunks

    hidden, weight = torch.randn(37, 4), torch.randn(9, 4)
    index = None if every == 1 else torch.arange(0, 37, every)
    count = len(range(0, 37, every))
    plan = types.SimpleNamespace(count = count, rows = 8, index = index, logits_dtype = torch.float32)
    chunks = [(c.start, c.stop, c.logits.clone()) for c in iterate_chunks(hidden, weight, plan)]
    starts = list(range(0, count, 8))
    assert [chunk[:2] for chunk in chunks] == [(n, min(n + 8, count)) for n in starts]
    found = torch.cat([logits for *_, logits in chunks])
    torch.testing.assert_close(found, hidden[::every] @ weight.t())


def test_a_frozen_head_takes_the_row_count_that_suits_its_products(chunk_size, monkeypatch):
    """Tried once a head; a smaller chunk has to gain 2%. Not while a graph is captured, nor deterministically."""
    tried, capturing = [], [False]

    def seconds_a_row(counts, hidden, weight):
        tried.append(list(counts))
        return {count: weight.times.get(count, 1.0) for count in counts}

    def head(vocab, **times):
        index = types.SimpleNamespace(index = 0)
        times = {int(count[1:]): time for count, time in times.items()}
        return types.SimpleNamespace(
            is_cuda = True, device = index, dtype = "half", shape = (vocab, 64), times = times
        )

    monkeypatch.setattr(chunk_size, "_seconds_a_row", seconds_a_row)
    monkeypatch.setattr(chunk_size, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    fastest = chunk_size.fastest_rows
    assert fastest(1280, None, head(1, r1024 = 0.9)) == 1024
    assert fastest(1280, None, head(1)) == 1024  # remembered
    assert fastest(1024, None, head(1)) == 1024  # another budget
    assert fastest(768, None, head(2, r512 = 0.985)) == 768
    assert fastest(768, None, head(3, r512 = 0.97, r384 = 0.96)) == 512
    assert tried == [[1280, 1024, 768], [1024, 768, 512], [768, 512, 384], [768, 512, 384]]
    capturing[0] = True
    assert fastest(512, None, head(4, r256 = 0.1)) == 512
    capturing[0] = False
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest(512, None, head(4, r256 = 0.1)) == 512
    finally:
        torch.use_deterministic_algorithms(False)
    assert fastest(512, None, head(4, r256 = 0.1)) == 256

    def no_room(*arguments):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as full:
        full.setattr(chunk_size, "_seconds_a_row", no_room)
        assert fastest(512, None, head(5, r256 = 0.1)) == 512
    assert fastest(512, None, head(5, r256 = 0.1)) == 256  # tried again
    assert fastest(512, torch.zeros(600, 4), torch.zeros(9, 4)) == 512  # no GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA GPU")
def test_row_counts_are_tried_on_the_gpu(chunk_size, monkeypatch):
    """The default loss of a frozen head keeps to a count that was tried, and its value is right."""
    from unsloth.kernels.linear_loss import linear_cross_entropy

    monkeypatch.setattr(chunk_size, "_fastest", {})
    monkeypatch.setattr(chunk_size, "_gpu_budget", lambda index: 8)
    hidden = torch.randn(2048, 64, device = "cuda", dtype = torch.bfloat16, requires_grad = True)
    weight = torch.randn(8191, 64, device = "cuda", dtype = torch.bfloat16) / 8
    labels = torch.randint(0, 8191, (2048,), device = "cuda")
    found = linear_cross_entropy(hidden, weight, labels)
    found.backward()
    ((key, rows),) = chunk_size._fastest.items()
    assert key[0] == 512 and rows in (512, 384, 256)
    expected = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels)
    torch.testing.assert_close(found, expected, rtol = 1e-3, atol = 1e-3)
