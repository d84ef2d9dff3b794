# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Loss options before a model has them: their values, their columns of a batch, trainers that ignore them."""

import contextlib
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from backend import require

require("cpu")
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"smoothing": 0.1}, TypeError, "'label_smoothing' is what it is called"),
        ({"temperature": 0.1}, TypeError, "no option 'temperature'"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[64\]"),
        ({"class_weight": [-1.0] * 64}, ValueError, "not negative"),
        ({"class_weight": [float("nan")] * 64}, ValueError, "finite"),
        ({"class_weight": [0] * 64}, ValueError, "a weight that is not 0"),
        ({"class_weight": ["1"] * 64}, TypeError, r"\[64\] numbers, got \['1', .*\.\.\.\]"),
        ({"label_smoothing": 2.0}, ValueError, "between 0 and 1"),
        ({"label_smoothing": True}, ValueError, "got True; give an int or a float"),
        ({"label_smoothing": "0.1"}, ValueError, "got '0.1'; give an int or a float"),
        ({"z_loss": True}, ValueError, "z_loss must be a finite number, got True"),
        ({"chunk_rows": "64"}, ValueError, "positive number of rows, got '64'"),
        ({"ignore_index": "5"}, TypeError, "an integer, got '5'"),
        ({"z_loss": -1.0}, ValueError, "z_loss must not be negative"),
        ({"z_loss": "much"}, ValueError, "z_loss must be a finite number"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"class_weight_mean": "sum"}, ValueError, '"weights" or "labels"'),
        ({"chunk_rows": 0}, ValueError, "positive number of rows"),
        ({"logits_dtype": torch.float16}, ValueError, "torch.float32 or left out"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function"),
        ({"loss_columns": ("a",)}, ValueError, "are for a loss_fn"),
        (
            {"loss_fn": torch.nn.functional.cross_entropy, "z_loss": 0.1},
            ValueError,
            "which loss_fn replaces",
        ),
    ],
)
def test_options_are_checked_by_name(options, error, words):
    """When they are set, not in the first step."""
    from unsloth.loss_options import checked_options
    with pytest.raises(error, match = words):
        checked_options("set_loss_options", 64, options)


@pytest.mark.parametrize("padding_free", [False, True])
def test_columns_of_the_loss_are_collated_with_their_tokens(padding_free):
    """A number a row or a value a token, padded or one behind the other, by TRL's own collator."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from unsloth.loss_columns import ColumnCollator

    stock = DataCollatorForLanguageModeling(pad_token_id = 0, padding_free = padding_free)
    collator = ColumnCollator(stock, ["loss_weights", "ids"])
    rows = [
        {"input_ids": [5, 6, 7], "loss_weights": 2, "ids": [[1, 2], [3, 4], [5, 6]]},
        {"input_ids": [8, 9], "loss_weights": [0.5, 0.25], "ids": [[7, 8], [9, 10]]},
    ]
    batch = collator(rows)
    assert batch["ids"].shape == (*batch["labels"].shape, 2) and batch["ids"].dtype == torch.int64
    if padding_free:
        assert batch["loss_weights"].tolist() == [[2.0, 2.0, 2.0, 0.5, 0.25]]
    else:
        assert batch["loss_weights"].tolist() == [[2.0, 2.0, 2.0], [0.5, 0.25, 0.0]]
        assert batch["ids"][1].tolist() == [[7, 8], [9, 10], [0, 0]]
    rows[0]["loss_weights"] = [1.0]
    with pytest.raises(ValueError, match = "3 tokens and 1 values of 'loss_weights'"):
        collator(rows)
    rows[0]["loss_weights"], rows[1]["ids"] = (
        1,
        [[0.0, -float("inf")]] * 2,
    )  # log-probabilities, say
    assert collator(rows)["ids"].isinf().any() and collator(rows)["ids"][0, 0, 1] == 2
    for missing, shown in (
        (None, "None"),
        (float("nan"), "nan"),
        ("1", "'1'"),
        ([1.0, None, 1.0], "None at its token 1"),
        ([*[1.0] * 500, float("inf")], "inf at its token 500"),
        (torch.tensor([1.0, float("nan")]), "nan at its token 1"),
        (["a"] * 500, "'a' at its token 0"),
        ([[1.0]] * 9 + [[1.0, 2.0]], r"\[(\[1.0\], ){6}\.\.\.\]"),
    ):
        rows[0]["loss_weights"] = missing
        words = f"a row's 'loss_weights' is {shown}; give finite numbers"
        with pytest.raises(ValueError, match = words):
            collator(rows)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_columns_of_the_loss_are_cut_where_a_collator_cuts_the_rows(mode):
    """TRL 1.0 shortens rows as it makes a batch of them; others' ``max_length`` is what they pad to."""
    from unsloth.loss_columns import ColumnCollator

    def stock(rows):
        return {"labels": torch.zeros(2, 2 if hasattr(stock, "truncation_mode") else 3)}

    rows = [{"input_ids": [5, 6, 7], "loss_weights": [1.0, 2.0, 3.0]}]
    rows += [{"input_ids": [8], "loss_weights": 4}]
    collator = ColumnCollator(stock, ["loss_weights"])
    stock.max_length = 2
    assert collator(rows)["loss_weights"].tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    stock.truncation_mode = mode
    kept = [1.0, 2.0] if mode == "keep_start" else [2.0, 3.0]
    assert collator(rows)["loss_weights"].tolist() == [kept, [4.0, 0.0]]


def test_a_trainer_with_a_loss_of_its_own_is_named():
    """TRL's other trainers, Unsloth's that are written from them, and compute_loss_func; SFT's and a user's are
    not."""
    from unsloth import loss_in_trainers

    class DPOTrainer:
        __module__ = "trl.trainer.dpo_trainer"

        def compute_loss(self):
            pass

    def written(name):
        """As Unsloth writes it: a copy of TRL's class, and a class over it."""
        copy = type(f"_Unsloth{name}", (), {**vars(MyTrainer), "__module__": f"Unsloth{name}"})
        return type(f"Unsloth{name}", (copy,), {"__module__": f"Unsloth{name}"})

    class MyTrainer:
        def compute_loss(self):
            pass

    for alike in (MyTrainer, written("SFTTrainer")):
        loss_in_trainers.refuse_other_losses(alike())
    for own in (DPOTrainer, written("DPOTrainer")):
        with pytest.raises(NotImplementedError, match = "^DPOTrainer computes a loss of its own"):
            loss_in_trainers.refuse_other_losses(own())
    with pytest.raises(NotImplementedError, match = "compute_loss_func computes a loss of its own"):
        loss_in_trainers.refuse_other_losses(SimpleNamespace(compute_loss_func = print))


def test_the_weights_of_a_step_are_those_of_the_labels_that_are_scored():
    """Shifted, packed (no label crosses from one sequence into the next), of classes and of tokens."""
    from unsloth.loss_in_trainers import _sum_of_weights
    from unsloth.loss_options import LossOptions

    labels = torch.tensor([[1, 2, 3, -100, 5, 6]])
    each = torch.tensor([[0.5, 1.0, 2.0, 4.0, 8.0, 16.0]])
    table = torch.arange(7.0)
    options = LossOptions(class_weight = table, ignore_index = 3)
    batch = {"labels": labels, "loss_weights": each}
    assert _sum_of_weights(batch, options).item() == 2 * 1.0 + 5 * 8.0 + 6 * 16.0
    packed = {**batch, "packed_seq_lengths": torch.tensor([4, 2])}
    assert _sum_of_weights(packed, options).item() == 2 * 1.0 + 6 * 16.0
    shifted = {"labels": labels, "shift_labels": labels, "loss_weights": each}
    assert _sum_of_weights(shifted, LossOptions()).item() == 0.5 + 1.0 + 2.0 + 8.0 + 16.0


@pytest.mark.parametrize("raising", [False, True])
def test_the_trainers_columns_are_its_own_again_after_a_loader_was_made(raising):
    """Also after an error; a model without options, and data without the columns, change nothing."""
    from unsloth.loss_columns import ColumnCollator, keeping_columns
    from unsloth.loss_options import LossOptions

    model, seen = torch.nn.Linear(1, 1), []
    model._takes_loss_options = True
    trainer = SimpleNamespace(model = model, data_collator = dict, _signature_columns = ["input_ids"])
    trainer._set_signature_columns_if_needed = lambda: None

    @keeping_columns
    def get_dataloader(self, dataset):
        seen.append((self._signature_columns, self.data_collator))
        if raising:
            raise RuntimeError("no loader")

    for options, columns, kept in (
        (None, ["input_ids", "loss_weights"], []),
        (LossOptions(), ["input_ids"], []),
        (LossOptions(), ["input_ids", "loss_weights"], ["loss_weights"]),
        (LossOptions(loss_columns = ("t",)), ["t", "loss_weights"], ["loss_weights", "t"]),
    ):
        model._unsloth_loss_options = options
        with pytest.raises(RuntimeError) if raising else contextlib.nullcontext():
            get_dataloader(trainer, SimpleNamespace(column_names = columns))
        names, collator = seen[-1]
        assert names == ["input_ids", *kept] and isinstance(collator, ColumnCollator) == bool(kept)
        assert (trainer._signature_columns, trainer.data_collator) == (["input_ids"], dict)


def test_a_steps_weights_are_told_to_its_batches_where_the_model_has_options():
    """The sum over the step's batches, where they are weighted; else the trainer's batches as they are."""
    from unsloth.loss_in_trainers import counting_weights
    from unsloth.loss_options import LossOptions

    model, weights = torch.nn.Linear(1, 1), torch.tensor([0.0, 1.0, 2.0, 4.0])
    model._takes_loss_options = True
    args = SimpleNamespace(average_tokens_across_devices = False, world_size = 1)
    trainer = SimpleNamespace(model = model, args = args, accelerator = None)
    labels, told = ([[0, 1, 2, -100]], [[3, 3, 1, 2]]), []

    def counted(
        options,
        items = 5,
        **columns,
    ):
        batches = [{"labels": torch.tensor(each), **columns} for each in labels]
        model._unsloth_loss_options = options
        step = counting_weights(lambda self, epoch_iterator: (list(epoch_iterator), items))
        found, n_items = step(trainer, epoch_iterator = iter(batches))
        assert n_items == items and (options or all(a is b for a, b in zip(found, batches)))
        assert [batch["labels"].tolist() for batch in batches] == list(labels)
        told.append([batch["labels"].tolist() for batch in found])
        return [batch.get("weight_items") for batch in found]

    assert counted(None) == counted(LossOptions()) == [None, None]
    assert counted(LossOptions(class_weight = weights)) == [1 + 2 + 4 + 1 + 2] * 2
    assert counted(LossOptions(class_weight = weights), items = None) == [None, None]
    by_labels = LossOptions(class_weight = weights, class_weight_mean = "labels")
    assert counted(by_labels) == [None, None]
    halves = torch.full((1, 4), 0.5)
    assert counted(LossOptions(), loss_weights = halves) == [0.5 * (2 + 3)] * 2
    assert all(each == list(labels) for each in told)
    assert counted(LossOptions(class_weight = weights, ignore_index = 2)) == [1 + 4 + 1] * 2
    assert told[-1] == [[[0, 1, -100, -100]], [[3, 3, 1, -100]]]


def test_the_weights_of_an_evaluated_batch_are_told_to_it():
    """transformers counts its labels for the loss's denominator, which class weights then replace."""
    from unsloth.loss_in_trainers import weighing_evaluation
    from unsloth.loss_options import LossOptions

    model, weights = torch.nn.Linear(1, 1), torch.tensor([0.0, 1.0, 2.0, 4.0])
    model._takes_loss_options = True
    inputs = {"labels": torch.tensor([[3, 1, 2, -100]])}
    step = weighing_evaluation(lambda self, model, inputs, only: inputs.get("weight_items"))

    def told(options, inputs = inputs):
        model._unsloth_loss_options = options
        return step(SimpleNamespace(model = model), model, inputs, False)

    assert told(LossOptions(class_weight = weights)) == 1 + 2
    assert told(LossOptions(class_weight = weights, ignore_index = 2)) == 1
    assert told(None) is told(LossOptions()) is told(LossOptions(class_weight = weights), {}) is None
    assert told(LossOptions(class_weight = weights, class_weight_mean = "labels")) is None
    assert "weight_items" not in inputs


def test_values_of_tokens_stand_where_a_collator_pads_on_the_left():
    """Where the mask says that the row begins."""
    from unsloth.loss_columns import _lay_out

    batch = {"labels": torch.zeros(2, 4), "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4])}
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0, 6.0])]
    assert _lay_out(rows, batch).tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]]
    del batch["attention_mask"]
    assert _lay_out(rows, batch).tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]


@pytest.mark.parametrize("module", ["user.trainers", "trlx.trainers", "UnslothTraining"])
def test_a_trainer_of_the_users_own_is_not_refused(module):
    """Only TRL's own losses are known to leave the model's alone."""
    from unsloth.loss_in_trainers import refuse_other_losses

    Own = type("OwnTrainer", (), {"__module__": module, "compute_loss": lambda self: None})
    refuse_other_losses(Own())
    with pytest.raises(NotImplementedError, match = "OwnTrainer computes a loss of its own"):
        refuse_other_losses(type("OwnTrainer", (Own,), dict(vars(Own), __module__ = "trl.x"))())


def test_preparing_a_data_set_keeps_the_columns_of_the_loss():
    """Tokenizing that drops columns, truncating either end, packing; rows that vanish are an error."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from unsloth.loss_columns import _columns_of_the_loss, preparing_columns
    from unsloth.loss_options import LossOptions

    rows = {"input_ids": [[5, 6, 7], [8, 9]], "loss_weights": [[1.0, 2.0, 3.0], [4.0, 5.0]]}
    seen = []

    def prepare(
        stock,
        rows,
        options = LossOptions(),
        packing = False,
        unknown = False,
        **settings,
    ):
        def recording(self, dataset, processing_class, args, packing, *rest):
            seen.append((packing, args.max_length))
            return stock(dataset)

        model = torch.nn.Module()
        model._takes_loss_options, model._unsloth_loss_options = True, options
        args = SimpleNamespace(**{"max_length": 4, "packing_strategy": "bfd", **settings})
        trainer = SimpleNamespace() if unknown else SimpleNamespace(_unsloth_model_ref = model)
        dataset = datasets.Dataset.from_dict(rows)
        try:
            return preparing_columns(recording)(
                trainer, dataset, None, args, packing, None, "train"
            )
        finally:
            assert args.max_length == settings.get("max_length", 4)

    def tokenized(dataset):
        return dataset.map(lambda row: row)

    def dropping(dataset):
        return dataset.remove_columns("loss_weights")

    def cut(keep):
        return lambda dataset: dataset.map(lambda row: {"input_ids": row["input_ids"][keep]})

    assert prepare(tokenized, rows)["loss_weights"][:] == rows["loss_weights"]
    assert prepare(dropping, rows)["loss_weights"][:] == rows["loss_weights"]
    found = prepare(cut(slice(2)), rows, max_length = 2)
    assert found["loss_weights"][:] == [[1.0, 2.0], [4.0, 5.0]]
    found = prepare(cut(slice(-2, None)), rows, max_length = 2, truncation_mode = "keep_end")
    assert found["loss_weights"][:] == [[2.0, 3.0], [4.0, 5.0]]
    with pytest.raises(ValueError, match = "2 tokens and 3 values of 'loss_weights'"):
        prepare(cut(slice(2)), rows)
    with pytest.raises(ValueError, match = "drops its column 'loss_weights', and rows with it"):
        prepare(lambda dataset: dropping(dataset).select([0]), rows)
    assert "loss_weights" not in prepare(dropping, rows, None).column_names
    # TRL prepares its data before it has a model.
    assert prepare(dropping, rows, unknown = True)["loss_weights"][:] == rows["loss_weights"]
    seen.clear()
    numbers = {**rows, "loss_weights": [0.5, 2.0]}
    found = prepare(tokenized, numbers, packing = True, max_length = 5)
    assert found["loss_weights"][:] == [[0.5] * 3 + [2.0] * 2]
    assert found["input_ids"][:] == [[5, 6, 7, 8, 9]] and found["seq_lengths"][:] == [[3, 2]]
    found = prepare(tokenized, rows, packing = True, max_length = 2, packing_strategy = "wrapped")
    assert found["loss_weights"][:] == [[1.0, 2.0], [3.0, 4.0], [5.0]]
    assert seen == [(False, 5), (False, 1 << 30)]

    def broken(dataset):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match = "no such column"):  # and the length is as before
        prepare(broken, rows, packing = True, packing_strategy = "wrapped")
    streamed = datasets.Dataset.from_dict(rows).to_iterable_dataset().map(lambda row: row)
    assert _columns_of_the_loss(LossOptions(), streamed) == ["loss_weights"]
    assert _columns_of_the_loss(LossOptions(), [{"loss_weights": 1.0}]) == ["loss_weights"]
    assert _columns_of_the_loss(LossOptions(), []) == []


def test_options_that_are_left_out_are_those_of_plain_cross_entropy():
    """Mean of the labels other than -100, of nothing but the logits."""
    from unsloth.loss_options import PLAIN

    given = {name: value for name, value in vars(PLAIN).items() if value not in (None, (), 0.0)}
    assert given == {"ignore_index": -100, "class_weight_mean": "weights", "reduction": "mean"}


def test_weights_that_nobody_asked_for_are_told_once():
    """Where the data have them, the model could take them, and the batch has lost them."""
    from unsloth.loss_columns import warn_of_dropped_weights
    from unsloth.loss_options import LossOptions

    def told(
        names = ("loss_weights",),
        batch = (),
        options = None,
        takes = True,
    ):
        model = torch.nn.Linear(1, 1)
        model._takes_loss_options, model._unsloth_loss_options = takes, options
        trainer = SimpleNamespace(model = model, train_dataset = SimpleNamespace(column_names = names))
        with warnings.catch_warnings(record = True) as caught:
            warnings.simplefilter("always")
            warn_of_dropped_weights(trainer, batch)
            warn_of_dropped_weights(trainer, batch)
        return [str(each.message) for each in caught]

    (text,) = told()
    assert (
        "loss_weights is not used" in text and "set_loss_options(model, class_weight_mean" in text
    )
    assert not told(names = ["text"]) and not told(names = None) and not told(takes = False)
    assert not told(batch = {"loss_weights": 1}) and not told(options = LossOptions())


def test_what_a_trainer_is_given_is_checked_as_it_is_made():
    """Before the data are prepared, which may drop their columns; by position and by name, and told once."""
    from unsloth.loss_columns import warn_of_dropped_weights
    from unsloth.loss_in_trainers import checking_what_is_given
    from unsloth.loss_options import LossOptions

    class Trainer:
        @checking_what_is_given
        def __init__(self, *args, **kwargs):
            self.model, self.seen = model, (args, kwargs)

    model, args = torch.nn.Linear(1, 1), SimpleNamespace(label_smoothing_factor = 0.0)
    weighted = SimpleNamespace(column_names = ["text", "loss_weights"])
    model._takes_loss_options = True

    def told(*given, **named):
        with warnings.catch_warnings(record = True) as caught:
            warnings.simplefilter("always")
            trainer = Trainer(*given, **named)
            assert trainer.seen == (given, named)
            trainer.train_dataset = weighted
            warn_of_dropped_weights(trainer, {})
        return [(str(each.message), each.filename) for each in caught]

    for given in (
        ((), {"model": model, "args": args, "train_dataset": weighted}),
        ((model, args, None, weighted), {}),
        ((model,), {"train_dataset": weighted}),
    ):
        ((text, place),) = told(*given[0], **given[1])
        assert "column loss_weights is not used" in text and "before the trainer is made" in text
        assert place == __file__
    for factor in (1.5, -0.1, True, "0.1", float("nan")):
        args.label_smoothing_factor = factor
        with pytest.raises(ValueError, match = f"label_smoothing_factor must be .* got {factor!r}"):
            Trainer(model, args)
    model._unsloth_loss_options, args.label_smoothing_factor = LossOptions(), 0.5
    assert not told(model, args, None, weighted)
    model._takes_loss_options, args.label_smoothing_factor = (
        False,
        1.5,
    )  # a stock loss: nothing of ours
    assert not told(model, args, None, weighted) and not told("name", train_dataset = weighted)


def test_options_are_shown_as_a_user_writes_them():
    """What differs from the defaults; nothing that the forward or a trainer fills in."""
    from unsloth.loss_options import LossOptions

    assert repr(LossOptions(observe = print, weight_items = 3, shifted_labels = 1)) == "LossOptions()"
    shown = LossOptions(
        class_weight = torch.ones(64), label_smoothing = 0.1, class_weight_mean = "labels"
    )
    words = "class_weight = <64 weights>, label_smoothing = 0.1, class_weight_mean = 'labels'"
    assert repr(shown) == f"LossOptions({words})"
    own = LossOptions(loss_fn = told_by_name, loss_columns = ("ids",), logits_dtype = torch.float32)
    words = "loss_fn = told_by_name, loss_columns = ('ids',), logits_dtype = torch.float32"
    assert repr(own) == f"LossOptions({words})"


def told_by_name(logits, labels):
    pass


def test_options_of_a_call_that_do_not_fit_the_models_loss_are_named():
    """Cross entropy's beside a loss of one's own; a column that the batch does not have."""
    from unsloth.loss_options import LossOptions, collect_options

    model = SimpleNamespace(
        _unsloth_loss_options = LossOptions(loss_fn = print, loss_columns = ("scores",))
    )
    with pytest.raises(ValueError, match = "z_loss is an option of cross entropy.*leave one of"):
        collect_options(model, {"z_loss": 0.1, "scores": 1})
    for labels in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match = "no column 'scores'.*before the trainer is made"):
            collect_options(model, {labels: torch.ones(1)})
    assert collect_options(model, {}).loss_columns == ()  # without labels there is no loss
    batch = {"labels": torch.ones(1), "scores": 3}
    assert collect_options(model, batch).loss_columns == (3,) and "scores" not in batch
    model._unsloth_loss_options, labels = None, torch.zeros(2, 3)
    with pytest.raises(ValueError, match = "z_loss must not be negative, got -1"):
        collect_options(model, {"labels": labels, "z_loss": -1})
    with pytest.raises(ValueError, match = "z_loss must be a finite number, got 'much'"):
        collect_options(model, {"labels": labels, "z_loss": "much"})
    with pytest.raises(ValueError, match = "z_loss must be a finite number, got True"):
        collect_options(model, {"labels": labels, "z_loss": True})
    with pytest.raises(ValueError, match = r"loss_weights must be \(2, 3\) as the labels are"):
        collect_options(model, {"labels": labels, "loss_weights": [1.0, 2.0]})
    weights = [[0.0, 1.0, 2.0]] * 2
    given = {"labels": None, "shift_labels": labels, "loss_weights": weights}
    assert collect_options(model, given).loss_weights.tolist() == weights


def test_without_trl_transformers_trainer_takes_the_options(monkeypatch):
    """TRL is no requirement of Unsloth's models."""
    import transformers
    from unsloth import loss_in_trainers

    class Trainer:
        def evaluation_loop(self):
            pass

    plain = Trainer.evaluation_loop
    monkeypatch.setattr(transformers, "Trainer", Trainer)
    monkeypatch.setitem(sys.modules, "trl", None)
    loss_in_trainers.install_in_trainers()
    assert Trainer.evaluation_loop is not plain
