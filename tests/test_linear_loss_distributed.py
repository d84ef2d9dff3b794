# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""The chunked losses on two ranks: DDP, a sharded head, and models that fully_shard has sharded.

Two gloo processes on the CPU, or two NCCL ones where there are two GPUs. Those on the CPU are forked,
so this file needs a process of its own in which nothing has run a backward pass.
"""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from backend import require

require("gloo")
import unsloth  # noqa: F401, E402

WIDTH, VOCAB, ROWS = 6, 12, 8
pytest.importorskip("torch.distributed.fsdp")


@pytest.fixture(autouse = True)
def losses():
    """The module under test, so that each test fails by itself where it is missing."""
    from unsloth.kernels import linear_loss
    return linear_loss


# --- two processes ------------------------------------------------------------------------------


def enter(rank, port, device):
    """The process group of two ranks; this rank's device."""
    import torch.distributed as dist

    os.environ.update(
        MASTER_ADDR = "127.0.0.1", MASTER_PORT = str(port), RANK = str(rank), WORLD_SIZE = "2"
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank = rank, world_size = 2)
    return torch.device(device, rank) if device == "cuda" else torch.device("cpu")


def _run(worker, rank, port, device, results):
    import torch.distributed as dist

    worker(rank, enter(rank, port, device))
    dist.barrier()
    dist.destroy_process_group()
    if results is not None:
        results.put(rank)


def on_two_ranks(worker, device):
    """Runs ``worker(rank, device)`` in two processes; fails where one raises or hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (on_two_gpus if device == "cuda" else on_two_forks)(worker, port)


def on_two_forks(worker, port):
    import torch.multiprocessing as mp

    context = mp.get_context("fork")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target = _run, args = (worker, rank, port, "cpu", results)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a rank hung"
    assert [process.exitcode for process in ranks] == [0, 0]
    assert sorted((results.get(), results.get())) == [0, 1]


def on_two_gpus(worker, port):
    """CUDA does not survive a fork: each rank is a pytest of its own, at `test_one_rank`."""
    command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_one_rank"]
    task = {"LINEAR_LOSS_WORKER": worker.__name__, "LINEAR_LOSS_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            command,
            env = {**os.environ, **task, "LINEAR_LOSS_RANK": str(rank)},
            stdout = subprocess.PIPE,
            stderr = subprocess.STDOUT,
            text = True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout = 300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs):
        assert process.returncode == 0 and "1 passed" in output, output


@pytest.mark.skipif("LINEAR_LOSS_RANK" not in os.environ, reason = "a rank of another test")
def test_one_rank():
    """One rank on a GPU: what `on_two_gpus` starts twice."""
    worker = globals()[os.environ["LINEAR_LOSS_WORKER"]]
    rank, port = (int(os.environ[f"LINEAR_LOSS_{name}"]) for name in ("RANK", "PORT"))
    _run(worker, rank, port, "cuda", None)


devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks = pytest.mark.skipif(
                torch.cuda.is_available(), reason = "a forked rank cannot use the GPU that it sees"
            ),
        ),
        pytest.param(
            "cuda",
            marks = pytest.mark.skipif(torch.cuda.device_count() < 2, reason = "needs two GPUs"),
        ),
    ],
)


# --- workers ------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """As Unsloth's models: the head's weight is read, and the head is never called."""

    def __init__(self, loss, tied):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.block = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias = False)
        if tied:
            self.head.weight = self.embed.weight
        self.loss = loss

    def forward(self, tokens, labels):
        return self.loss(torch.tanh(self.block(self.embed(tokens))), self.head.weight, labels)


def dense(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), labels.flatten())


def chunked(hidden, weight, labels):
    from unsloth.kernels.linear_loss import linear_cross_entropy
    return linear_cross_entropy(hidden, weight, labels, chunk_rows = 3)


def by_log_probs(hidden, weight, labels):
    from unsloth.kernels.linear_loss import linear_log_probs
    return -linear_log_probs(hidden, weight, labels, chunk_rows = 3).log_probs.mean()


def batches(device, steps = 3):
    """[steps, 2 ranks, ROWS] tokens and labels, the same on both ranks; none ignored, so that the
    mean over the ranks is the mean over all rows."""
    generator = torch.Generator().manual_seed(5)
    shape = (steps, 2, ROWS)
    tokens = torch.randint(0, VOCAB, shape, generator = generator)
    return tokens.to(device), torch.randint(0, VOCAB, shape, generator = generator).to(device)


def trained(model, step, tokens, labels):
    """The model's parameters, whole, after a few steps of SGD; step(model, tokens, labels) -> loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr = 0.5)
    for batch in zip(tokens, labels):
        step(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        whole[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def check_training(rank, device, loss, tied, shard):
    """Trains on this rank's half of each batch, and a dense copy on both halves; the same weights."""
    tokens, labels = batches(device)
    torch.manual_seed(0)
    reference = Model(dense, tied).to(device)
    torch.manual_seed(0)
    model = Model(loss, tied).to(device)
    model = shard(model)
    found = trained(model, lambda m, t, y: m(t[rank], y[rank]), tokens, labels)
    wanted = trained(reference, lambda m, t, y: m(t, y), tokens, labels)
    assert len(found) == len(wanted) == (3 if tied else 4)
    for name, value in wanted.items():
        name = name if name in found else f"module.{name}"
        torch.testing.assert_close(found[name], value, rtol = 1e-4, atol = 1e-5)
    # Not the trivial agreement of weights that nothing moved.
    torch.manual_seed(0)
    start = dict(Model(dense, tied).to(device).named_parameters())
    assert all((wanted[name] - start[name]).abs().max() > 1e-3 for name in wanted)


def with_ddp(rank, device):
    from torch.nn.parallel import DistributedDataParallel
    for loss in (chunked, by_log_probs):
        for tied in (False, True):
            check_training(rank, device, loss, tied, DistributedDataParallel)


def _fully(*parts):
    """fully_shard of the named parts, each a unit of its own, and then of the model."""

    def shard(model):
        from torch.distributed.fsdp import fully_shard
        for part in parts:
            fully_shard(getattr(model, part))
        return fully_shard(model)

    return shard


def with_the_head_in_the_root(rank, device):
    for loss in (chunked, by_log_probs):
        for tied in (False, True):
            check_training(rank, device, loss, tied, _fully("block"))


def with_the_head_apart(rank, device):
    """The head's own unit is never entered, so the loss meets a DTensor and gathers it itself."""
    from torch.distributed.tensor import DTensor

    seen = []

    def loss(hidden, weight, labels):
        seen.append(type(weight))
        return chunked(hidden, weight, labels)

    check_training(rank, device, loss, False, _fully("block", "head"))
    assert seen and all(kind is DTensor for kind in seen)


def with_a_sharded_parameter(rank, device):
    """A DTensor made by hand, and a gradient that comes back sharded alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    weight, hidden = torch.randn(11, 5, device = device), torch.randn(2, 6, 5, device = device)
    labels = torch.randint(0, 11, (2, 6), device = device)
    whole = weight.clone().requires_grad_()
    sum(dense(hidden[r], whole, labels[r]) / 2 for r in (0, 1)).backward()
    mesh = init_device_mesh(device.type, (2,))
    shard = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    chunked(hidden[rank], shard, labels[rank]).backward()
    assert shard.grad.placements == shard.placements
    torch.testing.assert_close(shard.grad.full_tensor(), whole.grad)


# --- tests --------------------------------------------------------------------------------------


@devices
def test_ddp_trains_like_one_process(device):
    """DistributedDataParallel averages the head's gradient, of a tied head too."""
    on_two_ranks(with_ddp, device)


@devices
def test_a_sharded_head_gets_a_sharded_gradient(device):
    """A weight that is a DTensor: gathered for the loss, its gradient averaged and sharded again."""
    on_two_ranks(with_a_sharded_parameter, device)


@devices
def test_fully_shard_with_the_head_in_the_root_unit(device):
    """FSDP2 gathers the head for the model's forward; trained and tied heads get right weights."""
    on_two_ranks(with_the_head_in_the_root, device)


@devices
def test_fully_shard_with_the_head_in_a_unit_of_its_own(device):
    """Reading a sharded head's weight without calling the head trains it like a whole one."""
    on_two_ranks(with_the_head_apart, device)
