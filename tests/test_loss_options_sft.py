# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""SFTTrainer on the losses, with their options."""

import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, GPU, require
from loss_trainer import (  # noqa: F401
    checkpoint,
    in_order,
    label_counts,
    load,
    reference_losses,
    reference_rows,
    rows_of_tokens,
    sequential,
    train,
)

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)

# `calls` counts the loss that the backend has; a GPU's model computes in bfloat16.
COUNTED, EXACT = ("fused", 5e-2) if GPU else ("cpu", 2e-4)


@pytest.mark.skipif(GPU, reason = "the CPU backend's imports")
def test_the_cpu_backend_is_imported_without_triton():
    """No kernel is loaded before a loss needs one, as on machines that have no Triton."""
    if not Path(unsloth.__file__).with_name("loss_options.py").exists():
        pytest.skip("what is put in at import is in no file that another process reads")
    code = "import sys; sys.modules['triton'] = None; import unsloth; print('unsloth.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output = True, text = True)
    assert done.stdout.split()[-1:] == ["False"], done.stderr


def test_sft_trainer_trains_on_our_loss(checkpoint):
    """Losses are right, a batch without labels trains on with loss 0, and the counter proves use."""
    from unsloth.fused_loss import calls

    before = calls().get(COUNTED, 0)
    found, trainer = train(checkpoint)
    assert calls().get(COUNTED, 0) - before == 4
    assert found == pytest.approx(reference_losses(checkpoint), abs = EXACT)
    assert found[3] == 0.0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_label_smoothing_factor_reaches_the_chunked_loss(checkpoint):
    """SFTConfig(label_smoothing_factor) smooths without asking the model for logits."""
    from unsloth.fused_loss import calls

    before = calls().get(COUNTED, 0)
    found, _ = train(checkpoint, label_smoothing_factor = 0.5)
    assert calls().get(COUNTED, 0) - before == 4
    assert abs(found[1] - reference_losses(checkpoint)[1]) > 5 * EXACT
    assert found == pytest.approx(reference_losses(checkpoint, label_smoothing = 0.5), abs = EXACT)
    with pytest.raises(ValueError, match = "label_smoothing_factor .* got 1.5"):
        train(checkpoint, label_smoothing_factor = 1.5)


@pytest.mark.parametrize("mean", ["weights", "labels"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_class_weights_through_sft_trainer(checkpoint, mean, accumulated):
    """Losses of whole steps, divided by the weights of all their labels or by the labels' number."""
    from unsloth.fused_loss import set_loss_options

    weight = torch.linspace(0.0, 2.0, 64)
    options = {"class_weight": weight, "class_weight_mean": mean, "z_loss": 0.01}
    found, _ = train(
        checkpoint,
        lambda model: set_loss_options(model, **options),
        gradient_accumulation_steps = accumulated,
    )
    rows, counts = reference_rows(checkpoint), label_counts()
    starts = range(0, 4, accumulated)
    for loss, start in zip(found, starts, strict = True):
        logits, labels = map(torch.cat, zip(*rows[start : start + accumulated]))
        count = max(sum(counts[start : start + accumulated]), 1)
        keep = labels != -100
        summed = F.cross_entropy(logits, labels, weight = weight, reduction = "sum")
        divisor = weight[labels[keep]].sum().clamp(min = 1) if mean == "weights" else count
        square = logits[keep].logsumexp(1).square().sum() / count
        expected = summed / divisor + 0.01 * square
        assert loss == pytest.approx(expected.item(), abs = EXACT)
    assert abs(found[0] / reference_losses(checkpoint)[0] - 1) > 4e-2


def test_evaluation_and_prediction_honour_the_options(checkpoint):
    """evaluate() and predict() report the loss that training follows; TRL's metrics stay."""
    from unsloth.fused_loss import set_loss_options

    _, trainer = train(checkpoint, rows = rows_of_tokens()[:2])
    plain = trainer.evaluate()
    set_loss_options(trainer.model, z_loss = 0.1, label_smoothing = 0.2)
    expected = []
    for (logits, labels), count in list(zip(reference_rows(checkpoint), label_counts()))[:2]:
        square = logits[labels != -100].logsumexp(1).square().sum()
        loss = F.cross_entropy(logits, labels, label_smoothing = 0.2, reduction = "sum")
        expected.append((loss + 0.1 * square).item() / count)
    expected = sum(expected) / 2
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected, abs = EXACT)
    assert abs(plain["eval_loss"] - expected) > 10 * EXACT
    for name in ("eval_entropy", "eval_mean_token_accuracy"):
        if name in plain:
            assert found[name] == pytest.approx(plain[name], abs = 1e-5)
    # Unsloth's GPU models return no logits, and predict() cannot join what they return instead.
    trainer.args.prediction_loss_only = GPU
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, abs = EXACT)
    set_loss_options(trainer.model, reset = True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], abs = 1e-6)


def test_trainers_with_a_loss_of_their_own_refuse_options(checkpoint):
    """loss_type = "dft", in training; before TRL 1.0 that is a compute_loss_func."""
    from unsloth.fused_loss import set_loss_options

    set_options = lambda model: set_loss_options(model, z_loss = 0.1)  # noqa: E731
    with pytest.raises(NotImplementedError, match = 'loss_type = "dft"|compute_loss_func'):
        train(checkpoint, set_options, loss_type = "dft")


def preference_rows():
    make = torch.Generator().manual_seed(2)
    words = lambda count: " ".join(  # noqa: E731
        f"w{i}" for i in torch.randint(3, 64, (count,), generator = make).tolist()
    )
    return [{"prompt": words(3), "chosen": words(5), "rejected": words(4)} for _ in range(2)]


@pytest.mark.skipif(GPU, reason = "the losses are those of the CPU backend")
@pytest.mark.parametrize("kind", ["DPO", "ORPO", "KTO"])
def test_preference_trainers_keep_their_losses_and_refuse_options(checkpoint, tmp_path, kind):
    """Two real steps beside plain transformers' model in the same trainer; options set there stop it."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, set_seed
    from unsloth.fused_loss import set_loss_options

    home = trl
    if kind == "ORPO":
        with contextlib.suppress(ImportError):  # TRL 0.24 has it at its top
            home = importlib.import_module("trl.experimental.orpo")
    Config, Trainer = getattr(home, f"{kind}Config"), getattr(home, f"{kind}Trainer")
    rows = preference_rows()
    if kind == "KTO":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]

    def steps(model, tokenizer):
        set_seed(0)
        config = Config(
            output_dir = str(tmp_path),
            per_device_train_batch_size = 2,
            max_steps = 2,
            logging_steps = 1,
            learning_rate = 1e-9,
            report_to = "none",
            save_strategy = "no",
            bf16 = False,  # TRL's default, which transformers 4 keeps for trainers that come after
            use_cpu = True,
        )
        trainer = Trainer(
            model = model,
            args = config,
            train_dataset = Dataset.from_list(rows),
            processing_class = tokenizer,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, tokenizer = load(checkpoint)
    plain = steps(AutoModelForCausalLM.from_pretrained(checkpoint, dtype = torch.float32), tokenizer)
    assert steps(model, tokenizer) == pytest.approx(plain, abs = 1e-4) and len(plain) == 2
    model, tokenizer = load(checkpoint)
    set_loss_options(model, z_loss = 0.1)
    with pytest.raises(NotImplementedError, match = f"{kind}Trainer computes a loss of its own"):
        steps(model, tokenizer)


@pytest.mark.skipif(GPU, reason = "generation of the CPU backend")
def test_grpo_refuses_options(checkpoint, tmp_path):
    """A real step without options; with them the first step says why it stops."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from unsloth.fused_loss import set_loss_options

    def step(model, tokenizer):
        config = GRPOConfig(
            output_dir = str(tmp_path),
            per_device_train_batch_size = 2,
            num_generations = 2,
            max_completion_length = 4,
            max_steps = 1,
            logging_steps = 1,
            report_to = "none",
            save_strategy = "no",
            bf16 = False,  # TRL's default, which transformers 4 keeps for trainers that come after
            use_cpu = True,
        )
        trainer = GRPOTrainer(
            model = model,
            args = config,
            reward_funcs = lambda completions, **_: [float(len(c)) for c in completions],
            train_dataset = Dataset.from_list([{"prompt": "w3 w4 w5"}] * 2),
            processing_class = tokenizer,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, tokenizer = load(checkpoint)
    assert len(step(model, tokenizer)) == 1
    set_loss_options(model, z_loss = 0.1)
    with pytest.raises(NotImplementedError, match = "GRPOTrainer computes a loss of its own"):
        step(model, tokenizer)


@pytest.mark.parametrize("batches", ["padded", "padding_free", "packed", "truncated"])
def test_weights_of_tokens_of_prompts_and_completions(checkpoint, batches):
    """TRL's own preparation: completion_only_loss masks the prompt; packing keeps sequences apart."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth.fused_loss import set_loss_options

    model, tokenizer = load(checkpoint)
    set_loss_options(model, class_weight_mean = "weights")
    rows = rows_of_tokens()[:2]
    for number, row in enumerate(rows):
        row["completion_mask"] = [0] * 4 + [1] * 8
        row["loss_weights"] = [0.25 + number + 0.1 * token for token in range(12)]
        if batches == "packed":
            row["loss_weights"] = 0.25 + number
        del row["labels"]
    length = 8 if batches == "truncated" else 32
    config = SFTConfig(
        output_dir = checkpoint + "/out",
        per_device_train_batch_size = 2,
        max_steps = 1,
        logging_steps = 1,
        learning_rate = 1e-9,
        report_to = "none",
        save_strategy = "no",
        completion_only_loss = True,
        padding_free = batches == "padding_free",
        packing = batches == "packed",
        max_length = length,
        bf16 = GPU,
        **sequential(),
    )
    trainer = SFTTrainer(
        model = model, args = config, train_dataset = Dataset.from_list(rows), processing_class = tokenizer
    )
    in_order(trainer).train()
    total = weights = 0.0
    for row, (logits, _) in zip(rows, reference_rows(checkpoint)):
        keep = torch.tensor(row["completion_mask"][1:length])
        each = torch.tensor(row["loss_weights"]).expand(12)[1:length] * keep
        labels = torch.tensor(row["input_ids"][1:length])
        losses = F.cross_entropy(logits[: length - 1], labels, reduction = "none")
        total = total + (losses * each).sum()
        weights = weights + each.sum()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == [pytest.approx((total / weights).item(), abs = 5 * EXACT)]


def focal(logits, labels):
    log_p = F.log_softmax(logits, 1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return -((1 - log_p.exp()) ** 2) * log_p


def dft(logits, labels):
    log_p = F.log_softmax(logits, 1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return -log_p.exp().detach() * log_p


def distill(logits, labels, ids, log_probs):
    """Kullback-Leibler divergence from a teacher's most likely tokens."""
    student = F.log_softmax(logits, 1).gather(1, ids)
    return (log_probs.exp() * (log_probs - student)).sum(1)


@pytest.mark.parametrize("loss_fn", [focal, dft, distill])
def test_a_loss_of_ones_own_trains_without_logits(checkpoint, loss_fn):
    """Focal, DFT and offline distillation through SFTTrainer and its evaluation, beside dense ones."""
    from unsloth.fused_loss import set_loss_options

    rows, columns = rows_of_tokens(), ()
    if loss_fn is distill:
        columns = ("teacher_ids", "teacher_log_probs")
        make = torch.Generator().manual_seed(3)
        for row in rows:
            log_probs, ids = torch.randn(12, 64, generator = make).log_softmax(1).topk(4)
            row.update(teacher_ids = ids.tolist(), teacher_log_probs = log_probs.tolist())
    expected = []
    for row, (logits, labels), count in zip(rows, reference_rows(checkpoint), label_counts()):
        keep = labels != -100
        extra = [torch.tensor(row[name])[1:][keep] for name in columns]
        total = loss_fn(logits[keep], labels[keep], *extra).sum()
        expected.append(total.item() / max(count, 1))
    found, trainer = train(
        checkpoint,
        lambda model: set_loss_options(model, loss_fn = loss_fn, loss_columns = columns),
        rows,
    )
    assert found == pytest.approx(expected, abs = EXACT)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(expected[:2]) / 2, abs = EXACT)


@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"loss_fn": focal}])
def test_labels_that_an_option_ignores_are_nowhere_counted(checkpoint, options):
    """As those of -100: not among a step's labels, nor an evaluation's."""
    from unsloth.fused_loss import set_loss_options

    found, rows = [], rows_of_tokens()
    for ignored in (9, -100):
        for row in rows:
            row["labels"] = [
                ignored if n % 3 == 0 or y in (9, -100) else y for n, y in enumerate(row["labels"])
            ]
        losses, trainer = train(
            checkpoint,
            lambda model: set_loss_options(model, ignore_index = ignored, **options),
            rows,
            gradient_accumulation_steps = 2,
        )
        found.append([*losses, trainer.evaluate()["eval_loss"]])
    assert found[0] == pytest.approx(found[1], abs = EXACT)


def test_weights_of_tokens_through_sft_trainer(checkpoint):
    """A loss_weights column: shifted with the labels, and summed over the whole step."""
    from unsloth.fused_loss import set_loss_options

    make = torch.Generator().manual_seed(4)
    rows = rows_of_tokens()
    for row in rows:
        row["loss_weights"] = torch.rand(12, generator = make).tolist()
    found, trainer = train(
        checkpoint,
        lambda model: set_loss_options(model, class_weight_mean = "weights"),
        rows,
        collator = None,
        gradient_accumulation_steps = 2,
        remove_unused_columns = True,
    )
    references = reference_rows(checkpoint)
    for step, loss in enumerate(found):
        total = weights = 0.0
        for row, (logits, labels) in list(zip(rows, references))[2 * step : 2 * step + 2]:
            each = torch.tensor(row["loss_weights"])[1:] * (labels != -100)
            total = total + (F.cross_entropy(logits, labels, reduction = "none") * each).sum()
            weights = weights + each.sum()
        assert loss == pytest.approx((total / weights).item(), abs = EXACT)


def test_columns_of_the_loss_survive_train_on_responses_only(checkpoint):
    """It drops what no forward names; with options the model is fed them, without options it is not."""
    from trl import SFTTrainer
    from unsloth.chat_templates import train_on_responses_only
    from unsloth.fused_loss import set_loss_options

    def loss(logits, labels, ids):
        return F.cross_entropy(logits.float(), labels, reduction = "none")

    rows = [{"input_ids": [3, 10 + row, 4, 20 + row], "ids": row} for row in range(2)]
    for row in rows:
        row.update(labels = row["input_ids"], loss_weights = 0.5 + row["ids"], note = 1)
    _, trainer = train(
        checkpoint,
        lambda model: set_loss_options(model, loss_fn = loss, loss_columns = "ids"),
        rows,
        collator = None,
    )
    collator, data = trainer.data_collator, trainer.train_dataset
    trainer.args.remove_unused_columns = True  # which Unsloth unsets for rows without padding
    trainer = train_on_responses_only(trainer, instruction_part = "w3", response_part = "w4")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == [[-100, -100, -100, 20]]
    assert batch["loss_weights"].tolist() == [[0.5] * 4] and batch["ids"].tolist() == [[0] * 4]
    assert "note" not in batch
    assert {"loss_weights", "ids"} <= set(trainer.eval_dataset.column_names)
    set_loss_options(trainer.model, reset = True)
    trainer.data_collator = collator
    trainer = train_on_responses_only(trainer, instruction_part = "w3", response_part = "w4")
    assert not {"loss_weights", "ids"} & set(trainer.train_dataset.column_names)
    with pytest.warns(UserWarning, match = "loss_weights is not used.*before the trainer is made"):
        SFTTrainer(
            trainer.model, trainer.args, None, data, processing_class = trainer.processing_class
        )


def test_model_arguments_that_stock_drops_are_honoured(checkpoint):
    """label_smoothing, ignore_index and shift_labels in a plain call of the model."""
    model, _ = load(checkpoint)
    row = rows_of_tokens()[1]
    tokens = torch.tensor([row["input_ids"]], device = DEVICE)
    labels = torch.tensor([row["labels"]], device = DEVICE)
    shifted = F.pad(labels[:, 1:], (0, 1), value = -100)
    with torch.no_grad():
        logits = model(input_ids = tokens).logits[0].float()
        smoothed = model(input_ids = tokens, labels = labels, label_smoothing = 0.5).loss
        renamed = model(
            input_ids = tokens, labels = labels.masked_fill(labels == -100, 5), ignore_index = 5
        ).loss
        moved = model(input_ids = tokens, shift_labels = shifted, label_smoothing = 0.5).loss
    expected = F.cross_entropy(logits, shifted[0], label_smoothing = 0.5).item()
    assert abs(expected - F.cross_entropy(logits, shifted[0]).item()) > 5 * EXACT
    assert smoothed.item() == pytest.approx(expected, abs = EXACT)
    assert moved.item() == pytest.approx(expected, abs = EXACT)
    other = shifted[0].masked_fill(shifted[0] == 5, -100)
    assert renamed.item() == pytest.approx(F.cross_entropy(logits, other).item(), abs = EXACT)


def test_reduction_is_honoured_and_lookalikes_are_refused(checkpoint):
    """reduction in a call of the model; class_weights, weight and the like name the right argument."""
    model, _ = load(checkpoint)
    row = rows_of_tokens()[1]
    arguments = {
        "input_ids": torch.tensor([row["input_ids"]], device = DEVICE),
        "labels": torch.tensor([row["labels"]], device = DEVICE),
    }
    (logits, labels) = reference_rows(checkpoint)[1]
    rows = F.cross_entropy(logits, labels, reduction = "none")
    for grad in (torch.enable_grad, torch.no_grad):
        with grad():
            summed = model(**arguments, reduction = "sum").loss
            each = model(**arguments, reduction = "none").loss
        assert summed.item() == pytest.approx(rows.sum().item(), abs = 10 * EXACT)
        torch.testing.assert_close(each[0, :-1].cpu().float(), rows, rtol = 0, atol = 2 * EXACT)
    for name, meant in (
        ("weight", "class_weight"),
        ("class_weights", "class_weight"),
        ("label_smoothing_factor", "label_smoothing"),
        ("z_losss", "z_loss"),
        ("sample_weights", "loss_weights"),
    ):
        with pytest.raises(TypeError, match = f"'{name}' would be ignored; '{meant}'"):
            model(**arguments, **{name: 0.1})
    # What transformers passes goes through.
    model(**arguments, num_items_in_batch = torch.tensor(9), use_cache = False, return_dict = True)


SCALED = {
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "Gemma3Text": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
}


def tiny(family):
    """A model whose logits are scaled or capped, from transformers alone."""
    import transformers

    size = dict(
        vocab_size = 64,
        hidden_size = 16,
        intermediate_size = 16,
        num_hidden_layers = 1,
        num_attention_heads = 2,
        num_key_value_heads = 2,
        initializer_range = 0.5,
        pad_token_id = 2,
        bos_token_id = 0,
        eos_token_id = 1,
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**size, **SCALED[family])
    kind = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    return kind(config).to(DEVICE).eval()


def test_options_are_converted_shown_and_removed():
    """Lists and integers become weights; the call returns what is in force."""
    from unsloth.fused_loss import LossOptions, set_loss_options

    model = tiny("Gemma2")
    assert set_loss_options(model) == LossOptions()
    shown = set_loss_options(model, class_weight = list(range(64)), ignore_index = None)
    assert shown.class_weight.dtype == torch.float32 and shown.class_weight[5] == 5
    assert set_loss_options(model) is shown
    with pytest.raises(ValueError, match = "between 0 and 1"):
        set_loss_options(model, label_smoothing = 2.0)
    assert set_loss_options(model) is shown  # what was in force stays
    assert set_loss_options(model, reset = True) == LossOptions() == set_loss_options(model)
    with pytest.raises(ValueError, match = "no causal language model"):
        set_loss_options(torch.nn.Linear(2, 2), label_smoothing = 0.1)


OPTIONS = {"label_smoothing": 0.2, "class_weight": torch.linspace(0.1, 2.0, 64)}


@pytest.mark.skipif(GPU, reason = "the CPU backend's models")
@pytest.mark.parametrize("family", SCALED)
def test_scaled_and_capped_logits_on_the_cpu(family):
    """In SFTTrainer's step without logits, elsewhere from them: plain transformers' loss and gradients."""
    from unsloth.fused_loss import calls, set_loss_options
    from unsloth_zoo.cpu.loader import patch_chunked_causal_lm_loss

    plain, model = tiny(family), tiny(family)
    assert patch_chunked_causal_lm_loss(model) and patch_chunked_causal_lm_loss(model)
    tokens = torch.randint(3, 64, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100

    def loss_and_gradients(model, loss):
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    def check(expected, **options):
        for inside in (True, False):
            model._unsloth_cpu_chunked_ce_active = inside
            counted = calls().get("cpu", 0)
            outputs = model(input_ids = tokens, **options)
            assert (outputs.logits is None) is inside
            assert calls().get("cpu", 0) == counted + inside
            found = loss_and_gradients(model, outputs.loss)
            torch.testing.assert_close(found, expected, rtol = 1e-4, atol = 1e-5)

    own = plain(input_ids = tokens, labels = labels, num_items_in_batch = 7).loss
    check(loss_and_gradients(plain, own), labels = labels, num_items_in_batch = 7)
    logits, targets = (
        plain(input_ids = tokens).logits[:, :-1].reshape(-1, 64),
        labels[:, 1:].reshape(-1),
    )
    own = F.cross_entropy(logits, targets, OPTIONS["class_weight"], label_smoothing = 0.2)
    expected = loss_and_gradients(plain, own)
    check(expected, labels = labels, **OPTIONS)
    set_loss_options(model, **OPTIONS)
    check(expected, shift_labels = F.pad(labels[:, 1:], (0, 1), value = -100))


@pytest.mark.skipif(GPU, reason = "the CPU backend's models")
@pytest.mark.parametrize("family", SCALED)
def test_sft_trainer_on_scaled_and_capped_logits(checkpoint, tmp_path, family):
    """Loaded by FastLanguageModel, trained, and evaluated, with options."""
    from transformers import AutoTokenizer
    from unsloth.fused_loss import calls, set_loss_options

    plain = tiny(family)
    plain.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    rows, counted = rows_of_tokens()[:3], calls().get("cpu", 0)
    found, trainer = train(str(tmp_path), lambda model: set_loss_options(model, **OPTIONS), rows)
    assert calls()["cpu"] - counted == 3
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = plain(input_ids = torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        loss = F.cross_entropy(logits, targets, OPTIONS["class_weight"], label_smoothing = 0.2)
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs = EXACT)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(expected[:2]) / 2, abs = EXACT)


@pytest.mark.skipif(GPU, reason = "the CPU backend's models")
def test_a_head_with_an_adapter_keeps_its_logits_on_the_cpu():
    """Its logits are more than the head's product: the loss, with options, comes from them."""
    from peft import LoraConfig, get_peft_model
    from unsloth_zoo.cpu.loader import patch_chunked_causal_lm_loss

    model = tiny("Gemma2")
    patch_chunked_causal_lm_loss(model)
    adapted = get_peft_model(model, LoraConfig(r = 2, target_modules = ["lm_head"]))
    torch.nn.init.normal_(adapted.base_model.model.lm_head.lora_B["default"].weight)
    model._unsloth_cpu_chunked_ce_active = True
    tokens = torch.randint(3, 64, (2, 9))
    outputs = adapted(input_ids = tokens, labels = tokens, label_smoothing = 0.2)
    logits, targets = outputs.logits[:, :-1].reshape(-1, 64), tokens[:, 1:].reshape(-1)
    expected = F.cross_entropy(logits, targets, label_smoothing = 0.2)
    torch.testing.assert_close(outputs.loss, expected, rtol = 1e-4, atol = 1e-5)


@pytest.mark.skipif(GPU, reason = "the CPU backend's models")
def test_without_triton_the_stock_loss_runs_and_drops_no_option(monkeypatch):
    """The kernels cannot be imported there: options come from the logits, or are refused."""
    from peft import LoraConfig, get_peft_model
    from unsloth.fused_loss import calls
    from unsloth_zoo.cpu.loader import patch_chunked_causal_lm_loss
    from unsloth_zoo.cpu.ops import chunked_linear_cross_entropy

    head = (torch.randn(9, 4), torch.randn(7, 4), torch.randint(7, (9,)))
    expected = chunked_linear_cross_entropy(*head)
    before = calls()
    kernels = chunked_linear_cross_entropy.__globals__["__package__"] + ".kernels"
    monkeypatch.setitem(sys.modules, f"{kernels}.linear_cross_entropy", None)
    monkeypatch.delattr(importlib.import_module(kernels), "linear_cross_entropy")
    torch.testing.assert_close(chunked_linear_cross_entropy(*head), expected)
    assert sum(calls().values()) == sum(before.values()) + 1 and calls()["cpu"] == before["cpu"]
    with pytest.raises(NotImplementedError, match = "z_loss cannot be honoured.*halted"):
        chunked_linear_cross_entropy(*head, z_loss = 0.1)
    model = tiny("Gemma2")
    adapted = get_peft_model(model, LoraConfig(r = 2, target_modules = ["q_proj"]))
    assert not patch_chunked_causal_lm_loss(adapted)  # the loss is the inner model's
    assert "forward" not in vars(adapted) and not patch_chunked_causal_lm_loss(model)
    tokens = torch.randint(3, 64, (2, 9))
    outputs = model(input_ids = tokens, labels = tokens, label_smoothing = 0.2)
    logits, targets = outputs.logits[:, :-1].reshape(-1, 64), tokens[:, 1:].reshape(-1)
    smoothed = F.cross_entropy(logits, targets, label_smoothing = 0.2)
    torch.testing.assert_close(outputs.loss, smoothed, rtol = 1e-4, atol = 1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "fused_cross_entropy:on_linear_cross_entropy",
        "fused_loss_cpu:cpu_loss_on_linear_cross_entropy",
        "fused_loss_cpu:cpu_forward_with_loss_options",
    ],
)
def test_a_loss_of_an_unknown_zoo_stays_stock_and_drops_no_option(name):
    """unsloth_zoo is released apart from Unsloth: one that we do not know must not break an import."""
    module, _, decorator = name.partition(":")
    decorator = getattr(importlib.import_module(f"unsloth.{module}"), decorator)

    def newer(hidden, something_new):
        return ("stock", hidden, something_new)

    with pytest.warns(UserWarning, match = "something_new"):
        kept = decorator(newer)
    assert kept(1, something_new = 2) == ("stock", 1, 2)
    with pytest.raises(NotImplementedError, match = "z_loss cannot be honoured"):
        kept(1, 2, z_loss = 0.1)


@pytest.mark.skipif(GPU, reason = "the losses are those of the CPU backend")
def test_a_trainer_that_unsloth_has_written_refuses_options_too(checkpoint, tmp_path):
    """As on a GPU, where they stand in TRL's place. Last: from here on they stand there."""
    import trl
    import unsloth.models  # noqa: F401

    assert trl.DPOTrainer.__name__ == "UnslothDPOTrainer"
    test_preference_trainers_keep_their_losses_and_refuse_options(checkpoint, tmp_path, "DPO")
