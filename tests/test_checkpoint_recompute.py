# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""A checkpointed Llama block is recomputed without its down projection; gradients keep their bits.

Without a GPU, torch forms stand for the Triton kernels of norm and activation.
"""

import contextlib
import functools
import importlib
import os
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if GPU else "cpu"
HIDDEN, MLP_WIDTH, ROWS = 32, 48, (2, 5)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Products with a base weight in one block: three in each forward pass, three in the backward pass.
WHOLE, WITHOUT_DOWN = 9, 8


@pytest.fixture(scope = "module")
def fast_lora():
    import unsloth  # noqa: F401

    return importlib.import_module("unsloth.kernels.fast_lora")


@pytest.fixture(scope = "module")
def llama(fast_lora):
    return importlib.import_module("unsloth.models.llama")


@pytest.fixture(scope = "module")
def checkpointing(fast_lora):
    return importlib.import_module("unsloth_zoo.gradient_checkpointing")


@pytest.fixture(autouse = True)
def torch_kernels(llama, fast_lora, monkeypatch):
    """Without a GPU: torch forms of the kernels beside the products, which Inductor can trace."""
    if GPU:
        return
    swiglu = importlib.import_module("unsloth.kernels.swiglu")

    def forward(e, g):
        return torch.nn.functional.silu(e.float()).to(g.dtype) * g

    monkeypatch.setattr(fast_lora, "swiglu_fg_kernel", forward)
    monkeypatch.setattr(fast_lora, "swiglu_DWf_DW_dfg_kernel", swiglu._DWf_DW_dfg_traced)
    monkeypatch.setattr(llama, "fast_rms_layernorm", lambda norm, x, **kwargs: norm(x))


class BaseProducts(TorchDispatchMode):
    """Counts products with a base weight of ``blocks``, whoever calls them."""

    def __init__(self, blocks):
        super().__init__()
        self.count = 0
        layers = [getattr(block.mlp, name).base_layer for block in blocks for name in PROJECTIONS]
        self.weights = {layer.weight.untyped_storage().data_ptr() for layer in layers}

    def __torch_dispatch__(
        self,
        func,
        types,
        args = (),
        kwargs = None,
    ):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self.count += any(t.untyped_storage().data_ptr() in self.weights for t in tensors)
        return func(*args, **(kwargs or {}))


class Scale(torch.nn.Module):
    """Stands for attention, whose kernels are not under test."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, hidden_states, **kwargs):
        return hidden_states * self.weight, None, None


def make_blocks(
    llama,
    fast_lora,
    checkpoint,
    count = 2,
    dtype = torch.float32,
    sizes = (HIDDEN, MLP_WIDTH),
    **lora,
):
    """Llama blocks with LoRA on the MLP, as patch_peft_model leaves them."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Block(LlamaDecoderLayer):
        forward = llama.LlamaDecoderLayer_fast_forward

    torch.manual_seed(0)
    shape = {"hidden_size": sizes[0], "intermediate_size": sizes[1], "num_attention_heads": 1}
    config = LlamaConfig(**shape)
    blocks = torch.nn.ModuleList(Block(config, i) for i in range(count)).to(DEVICE, dtype)
    for block in blocks:
        block.self_attn = Scale().to(DEVICE, dtype)
    lora = {"r": 4, "lora_alpha": 6, "target_modules": list(PROJECTIONS), **lora}
    blocks = inject_adapter_in_model(LoraConfig(**lora), blocks)
    for name, parameter in blocks.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std = 0.1)
    for block in blocks:
        block.mlp.forward = types.MethodType(fast_lora.apply_lora_mlp_swiglu, block.mlp)
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = checkpoint
    return blocks.train()


def train_step(
    blocks,
    run = None,
    rows = ROWS,
    counting = True,
):
    """([output, every gradient], base products) of one step on the same data.

    counting: False where compiled code runs, which a dispatch mode would switch off.
    """
    for parameter in blocks.parameters():
        parameter.grad = None
    first = next(blocks.parameters())
    width = blocks[0].input_layernorm.weight.shape[0]
    x = torch.randn(*rows, width, generator = torch.Generator().manual_seed(1))
    x = x.to(DEVICE, first.dtype).requires_grad_()
    products = BaseProducts(blocks)
    with products if counting else contextlib.nullcontext():
        if run is not None:
            hidden = run(x)
        else:
            hidden = x
            for block in blocks:
                hidden = block(hidden)[0]
        hidden.float().square().sum().backward()
    gradients = [p.grad for p in blocks.parameters() if p.grad is not None]
    return [hidden.detach().clone(), x.grad, *gradients], products.count


def same_bits(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def without_checkpoint(blocks, **options):
    """The same step with every activation kept: what a recompute has to reproduce."""
    for block in blocks:
        block.gradient_checkpointing = False
    result, _ = train_step(blocks, **options)
    for block in blocks:
        block.gradient_checkpointing = True
    return result


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_recompute_leaves_out_the_down_projection(llama, fast_lora, checkpointing, dtype):
    """One product a block fewer; bits as in a step without checkpointing."""
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, dtype = dtype)
    result, products = train_step(blocks)
    assert products == WITHOUT_DOWN * len(blocks)
    assert same_bits(result, without_checkpoint(blocks))


@pytest.mark.parametrize("seed", range(8))
def test_any_shape_and_rank(llama, fast_lora, checkpointing, seed):
    """Odd sizes, single rows, a rank of its own for each projection, rsLoRA scaling."""
    make = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator = make))

    blocks = make_blocks(
        llama,
        fast_lora,
        checkpointing.unsloth_gradient_checkpoint,
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


def test_unread_output_holds_no_memory(llama, fast_lora, checkpointing):
    """The recompute's MLP returns zeros of the right shape that share one element."""
    unread = importlib.import_module("unsloth.kernels.lora_mlp_unread")
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint)
    mlp = blocks[0].mlp
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE, requires_grad = True)
    mlp.__dict__[unread.OUTPUT_UNREAD] = True
    out = mlp(x)
    assert out.shape == x.shape and out.dtype == x.dtype and out.grad_fn is not None
    assert not out.any() and out.untyped_storage().nbytes() == out.element_size()
    with torch.no_grad():
        assert mlp(x).any(), "without grad the output is all that a caller can want"


def test_a_hook_sees_the_whole_output(llama, fast_lora, checkpointing):
    """A forward hook on block or MLP reads outputs, in the recompute too: nothing is left out."""
    for hooked in (lambda block: block, lambda block: block.mlp):
        blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, count = 1)
        seen = []

        def hook(module, args, out):
            seen.append((out[0] if isinstance(out, tuple) else out).detach().clone())

        handle = hooked(blocks[0]).register_forward_hook(hook)
        assert train_step(blocks)[1] == WHOLE
        assert len(seen) == 2 and torch.equal(*seen)
        handle.remove()
        assert train_step(blocks)[1] == WITHOUT_DOWN


def test_a_checkpoint_around_several_blocks_computes_all(llama, fast_lora, checkpointing):
    """There the first block's output is read by the second, in the recompute as well."""
    blocks = make_blocks(llama, fast_lora, None)
    for block in blocks:
        block.gradient_checkpointing = False

    def both(x):
        return blocks[1](blocks[0](x)[0])[0]

    outer = functools.partial(checkpointing.unsloth_gradient_checkpoint, both)
    result, products = train_step(blocks, outer)
    assert products == WHOLE * len(blocks)
    assert same_bits(result, without_checkpoint(blocks))
    # Checkpoints within a checkpoint: each block's own recompute still leaves the product out.
    for block in blocks:
        block._gradient_checkpointing_func = checkpointing.unsloth_gradient_checkpoint
    nested, products = train_step(blocks, outer)
    assert products == (WITHOUT_DOWN + 3) * len(blocks)
    assert same_bits(result, nested)


def test_torch_checkpoint_that_unsloth_made_its_own(llama, fast_lora, checkpointing, monkeypatch):
    """What a loaded model's layers hold: torch's function, over Unsloth's autograd.Function."""
    import torch.utils.checkpoint as torch_checkpoint

    class UnslothFunction:
        @staticmethod
        def apply(function, preserve_rng_state, *args):
            return checkpointing.unsloth_gradient_checkpoint(function, *args)

    monkeypatch.setattr(torch_checkpoint, "CheckpointFunction", UnslothFunction)
    plain = plain_checkpoint()
    for use_reentrant, expected in ((None, WITHOUT_DOWN), (True, WITHOUT_DOWN), (False, WHOLE)):
        checkpoint = functools.partial(plain, use_reentrant = use_reentrant)
        blocks = make_blocks(llama, fast_lora, plain if use_reentrant is None else checkpoint)
        result, products = train_step(blocks)
        assert products == expected * len(blocks)
        assert same_bits(result, without_checkpoint(blocks))


def plain_checkpoint():
    import torch.utils.checkpoint as torch_checkpoint

    return getattr(torch_checkpoint, "_unsloth_pristine_checkpoint", torch_checkpoint.checkpoint)


def test_torch_checkpoint_of_its_own_compiles_no_graph_for_nothing(llama, fast_lora, checkpointing):
    """torch's Function (``use_gradient_checkpointing = True``) tells nobody that it recomputes: nothing is
    left out, and one graph does for both runs."""
    if not fast_lora.TRACE_LORA_FUNCTIONS:
        pytest.skip("this torch does not trace fused LoRA")
    import torch.utils.checkpoint as torch_checkpoint
    from torch._dynamo.utils import counters

    unread = importlib.import_module("unsloth.models.checkpoint_recompute").output_unread
    block_compile = importlib.import_module("unsloth.models._block_compile")
    checkpoint = functools.partial(plain_checkpoint(), use_reentrant = True)
    function = getattr(torch_checkpoint, "_old_CheckpointFunction", None)
    with pytest.MonkeyPatch.context() as patch:
        if function is not None:
            patch.setattr(torch_checkpoint, "CheckpointFunction", function)
        blocks = make_blocks(llama, fast_lora, checkpoint)
        with torch.no_grad():
            assert not unread(blocks[0])
        torch._dynamo.reset()
        counters.clear()
        block_compile._wrap(type(blocks[0]), dict(block_compile._COMPILE_OPTIONS))
        train_step(blocks, counting = False)
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_non_reentrant_checkpoint_is_left_alone(llama, fast_lora, checkpointing):
    """torch's own checkpoint runs the forward pass itself with grad, so the output is read; also in
    the recompute of a reentrant checkpoint around the blocks."""
    checkpoint = functools.partial(plain_checkpoint(), use_reentrant = False)
    blocks = make_blocks(llama, fast_lora, checkpoint)
    result, products = train_step(blocks)
    assert products == WHOLE * len(blocks)
    assert same_bits(result, without_checkpoint(blocks))

    def both(x):
        return blocks[1](blocks[0](x)[0])[0]

    outer = functools.partial(checkpointing.unsloth_gradient_checkpoint, both)
    assert same_bits(result, train_step(blocks, outer)[0])


@pytest.mark.parametrize("lora", ({"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.5}))
def test_other_adapters_take_the_stock_path(llama, fast_lora, checkpointing, lora):
    """A bias, DoRA or dropout: stock's path, down projection included."""
    blocks = make_blocks(
        llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, count = 1, **lora
    )
    result, products = train_step(blocks)
    blocks[0].register_forward_hook(lambda *args: None)
    assert products == train_step(blocks)[1] and products >= WHOLE
    if "lora_dropout" not in lora:  # this checkpoint function does not restore the random state
        assert same_bits(result, without_checkpoint(blocks))


def test_disabled_and_merged_adapters(llama, fast_lora, checkpointing):
    """Without an active adapter: as in stock, fused without grad, PEFT's in the recompute."""
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, count = 1)
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


def test_flag_is_off_outside_a_block(llama, fast_lora, checkpointing):
    """Also after an error inside the block."""
    unread = importlib.import_module("unsloth.kernels.lora_mlp_unread")
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, count = 1)
    train_step(blocks)
    assert blocks[0].mlp.__dict__[unread.OUTPUT_UNREAD] is False

    def broken(hidden_states, **kwargs):
        assert blocks[0].mlp.__dict__[unread.OUTPUT_UNREAD] is True
        raise RuntimeError("broken attention")

    blocks[0].self_attn.forward = broken
    with pytest.raises(RuntimeError, match = "broken attention"):
        train_step(blocks)
    assert blocks[0].mlp.__dict__[unread.OUTPUT_UNREAD] is False


@contextlib.contextmanager
def compiled(blocks, options = {}):
    """Block compile of the blocks' class; yields Dynamo's counters."""
    from torch._dynamo.utils import counters

    block_compile = importlib.import_module("unsloth.models._block_compile")
    torch._dynamo.reset()
    counters.clear()
    block_compile._wrap(type(blocks[0]), {**block_compile._COMPILE_OPTIONS, **options})
    yield counters
    torch._dynamo.reset()


@pytest.fixture
def traced(fast_lora):
    if not fast_lora.TRACE_LORA_FUNCTIONS:
        pytest.skip("this torch does not trace fused LoRA")


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


def test_a_compiled_block_has_one_graph(llama, fast_lora, checkpointing, traced):
    """One graph for both runs of the checkpoint, no break, and the product gone from the second."""
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint)
    expected = without_checkpoint(blocks)
    with compiled(blocks) as counters:
        first, _ = train_step(blocks, counting = False)
        # The first run, and twice in the backward pass (dX of gate and up); not in the recompute.
        assert down_projections(blocks) == 3 * len(blocks)
        second, _ = train_step(blocks, counting = False)
        assert same_bits(first, second)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
        for result, reference in zip(second, expected):
            torch.testing.assert_close(result, reference)


def test_rows_and_lengths_that_change(llama, fast_lora, checkpointing, traced):
    """One graph for a batch of one row and one for more, whatever the lengths."""
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint)
    with compiled(blocks) as counters:
        for rows in ((4, 10), (3, 17), (1, 7), (2, 5), (1, 23), (4, 31), (1, 10)):
            result, _ = train_step(blocks, rows = rows, counting = False)
            expected = without_checkpoint(blocks, rows = rows)
            for value, reference in zip(result, expected):
                torch.testing.assert_close(value, reference)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2


def test_sizes_marked_as_dynamic_stay_marked(llama):
    """The mark is on the tensor object that block compile was given, not on what is run instead: a
    graph compiled in a first run was of one length."""
    one_graph = importlib.import_module("unsloth.models.checkpoint_one_graph")
    marked = torch.randn(2, 5, HIDDEN, device = DEVICE, requires_grad = True) * 1
    torch._dynamo.mark_dynamic(marked, 1)
    leaf = one_graph._leaf_of(marked)
    assert leaf._dynamo_dynamic_indices == {1}
    assert leaf.is_leaf and leaf.requires_grad and torch.equal(leaf, marked)


def test_a_compiled_block_whose_output_is_looked_at(llama, fast_lora, checkpointing, traced):
    """The same graph computes all of it: for a hook, and outside a checkpoint."""
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, count = 1)
    with compiled(blocks) as counters:
        result, _ = train_step(blocks, counting = False)
        seen = []
        handle = blocks[0].register_forward_hook(lambda *a: seen.append(a[2][0].detach().clone()))
        assert same_bits(result, train_step(blocks, counting = False)[0])
        assert len(seen) == 2 and torch.equal(*seen)
        handle.remove()
        assert same_bits(result, without_checkpoint(blocks, counting = False))
        assert counters["stats"]["unique_graphs"] == 1


def test_graph_for_each_run_where_one_cannot_do(
    llama, fast_lora, checkpointing, traced, monkeypatch
):
    """UNSLOTH_CHECKPOINT_ONE_GRAPH=0, as for CUDA graphs: two graphs, and the same is left out."""
    monkeypatch.setenv("UNSLOTH_CHECKPOINT_ONE_GRAPH", "0")
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint)
    with compiled(blocks) as counters:
        train_step(blocks, counting = False)
        assert down_projections(blocks) == 3 * len(blocks)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    one_graph = importlib.import_module("unsloth.models.checkpoint_one_graph")
    monkeypatch.delenv("UNSLOTH_CHECKPOINT_ONE_GRAPH")
    assert one_graph.one_graph_wanted({}) and one_graph.one_graph_wanted(
        {"triton.cudagraphs": False}
    )
    assert not one_graph.one_graph_wanted({"triton.cudagraphs": True})


def test_first_runs_that_stay_without_grad(llama, fast_lora, checkpointing, traced):
    """No second run will follow: the input wants no grad, or the adapters are off. And what a run
    with grad saves must not go through somebody's hooks."""
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, count = 1)
    grad_modes = []
    attend = blocks[0].self_attn.forward

    def watched(*args, **kwargs):
        grad_modes.append(torch.is_grad_enabled())
        return attend(*args, **kwargs)

    blocks[0].self_attn.forward = watched
    x = torch.randn(*ROWS, HIDDEN, device = DEVICE)
    adapters = [getattr(blocks[0].mlp, name) for name in PROJECTIONS]
    with compiled(blocks):
        # An eager stand-in for the compiled function: grad mode would be a constant of its graph.
        one_graph = importlib.import_module("unsloth.models.checkpoint_one_graph")
        run = one_graph._first_run_with_grad(lambda self, x: (watched(x)[0],))

        def mode_of(x):
            with torch.no_grad():
                (out,) = run(blocks[0], x)
            assert not out.requires_grad
            return grad_modes.pop()

        wanting = x.clone().requires_grad_()
        assert mode_of(wanting) and not mode_of(x)
        for switch in (True, False):
            for adapter in adapters:
                adapter.enable_adapters(switch)
            assert mode_of(wanting) is switch
        for adapter in adapters:
            adapter.enable_adapters(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            assert not mode_of(wanting)
        blocks[0].gradient_checkpointing = False
        assert not mode_of(wanting)
        assert wanting.grad_fn is None and run(blocks[0], wanting)[0].requires_grad


def test_needed_is_true_outside_a_recompute(llama, fast_lora, checkpointing, traced):
    """Also after an error, and for a graph that somebody traces around the block."""
    unread = importlib.import_module("unsloth.kernels.lora_mlp_unread")
    blocks = make_blocks(llama, fast_lora, checkpointing.unsloth_gradient_checkpoint, count = 1)
    mlp = blocks[0].mlp
    with compiled(blocks):
        expected, _ = train_step(blocks, counting = False)
        needed = mlp.__dict__[unread.OUTPUT_NEEDED]
        assert needed.item() and needed.device.type == "cpu"
        with pytest.raises(RuntimeError, match = "size|shape|match"):
            blocks[0](torch.randn(2, 3, HIDDEN + 1, device = DEVICE, requires_grad = True))
        assert needed.item()
        blocks[0].gradient_checkpointing = False
        outer = torch.compile(lambda x: blocks[0](x)[0], backend = "aot_eager", fullgraph = True)
        torch.testing.assert_close(train_step(blocks, outer, counting = False)[0], expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_swiglu_down_operator(llama, fast_lora, dtype):
    """As the eager MLP's last product, from any weights; nothing is written where it is not needed;
    schema, fake and functionalization hold (opcheck)."""
    importlib.import_module("unsloth.kernels.lora_mlp_unread")  # the operator's home
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
