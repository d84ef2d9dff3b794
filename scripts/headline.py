# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Write the measured rows of README's first table from the committed JSON of docs/results.

python scripts/headline.py            # rewrites README.md; a test compares the two
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "docs/results"
TRAIN, LOSS, DEQUANT = "train_h100_llama-8b-8-layers", "loss_h100", "dequant_h100"
STEPS = "steps_h200_llama-{}"


def _read(name):
    return json.loads((ROOT / RESULTS / f"{name}.json").read_text())


def _row(what, stock, patched, name):
    return f"| {what} | {stock} | {patched} ([JSON]({RESULTS}/{name}.json)) |"


def _time_and_memory(found):
    return f"{found['step_seconds']['median'] * 1e3:.0f} ms, {found['peak_mib']:.0f} MiB"


def _short_steps(model):
    name = STEPS.format(model)
    found = _read(name)
    case = found["cases"]["default"]
    each = {form: _time_and_memory(case[form]) for form in case}
    what = f"QLoRA step of {found['title']}, plain SFTTrainer, 4 x 2 rows of 490 tokens in the median, one H200"
    return _row(what, each["stock"], each["graphs"], name)


def rows():
    """The table's measured rows, as README has them."""
    train, loss, dequant = map(_read, (TRAIN, LOSS, DEQUANT))
    half, runs = train["shares"]["half"], train["runs"]
    step = {form: _time_and_memory(half[form]) for form in ("stock", "patched")}
    first = {form: f"{runs[form]['seconds']['to_first_step']:.1f} s" for form in step}
    largest = loss["rows"][0]
    tokens, _, words = largest["shape"].split(",")[0].split(" x ")
    fused = {name: largest["time_us"][name]["median"] / 1e3 for name in ("unsloth_zoo", "ours")}
    weight = next(
        entry["us"]
        for entry in dequant["single"]
        if (entry["shape"], entry["quant_type"], entry["dtype"])
        == ([8192, 28672], "fp4", "bfloat16")
    )
    return [
        *(_short_steps(model) for model in ("1b", "8b")),
        _row(
            "QLoRA step, 8 layers of Llama-3.1-8B's shape, 4 x 2048, half the labels ignored",
            step["stock"],
            step["patched"],
            TRAIN,
        ),
        _row("its first step (compiling)", first["stock"], first["patched"], TRAIN),
        _row(
            f"loss over {tokens} tokens and {int(words):,} words, forward and backward",
            f"{fused['unsloth_zoo']:.1f} ms",
            f"{fused['ours']:.1f} ms",
            LOSS,
        ),
        _row(
            "an FP4 weight of 8192 x 28672 to bfloat16",
            f"{weight['upstream']['median']:.0f} us",
            f"{weight['ours']['median']:.0f} us",
            DEQUANT,
        ),
    ]


def update(text):
    """README's text with the measured rows, the first of its first table, written anew."""
    lines, fresh = text.splitlines(), rows()
    start = lines.index("| what you do | stock | patched |") + 2
    lines[start : start + len(fresh)] = fresh
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = update(before)
    readme.write_text(after)
    print("README.md: " + ("unchanged" if after == before else "rewritten"))
