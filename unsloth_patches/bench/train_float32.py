# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""The losses of `bench train` in float32: what says whose rounding a difference is.

The decoded 4-bit weights, the adapters' start, the batches and the optimizer are those of `bench
train`. The model is written out here in plain PyTorch, float32 throughout and without TF32.

    python -m unsloth_patches.bench.train_float32 job.json      # as `reference` below starts it
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint  # now: Unsloth puts its own into torch

HEAD_ROWS = 2048  # of logits at once


# ------------------------------------------------------------------------------- the model


class Linear(torch.nn.Module):
    """A LoRA layer of PEFT: its base weight as it decodes, and the adapters."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("weight", _decoded(layer.base_layer.weight))
        (adapter,) = layer.active_adapters
        self.scale = layer.scaling[adapter]
        self.lora_A = _copy(layer.lora_A[adapter].weight)
        self.lora_B = _copy(layer.lora_B[adapter].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale
        )


def _copy(parameter: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().to(torch.float32, copy = True))


def _decoded(weight: torch.Tensor) -> torch.Tensor:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    return (
        dequantize_4bit(weight.data, state).to(torch.bfloat16).float()
    )  # what training decodes to


class Block(torch.nn.Module):
    """A decoder block of Llama. layer: Unsloth's, whose weights it takes."""

    def __init__(self, layer, config):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.narrow_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.q, self.k, self.v, self.o = (
            Linear(getattr(attention, f"{name}_proj")) for name in "qkvo"
        )
        self.gate, self.up, self.down = map(Linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.register_buffer("first", layer.input_layernorm.weight.detach().float())
        self.register_buffer("second", layer.post_attention_layernorm.weight.detach().float())

    def forward(self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = norm(h, self.first, self.eps)
        split = lambda y, heads: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
        q = rotate(split(self.q(x), self.heads), cos, sin)
        k = rotate(split(self.k(x), self.narrow_heads), cos, sin)
        v = split(self.v(x), self.narrow_heads)
        k, v = (y.repeat_interleave(self.heads // self.narrow_heads, 1) for y in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal = True)
        h = h + self.o(x.transpose(1, 2).flatten(2))
        x = norm(h, self.second, self.eps)
        return h + self.down(F.silu(self.gate(x)) * self.up(x))


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim = True) + eps))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def angles(config, length: int, device):
    """(cos, sin) [length, head width] of rotary positions without scaling."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"bench train --float32: no rotary scaling {rope['rope_type']!r} here")
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    powers = torch.arange(0, width, 2, device = device).float() / width
    turns = torch.outer(torch.arange(length, device = device).float(), theta**-powers)
    turns = torch.cat((turns, turns), -1)
    return turns.cos(), turns.sin()


class Llama(torch.nn.Module):
    """The model of `bench train` in float32, LoRA included. peft_model: Unsloth's."""

    def __init__(self, peft_model):
        super().__init__()
        lm = peft_model.get_base_model()
        self.config = lm.config
        self.blocks = torch.nn.ModuleList(Block(layer, lm.config) for layer in lm.model.layers)
        self.register_buffer("words", lm.model.embed_tokens.weight.detach().float())
        self.register_buffer("last", lm.model.norm.weight.detach().float())
        self.register_buffer("head", lm.lm_head.weight.detach().float())

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of the next words whose label counts."""
        h = self.words[ids]
        cos, sin = angles(self.config, ids.shape[1], h.device)
        for block in self.blocks:
            h = checkpoint(block, h, cos, sin, use_reentrant = False)
        h, labels = norm(h, self.last, self.config.rms_norm_eps)[:, :-1], labels[:, 1:]
        counts = labels != -100
        parts = zip(h[counts].split(HEAD_ROWS), labels[counts].split(HEAD_ROWS))
        total = sum(checkpoint(self._loss, *part, use_reentrant = False) for part in parts)
        return total / counts.sum()

    def _loss(self, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, self.head), labels, reduction = "sum")


# ------------------------------------------------------------------------------- training


def losses(model: Llama, batches, args) -> Iterator[float]:
    """Trains on the batches as Trainer does by args; the loss of each step."""
    from transformers import get_scheduler

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr = args.learning_rate,
        betas = (args.adam_beta1, args.adam_beta2),
        eps = args.adam_epsilon,
        weight_decay = args.weight_decay,
    )
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
    device = parameters[0].device
    for batch in batches:
        loss = model(batch["input_ids"].to(device), batch["labels"].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        yield loss.item()


def work(job: dict) -> None:
    """Prints a line {"share": …, "losses": […]} for every share. job: see `train.job_for`."""
    import unsloth  # noqa: F401  (before transformers, as Unsloth wants it)
    from transformers import TrainerCallback

    from .train_worker import dataset, load, trainer_for

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    peft_model, tokenizer = load(job)
    vocab_size = peft_model.config.vocab_size
    model = Llama(peft_model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for share, (ignored, steps) in job["shares"].items():
        rows = dataset(job["batch"] * steps, job["length"], vocab_size, ignored)
        trainer = trainer_for(peft_model, tokenizer, job, rows, steps, TrainerCallback())
        model.load_state_dict(start, strict = False)
        found = list(losses(model, trainer.get_train_dataloader(), trainer.args))
        print(json.dumps({"share": share, "losses": found}), flush = True)


# ------------------------------------------------------------------------------- beside the others


def reference(job: Callable[[Path], dict], environment: dict, make: Callable[[Path], object]):
    """(share, losses) of every share, as they come, from a process of its own.

    job: of the folder where make leaves the checkpoint. Raises RuntimeError with the end of the
    process's output if it fails.
    """
    from .fsdp2_checkpoint import fast_folder
    with tempfile.TemporaryDirectory(prefix = "bench-train-", dir = fast_folder()) as scratch:
        folder = Path(scratch)
        described, log = folder / "job.json", folder / "log.txt"
        wanted = job(folder)
        described.write_text(json.dumps(wanted), encoding = "utf-8")
        make(folder / "model")
        command = [sys.executable, "-m", f"{__package__}.train_float32", str(described)]
        with log.open("w", encoding = "utf-8") as errors:
            process = subprocess.Popen(
                command, env = environment, stdout = subprocess.PIPE, stderr = errors, text = True
            )
            try:
                for line in process.stdout:
                    if line.startswith('{"share"'):
                        found = json.loads(line)
                        yield found["share"], found["losses"]
            finally:
                if process.poll() is None:
                    process.terminate()
                code = process.wait()
        if code:
            tail = "\n".join(log.read_text(encoding = "utf-8", errors = "replace").splitlines()[-20:])
            raise RuntimeError(f"bench train --float32 failed ({code}):\n{tail}")


def distances(exact: List[float], forms: Dict[str, List[float]]) -> dict:
    """How far each form's losses are from these, relative: at most and on average; and at how many
    steps the patched form is the nearer one."""
    far = {
        form: [abs(found - true) / abs(true) for found, true in zip(losses, exact)]
        for form, losses in forms.items()
    }
    result = {form: {"largest": max(d), "mean": sum(d) / len(d)} for form, d in far.items()}
    nearer = sum(b < a for a, b in zip(far["stock"], far["patched"]))
    return {"losses": exact, **result, "patched_nearer": nearer}


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text(encoding = "utf-8")))
