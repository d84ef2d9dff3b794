# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""A few Llama decoder blocks with LoRA on their MLP, as Unsloth leaves them, and training steps of them."""

import contextlib
import types

import torch
from backend import DEVICE, GPU
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN, MLP_WIDTH, ROWS = 32, 48, (2, 5)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def torch_kernels(patch):
    """Without a GPU: torch forms of the kernels beside the products, which Inductor can trace."""
    if GPU:
        return
    from unsloth.kernels import fast_lora, swiglu
    from unsloth.models import llama

    def forward(e, g):
        return torch.nn.functional.silu(e.float()).to(g.dtype) * g

    patch.setattr(fast_lora, "swiglu_fg_kernel", forward)
    patch.setattr(fast_lora, "swiglu_DWf_DW_dfg_kernel", swiglu._DWf_DW_dfg_traced)
    patch.setattr(llama, "fast_rms_layernorm", lambda norm, x, **kwargs: norm(x))


def unsloth_checkpoint(*arguments):
    """Unsloth's own reentrant checkpoint."""
    from unsloth_zoo.gradient_checkpointing import unsloth_gradient_checkpoint
    return unsloth_gradient_checkpoint(*arguments)


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
    checkpoint = None,
    count = 2,
    dtype = torch.float32,
    sizes = (HIDDEN, MLP_WIDTH),
    **lora,
):
    """Llama blocks with LoRA on the MLP, as patch_peft_model leaves them; by default checkpointed by
    Unsloth."""
    from unsloth.kernels import fast_lora  # noqa: I001  (before transformers)
    from unsloth.models import llama
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
        block._gradient_checkpointing_func = checkpoint or unsloth_checkpoint
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


@contextlib.contextmanager
def compiled(blocks, backend = "aot_eager"):
    """Block compile of the blocks' class, by ``"inductor"`` or what takes less time; yields Dynamo's
    counters."""
    from torch._dynamo.utils import counters
    from unsloth.models import _block_compile

    torch._dynamo.reset()
    counters.clear()
    compile_ = torch.compile

    def compile_by_backend(
        function,
        options = None,
        **settings,
    ):
        options = options if backend == "inductor" else None
        return compile_(function, backend = backend, options = options, **settings)

    torch.compile = compile_by_backend
    try:
        _block_compile._wrap(type(blocks[0]), dict(_block_compile._COMPILE_OPTIONS))
    finally:
        torch.compile = compile_
    try:
        yield counters
    finally:
        torch._dynamo.reset()


def plain_checkpoint():
    import torch.utils.checkpoint as torch_checkpoint
    return getattr(torch_checkpoint, "_unsloth_pristine_checkpoint", torch_checkpoint.checkpoint)
