# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What the loss benchmarks compare: inputs by shape, the candidates, and the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Dict, Optional

IGNORED = -100


@dataclass(frozen = True)
class Shape:
    tokens: int
    hidden: int
    vocab: int
    trained: bool
    ignored: float

    @property
    def name(self) -> str:
        head = "trained" if self.trained else "frozen"
        return f"{self.tokens} x {self.hidden} x {self.vocab}, {head}, {self.ignored:.0%} ignored"

    @property
    def active(self) -> int:
        return self.tokens - int(self.tokens * self.ignored)

    @property
    def flops(self) -> float:
        products = 3 if self.trained else 2
        return 2.0 * products * self.active * self.hidden * self.vocab


SHAPES = (
    Shape(16384, 4096, 128256, False, 0.0),
    Shape(16384, 4096, 128256, False, 0.5),
    Shape(16384, 4096, 128256, True, 0.5),
    Shape(8192, 2304, 256000, False, 0.0),
    Shape(2048, 4096, 128256, False, 0.5),
    Shape(8192, 2048, 128256, True, 0.0),  # Llama 3.2 1B, tied
    # Heads that FastModel's forwards train on: Gemma 3 1B, Qwen3 30B-A3B, Qwen2.5-VL 7B.
    Shape(8192, 1152, 262144, False, 0.0),
    Shape(8192, 2048, 151936, False, 0.0),
    Shape(8192, 3584, 152064, False, 0.5),
)
QUICK = (Shape(1024, 512, 8192, False, 0.5), Shape(1024, 512, 8192, True, 0.0))


class Problem:
    """Random inputs of a shape, bf16 on the GPU; logits come out with standard deviation 2."""

    def __init__(
        self,
        shape: Shape,
        seed: int = 0,
    ):
        import torch

        make = torch.Generator("cuda").manual_seed(seed)
        options = {"device": "cuda", "generator": make}
        self.shape = shape
        self.hidden = torch.randn(shape.tokens, shape.hidden, **options).bfloat16()
        spread = 2.0 / math.sqrt(shape.hidden)
        self.weight = torch.empty(shape.vocab, shape.hidden, dtype = torch.bfloat16, device = "cuda")
        self.weight.normal_(0.0, spread, generator = make)
        self.labels = torch.randint(0, shape.vocab, (shape.tokens,), **options)
        order = torch.randperm(shape.tokens, **options)
        self.labels[order[: shape.tokens - shape.active]] = IGNORED
        self.hidden.requires_grad_(True)
        self.weight.requires_grad_(shape.trained)

    def step(self, loss: Callable) -> Callable:
        """Forward and backward once, the gradients dropped."""

        def run():
            self.hidden.grad = self.weight.grad = None
            value = loss(self.hidden, self.weight, self.labels)
            value.backward()
            return value

        return run

    def drop(self) -> None:
        self.hidden.grad = self.weight.grad = None


# ------------------------------------------------------------------------------- candidates


def ours(**options) -> Callable:
    from unsloth_patches.unsloth.kernels.linear_cross_entropy import linear_cross_entropy
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, **options)


def _zoo() -> Callable:
    import unsloth  # noqa: F401  (the zoo wants it first)
    from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss

    def loss(hidden, weight, labels):
        return unsloth_fused_ce_loss(
            None, hidden[None], weight, None, labels[None], shift_labels = False
        )

    return loss


def stock_loss() -> Optional[Callable]:
    """Unsloth's own fused loss, or None where it is not installed."""
    try:
        return _zoo()
    except ImportError:
        return None


def _liger() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    function = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: function(weight, hidden, labels)


def _cce() -> Callable:
    from cut_cross_entropy import linear_cross_entropy
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)


def _torch() -> Callable:
    try:
        from torch.nn.functional import linear_cross_entropy
    except ImportError as error:
        raise ImportError("PyTorch has it from 2.13 on") from error
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)


def _quack() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy
    def loss(hidden, weight, labels):
        # Its kernels refuse a chunk of as many rows as columns, which its default, 4096, is for 8B.
        chunk_size = 8192 if hidden.shape[1] == 4096 else 4096
        return chunked_linear_cross_entropy(hidden, weight, labels, chunk_size = chunk_size)

    return loss


def _trl() -> Callable:
    """The loss of TRL's SFTTrainer, ``chunked_nll``: log-probabilities of the labelled rows."""
    from trl.kernels import ChunkedLogProbFunction

    def loss(hidden, weight, labels):
        keep = labels != IGNORED
        found = ChunkedLogProbFunction.apply(
            hidden[keep], weight, None, labels[keep], 1.0, 32768, None, 1.0, ()
        )
        return -found[0].sum() / keep.sum()

    return loss


def dense(hidden, weight, labels):
    import torch.nn.functional as F
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def candidates() -> Dict[str, Optional[Callable]]:
    """name -> loss(hidden, weight, labels); None with a note where a peer is not installed."""
    import torch

    found: Dict[str, Optional[Callable]] = {
        "ours": ours(),
        "ours, float32 logits": ours(logits_dtype = torch.float32),
    }
    peers = {"unsloth_zoo": _zoo, "liger": _liger, "cce": _cce, "torch": _torch}
    peers.update(quack = _quack, trl = _trl)
    for name, make in peers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"bench loss: {name} left out: {error}")
    found["dense"] = dense
    return found


def log_prob_candidates() -> Dict[str, Callable]:
    """name -> per-token log-probabilities as GRPO takes them: ours, Unsloth's and those of dense logits."""
    import torch

    from unsloth_patches.unsloth.kernels.linear_log_probs import linear_log_probs

    def of_logits(hidden, weight, labels):
        logits = torch.nn.functional.linear(hidden, weight).float()
        return -torch.nn.functional.cross_entropy(logits, labels, reduction = "none")

    found = {
        "ours": lambda hidden, weight, labels: linear_log_probs(hidden, weight, labels).log_probs
    }
    try:
        import unsloth  # noqa: F401  (the zoo wants it first)
        from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs
    except ImportError as error:
        print(f"bench loss: unsloth_zoo's log-probabilities left out: {error}")
    else:

        def zoo(hidden, weight, labels):
            found = fused_linear_logprobs(hidden, weight, labels)
            return found[0] if isinstance(found, tuple) else found

        found["unsloth_zoo"] = zoo
    found["dense"] = of_logits
    return found


def products_alone(problem: "Problem") -> Callable:
    """Only the matrix products that ours runs, 4096 rows at a time: the floor as this GPU gives it.

    Timed in the same rounds as the losses, so at the same clocks and power limit.
    """
    import torch

    from unsloth_patches.unsloth.kernels.loss_chunking import multiply_, project

    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    active, vocab = problem.shape.active, problem.shape.vocab

    def run():
        step = min(active, 4096)
        logits = torch.empty(step, vocab, dtype = hidden.dtype, device = "cuda")
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.empty_like(weight) if problem.shape.trained else None
        for start in range(0, active, step):
            rows = hidden[start : start + step]
            block = logits[: rows.shape[0]]
            project(rows, weight, block)
            multiply_(by_hidden[start : start + step][: rows.shape[0]], block, weight, 1.0, False)
            if by_weight is not None:
                multiply_(by_weight, block.t(), rows, 1.0, start > 0)

    return run


# ------------------------------------------------------------------------------- oracle


def oracle(problem: Problem):
    """(loss, hidden gradient, weight gradient) in float64, 256 rows at a time."""
    import torch

    hidden, weight = problem.hidden.detach(), problem.weight.detach().double()
    keep = problem.labels != IGNORED
    count = keep.sum().item()
    by_hidden = torch.zeros(hidden.shape, dtype = torch.float64, device = "cuda")
    by_weight = torch.zeros_like(weight) if problem.shape.trained else None
    total = torch.zeros((), dtype = torch.float64, device = "cuda")
    for rows in keep.nonzero().squeeze(1).split(256):
        x = hidden[rows].double()
        logits = x @ weight.t()
        target = problem.labels[rows].unsqueeze(1)
        log_p = torch.log_softmax(logits, 1)
        total -= log_p.gather(1, target).sum()
        gradient = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype = log_p.dtype))
        gradient /= count
        by_hidden[rows] = gradient @ weight
        if by_weight is not None:
            by_weight.addmm_(gradient.t(), x)
    return total / count, by_hidden, by_weight


def relative_error(value, reference) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()
