# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Decoder blocks replayed as graphs train as they do without: losses and gradients beside a twin's.

Without a GPU a tape of the operations stands for the graphs (``graph_tape.py``): it keeps addresses,
runs no Python, and spoils its memory between replays.
"""

import copy
import gc
import itertools
import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from backend import DEVICE, GPU, require

require("interpreter")
import unsloth  # noqa: F401, E402
from replay_walk import Walk, move  # noqa: E402
from replayed_models import (  # noqa: E402, F401
    as_without,
    backbone,
    batch,
    close,
    fit_on_host,
    forward,
    gradients,
    graphs,
    kernels,
    llama,
    made,
    packed,
    plain,
    recorder_class,
    recorders,
    step,
    summary,
)

MIB = 1 << 20
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
FAMILIES += ["gemma"] if GPU else []  # its RoPE tables are kept by a GPU's number

# ------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", ["unsloth", False])
def test_a_replayed_step_is_the_step(made, family, checkpointing):
    model = copy.deepcopy(made(family, checkpointing = checkpointing))
    for seed, length in enumerate((40, 40, 37, 64, 33)):
        as_without(model, batch(2, length, seed, pads = seed))
    found = summary(model)
    assert found["replayed"] == 4 and found["buckets"] == [(2, 64)]
    assert found["reasons"] == {"a length's first batch": 1}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_of_a_buckets_own_length_keeps_its_bits(made, family, dtype):
    """In half precision, with Unsloth's fused LoRA functions, and under autocast as the Trainer's."""
    model = copy.deepcopy(made(family, dtype = dtype))
    for autocast in (False, True):
        with torch.autocast(DEVICE, dtype = dtype, enabled = autocast):
            for seed in range(3):
                inputs = batch(2, 64, seed, pads = 3)
                if GPU:  # some kernels add in no fixed order
                    step(model, inputs)
                else:
                    bit_equal(model, inputs)
    assert summary(model)["replayed"] == 4 and summary(model)["captures"] == 2


def test_packed_rows_are_laid_out_a_document_a_row(llama):
    for seed, lengths in enumerate(([30, 41], [30, 41], [64, 5], [60, 33])):
        as_without(llama, packed(lengths, seed))
    assert summary(llama)["replayed"] == 3 and summary(llama)["buckets"] == [(2, 64)]


def test_two_buckets_share_their_memory(llama):
    for seed, length in enumerate((40, 40, 90, 90, 40, 90, 90, 40)):
        as_without(llama, batch(2, length, seed))
    assert summary(llama)["replayed"] == 6 and len(summary(llama)["buckets"]) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_inputs_on_the_host_and_some_rows_at_once(made, monkeypatch, family, rows):
    """Padded rows and packed ones, of which a position is a row's own."""
    fit_on_host(monkeypatch, rows)
    model = copy.deepcopy(made(family))
    for seed in range(3):
        for inputs in (batch(3, 40, seed, pads = seed), packed([60, 41, 33], seed)):
            as_without(model, inputs)
    assert summary(model)["replayed"] == 4


def by_tokens(bucket):
    bucket.block_bytes = bucket.input.shape[1] * MIB


def test_a_length_that_needs_more_than_was_reserved_gets_a_larger_pool(llama, monkeypatch):
    """In which the others are captured anew; nothing holds the old one, no loss that is kept, either."""
    from unsloth.models import step_graphs, step_graphs_capture

    monkeypatch.setattr(recorder_class(), "peak", lambda self: 40 << 30)
    monkeypatch.setattr(step_graphs_capture.Bucket, "measure", by_tokens)
    kept = forward(captured(llama), batch(2, 40, 9))
    kept.backward()
    stack = step_graphs._stacks[backbone(llama)]
    small, size = weakref.ref(stack.pool), stack.pool.size
    for length in (120, 120, 60):
        as_without(llama, batch(2, length, length))
    assert small() is None and stack.pool.size > 1.5 * size
    assert summary(llama)["buckets"] == [(2, 128), (2, 64)]
    assert (summary(llama)["captures"], summary(llama)["dropped"]) == (3, 1)


def test_a_length_that_pays_is_not_asked_again_in_a_larger_pool(llama, monkeypatch):
    taken = itertools.cycle([(1.0, 1.0), (1.0, 1.2)])
    monkeypatch.setattr(recorder_class(), "peak", lambda self: 40 << 30)
    monkeypatch.setattr("unsloth.models.step_graphs_capture.Bucket.measure", by_tokens)
    with graphs("auto"):
        step(captured(llama), batch(2, 600))
        monkeypatch.setattr(recorder_class(), "timed", lambda self, run: next(taken))
        step(llama, batch(2, 600))
    assert summary(llama)["buckets"] == [(2, 624)] and summary(llama)["captures"] == 2


def test_rows_that_take_the_gpu_longer_pay_where_the_host_is_waited_for(llama, monkeypatch):
    fit_on_host(monkeypatch, 1)
    for busy, length in ((1.15, 40), (1.05, 100)):
        taken = itertools.cycle([(1.0, 0.7), (2.0, busy)])
        monkeypatch.setattr(recorder_class(), "timed", lambda self, run: next(taken))
        with graphs("auto"):
            for seed in range(3):
                step(llama, batch(2, length, seed))
    assert reasons(llama) == {"the GPU is what takes the time"}
    assert summary(llama)["buckets"] == [(2, 128)]


@pytest.mark.parametrize("checkpointing", ["unsloth", False])
def test_graphs_may_take_a_part_of_the_peak_where_memory_is_saved(made, monkeypatch, checkpointing):
    """Else of what is free; and then no block runs without grad, for which it would compile once more."""
    from unsloth.models import step_graphs
    from unsloth.models.step_graphs_blocks import BlockRuns

    ran, run = [], BlockRuns._without_grad
    monkeypatch.setattr(BlockRuns, "_without_grad", lambda *a: (ran.append(a), run(*a))[1])
    monkeypatch.setattr(recorder_class(), "peak", lambda self: 1000 * MIB)
    monkeypatch.setattr(recorder_class(), "memory", lambda self: (0, 4000 * MIB))
    model = copy.deepcopy(made("llama", checkpointing = checkpointing))
    with graphs("auto"):
        step(captured(model), batch(2, 40))
    pool = step_graphs._stacks[backbone(model)].pool
    assert pool.room == pytest.approx((406 if checkpointing else 1000) * MIB)
    assert bool(ran) is bool(checkpointing)


# --------------------------------------------------------------------------- gradients as autograd's


def captured(model, length = 40):
    """The model with a captured bucket of two rows of 64."""
    for seed in range(2):
        step(model, batch(2, length, seed))
    assert summary(model)["captures"] == 1
    return model


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_accumulate(llama, set_to_none):
    captured(llama)
    found = {}
    for value in ("1", "0"):
        with graphs(value):
            llama.zero_grad(set_to_none = set_to_none)
            for seed, length in enumerate((40, 45, 90, 64)):
                (forward(llama, batch(2, length, seed)) / 4).backward()
            found[value] = (torch.zeros(()), gradients(llama))
    close(found["1"], found["0"])


def test_a_gradient_that_was_kept_stays(llama):
    """The first gradient becomes .grad; later replays must not write into it."""
    captured(llama)
    forward(llama, batch(2, 40, 7)).backward()
    kept = {n: p.grad for n, p in llama.named_parameters() if p.grad is not None}
    values = {n: g.clone() for n, g in kept.items()}
    llama.zero_grad(set_to_none = True)
    step(llama, batch(2, 40, 8))
    assert all(torch.equal(kept[n], values[n]) for n in kept)


def test_two_forward_passes_before_their_backward_passes(llama):
    captured(llama)
    found = {}
    for value in ("1", "0"):
        with graphs(value):
            losses = [forward(llama, batch(2, n, s)) for s, n in enumerate((40, 50))]
            losses[0].backward()
            losses[1].backward()
            found[value] = (losses[0].detach(), gradients(llama))
            llama.zero_grad()
    close(found["1"], found["0"])


def test_a_second_backward_pass_of_a_kept_graph(llama):
    captured(llama)
    loss = forward(llama, batch(2, 40, 3))
    loss.backward(retain_graph = True)
    once = gradients(llama)
    loss.backward()
    for name, value in gradients(llama).items():
        assert torch.allclose(value, 2 * once[name], rtol = 1e-5)
    llama.zero_grad()


def test_hooks_on_parameters_and_autograd_grad_see_every_gradient(llama):
    captured(llama)
    name, parameter = next((n, p) for n, p in llama.named_parameters() if p.requires_grad)
    seen = []
    handle = parameter.register_hook(lambda grad: seen.append(grad.clone()))
    inputs = batch(2, 40, 5)
    _, found = step(llama, inputs)
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], found[name])
    (alone,) = torch.autograd.grad(forward(llama, inputs), [parameter])
    assert torch.allclose(alone, found[name], rtol = 1e-5)
    assert parameter.grad is None and summary(llama)["changes"] == {}


def test_a_hook_on_a_parameter_runs_once_a_gradient_while_a_length_is_captured(llama):
    name, parameter = next((n, p) for n, p in llama.named_parameters() if p.requires_grad)
    calls = []
    handle = parameter.register_hook(lambda grad: (calls.append(1), 2 * grad)[1])
    for seed in range(4):
        inputs = batch(2, 40, seed)
        ours = step(llama, inputs)
        assert len(calls) == 1
        close(ours, plain(llama, inputs))
        calls.clear()
    handle.remove()
    assert summary(llama)["replayed"] == 3 and llama.get_parameter(name) is parameter


@pytest.mark.parametrize("pending", ["ordinary", "replayed"])
def test_a_length_is_captured_while_an_earlier_loss_is_alive(llama, pending):
    """``loss`` of a loop's last round is there until it is assigned again, and so is its graph."""
    captured(llama)
    step(llama, batch(2, 100))
    found = {}
    for value in ("1", "0"):
        with graphs(value):
            first = forward(llama, batch(2, 150 if pending == "ordinary" else 40, 1))
            second = forward(llama, batch(2, 100, 2))
            (first + second).backward()
            found[value] = (second.detach(), gradients(llama))
            llama.zero_grad()
    close(found["1"], found["0"])
    assert summary(llama)["captures"] == 2 and "capture failed" not in str(reasons(llama))


def test_a_length_waits_in_a_graph_that_is_a_little_longer(llama):
    """Until it has been seen so often that one of its own repays."""
    for length in (130, 130, 100, 100, 100, 100, 70):
        as_without(llama, batch(2, length, length))
    found = summary(llama)
    assert found["replayed"] == 6 and found["buckets"] == [(2, 192), (2, 128)]


def test_a_forward_pass_whose_backward_pass_never_comes(llama):
    captured(llama)
    forward(llama, batch(2, 40, 4))
    as_without(llama, batch(2, 44, 5))


def test_optimizer_steps_are_seen(llama):
    twin = copy.deepcopy(llama)
    losses = {}
    for value, model in (("1", llama), ("0", twin)):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr = 1e-2)
        with graphs(value):
            losses[value] = []
            for seed in range(8):
                loss = forward(model, batch(2, 40, seed % 2))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses[value].append(loss.detach())
    assert torch.allclose(torch.stack(losses["1"]), torch.stack(losses["0"]), rtol = 1e-3)
    assert losses["1"][-1] < losses["1"][0] and summary(llama)["replayed"] == 7


# ----------------------------------------------------------------------------------- staleness


def _move_and_hold(model):
    """Nothing is freed: somebody keeps the memory that the weights had."""
    parameters = list(backbone(model).layers[1].self_attn.parameters())
    model.earlier = [p.data for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.data * 2


def _replace(model):
    mlp = backbone(model).layers[0].mlp
    mlp.down_proj = copy.deepcopy(mlp.down_proj)
    with torch.no_grad():
        mlp.down_proj.base_layer.weight.mul_(0.5)


def _replace_parameter(model):
    adapter = backbone(model).layers[0].mlp.down_proj.lora_B["default"]
    adapter.weight = torch.nn.Parameter(adapter.weight.detach() * 2)


def _scale(model):
    for layer in backbone(model).layers:
        layer.self_attn.q_proj.set_scale("default", 3.0)


def _freeze(model):
    backbone(model).layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)


def _disable(model):
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layernorm" in name)


def _checkpoint(model):
    for layer in backbone(model).layers:
        layer.gradient_checkpointing = False


def _shorten(model):
    del backbone(model).layers[1]


def _new_layers(model):
    backbone(model).layers = copy.deepcopy(backbone(model).layers)


def _merge(model):
    backbone(model).layers[0].mlp.up_proj.merge()


def _thaw(model):
    backbone(model).layers[1].input_layernorm.weight.requires_grad_(True)


def _resize(model):
    """The same tensor over memory that is longer, and elsewhere."""
    weight = backbone(model).layers[0].self_attn.k_proj.lora_A["default"].weight
    weight.untyped_storage().resize_(8 * weight.nbytes)
    with torch.no_grad():
        weight.mul_(2)


def _rank(model):
    config = copy.copy(model.peft_config["default"])
    config.r, config.lora_alpha, config.target_modules = 2, 6, {"q_proj", "down_proj"}
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.delete_adapter("default")


CHANGES = (
    move, _move_and_hold, _replace, _replace_parameter, _scale, _freeze, _disable, _checkpoint,
    _shorten, _new_layers, _merge, _thaw, _resize, _rank,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids = lambda f: f.__name__)
def test_a_change_is_noticed_before_anything_is_computed(llama, change, monkeypatch):
    """And the old graphs' memory is free by then."""
    from unsloth.models.step_graphs import _stacks
    from unsloth.models.step_graphs_stack import Stack

    captured(llama)
    pool, ordinary, held = weakref.ref(_stacks[backbone(llama)].pool), Stack.ordinary, []
    monkeypatch.setattr(Stack, "ordinary", lambda *a: (held.append(pool()), ordinary(*a))[1])
    change(llama)
    for seed in range(3):
        as_without(llama, batch(2, 40, seed))
    assert held and not any(held)
    assert summary(llama)["dropped"] == 1 or change is _new_layers
    assert summary(llama)["captures"] == 2  # of the new state


def test_transformers_without_checkpointing_layers(monkeypatch):
    """An older one: no block is of a class that nobody has."""
    import sys

    from unsloth.models.step_graphs_stack import checkpointing_layer

    monkeypatch.setitem(sys.modules, "transformers.modeling_layers", None)
    assert checkpointing_layer.__wrapped__().__mro__[1] is object


def test_attention_kernels_and_implementation_are_part_of_a_graphs_key(llama):
    captured(llama)
    config = backbone(llama).config
    config._attn_implementation = "eager"
    step(llama, batch(2, 40))
    assert summary(llama)["replayed"] == 1 and len(summary(llama)["buckets"]) == 1
    config._attn_implementation = "sdpa"
    step(llama, batch(2, 40))
    assert summary(llama)["replayed"] == 2
    enabled = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(not enabled)
    step(llama, batch(2, 40))
    torch.backends.cuda.enable_flash_sdp(enabled)
    step(llama, batch(2, 40))
    assert summary(llama)["replayed"] == 3 and summary(llama)["dropped"] == 0


def test_autocast_and_its_dtype_are_part_of_a_graphs_key():
    """A graph of bfloat16 products must not run where float16 ones are asked for."""
    from unsloth.models.step_graphs_stack import Stack

    stack = SimpleNamespace(_model = lambda: SimpleNamespace(config = None))
    hidden, layout = torch.zeros(1, device = DEVICE), SimpleNamespace(rows = 1, bucket = 64)
    keys = {Stack._key(stack, hidden, {}, layout)}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype):
            keys.add(Stack._key(stack, hidden, {}, layout))
    assert len(keys) == 3


def test_a_first_packed_batch_leaves_the_process_as_it_was(llama, monkeypatch):
    """It runs uncompiled, by a mark on this batch's lengths alone."""
    before, inputs, seen = dict(os.environ), packed([30, 41]), []
    block = type(backbone(llama).layers[0])
    ordinary = block.forward

    def forward(self, *args, **kwargs):
        seen.append(getattr(kwargs["packed_seq_lengths"], "_unsloth_uncompiled", False))
        return ordinary(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", forward)
    step(llama, inputs)
    assert seen and all(seen) and dict(os.environ) == before
    assert not hasattr(inputs["packed_seq_lengths"], "_unsloth_uncompiled")


def test_another_adapter(made):
    model = copy.deepcopy(made(adapters = ("default", "other")))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        for seed in range(3):
            inputs = batch(2, 40, seed)
            ours = step(model, inputs)
            close(ours, plain(model, inputs))
            assert all(f".{name}." in key for key in ours[1])
    assert summary(model)["captures"] == 3


@pytest.mark.parametrize("moved", [move, _move_and_hold])
def test_weights_that_move_between_the_passes_are_an_error(llama, moved):
    captured(llama)
    loss = forward(llama, batch(2, 40))
    moved(llama)
    with pytest.raises(RuntimeError, match = "UNSLOTH_STEP_GRAPHS=0"):
        loss.backward()
    llama.zero_grad()
    as_without(llama, batch(2, 40, 1))


def test_the_summary_tells_what_the_padding_is(llama):
    captured(llama)
    for seed in (1, 2):
        step(llama, batch(2, 40, seed))
    assert summary(llama)["padding"] == pytest.approx(64 / 40 - 1)


def test_nothing_changed_nothing_is_dropped(llama):
    """Evaluation, generation's mode, saving and loading adapters leave the graphs."""
    captured(llama)
    llama.eval()
    with torch.no_grad():
        forward(llama, batch(2, 40))
    llama.train()
    state = {n: p.detach().clone() for n, p in llama.named_parameters() if p.requires_grad}
    llama.load_state_dict(state, strict = False)
    as_without(llama, batch(2, 40, 9))
    assert summary(llama)["dropped"] == 0 and summary(llama)["captures"] == 1


# ----------------------------------------------------------------------------------- fallbacks


def reasons(model):
    return set(summary(model)["reasons"]) - {"a length's first batch"}


def bit_equal(model, inputs):
    ours, reference = step(model, inputs), plain(model, inputs)
    assert torch.equal(ours[0], reference[0])
    for name, value in reference[1].items():
        assert torch.equal(ours[1][name], value)


def test_a_left_padded_batch_without_labels_runs_as_before(llama):
    captured(llama)
    inputs = batch(2, 40)
    inputs["attention_mask"][0, :5] = 0
    backbone(llama)._has_no_labels = True
    found = {}
    for value in ("1", "0"):
        with graphs(value):
            ids = {k: v for k, v in inputs.items() if k != "labels"}
            found[value] = backbone(llama)(**ids).last_hidden_state
    assert torch.equal(found["1"], found["0"])
    assert reasons(llama) == {"an attention mask"}


def test_hidden_states_that_are_asked_for_are_there(llama):
    captured(llama)
    out = backbone(llama)(input_ids = batch(2, 40)["input_ids"], output_hidden_states = True)
    assert len(out.hidden_states) == 3 and reasons(llama) == {"output_hidden_states"}


@pytest.mark.parametrize("where", ["block", "mlp", "everywhere"])
def test_module_hooks_see_their_modules(llama, where):
    captured(llama)
    seen, hook = [], lambda *arguments: seen.append(1)
    block = backbone(llama).layers[0]
    if where == "everywhere":
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = (block if where == "block" else block.mlp).register_forward_hook(hook)
    bit_equal(llama, batch(2, 40))
    assert seen
    handle.remove()
    for _ in range(3):
        count = summary(llama)["replayed"]
        step(llama, batch(2, 40))
    assert summary(llama)["replayed"] == count + 1


def test_anomaly_mode_and_saved_tensor_hooks(llama):
    captured(llama)
    for watched in (torch.autograd.set_detect_anomaly(True), torch.autograd.graph.save_on_cpu()):
        with watched:
            bit_equal(llama, batch(2, 40))
    assert reasons(llama) == {"anomaly mode", "saved-tensor hooks"}


def test_several_processes_swapped_blocks_and_dispatch_modes_run_as_before(llama, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func,
            types,
            args = (),
            kwargs = None,
        ):
            return func(*args, **(kwargs or {}))

    captured(llama)
    with Counts():
        bit_equal(llama, batch(2, 40))
    backbone(llama).layers._unsloth_block_swap = object()
    bit_equal(llama, batch(2, 40))
    del backbone(llama).layers._unsloth_block_swap
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda *arguments: 2)
        bit_equal(llama, batch(2, 40))
    assert reasons(llama) == {"a dispatch mode", "swapped blocks", "several processes"}
    count = summary(llama)["replayed"]
    step(llama, batch(2, 40))
    assert summary(llama)["replayed"] == count + 1


def test_dropout_runs_as_before(made):
    model = copy.deepcopy(made(lora_dropout = 0.1))
    step(model, batch(2, 40))
    step(model, batch(2, 40))
    assert reasons(model) == {"dropout"} and summary(model)["captures"] == 0


def test_a_custom_module_in_a_block(llama):
    class Mine(torch.nn.Module):
        def forward(self, x):
            return x

    Mine.__module__ = "notebook"
    backbone(llama).layers[0].mlp.extra = Mine()
    bit_equal(llama, batch(2, 40))
    bit_equal(llama, batch(2, 40))
    assert reasons(llama) == {"a module of type Mine in a block"}


def test_a_capture_that_fails_turns_graphs_off(llama, recorders, monkeypatch):
    from unsloth.models import step_graphs_capture, step_graphs_stack

    told = []
    monkeypatch.setattr(step_graphs_stack.logger, "warning", told.append)
    step(llama, batch(2, 40))
    monkeypatch.setattr(
        step_graphs_capture.Bucket, "capture", lambda *a: (_ for _ in ()).throw(ValueError("no"))
    )
    bit_equal(llama, batch(2, 40))
    bit_equal(llama, batch(2, 40))
    assert reasons(llama) == {"capture failed: ValueError: no"}
    assert told == ["Unsloth: step graphs are off (capture failed: ValueError: no)."]


def test_out_of_memory_while_capturing_gives_the_memory_back(llama, monkeypatch):
    from unsloth.models import step_graphs, step_graphs_capture

    captured(llama)
    stack = step_graphs._stacks[backbone(llama)]
    pool, give_back, alive = weakref.ref(stack.pool), stack._give_back, []
    stack._give_back = lambda: (give_back(), alive.append(pool()))
    capture = step_graphs_capture.Bucket.capture

    def capture_small(bucket, *arguments):
        if bucket.input.shape[1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(bucket, *arguments)

    monkeypatch.setattr(step_graphs_capture.Bucket, "capture", capture_small)
    for seed in range(3):
        bit_equal(llama, batch(2, 100, seed))
    assert reasons(llama) == {"out of memory while capturing"} and alive == [None]
    assert summary(llama)["buckets"] == [] and summary(llama)["dropped"] == 1
    step(llama, batch(2, 40))
    assert summary(llama)["buckets"] == [(2, 64)]


@pytest.mark.parametrize("kind", ["training", "hidden states", "evaluation"])
def test_graphs_make_room_for_a_pass_without_them(llama, monkeypatch, kind):
    """If it needs more than is left: for a token as much as the graphs hold. Later ones take less."""
    from unsloth.models import step_graphs

    def run(rows, length):
        inputs = batch(rows, length)
        if kind == "training":
            return bit_equal(llama, inputs)
        if kind == "hidden states":
            return backbone(llama)(inputs["input_ids"], output_hidden_states = True)
        with torch.no_grad():  # a quarter of what is needed with grad
            backbone(llama)(inputs["input_ids"].repeat(4, 1))

    captured(llama)  # 128 tokens
    stack = step_graphs._stacks[backbone(llama)]
    room, share, budget = [stack.pool.bytes * (1 + 300 / 128)], stack.share, stack.pool.budget
    monkeypatch.setattr(type(stack.pool.recorder), "room", lambda self: room[0])
    for length in (100, 150):
        run(2, length)
        assert summary(llama)["dropped"] == 0
    run(2, 200)
    # A shorter length needs no piece of that size.
    assert (summary(llama)["dropped"], stack.pool, stack.size) == (1, None, 0)
    assert summary(llama)["changes"] == {"another pass needed the memory": 1}
    step(llama, batch(2, 40))
    assert summary(llama)["buckets"] == [(2, 64)] and stack.share == share / 2
    assert stack.pool.budget == pytest.approx(budget / 2, rel = 0.1)  # of about as much memory
    room[0] = 0
    run(1, 20)
    assert summary(llama)["dropped"] == 2


def test_how_many_tokens_a_pass_is_given():
    """None that need more memory where a text goes on."""
    from unsloth.models.step_graphs import _tokens

    ids = torch.zeros(2, 5, dtype = torch.long)
    assert _tokens((ids,), {}) == _tokens((), {"inputs_embeds": torch.zeros(2, 5, 8)}) == 10
    assert _tokens((ids,), {"past_key_values": object()}) == _tokens((), {}) == 0


def test_a_length_past_the_pools_budget_is_not_captured(llama, monkeypatch):
    from unsloth.models import step_graphs_stack

    monkeypatch.setattr(step_graphs_stack, "POOL_SHARE", 0.0)
    for seed in range(3):
        bit_equal(llama, batch(2, 100, seed))
    assert summary(llama)["captures"] == 0
    assert reasons(llama) == {"past the pool's budget"}


def test_the_least_recently_used_bucket_goes(llama, monkeypatch):
    from unsloth.models import step_graphs_stack

    monkeypatch.setattr(step_graphs_stack, "MAX_BUCKETS", 2)
    for length in (40, 40, 100, 100, 40, 150, 150):
        step(llama, batch(2, length))
    assert summary(llama)["buckets"] == [(2, 64), (2, 192)]
    as_without(llama, batch(2, 100, 1))


def test_auto_captures_only_where_the_host_is_waited_for(llama, recorders):
    with graphs("auto"):
        for seed in range(3):
            step(llama, batch(2, 40, seed))
        if GPU:
            return  # as the machine is
        assert summary(llama)["captures"] == 1
        recorders[0].host_and_gpu = (1.0, 1.5)
        for seed in range(3):
            bit_equal(llama, batch(2, 100, seed))
        assert reasons(llama) == {"the GPU is what takes the time"}
        for sighting in range(4, 18):
            recorders[0].host_and_gpu = (1.0, 1.5 if sighting < 9 else 0.5)
            step(llama, batch(2, 100, sighting))
            assert summary(llama)["captures"] == (1 if sighting < 16 else 2)


def test_the_variable_takes_three_values(llama):
    with graphs("yes"), pytest.raises(ValueError, match = "'yes': choose auto, 1 or 0"):
        step(llama, batch(2, 40))
    with graphs("0"):
        step(llama, batch(2, 40))
    assert summary(llama) == {}
    with graphs(""):
        from unsloth.models.step_graphs import mode
        assert mode() == "auto"


def test_the_model_is_as_it_was_after_an_error(llama):
    captured(llama)
    with pytest.raises(RuntimeError):  # no such width
        backbone(llama)(inputs_embeds = torch.zeros(2, 40, 7, device = DEVICE))
    assert "layers" not in backbone(llama).__dict__
    as_without(llama, batch(2, 40, 1))


def test_a_model_can_be_copied_and_is_freed(made):
    model = captured(copy.deepcopy(made()))
    twin = copy.deepcopy(model)
    assert summary(twin) == {}
    gone = weakref.ref(backbone(model))
    del model, twin
    gc.collect()
    assert gone() is None


def test_rows_stay_free_of_padding_where_blocks_are_replayed(llama, monkeypatch):
    from unsloth.models.step_graphs import choose_padding_free
    from unsloth.utils import padding_choice

    stock, why = (False, "host bound"), "step graphs replay padding-free rows; otherwise host bound"
    decide = choose_padding_free(lambda model, *arguments: stock)
    assert decide(llama, None, None, None) == (True, why)
    with graphs("0"):
        assert decide(llama, None, None, None) == stock
    assert decide(torch.nn.Linear(1, 1), None, None, None) == stock
    kind = type(backbone(llama))
    with monkeypatch.context() as patched:  # as FastModel leaves it, where nothing is replayed
        patched.setattr(kind, "forward", lambda self, *args, **kwargs: None)
        assert decide(llama, None, None, None) == stock
    backbone(llama).layers[0].mlp.register_forward_hook(lambda *arguments: None)
    assert decide(llama, None, None, None) == stock
    for value, chosen in (("padded", False), ("padding_free", True)):
        monkeypatch.setenv("UNSLOTH_PADDING_CHOICE", value)
        found = padding_choice.decide_auto_padding_free(llama, None, None, None)
        assert found == (chosen, f"UNSLOTH_PADDING_CHOICE={value}")


def test_the_compile_report_tells_what_was_replayed(llama):
    reports = pytest.importorskip("unsloth.models.compile_report")
    step(llama, batch(2, 40))
    with reports.CompileReport(llama) as report:
        for seed in range(4):
            step(llama, batch(2, 40, seed))
    found = report.summary()["step_graphs"]
    assert (found["replayed"], found["share"], found["reasons"]) == (4, 1.0, {})
    assert "100% of micro-batches replayed (4), 1 buckets, pool" in report.table()
    assert f"{64 / 40 - 1:.0%} padding" in report.table()


# ------------------------------------------------------------------------------- a random walk


def test_a_random_walk_beside_an_uncaptured_twin(made):
    walk = Walk(copy.deepcopy(made()), 3407)
    weights = {
        walk.micro_batch: 60, walk.zero_grad: 12, walk.optimizer_step: 8, walk.evaluate: 5,
        walk.without_adapters: 3, walk.scale: 1, walk.load: 2, walk.move: 1, walk.checkpointing: 1,
        walk.two_passes: 4, walk.dropped_pass: 3,
    }  # fmt: skip
    events = 300 if GPU else 160  # a tape takes longer than a graph
    for _ in range(events):
        (event,) = walk.random.choices(list(weights), list(weights.values()))
        event()
    found = summary(walk.models["1"])
    assert found["replayed"] > events * 80 / 300 and found["changes"], found
