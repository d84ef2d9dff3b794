# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Causal attention with lengths that change every step: SDPA beside compiled flex attention.

python -m unsloth_patches.bench.compile_attention result.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Tuple

from . import harness

SHAPE = {"batch": 4, "heads": 32, "kv_heads": 8, "head_dim": 128}
LENGTHS = (512, 777, 1024, 2048, 3001, 4096)


def _inputs(length: int) -> Tuple:
    import torch

    make = torch.Generator("cuda").manual_seed(length)

    def random(heads):
        shape = (SHAPE["batch"], heads, length, SHAPE["head_dim"])
        values = torch.randn(shape, generator = make, device = "cuda", dtype = torch.bfloat16)
        return values.requires_grad_()

    return random(SHAPE["heads"]), random(SHAPE["kv_heads"]), random(SHAPE["kv_heads"])


def _sdpa(query, key, value):
    import torch.nn.functional as F
    return F.scaled_dot_product_attention(query, key, value, is_causal = True, enable_gqa = True)


def _flex() -> Dict[str, Callable]:
    """Compiled flex attention that builds its block mask at each call, and one that keeps them."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, kept = torch.compile(flex_attention, dynamic = True), {}

    def causal(batch, head, query_index, key_index):
        return query_index >= key_index

    def mask_for(length):
        return create_block_mask(causal, None, None, length, length, device = "cuda")

    def fresh(query, key, value):
        mask = mask_for(query.shape[2])
        return compiled(query, key, value, block_mask = mask, enable_gqa = True)

    def reused(query, key, value):
        length = query.shape[2]
        if length not in kept:
            kept[length] = mask_for(length)
        return compiled(query, key, value, block_mask = kept[length], enable_gqa = True)

    return {"flex": fresh, "flex, masks kept": reused}


def _step(attention: Callable, inputs: Tuple) -> Callable[[], None]:
    def step():
        import torch
        torch.autograd.grad(attention(*inputs).sum(), inputs)

    return step


def measure() -> dict:
    """Per length, forward and backward in microseconds; and what each implementation compiled."""
    import torch

    from unsloth_patches.unsloth.models.compile_events import CompileEvents

    chosen = {"SDPA": _sdpa, **_flex()}
    compiled: Dict[str, dict] = {}
    for name, attention in chosen.items():
        events = CompileEvents()
        events.start()
        begin = time.perf_counter()
        try:
            for length in LENGTHS:
                _step(attention, _inputs(length))()
            torch.cuda.synchronize()
            error = ""
        except Exception as caught:  # what a user of it would run into belongs in the table
            error = f"{type(caught).__name__}: {str(caught).splitlines()[0][:200]}"
        events.stop()
        first = time.perf_counter() - begin
        compiled[name] = {"first_pass_seconds": first, "graphs": events.graphs, "error": error}
    running = {name: chosen[name] for name in chosen if not compiled[name]["error"]}
    times = {}
    for length in LENGTHS:
        inputs = _inputs(length)
        steps = {name: _step(attention, inputs) for name, attention in running.items()}
        times[length] = harness.measure(steps, rounds = 20, warmup = 3)
    return {"shape": SHAPE, "compiled": compiled, "microseconds": times}


def show(found: dict) -> None:
    """Prints what `measure` returned (or what was read back from JSON)."""
    names = list(found["compiled"])
    rows = [
        [str(length), *(_median(times.get(name)) for name in names)]
        for length, times in found["microseconds"].items()
    ]
    for label, key in (("first pass, s", "first_pass_seconds"), ("graphs", "graphs")):
        rows.append([label, *(found["compiled"][name][key] for name in names)])
    harness.print_table(
        "Causal attention, forward + backward, microseconds by length",
        ["length", *names],
        rows,
    )
    for name in names:
        if found["compiled"][name]["error"]:
            print(f"{name} fails: {found['compiled'][name]['error']}")


def _median(times) -> object:
    return f"{times['median']:.0f}" if times else "fails"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure()), encoding = "utf-8")
