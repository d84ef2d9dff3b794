# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Loss options in a Trainer of two ranks that accumulates gradients, beside the whole step in one process.

Two gloo processes, which are forked: this file needs a process of its own in which nothing has run a
backward pass.
"""

import copy
import os
import socket

import pytest
import torch
import torch.nn.functional as F
from backend import GPU, require
from loss_trainer import in_order, sequential

require("gloo")
import unsloth  # noqa: F401, E402

VOCAB, LENGTH, ACCUMULATED, STEPS, RATE = 32, 10, 2, 2, 0.5


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size = VOCAB,
        hidden_size = 16,
        intermediate_size = 16,
        num_hidden_layers = 1,
        num_attention_heads = 2,
        num_key_value_heads = 2,
        initializer_range = 0.3,
    )
    return LlamaForCausalLM(config)


def rows_of_tokens():
    """As many as both ranks take in all steps; the labels that count are fewer from row to row."""
    make = torch.Generator().manual_seed(1)
    rows = []
    for row in range(2 * ACCUMULATED * STEPS):
        tokens = torch.randint(0, VOCAB, (LENGTH,), generator = make).tolist()
        labels = [-100] * (row + 1) + tokens[row + 1 :]
        weights = torch.rand(LENGTH, generator = make).tolist()
        rows.append({"input_ids": tokens, "labels": labels, "loss_weights": weights})
    return rows


def dense_steps(model, class_weight, mean):
    """Plain descent on the losses of whole steps, over all labels of all ranks."""
    rows, each = rows_of_tokens(), 2 * ACCUMULATED
    for step in range(STEPS):
        total, weights, count = 0.0, 0.0, 0
        for row in rows[each * step : each * (step + 1)]:
            logits = model(input_ids = torch.tensor([row["input_ids"]])).logits[0, :-1].float()
            labels = torch.tensor(row["labels"][1:])
            keep = labels != -100
            of_rows = torch.tensor(row["loss_weights"])[1:] * keep
            losses = F.cross_entropy(logits, labels, weight = class_weight, reduction = "none")
            total = total + (losses * of_rows).sum()
            weights += (of_rows * class_weight[labels.clamp(min = 0)]).sum().item()
            count += int(keep.sum())
        (total / (weights if mean == "weights" else count)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None


def train_on_a_rank(folder, mean):
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from unsloth.fused_loss import set_loss_options

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    model = small_model()
    expected = copy.deepcopy(model)
    class_weight = torch.linspace(0.1, 3.0, VOCAB)
    set_loss_options(model, class_weight = class_weight, class_weight_mean = mean)
    args = TrainingArguments(
        output_dir = folder,
        per_device_train_batch_size = 1,
        gradient_accumulation_steps = ACCUMULATED,
        max_steps = STEPS,
        optim = "sgd",
        learning_rate = RATE,
        lr_scheduler_type = "constant",
        max_grad_norm = 0.0,
        average_tokens_across_devices = True,
        use_cpu = True,
        ddp_backend = "gloo",
        report_to = "none",
        save_strategy = "no",
        **sequential(),
    )
    trainer = Trainer(model = model, args = args, train_dataset = Dataset.from_list(rows_of_tokens()))
    assert args.world_size == 2
    in_order(trainer).train()
    dense_steps(expected, class_weight, mean)
    for found, wanted in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(found, wanted, rtol = 1e-4, atol = 1e-6)


def run_rank(rank, port, folder, mean, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place.update(MASTER_ADDR = "127.0.0.1", MASTER_PORT = port, ACCELERATE_USE_CPU = "true")
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group("gloo", rank = rank, world_size = 2)
    train_on_a_rank(folder, mean)
    results.put(rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(GPU, reason = "a forked rank cannot use the GPU that it sees")
@pytest.mark.parametrize("mean", ["weights", "labels"])
def test_two_ranks_that_accumulate_train_like_one_dense_step(tmp_path, mean):
    """Class weights and weights of tokens; the mean is over the weights, or labels, of all ranks' batches."""
    import torch.multiprocessing as mp
    from unsloth import fused_loss  # noqa: F401  (without it no rank needs to start)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target = run_rank, args = (rank, port, str(tmp_path), mean, results))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a rank hung"
    assert [process.exitcode for process in ranks] == [0, 0]
    assert sorted((results.get(), results.get())) == [0, 1]
