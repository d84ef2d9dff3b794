# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A checkpointed Llama block is recomputed without its down projection; gradients keep their bits.

Without a GPU, torch forms stand for the Triton kernels of norm and activation.
"""

import contextlib
import functools
import gc
import importlib

import pytest
import torch
from backend import DEVICE, GPU, require

require("interpreter")

import faults  # noqa: E402
import unsloth  # noqa: F401, E402
from llama_blocks import (  # noqa: E402
    HIDDEN,
    MLP_WIDTH,
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

# Products with a base weight in one block: three in each forward pass, three in the backward pass.
WHOLE, WITHOUT_DOWN = 9, 8
BEFORE_10_8 = tuple(map(int, unsloth.__version__.split(".")[:3])) < (2026, 10, 8)
traced = pytest.mark.skipif(
    not fast_lora.TRACE_LORA_FUNCTIONS, reason = "this torch does not trace fused LoRA"
)


@pytest.fixture(autouse = True)
def kernels(monkeypatch):
    monkeypatch.delenv("UNSLOTH_COMPILE_DISABLE", raising = False)
    torch_kernels(monkeypatch)


@pytest.fixture
def recompute():
    from unsloth.kernels import lora_mlp_recompute
    return lora_mlp_recompute


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_recompute_leaves_out_the_down_projection(dtype):
    """One product a block fewer; bits as in a step without checkpointing."""
    blocks = make_blocks(dtype = dtype)
    result, products = train_step(blocks)
    assert products == WITHOUT_DOWN * len(blocks)
    assert same_bits(result, without_checkpoint(blocks))


@pytest.mark.parametrize("seed", range(8))
def test_any_shape_and_rank(seed):
    """Odd sizes, single rows, a rank of its own for each projection, rsLoRA scaling."""
    make = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator = make))

    blocks = make_blocks(
        count = 1,
        sizes = (draw(1, 40) * 2, draw(1, 70)),
        rank_pattern = {name: draw(1, 20) for name in PROJECTIONS},
        use_rslora = True,
    )
    rows = (draw(1, 4), draw(1, 9))
    result, products = train_step(blocks, rows = rows)
    assert products == WITHOUT_DOWN
    blocks[0].gradient_checkpointing = False
    assert same_bits(result, train_step(blocks, rows = rows)[0])


def test_unread_output_holds_no_memory(recompute):
    """The recompute's MLP returns zeros of the right shape that share one element."""
    blocks = make_blocks()
    mlp = blocks[0].mlp
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE, requires_grad = True)
    mlp.__dict__[recompute.SKIP_DOWN_PROJ] = True
    out = mlp(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.grad_fn is not None
    assert not out.any() and out.untyped_storage().nbytes() == out.element_size()
    with torch.no_grad():
        assert mlp(x).any(), "without grad the output is all that a caller can want"


def test_a_hook_sees_the_whole_output():
    """A forward hook on block or MLP reads outputs, in the recompute too: nothing is left out."""
    for hooked in (lambda block: block, lambda block: block.mlp):
        blocks = make_blocks(count = 1)
        seen = []

        def hook(module, args, out):
            seen.append((out[0] if isinstance(out, tuple) else out).detach().clone())

        handle = hooked(blocks[0]).register_forward_hook(hook)
        assert train_step(blocks)[1] == WHOLE
        assert len(seen) == 2 and torch.equal(*seen)
        handle.remove()
        assert train_step(blocks)[1] == WITHOUT_DOWN


def test_a_checkpoint_around_several_blocks_computes_all():
    """There the first block's output is read by the second, in the recompute as well."""
    blocks = make_blocks(None)
    for block in blocks:
        block.gradient_checkpointing = False

    def both(x):
        return blocks[1](blocks[0](x)[0])[0]

    outer = functools.partial(unsloth_checkpoint, both)
    result, products = train_step(blocks, outer)
    assert products == WHOLE * len(blocks)
    assert same_bits(result, without_checkpoint(blocks))
    # Checkpoints within a checkpoint: each block's own recompute still leaves the product out.
    for block in blocks:
        block._gradient_checkpointing_func = unsloth_checkpoint
    nested, products = train_step(blocks, outer)
    assert products == (WITHOUT_DOWN + 3) * len(blocks)
    assert same_bits(result, nested)


def test_torch_checkpoint_that_unsloth_made_its_own(monkeypatch):
    """What a loaded model's layers hold: torch's function, over Unsloth's autograd.Function."""
    import torch.utils.checkpoint as torch_checkpoint

    class UnslothFunction:
        @staticmethod
        def apply(function, preserve_rng_state, *args):
            return unsloth_checkpoint(function, *args)

    monkeypatch.setattr(torch_checkpoint, "CheckpointFunction", UnslothFunction)
    plain = plain_checkpoint()
    for use_reentrant, expected in ((None, WITHOUT_DOWN), (True, WITHOUT_DOWN), (False, WHOLE)):
        checkpoint = functools.partial(plain, use_reentrant = use_reentrant)
        blocks = make_blocks(plain if use_reentrant is None else checkpoint)
        result, products = train_step(blocks)
        assert products == expected * len(blocks)
        assert same_bits(result, without_checkpoint(blocks))


def test_torch_checkpoint_of_its_own_compiles_no_graph_for_nothing():
    """torch's Function (``use_gradient_checkpointing = True``) tells nobody that it recomputes: nothing is
    left out, and one graph does for both runs."""
    if not fast_lora.TRACE_LORA_FUNCTIONS:
        pytest.skip("this torch does not trace fused LoRA")
    import torch.utils.checkpoint as torch_checkpoint

    unread = importlib.import_module("unsloth.models.checkpoint_recompute").output_unread
    checkpoint = functools.partial(plain_checkpoint(), use_reentrant = True)
    function = getattr(torch_checkpoint, "_old_CheckpointFunction", None)
    with pytest.MonkeyPatch.context() as patch:
        if function is not None:
            patch.setattr(torch_checkpoint, "CheckpointFunction", function)
        blocks = make_blocks(checkpoint)
        with torch.no_grad():
            assert not unread(blocks[0])
        with compiled(blocks, "eager") as counters:
            train_step(blocks, counting = False)
            assert counters["stats"]["unique_graphs"] == 1


def test_non_reentrant_checkpoint_is_left_alone():
    """torch's own checkpoint runs the forward pass itself with grad, so the output is read; also in
    the recompute of a reentrant checkpoint around the blocks."""
    checkpoint = functools.partial(plain_checkpoint(), use_reentrant = False)
    blocks = make_blocks(checkpoint)
    result, products = train_step(blocks)
    assert products == WHOLE * len(blocks)
    assert same_bits(result, without_checkpoint(blocks))

    def both(x):
        return blocks[1](blocks[0](x)[0])[0]

    outer = functools.partial(unsloth_checkpoint, both)
    assert same_bits(result, train_step(blocks, outer)[0])


@pytest.mark.parametrize("lora", ({"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.5}))
def test_other_adapters_take_the_stock_path(lora):
    """A bias, DoRA or dropout: stock's path, down projection included."""
    blocks = make_blocks(count = 1, **lora)
    result, products = train_step(blocks)
    blocks[0].register_forward_hook(lambda *args: None)
    assert products == train_step(blocks)[1] and products >= WHOLE
    if "lora_dropout" not in lora:  # this checkpoint function does not restore the random state
        assert same_bits(result, without_checkpoint(blocks))


def test_disabled_and_merged_adapters():
    """Without an active adapter: as in stock, fused without grad, PEFT's in the recompute."""
    if BEFORE_10_8:
        pytest.skip("stock's own backward pass wants LoRA weights there")
    blocks = make_blocks(count = 1)
    adapters = [getattr(blocks[0].mlp, name) for name in PROJECTIONS]

    def check():
        result, products = train_step(blocks)
        assert products == WHOLE
        torch.testing.assert_close(result, without_checkpoint(blocks))

    for adapter in adapters:
        adapter.enable_adapters(False)
    check()
    for adapter in adapters:
        adapter.enable_adapters(True)
    adapters[0].merge()
    check()


def test_flag_is_off_outside_a_block(recompute):
    """Also after an error inside the block."""
    blocks = make_blocks(count = 1)
    train_step(blocks)
    assert blocks[0].mlp.__dict__[recompute.SKIP_DOWN_PROJ] is False

    def broken(hidden_states, **kwargs):
        assert blocks[0].mlp.__dict__[recompute.SKIP_DOWN_PROJ] is True
        raise RuntimeError("broken attention")

    blocks[0].self_attn.forward = broken
    with pytest.raises(RuntimeError, match = "broken attention"):
        train_step(blocks)
    assert blocks[0].mlp.__dict__[recompute.SKIP_DOWN_PROJ] is False


def down_projections(blocks):
    """How often a step multiplies with the down projection's weight."""
    with torch.profiler.profile(
        activities = [torch.profiler.ProfilerActivity.CPU], record_shapes = True
    ) as profile:
        train_step(blocks, counting = False)
    rows = ROWS[0] * ROWS[1]
    return sum(
        event.name in ("aten::mm", "aten::addmm_", "aten::addmm")
        and [rows, MLP_WIDTH] in event.input_shapes
        and [MLP_WIDTH, HIDDEN] in event.input_shapes
        for event in profile.events()
    )


@traced
def test_a_compiled_block_has_one_graph():
    """One graph for both runs of the checkpoint, no break, and the product gone from the second."""
    blocks = make_blocks()
    expected = without_checkpoint(blocks)
    with compiled(blocks, "inductor") as counters:
        first, _ = train_step(blocks, counting = False)
        # The first run, and twice in the backward pass (dX of gate and up); not in the recompute.
        assert down_projections(blocks) == 3 * len(blocks)
        second, _ = train_step(blocks, counting = False)
        assert same_bits(first, second)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
        for result, reference in zip(second, expected):
            torch.testing.assert_close(result, reference)


@traced
def test_a_compiled_block_whose_output_is_looked_at():
    """The same graph computes all of it: for a hook, and outside a checkpoint."""
    blocks = make_blocks(count = 1)
    with compiled(blocks, "eager") as counters:
        result, _ = train_step(blocks, counting = False)
        seen = []
        handle = blocks[0].register_forward_hook(lambda *a: seen.append(a[2][0].detach().clone()))
        assert same_bits(result, train_step(blocks, counting = False)[0])
        assert len(seen) == 2 and torch.equal(*seen)
        handle.remove()
        assert same_bits(result, without_checkpoint(blocks, counting = False))
        assert counters["stats"]["unique_graphs"] == 1


@traced
def test_a_graph_for_each_run_leaves_it_out_too(monkeypatch):
    """UNSLOTH_CHECKPOINT_ONE_GRAPH=0, as for CUDA graphs: two graphs, the second without the product."""
    monkeypatch.setenv("UNSLOTH_CHECKPOINT_ONE_GRAPH", "0")
    blocks = make_blocks()
    with compiled(blocks, "eager") as counters:
        train_step(blocks, counting = False)
        assert down_projections(blocks) == 3 * len(blocks)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


@traced
def test_needed_is_true_outside_a_recompute(recompute):
    """Also after an error, and for a graph that somebody traces around the block."""
    blocks = make_blocks(count = 1)
    mlp = blocks[0].mlp
    with compiled(blocks, "eager"):
        expected, _ = train_step(blocks, counting = False)
        needed = mlp.__dict__[recompute.DOWN_PROJ_NEEDED]
        assert needed.item() and needed.device.type == "cpu"
        with pytest.raises(RuntimeError, match = "size|shape|match"):
            blocks[0](torch.randn(2, 3, HIDDEN + 1, device = DEVICE, requires_grad = True))
        assert needed.item()
        blocks[0].gradient_checkpointing = False
        if BEFORE_10_8:
            pytest.skip("nobody can trace around stock's compiled blocks there; the rest passed")
        outer = torch.compile(lambda x: blocks[0](x)[0], backend = "aot_eager", fullgraph = True)
        torch.testing.assert_close(train_step(blocks, outer, counting = False)[0], expected)


@traced
@pytest.mark.parametrize("shared", ("1", "0"))
def test_a_first_run_in_inference_mode(recompute, monkeypatch, shared):
    """As GRPO scores its completions before the first step: training follows, and the other way."""
    monkeypatch.setenv("UNSLOTH_CHECKPOINT_ONE_GRAPH", shared)
    blocks = make_blocks(count = 1)
    hidden = torch.randn(*ROWS, HIDDEN, device = DEVICE)
    with compiled(blocks, "eager"):
        steps = []
        for _ in range(2):
            with torch.inference_mode():
                blocks[0](hidden)
            steps.append(train_step(blocks, counting = False)[0])
    assert same_bits(*steps) and torch.stack([g.abs().sum() for g in steps[0]]).all()


@traced
@pytest.mark.parametrize("shared", ("1", "0"))
def test_a_recompute_that_raises_leaves_nothing_behind(recompute, monkeypatch, shared):
    """Out of memory in the backward pass, caught: the next run computes its whole output."""
    monkeypatch.setenv("UNSLOTH_CHECKPOINT_ONE_GRAPH", shared)
    blocks = make_blocks(count = 1)
    mlp = blocks[0].mlp
    armed = []
    with compiled(blocks, "eager"):
        expected, _ = train_step(blocks, counting = False)
        forward = type(blocks[0]).forward

        @functools.wraps(forward)
        def failing(self, *args, **kwargs):
            if armed and torch.is_grad_enabled():
                needed = mlp.__dict__.get(recompute.DOWN_PROJ_NEEDED)
                assert mlp.__dict__[recompute.SKIP_DOWN_PROJ] if needed is None else not needed
                raise armed.pop()
            return forward(self, *args, **kwargs)

        around = getattr(failing, "_unsloth_around_compiled")
        type(blocks[0]).forward = around(failing, shared == "1")
        armed.append(torch.OutOfMemoryError("in the recompute"))
        with pytest.raises(torch.OutOfMemoryError, match = "in the recompute"):
            train_step(blocks, counting = False)
        needed = mlp.__dict__.get(recompute.DOWN_PROJ_NEEDED)
        assert not armed and (needed is None or needed.item())
        assert not mlp.__dict__.get(recompute.SKIP_DOWN_PROJ, False)
        assert same_bits(expected, train_step(blocks, counting = False)[0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_swiglu_down_operator(dtype):
    """As the eager MLP's last product, from any weights; nothing is written where it is not needed;
    schema, fake and functionalization hold (opcheck)."""
    importlib.import_module("unsloth.kernels.lora_mlp_recompute")  # the operator's home
    torch.manual_seed(0)
    for rows, width, hidden, rank in ((1, 1, 1, 1), (7, 33, 10, 3), (64, 48, 96, 16)):
        make = functools.partial(torch.randn, device = DEVICE, dtype = dtype)
        e, g, W = make(rows, width), make(rows, width), make(hidden, width)
        A, B, S = make(rank, width), make(hidden, rank), 0.75
        for needed in (True, False):
            out = torch.full((rows, hidden), 123.0, device = DEVICE, dtype = dtype)
            flag = torch.tensor(needed)
            torch.ops.unsloth.swiglu_down_(out, e, g, flag, W, A, B, S)
            if not needed:
                assert (out == 123).all()
                continue
            h = fast_lora.swiglu_fg_kernel(e[None], g[None])[0]
            exact = h.double() @ W.double().t() + S * (h.double() @ A.double().t() @ B.double().t())
            plain = h @ W.t() + S * (h @ A.t() @ B.t())
            allowed = (
                2 * (plain.double() - exact).abs().max()
                + torch.finfo(dtype).eps * exact.abs().max()
            )
            assert (out.double() - exact).abs().max() <= allowed
            torch.library.opcheck(
                torch.ops.unsloth.swiglu_down_.default, (out, e, g, flag, W, A, B, S)
            )


def test_a_dequantize_that_takes_no_dtype(recompute, monkeypatch):
    """As Unsloth's before 2026.10.8."""

    def fast_dequantize(
        W,
        quant_state = None,
        out = None,
        use_global_buffer = False,
    ):
        return W

    monkeypatch.setattr(fast_lora, "fast_dequantize", fast_dequantize)
    for name in ("_fast_lora", "function", "_takes_dtype"):
        monkeypatch.setattr(recompute, name, getattr(recompute, name))
    names = {"__module__": fast_lora.__name__}
    recompute.with_recompute_variant(type("LoRA_MLP", (torch.autograd.Function,), names))
    e, g, W, A = (torch.randn(rows, 8, device = DEVICE) for rows in (3, 3, 4, 2))
    down = recompute.Projection(W, None, A, W.new_zeros(4, 2), 1.0)
    found = recompute.down_proj_if_needed(e, g, torch.tensor(True), down)
    torch.testing.assert_close(found, (torch.nn.functional.silu(e) * g) @ W.t())


@pytest.mark.skipif(not GPU, reason = "loads a model the way a GPU does")
def test_a_loaded_model_leaves_it_out(tmp_path, monkeypatch):
    """FastLanguageModel with "unsloth" checkpointing: every block's recompute is recognised."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from unsloth import FastLanguageModel

    recompute = importlib.import_module("unsloth.models.checkpoint_recompute")
    config = LlamaConfig(
        vocab_size = 256,
        hidden_size = 256,
        intermediate_size = 512,
        num_hidden_layers = 3,
        num_attention_heads = 4,
        num_key_value_heads = 2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token = "w2"))
    special = {"bos_token": "w0", "eos_token": "w1", "unk_token": "w2", "pad_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object = words, **special).save_pretrained(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(
        str(tmp_path), max_seq_length = 1024, load_in_4bit = False
    )
    model = FastLanguageModel.get_peft_model(
        model, r = 8, target_modules = list(PROJECTIONS), use_gradient_checkpointing = "unsloth"
    )
    answers, ask = [], recompute.output_unread
    monkeypatch.setattr(
        recompute, "output_unread", lambda layer: answers.append(ask(layer)) or answers[-1]
    )
    ids = torch.randint(0, 256, (1, 1024), device = DEVICE)
    model.train()
    model(input_ids = ids, labels = ids).loss.backward()
    assert len(answers) >= config.num_hidden_layers and all(answers)


@pytest.mark.parametrize("fault", [faults.Operations, faults.Lines])
def test_a_step_after_a_fault_is_like_one_without(recompute, fault):
    """Out of memory, or Ctrl-C, anywhere in forward, loss, recompute or backward."""
    blocks = make_blocks()
    expected, _ = train_step(blocks, counting = False)

    def step():
        return train_step(blocks, counting = False)[0]

    faults.check_steps_after_faults(step, expected, fault)
    assert not any(block.mlp.__dict__[recompute.SKIP_DOWN_PROJ] for block in blocks)


class Memory(contextlib.AbstractContextManager):
    """Counts MiB that a step takes of a GPU; leaves it fewer than ``failing``. A step has to take many, as
    what the allocator holds in part is there, too."""

    def __init__(self, failing = None):
        self.count, self.failing = 0, failing

    def __enter__(self):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        if self.failing is not None:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            room = self.before + (self.failing - 1) * 2**20
            torch.cuda.set_per_process_memory_fraction(room / total)
        return self

    def __exit__(self, *error):
        torch.cuda.set_per_process_memory_fraction(1.0)
        self.count = (torch.cuda.max_memory_allocated() - self.before) >> 20


@pytest.mark.skipif(not GPU, reason = "needs a GPU, whose memory ends")
def test_a_step_after_a_full_gpu_is_like_one_without(recompute):
    """Memory that ends anywhere between what there is before the step and what the step takes."""
    blocks = make_blocks(sizes = (1024, 2048))

    def step():
        return train_step(blocks, rows = (4, 2048), counting = False)[0]

    faults.check_steps_after_faults(step, step(), Memory)
    assert not any(block.mlp.__dict__[recompute.SKIP_DOWN_PROJ] for block in blocks)
