# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The float32 reference of `bench train` against transformers and PEFT, and how it is reported."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from toy_project import ROOT
from typer.testing import CliRunner

from unsloth_patches.bench import models, train, train_float32
from unsloth_patches.cli import app


@pytest.fixture
def peft_model():
    """A float32 Llama of transformers with LoRA whose B is not zero. Unsloth is not imported here."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**models.TOY.shape, num_hidden_layers = 2, rope_theta = 5000.0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r = 4, lora_alpha = 6, target_modules = targets, init_lora_weights = False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def batches(count):
    make = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(0, models.TOY.shape["vocab_size"], (2, 24), generator = make)
        labels = ids.clone()
        labels[0, :9] = labels[1, :1] = -100
        yield {"input_ids": ids, "labels": labels}


def test_reference_is_llama_with_lora(peft_model):
    """Loss and every adapter's gradient are those of transformers and PEFT."""
    (batch,) = batches(1)
    mine = train_float32.Llama(peft_model)
    loss = mine(batch["input_ids"], batch["labels"])
    expected = peft_model(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel = 1e-6)
    found = torch.autograd.grad(loss, list(mine.parameters()))
    theirs = [p for p in peft_model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, theirs)
    assert len(found) == len(gradients) == 28
    by_sum = lambda tensors: sorted(t.square().sum().item() for t in tensors)  # noqa: E731
    assert by_sum(found) == pytest.approx(by_sum(gradients), rel = 1e-5)


def test_reference_trains_as_the_trainer_does(peft_model, tmp_path):
    """Clipping, AdamW and the schedule: the losses of transformers' Trainer on the same batches."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path), max_steps = 6, learning_rate = 5e-3, warmup_steps = 2, logging_steps = 1,
        report_to = "none", save_strategy = "no", use_cpu = True, disable_tqdm = True,
    )  # fmt: skip
    reference = train_float32.Llama(peft_model)
    trainer = Trainer(peft_model, args)
    trainer.get_train_dataloader = lambda: list(batches(6))
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = list(train_float32.losses(reference, batches(6), args))
    assert found == pytest.approx(expected, rel = 1e-5) and found[-1] < found[0]


def test_rotary_scaling_is_refused():
    config = SimpleNamespace(
        head_dim = 16, rope_parameters = {"rope_type": "llama3", "rope_theta": 5e5}
    )
    with pytest.raises(ValueError, match = "llama3"):
        train_float32.angles(config, 8, "cpu")


def test_distances():
    forms = {"stock": [4.0, 2.02], "patched": [4.0, 1.99]}
    found = train_float32.distances([4.0, 2.0], forms)
    assert found["stock"] == pytest.approx({"largest": 0.01, "mean": 0.005})
    assert found["patched"]["largest"] == pytest.approx(0.005)
    assert found["patched_nearer"] == 1


def test_losses_are_added_to_the_earlier_results(tmp_path, monkeypatch, capsys):
    """Share by share, so that Ctrl-C keeps what is there; nothing else in the file changes."""
    share = {"stock": {"losses": [4.0, 2.02]}, "patched": {"losses": [4.0, 1.99]}, "speedup": 1.1}
    path = tmp_path / "train_cpu_toy.json"
    path.write_text(json.dumps({"title": "toy", "shares": {"half": share, "none": share}}))

    def reference(job, environment, make):
        assert job(tmp_path)["shares"] == {"half": (0.5, 2), "none": (0.0, 2)}
        yield "half", [4.0, 2.0]
        raise RuntimeError("stopped")

    monkeypatch.setattr(train_float32, "reference", reference)
    assert train.run(tmp_path, quick = True, float32 = True) == 1
    written = json.loads(path.read_text())
    added = written["shares"]["half"].pop("float32")
    assert added["losses"] == [4.0, 2.0] and added["patched_nearer"] == 1
    assert written.pop("float32_environment")["command"].endswith("--quick --float32")
    assert written == {"title": "toy", "shares": {"half": share, "none": share}}
    assert "patched is nearer at 1 of 2 steps" in capsys.readouterr().out


def test_without_a_model_named_the_possible_ones_are_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "start", lambda bench, every, model, quick: every)
    done = []
    monkeypatch.setattr(train, "_add_float32", lambda path, name, model: done.append(name))
    monkeypatch.setattr(train, "draw", lambda out, gpu: None)
    assert train.run(tmp_path, float32 = True) == 1 and not done
    for name in ("llama-1b", "llama-8b", "qwen3-4b-12-layers"):
        (tmp_path / f"train_{train.harness.slug()}_{name}.json").write_text("{}")
    capsys.readouterr()
    assert train.run(tmp_path, float32 = True) == 0
    assert sorted(done) == ["llama-1b", "llama-8b"]
    left_out = capsys.readouterr().err
    assert "left out: qwen3-4b-12-layers is a Qwen3" in left_out
    assert "llama-1b-full (Llama-3.2-1B shape, all weights trained) is no QLoRA" in left_out
    assert "train_cpu_llama-8b-8-layers.json; run `" in left_out


def test_results_of_an_earlier_run_are_needed(tmp_path, capsys):
    assert train.run(tmp_path, quick = True, float32 = True) == 1
    error = capsys.readouterr().err
    assert "train_cpu_toy.json" in error and f"bench train --quick --out {tmp_path}` first" in error
    done = CliRunner().invoke(app, ["bench", "loss", "--float32"], env = {"COLUMNS": "300"})
    assert done.exit_code == 2 and "bench loss has no --float32" in done.output


def test_a_reference_that_fails_says_why(tmp_path):
    """The end of its output is in the error."""
    (tmp_path / "torch.py").write_text("raise ImportError('a broken torch')", encoding = "utf-8")
    job = lambda folder: {"checkpoint": str(folder)}  # noqa: E731
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    with pytest.raises(RuntimeError, match = r"--float32 failed \(1\)(.|\n)*a broken torch"):
        list(train_float32.reference(job, environment, lambda folder: None))
