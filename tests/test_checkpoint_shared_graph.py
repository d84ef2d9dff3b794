# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A compiled block's two runs under gradient checkpointing share one graph.

Without a GPU, torch forms stand for the Triton kernels of norm and activation.
"""

import functools

import pytest
import torch
from backend import DEVICE, require

require("interpreter")

import unsloth  # noqa: F401, E402
from llama_blocks import (  # noqa: E402
    HIDDEN,
    PROJECTIONS,
    ROWS,
    compiled,
    make_blocks,
    plain_checkpoint,
    same_bits,
    torch_kernels,
    train_step,
    unsloth_checkpoint,
    without_checkpoint,
)
from unsloth.kernels import fast_lora  # noqa: E402

traced = pytest.mark.skipif(
    not fast_lora.TRACE_LORA_FUNCTIONS, reason = "this torch does not trace fused LoRA"
)


@pytest.fixture(autouse = True)
def kernels(monkeypatch):
    monkeypatch.delenv("UNSLOTH_COMPILE_DISABLE", raising = False)
    torch_kernels(monkeypatch)


@pytest.fixture
def shared_graph():
    from unsloth.models import checkpoint_shared_graph
    return checkpoint_shared_graph


@traced
def test_both_runs_of_a_checkpoint_share_one_graph():
    """No break; output and gradients as without a checkpoint, again in the second step."""
    blocks = make_blocks()
    expected = without_checkpoint(blocks)
    with compiled(blocks) as counters:
        first, _ = train_step(blocks, counting = False)
        assert same_bits(first, train_step(blocks, counting = False)[0])
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
        for result, reference in zip(first, expected):
            torch.testing.assert_close(result, reference)


@traced
def test_rows_and_lengths_that_change():
    """One graph for a batch of one row and one for more, whatever the lengths."""
    from unsloth.models import _block_compile

    # Where Unsloth marks no number of rows as dynamic, before 2026.10.9, Dynamo finds that out itself.
    most = 2 if hasattr(_block_compile, "_mark_batch_dynamic") else 4
    blocks = make_blocks()
    sizes = ((4, 10), (3, 17), (1, 7), (2, 5), (1, 23), (4, 31), (1, 10))
    # Before anything is compiled: under the mode that counts products Dynamo gives blocks up for good.
    expected = [without_checkpoint(blocks, rows = rows) for rows in sizes]
    with compiled(blocks) as counters:
        for rows, references in zip(sizes, expected):
            result, _ = train_step(blocks, rows = rows, counting = False)
            for value, reference in zip(result, references):
                torch.testing.assert_close(value, reference)
        assert not counters["graph_break"] and 2 <= counters["stats"]["unique_graphs"] <= most


@traced
def test_a_graph_for_each_run_where_one_cannot_do(shared_graph, monkeypatch):
    """UNSLOTH_CHECKPOINT_ONE_GRAPH=0, and CUDA graphs: two graphs, as without this change."""
    assert shared_graph.shared_graph_wanted({"triton.cudagraphs": False})
    assert not shared_graph.shared_graph_wanted({"triton.cudagraphs": True})
    monkeypatch.setenv("UNSLOTH_CHECKPOINT_ONE_GRAPH", "0")
    blocks = make_blocks()
    with compiled(blocks, "eager") as counters:
        train_step(blocks, counting = False)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("mark", ("mark_dynamic", "maybe_mark_dynamic", "mark_static"))
def test_marked_sizes_stay_marked(shared_graph, mark):
    """Dynamo's marks are on the tensor object that block compile was given, not on what is run
    instead: a graph compiled in a first run was of one length. All of them go over, as copies."""
    marked = torch.randn(2, 5, HIDDEN, device = DEVICE, requires_grad = True) * 1
    getattr(torch._dynamo, mark)(marked, 1)
    leaf = shared_graph._as_leaf(marked)
    assert vars(leaf) == vars(marked) != {}
    assert leaf.is_leaf and leaf.requires_grad and torch.equal(leaf, marked)
    getattr(torch._dynamo, mark)(leaf, 0)
    assert vars(leaf) != vars(marked)


class ToyExperts(torch.nn.Module):
    """As GraniteMoeParallelExperts, which goes by another name in its block."""


@traced
def test_first_runs_that_stay_without_grad(shared_graph):
    """No second run will follow: the input wants no grad, or the adapters are off. What a run with grad
    saves must not go through somebody's hooks, and experts save other things in it."""
    blocks = make_blocks(count = 1)
    grad_modes = []
    attend = blocks[0].self_attn.forward

    def watched(*args, **kwargs):
        grad_modes.append(torch.is_grad_enabled())
        return attend(*args, **kwargs)

    blocks[0].self_attn.forward = watched
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE)
    adapters = [getattr(blocks[0].mlp, name) for name in PROJECTIONS]
    with compiled(blocks):
        # An eager stand-in for the compiled function: grad mode would be a constant of its graph. Each
        # time anew, which has not scored.
        def run(*args):
            return shared_graph._first_run_with_grad(lambda self, x: (watched(x)[0],))(*args)

        def runs_in_mode(x):
            with torch.no_grad():
                (out,) = run(blocks[0], x)
            assert not out.requires_grad
            return grad_modes.pop()

        wanting = x.clone().requires_grad_()
        assert runs_in_mode(wanting) and not runs_in_mode(x)
        for switch in (True, False):
            for adapter in adapters:
                adapter.enable_adapters(switch)
            assert runs_in_mode(wanting) is switch
        for adapter in adapters:
            adapter.enable_adapters(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            assert not runs_in_mode(wanting)
        for name, experts in (("experts", torch.nn.ModuleList()), ("inner", ToyExperts())):
            blocks[0].mlp.add_module(name, experts)
            del blocks[0].__dict__[
                "_unsloth_has_experts"
            ]  # remembered: a trained block stays what it is
            assert not runs_in_mode(wanting)
            delattr(blocks[0].mlp, name)
        del blocks[0].__dict__["_unsloth_has_experts"]
        assert runs_in_mode(wanting)
        blocks[0].gradient_checkpointing = False
        assert not runs_in_mode(wanting)
        assert wanting.grad_fn is None and run(blocks[0], wanting)[0].requires_grad


def test_where_the_gpu_waits_first_runs_go_without_grad(shared_graph, monkeypatch):
    """Once it has waited in so many more first runs than not, and then for good: the run with grad keeps
    the host longer. Nobody is asked while a CUDA graph is captured."""
    blocks = make_blocks(count = 1)
    monkeypatch.setattr(shared_graph, "WAITED_RUNS", 3)
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE, requires_grad = True)
    run = shared_graph._first_run_with_grad(lambda self, x: torch.is_grad_enabled())
    capturing, busy, waiting = "capturing", "busy", "waiting"
    course = [waiting, capturing, waiting, busy, waiting, waiting, capturing, busy]
    with_grad = []
    for now in course:
        monkeypatch.setattr(shared_graph, "_capturing", lambda x: now == capturing)
        monkeypatch.setattr(shared_graph, "_gpu_waits", lambda x: now == waiting)
        with torch.no_grad():
            with_grad.append(run(blocks[0], x))
    assert with_grad == [True] * 5 + [False] * 3  # what is captured then has been compiled


def test_where_a_training_scores_without_grad_first_runs_do_so(shared_graph):
    """As DPO's reference: policy and reference of the first step are to be equal. Evaluation is none."""
    blocks, failing = make_blocks(count = 1), False
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE)
    first = x.clone().requires_grad_()

    def compiled(self, x):
        if failing and not torch.is_grad_enabled():
            raise ValueError("ours")
        return torch.is_grad_enabled()

    @torch.no_grad()
    def with_grad(x):
        return run(blocks[0], x)

    run = shared_graph._first_run_with_grad(compiled)
    blocks[0].eval()
    assert not with_grad(x)
    blocks[0].train()
    assert with_grad(first) and run(blocks[0], x) and with_grad(first)
    blocks[0].gradient_checkpointing = False  # as TRL has it meanwhile
    assert not with_grad(x)
    blocks[0].gradient_checkpointing = True
    assert not with_grad(first) and not with_grad(first)
    failing = True  # and where that graph does not compile, one serves for good
    with pytest.warns(UserWarning, match = "keeps one graph: ours"):
        assert with_grad(first)
    failing = False
    assert not with_grad(x) and with_grad(first)


def test_a_second_graph_that_cannot_be_compiled_stops_no_training(shared_graph, monkeypatch):
    """Block compile falls back in the first step only. Out of memory is told."""
    blocks = make_blocks(count = 1)
    monkeypatch.setattr(shared_graph, "WAITED_RUNS", 1)
    monkeypatch.setattr(shared_graph, "_gpu_waits", lambda x: True)
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE, requires_grad = True)
    for error in (ValueError, torch.OutOfMemoryError):
        runs = []

        def compiled(self, x):
            runs.append(torch.is_grad_enabled())
            if not runs[-1]:
                raise error("ours")

        run = shared_graph._first_run_with_grad(compiled)
        with torch.no_grad():
            if error is ValueError:
                with pytest.warns(UserWarning, match = "keeps one graph: ours"):
                    run(blocks[0], x)
                run(blocks[0], x)
                assert runs == [False, True, True]
            else:
                with pytest.raises(error, match = "ours"):
                    run(blocks[0], x)


def test_whether_the_gpu_waits(shared_graph):
    """Asked of the stream that the block runs on; without a GPU nobody waits."""
    x = torch.ones(1024, 1024, device = DEVICE)
    if DEVICE == "cpu":
        assert not shared_graph._gpu_waits(x) and not shared_graph._capturing(x)
        return
    torch.cuda.synchronize()
    assert shared_graph._gpu_waits(x)
    for _ in range(200):
        x = torch.mm(x, x)
    assert not shared_graph._gpu_waits(x)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert shared_graph._capturing(x)


@traced
def test_a_first_run_that_raises_leaves_grad_mode_as_it_was(shared_graph):
    """Out of memory in the run with grad, caught by a caller without: the next run is as before."""
    blocks = make_blocks(count = 1)
    fails = [torch.OutOfMemoryError("in the first run")]

    def function(self, x):
        assert torch.is_grad_enabled()
        if fails:
            raise fails.pop()
        return (x * 2,)

    run = shared_graph._first_run_with_grad(function)
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE, requires_grad = True)
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError, match = "in the first run"):
            run(blocks[0], x)
        assert not torch.is_grad_enabled()
        assert torch.equal(run(blocks[0], x)[0], x * 2)


def test_torch_compile_is_put_back_when_the_set_up_raises(monkeypatch):
    """Later compiles are the user's own; the next class is set up as before."""
    from unsloth.models import _block_compile, compile_wrapping

    before = torch.compile

    class Layer(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    def broken(*arguments, **options):
        raise RuntimeError("set-up")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RuntimeError, match = "set-up"):
        _block_compile._wrap(Layer, {})
    assert torch.compile is broken
    monkeypatch.setattr(torch, "compile", before)
    with pytest.raises(ValueError, match = "ours"):
        with compile_wrapping.torch_compile_as(lambda compile, function: (compile, function)):
            assert torch.compile(Layer) == (before, Layer)
            with compile_wrapping.torch_compile_as(lambda compile, function: [compile(function)]):
                assert torch.compile(Layer) == [(before, Layer)]
            raise ValueError("ours")
    assert torch.compile is before


def test_which_checkpoints_are_reentrant(shared_graph):
    """Asked of the function itself, under any grad mode; what cannot be asked is not."""
    non_reentrant = functools.partial(plain_checkpoint(), use_reentrant = False)
    blocks = make_blocks(count = 1)
    with torch.no_grad():
        for function, expected in (
            (unsloth_checkpoint, True),
            (non_reentrant, False),
            (lambda: None, False),
            (3, False),
        ):
            blocks[0]._gradient_checkpointing_func = function
            assert shared_graph.reentrant(blocks[0]) is expected
    del blocks[0]._gradient_checkpointing_func
    assert not shared_graph.reentrant(blocks[0])


def test_a_forward_gets_around_its_compiled_self_what_it_asks_for(shared_graph, monkeypatch):
    """And one that asks for nothing, as other families' do, is compiled as it is."""
    from unsloth.models import _block_compile

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def around(forward, shared):
        return lambda self, hidden_states: (forward(self, hidden_states), shared)

    for asks in (False, True):

        class Layer(torch.nn.Module):
            def forward(self, hidden_states):
                return hidden_states + 1

        if asks:
            setattr(Layer.forward, shared_graph.AROUND_COMPILED, around)
        _block_compile._wrap(Layer, {})
        out = Layer().eval()(torch.zeros(1))
        assert out == (1, shared_graph.shared_graph_wanted({})) if asks else out == 1
