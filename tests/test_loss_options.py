# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Loss options reach the losses of the models that run Unsloth's own forwards."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from backend import DEVICE, require
from loss_problems import problem

require("interpreter")
import faults  # noqa: E402
import unsloth  # noqa: F401, E402

torch.set_num_threads(1)


@pytest.fixture(scope = "module", params = ["llama", "mistral"])
def model_call(request):
    """(model, its loss as FastLanguageModel computes it, vocabulary)."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
    from unsloth.models.llama import CausalLM_fast_forward
    from unsloth.models.mistral import MistralForCausalLM_fast_forward

    config, model, forward = {
        "llama": (LlamaConfig, LlamaForCausalLM, CausalLM_fast_forward(None)),
        "mistral": (MistralConfig, MistralForCausalLM, MistralForCausalLM_fast_forward),
    }[request.param]
    torch.manual_seed(0)
    model = model(
        config(
            vocab_size = 48,
            hidden_size = 16,
            intermediate_size = 32,
            num_hidden_layers = 1,
            num_attention_heads = 2,
            num_key_value_heads = 2,
        )
    ).to(DEVICE)
    return model, lambda **arguments: forward(model, **arguments)


def tokens_and_targets():
    make = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 48, (2, 9), generator = make).to(DEVICE)
    labels = tokens.clone()
    labels[:, :3] = -100
    return tokens, labels, F.pad(labels[:, 1:], (0, 1), value = -100)


def plain_logits(model, tokens):
    with torch.no_grad():
        hidden = model.model(input_ids = tokens)[0]
        return F.linear(hidden, model.lm_head.weight, model.lm_head.bias).view(-1, 48)


@pytest.mark.parametrize("materialised", [False, True])
def test_model_arguments_reach_the_loss(model_call, monkeypatch, materialised):
    """label_smoothing, ignore_index, class_weight and shift_labels, also with UNSLOTH_RETURN_LOGITS=1."""
    from unsloth.fused_loss import calls

    if materialised:
        monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "1")
    model, call = model_call
    tokens, labels, targets = tokens_and_targets()
    logits = plain_logits(model, tokens)
    class_weight = torch.rand(48, device = DEVICE)
    counted = "dense" if materialised else "fused"
    before = calls().get(counted, 0)

    smoothed = call(input_ids = tokens, labels = labels, label_smoothing = 0.2)
    wanted = F.cross_entropy(logits, targets.view(-1), label_smoothing = 0.2)
    torch.testing.assert_close(
        smoothed.loss.float(), wanted, rtol = 1e-2 if materialised else 1e-4, atol = 1e-4
    )
    if materialised:
        assert smoothed.logits.shape == (2, 9, 48)

    renamed = call(input_ids = tokens, labels = labels.masked_fill(labels == -100, 7), ignore_index = 7)
    wanted = F.cross_entropy(logits, targets.view(-1).masked_fill(targets.view(-1) == 7, -100))
    torch.testing.assert_close(
        renamed.loss.float(), wanted, rtol = 1e-2 if materialised else 1e-4, atol = 1e-4
    )

    shifted = call(
        input_ids = tokens, shift_labels = targets, class_weight = class_weight, num_items_in_batch = 10
    )
    wanted = F.cross_entropy(logits, targets.view(-1), weight = class_weight, reduction = "sum") / 10
    torch.testing.assert_close(
        shifted.loss.float(), wanted, rtol = 1e-2 if materialised else 1e-4, atol = 1e-4
    )
    assert calls()[counted] - before == 3


def test_a_head_bias_and_options_set_once_reach_the_loss(model_call):
    """The head's bias is added; set_loss_options holds for every call until it is taken back."""
    from unsloth.fused_loss import set_loss_options

    model, call = model_call
    tokens, labels, targets = tokens_and_targets()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(48, device = DEVICE))
    set_loss_options(model, label_smoothing = 0.1)
    try:
        assert set_loss_options(model).label_smoothing == 0.1
        loss = call(input_ids = tokens, labels = labels).loss
        wanted = F.cross_entropy(plain_logits(model, tokens), targets.view(-1), label_smoothing = 0.1)
        torch.testing.assert_close(loss, wanted, rtol = 1e-4, atol = 1e-4)
        loss.backward()
        assert model.lm_head.bias.grad.abs().sum() > 0
    finally:
        model.lm_head.bias = None
        assert set_loss_options(model, reset = True).label_smoothing == 0.0
        for name in ("forward", "_takes_loss_options"):
            vars(model).pop(name, None)
        model.zero_grad()
    with pytest.raises(ValueError, match = "Linear is no causal language model"):
        set_loss_options(torch.nn.Linear(1, 1), label_smoothing = 0.1)


def test_a_batch_with_every_label_ignored_trains_on(model_call):
    """Loss 0 and zero gradients, as with stock, from our loss."""
    from unsloth.fused_loss import calls

    model, call = model_call
    before = calls().get("fused", 0)
    tokens, labels, _ = tokens_and_targets()
    loss = call(input_ids = tokens, labels = torch.full_like(labels, -100)).loss
    assert loss.item() == 0.0
    loss.backward()
    assert not model.lm_head.weight.grad.any()
    assert calls()["fused"] == before + 1
    model.zero_grad()


def test_shifted_labels_reach_the_stock_loss_where_it_has_to_run():
    """Labels that the forward got shifted are not shifted again, and not dropped."""
    from unsloth import fused_loss, loss_options
    from unsloth.models._utils import unsloth_fused_ce_loss

    hidden, weight, _, labels = problem(rows = 5, dtype = torch.float32, ignored = ())
    arguments = {"hidden_states": hidden[None], "lm_head_weight": weight, "lm_head_bias": None}
    arguments.update(target_gb = 1, torch_compile = False)
    targets = F.pad(labels[1:], (0, 1), value = -100)[None]
    wanted = F.cross_entropy(F.linear(hidden, weight)[:-1], labels[1:])
    with loss_options.using_options(fused_loss.LossOptions(shifted_labels = targets)):
        loss = unsloth_fused_ce_loss(None, labels = targets, **arguments)
    torch.testing.assert_close(loss, wanted, rtol = 1e-4, atol = 1e-4)
    with loss_options.using_options(fused_loss.LossOptions(z_loss = 0.1)):
        with pytest.raises(NotImplementedError, match = "z_loss cannot be honoured"):
            unsloth_fused_ce_loss(None, labels = labels[None], **arguments)


def test_models_that_take_options_have_trainers_check_what_they_are_given(monkeypatch):
    """Before any options are set: a column of weights, which preparing the data may drop, is told of."""
    trl = pytest.importorskip("trl")
    from unsloth import fused_loss

    class SFTTrainer:
        def __init__(
            self,
            model,
            args = None,
        ):
            pass

    monkeypatch.setattr(trl, "SFTTrainer", SFTTrainer)

    def CausalLM_fast_forward(fast_forward_inference):
        return lambda self, labels = None: None

    fused_loss.forward_factory_with_loss_options(CausalLM_fast_forward)(None)
    model = Marked()
    model._takes_loss_options = True
    with pytest.raises(ValueError, match = "SFTConfig: label_smoothing_factor .* got 1.5"):
        SFTTrainer(model, SimpleNamespace(label_smoothing_factor = 1.5))


# --- what an error leaves behind ----------------------------------------------------------------


class Marked(torch.nn.Module):
    """A model whose forward takes loss options; it raises on request and returns those in force."""

    def forward(
        self,
        fail = False,
        labels = None,
    ):
        from unsloth.loss_options import active_options
        if fail:
            raise RuntimeError("out of memory")
        return active_options()


@pytest.fixture
def marked(monkeypatch):
    from unsloth.fused_loss import taking_options
    monkeypatch.setattr(Marked, "forward", taking_options(Marked.forward, shifts_itself = True))
    return Marked()


def test_options_of_a_call_that_raises_are_gone_afterwards(marked):
    """The next call, and the next loss outside of one, are plain."""
    from unsloth.loss_options import PLAIN, active_options

    with pytest.raises(RuntimeError, match = "out of memory"):
        marked(fail = True, z_loss = 0.1)
    assert active_options() is PLAIN
    assert marked() is PLAIN
    assert marked(z_loss = 0.2).z_loss == 0.2


def test_label_smoothing_of_a_trainer_survives_a_loss_that_raises(marked):
    """The trainer's label_smoother is back, so that a retry smooths as well."""
    from transformers.trainer_pt_utils import LabelSmoother
    from unsloth.fused_loss import label_smoothing_in_the_model

    smoother = LabelSmoother(epsilon = 0.25)
    trainer, seen = SimpleNamespace(label_smoother = smoother), []

    @label_smoothing_in_the_model
    def compute_loss(self, model, inputs):
        seen.append((self.label_smoother, inputs.get("label_smoothing")))
        if len(seen) == 1:
            raise RuntimeError("out of memory")
        return model(labels = inputs["labels"])

    with pytest.raises(RuntimeError, match = "out of memory"):
        compute_loss(trainer, marked, {"labels": torch.zeros(1)})
    assert trainer.label_smoother is smoother
    compute_loss(trainer, marked, {"labels": torch.zeros(1)})
    assert seen == [(None, 0.25), (None, 0.25)]
    # A smoother that we do not know, a loss of the user's own and a model with another loss keep it.
    for change in (
        {"label_smoother": LabelSmoother(epsilon = 0.25, ignore_index = 0)},
        {"label_smoother": SimpleNamespace(epsilon = 0.25, ignore_index = -100)},
        {"compute_loss_func": print},
    ):
        other = SimpleNamespace(**{"label_smoother": smoother, **change})
        compute_loss(other, marked, {"labels": torch.zeros(1)})
        assert seen[-1] == (other.label_smoother, None)
    compute_loss(trainer, lambda labels: None, {"labels": torch.zeros(1)})
    assert seen[-1] == (smoother, None)
    trainer.label_smoother = LabelSmoother(epsilon = 1.5)  # of a trainer that is none of TRL's
    with pytest.raises(ValueError, match = "SFTConfig: label_smoothing_factor .* got 1.5"):
        compute_loss(trainer, marked, {"labels": torch.zeros(1)})
    assert trainer.label_smoother.epsilon == 1.5


@pytest.mark.parametrize("fault", [faults.Operations, faults.Lines])
def test_a_loss_after_a_fault_is_like_one_without(model_call, fault):
    """Out of memory, or Ctrl-C, anywhere in a forward, its loss with options, or its backward."""
    from unsloth.loss_options import PLAIN, active_options

    model, call = model_call
    tokens, labels, _ = tokens_and_targets()
    class_weight = torch.rand(48, device = DEVICE)

    def step(**options):
        model.zero_grad()
        loss = call(input_ids = tokens, labels = labels, **options).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    def with_options():
        return step(class_weight = class_weight, z_loss = 0.1, label_smoothing = 0.2)

    plain = step()
    faults.check_steps_after_faults(with_options, with_options(), fault, points = 5)
    assert active_options() is PLAIN
    assert all(map(torch.equal, step(), plain))
    model.zero_grad()


def test_forwards_and_losses_of_another_release_are_refused():
    """Not wrapped: their arguments are not known."""
    from unsloth import fused_loss
    for decorator, words in (
        (
            fused_loss.forward_factory_with_loss_options,
            "takes .model. here, not .fast_forward_inference",
        ),
        (fused_loss.forward_with_loss_options, "takes no labels here"),
        (fused_loss.label_smoothing_in_the_model, "does not take .self, model, inputs. here"),
    ):
        with pytest.raises(NotImplementedError, match = words):
            decorator(lambda model: model)


@pytest.mark.parametrize("served", [False, None])
def test_a_forward_with_another_loss_takes_options_from_its_logits(served):
    """In the form that is asked for. One that returns no logits is refused, and named."""
    from transformers.modeling_outputs import CausalLMOutput
    from unsloth.fused_loss import taking_options

    labels, logits = (
        torch.tensor([[1, 2, -100, 4]], device = DEVICE),
        torch.randn(1, 4, 9, device = DEVICE),
    )

    def forward(
        model,
        logits,
        labels = None,
        return_dict = None,
    ):
        outputs = CausalLMOutput(loss = None if labels is None else labels.sum(), logits = logits)
        return outputs if return_dict else outputs.to_tuple()

    model = torch.nn.Linear(1, 1)
    call = taking_options(forward, True, computes_loss = lambda model: served)
    wanted = F.cross_entropy(logits[0, :-1], labels[0, 1:], label_smoothing = 0.3)
    for return_dict in (True, False):
        found = call(model, logits, labels = labels, return_dict = return_dict, label_smoothing = 0.3)
        torch.testing.assert_close(found[0], wanted)
        assert isinstance(found, tuple) is not return_dict and found[1] is logits
        found = call(model, logits, labels, return_dict, label_smoothing = 0.3)  # by position
        torch.testing.assert_close(found[0], wanted)
    with pytest.raises(NotImplementedError, match = "Linear returns no logits here"):
        call(model, None, labels = labels, label_smoothing = 0.3)
    # What has no name stays where it is.
    call = taking_options(lambda model, *args, labels = None: args, True)
    assert call(model, 1, 2, 3, labels = labels, label_smoothing = 0.3) == (1, 2, 3)


def test_logits_that_are_there_are_scaled_and_capped():
    """For the options of cross entropy, for a loss_fn, and for what observes; as a model has them or not."""
    from unsloth.fused_loss import _loss_of_logits
    from unsloth.loss_options import LossOptions

    logits, labels = (
        torch.randn(1, 4, 9, device = DEVICE),
        torch.tensor([[1, 2, -100, 4]], device = DEVICE),
    )
    seen = []

    def cross_entropy(logits, labels):
        return F.cross_entropy(logits, labels, reduction = "none")

    for cap, scale in ((3.0, 0.5), (0, 0), (None, None)):
        capped = torch.tanh(logits[0] * 0.5 / 3.0) * 3.0 if cap else logits[0]
        for options in (
            LossOptions(label_smoothing = 0.3),
            LossOptions(loss_fn = cross_entropy),
            LossOptions(z_loss = 1e-9, observe = lambda *given: seen.append(given[2])),
        ):
            found = _loss_of_logits(logits, labels, cap, scale, options = options)
            wanted = F.cross_entropy(capped, labels[0], label_smoothing = options.label_smoothing)
            torch.testing.assert_close(found, wanted, rtol = 1e-4, atol = 1e-5)
        assert (seen[-1].softcap, seen[-1].logit_scale) == (cap or 0.0, scale or 1.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_of_ones_own_sees_no_ignored_label_of_logits_that_are_there(reduction):
    """Neither -100 nor the option's; rows without a label have loss 0 and keep their places."""
    from unsloth.fused_loss import _loss_of_logits
    from unsloth.loss_options import LossOptions

    def cross_entropy(logits, labels):
        assert (labels >= 0).all()
        return F.cross_entropy(logits, labels, reduction = "none")

    logits = torch.randn(1, 5, 9, device = DEVICE, requires_grad = True)
    labels = torch.tensor([[1, 2, -100, 4, 7]], device = DEVICE)
    options = LossOptions(loss_fn = cross_entropy, ignore_index = 4, reduction = reduction)
    found = _loss_of_logits(logits, labels, options = options)
    masked = labels.masked_fill(labels == 4, -100)[0]
    wanted = F.cross_entropy(logits[0], masked, reduction = reduction)
    assert found.shape == (labels.shape if reduction == "none" else ())
    torch.testing.assert_close(found.flatten(), wanted.flatten())
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_forward_that_its_module_only_imports_takes_options(family, monkeypatch):
    """A release that defines it elsewhere: its options are read, and not left to stock, which ignores them."""
    from unsloth import fused_loss
    from unsloth.loss_options import active_options
    from unsloth.models import llama, mistral

    def MistralForCausalLM_fast_forward(self, labels = None):
        return active_options().label_smoothing

    def CausalLM_fast_forward(fast_forward_inference):
        return MistralForCausalLM_fast_forward

    if family == "llama":
        new = fused_loss.forward_factory_with_loss_options(CausalLM_fast_forward)
        monkeypatch.setattr(llama, "CausalLM_fast_forward", new)
        new = new(None)
    else:
        new = fused_loss.forward_with_loss_options(MistralForCausalLM_fast_forward)
        monkeypatch.setattr(mistral, "MistralForCausalLM_fast_forward", new)
    labels = torch.zeros(1, 2, dtype = torch.long)
    assert new(torch.nn.Linear(2, 2), labels = labels, label_smoothing = 0.25) == 0.25


def test_logits_that_are_there_are_observed_as_they_are():
    """Rows with a label, without the padding that the kernels want behind them."""
    from unsloth.fused_loss import _observe
    from unsloth.loss_options import LossOptions

    seen, labels = [], torch.tensor([3, -100, 8, 0, 2])
    options = LossOptions(observe = lambda *arguments: seen.append(arguments), ignore_index = 2)
    logits = torch.randn(5, 9)
    _observe(logits, labels, 0, 0, options)
    ((rows, targets, *_),) = seen
    assert torch.equal(rows, logits[[0, 2, 3]]) and targets.tolist() == [3, 8, 0]


def test_a_copy_of_a_model_runs_its_own_forward():
    """copy.deepcopy binds the method to the copy; a forward of somebody else's stays theirs."""
    import copy

    from unsloth.fused_loss import take_options_from_logits

    class Scales(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.by = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.by

    model, theirs = Scales(), Scales()
    take_options_from_logits(model)
    twin = copy.deepcopy(model)
    twin.by.data.fill_(3.0)
    assert (twin(1.0).item(), model(1.0).item()) == (3.0, 1.0)
    theirs.forward = lambda x: "theirs"
    take_options_from_logits(theirs)
    assert theirs(1.0) == "theirs"
