# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Families of models, stock Unsloth beside the patches: first step, step time, memory, losses.

Random-weight models of each family's own architecture and vocabulary, a few layers of medium width,
loaded in 4 bits through FastLanguageModel and trained as in `bench steps` by a plain SFTTrainer.
Stock runs twice, for how far two of its runs lie apart. All compile at the same time in their first steps.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from . import harness, vision_worker
from .fsdp2_checkpoint import fast_folder, save_word_tokenizer
from .steps import ACCUMULATION, BATCH, LONGEST, MEDIAN, compare_case
from .train_turns import alternate, at_once, own_caches, set_off, working

FORMS = {"stock": "all", "patched": "", "stock again": "all"}  # -> UNSLOTH_PATCHES_DISABLE
STEPS, STRETCH = 30, 10
COMMAND = "python -m unsloth_patches bench families"
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 4}


class Family(NamedTuple):
    """config: class of transformers. more: what its shape has beside WIDE."""

    config: str
    vocab: int
    more: Dict[str, Any] = {}
    worker: str = "steps_worker"


FAMILIES = {
    "Llama 3": Family("LlamaConfig", 128256),
    "Mistral": Family("MistralConfig", 32768),
    "Qwen 2.5": Family("Qwen2Config", 151936),
    "Qwen 2.5 VL": Family("Qwen2_5_VLConfig", 151936, worker = "vision_worker"),
    "Qwen 3": Family("Qwen3Config", 151936),
    "Qwen 3 MoE": Family("Qwen3MoeConfig", 151936, EXPERTS),
    "Gemma 2": Family("Gemma2Config", 256000, {"head_dim": 256, "num_attention_heads": 8}),
    # One layer of each kind.
    "Gemma 3": Family(
        "Gemma3TextConfig",
        262144,
        {
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Granite": Family("GraniteConfig", 49155, {"logits_scaling": 8.0}),
    "gpt-oss": Family(
        "GptOssConfig", 201088, {"num_local_experts": 8, "intermediate_size": 2048, "head_dim": 64}
    ),
}
QUICK = ("Llama 3", "Qwen 3")


def make(folder: Path, family: Family, quick: bool) -> None:
    """A bfloat16 checkpoint with random weights and a word tokenizer."""
    import torch
    import transformers

    shape = {**WIDE, **family.more, "vocab_size": family.vocab}
    shape.update({**TINY, "vocab_size": 512} if quick else {})
    shape.update(bos_token_id = 1, eos_token_id = 2, pad_token_id = 3, max_position_embeddings = 8192)
    if family.worker == "vision_worker":
        config, kind = vision_worker.config(shape), transformers.AutoModelForImageTextToText
        save_tokenizer = vision_worker.save_processor
    else:
        config = getattr(transformers, family.config)(**shape)
        kind, save_tokenizer = transformers.AutoModelForCausalLM, save_word_tokenizer
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind.from_config(config, dtype = torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder, shape["vocab_size"])


def compare(name: str, quick: bool) -> dict:
    """Trains a family in all forms by turns. Raises RuntimeError with the end of its output if a
    process fails."""
    steps, stretch = (4, 2) if quick else (STEPS, STRETCH)
    case = {"path": "default", "median": 30 if quick else MEDIAN, "batch": BATCH, "steps": steps}
    runs = train_forms(FAMILIES[name], {"default": case}, stretch, quick, COMMAND)
    found = compare_case(runs, "default", FORMS)
    found["patched"].update({key: runs["patched"][key] for key in ("loss_calls", "acting")})
    return found


def train_forms(
    family: Family,
    cases: Dict[str, dict],
    stretch: int,
    quick: bool,
    command: str,
    worker: Optional[str] = None,
) -> Dict[str, dict]:
    """form -> what its process measured of the cases. worker: another module than the family's."""
    runs: Dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix = "bench-families-", dir = fast_folder()) as scratch:
        folder = Path(scratch)
        jobs = {
            form: {
                "worker": worker or family.worker,
                "form": form,
                "checkpoint": str(folder / "model"),
                "scratch": str(folder / f"scratch-{form.replace(' ', '-')}"),
                "longest": 64 if quick else LONGEST,
                "accumulation": ACCUMULATION,
                "cases": cases,
                "stretch": stretch,
                "acting": not worker,  # other trainers cannot be made twice of a model
                "command": command,
            }
            for form in FORMS
        }
        with working(jobs, _environment, folder) as workers:
            make(folder / "model", family, quick)
            set_off(workers)
            for case in cases.values():
                at_once(workers, runs)  # the first stretch, in which they compile
                alternate(workers, case["steps"] - stretch, stretch, runs)
    return runs


def _environment(form: str, folder: Path) -> dict:
    return {**own_caches(form, folder), "UNSLOTH_PATCHES_DISABLE": FORMS[form]}


MEASURED = ("step ms", "patched", "first step s", "patched", "peak MiB", "patched")


def measured(stock: dict, patched: dict) -> List[str]:
    """Cells of the columns MEASURED; empty without a GPU."""
    cells = []
    for key, scale, digits in (
        ("step_seconds", 1e3, 0),
        ("first_step_seconds", 1, 1),
        ("peak_mib", 1, 0),
    ):
        for form in (stock, patched):
            value = form[key]["median"] if key == "step_seconds" else form[key]
            cells.append(f"{value * scale:.{digits}f}" if stock["peak_mib"] else "")
    return cells


def show(families: Dict[str, dict]) -> None:
    """Prints a row for each family; times and memory only where a GPU was measured."""
    columns = ["family", "loss differs by", "two stock runs by"]
    columns += [*MEASURED, "replayed"]
    rows = []
    for name, found in families.items():
        if "error" in found:
            rows.append([name, found["error"].splitlines()[-1][:60], *[""] * 8])
            continue
        stock, patched = found["stock"], found["patched"]
        row = [name, f"{patched['largest_difference']:.1e}"]
        row += [f"{found['stock again']['largest_difference']:.1e}"]
        row += measured(stock, patched)
        rows.append([*row, f"{patched['graphs'].get('share', 0):.0%}"])
    harness.print_table("QLoRA rank 16, plain SFTTrainer, 4 x 2 rows a step", columns, rows)


def _earlier(path: Path) -> Dict[str, dict]:
    return json.loads(path.read_text(encoding = "utf-8"))["families"] if path.exists() else {}


def run(
    out: Path,
    quick: bool = False,
    model: Optional[str] = None,
) -> int:
    """Compares every family, or the one named, and writes JSON under out after each, beside the other
    families of an earlier run.

    A family that does not train in one of the forms is reported with its error. Without a GPU toys
    train on Unsloth's CPU backend: losses are compared, times mean nothing.
    """
    import torch

    quick = quick or not torch.cuda.is_available()
    if model is not None and model not in FAMILIES:
        print(f"bench families: no family {model!r}; there are: {', '.join(FAMILIES)}")
        return 2
    path = Path(out) / f"families_{harness.slug()}.json"
    families: Dict[str, dict] = _earlier(path)
    chosen = (model,) if model else QUICK if quick else tuple(FAMILIES)
    for name in chosen:
        try:
            families[name] = compare(name, quick)
        except (ImportError, RuntimeError) as error:
            families[name] = {"error": str(error)}
        families[name]["environment"] = harness.environment(f'{COMMAND} --model "{name}"')
        print(f"{name}: {'failed' if 'error' in families[name] else 'done'}", flush = True)
        harness.save_json(path, {"shape": WIDE, "families": families}, COMMAND)
    show(families)
    return 1 if any("error" in families[name] for name in chosen) else 0
