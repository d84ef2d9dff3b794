# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Packed rows of any lengths are compiled, to one graph, and documents do not see each other."""

import contextlib

import pytest
import torch
from backend import DEVICE, require

require("interpreter")

import fast_models  # noqa: E402
import unsloth  # noqa: F401, E402
from fast_models import (  # noqa: E402, F401
    HEAD_DIM,
    LONGEST,
    assert_bit_equal,
    build,
    eager,
    get_layers,
    graphs,
    many_steps,
    packed,
    shares_graph_between_runs,
    step,
    unsloth_modules,
)
from small_models import VOCABULARY  # noqa: E402


@pytest.fixture(autouse = True)
def no_step_graphs(monkeypatch):
    """On a GPU they would replay these blocks, and run a first batch uncompiled."""
    monkeypatch.setenv("UNSLOTH_STEP_GRAPHS", "0")


def test_what_pytorchs_flash_kernel_is_asked_for(monkeypatch):
    """The first model brings a stand-in for it where there is no GPU, so this comes before.

    A window of n tokens reaches n - 1 back.
    """
    from unsloth.utils.packed_attention import flash_varlen

    asked = []
    monkeypatch.setattr(
        torch.ops.aten,
        "_flash_attention_forward",
        lambda *given, **options: asked.append((given[5:], options)) or given,
    )
    for window in (None, 1, 3):
        assert flash_varlen("Q", "K", "V", None, 7, 0.5, window) == "Q"
    no_dropout, no_mask = 0.0, False
    (plain, no_window), (one, itself), (three, two_before) = asked
    assert plain == (7, 7, no_dropout, True, no_mask)
    assert one == three == (7, 7, no_dropout, False, no_mask)
    assert no_window == {"scale": 0.5, "window_size_left": None, "window_size_right": None}
    assert itself == {"scale": 0.5, "window_size_left": 0, "window_size_right": 0}
    assert two_before == {"scale": 0.5, "window_size_left": 2, "window_size_right": 0}


def test_packed_rows_are_compiled(build):
    """Documents of any number and length, an evaluation in between: one graph, or one for each run of
    the checkpoint. A document does not see the one before it."""
    model = build(checkpointing = True)
    for documents, length in (
        (2, 24),
        (3, 50),
        (5, 37),
        (2, 90),
        (2, LONGEST - 1),
        (4, HEAD_DIM + 1),
    ):
        ours = step(model, 1, length, length, documents)
        if DEVICE == "cpu":
            assert_bit_equal(ours, eager(model, 1, length, length, documents))
        assert graphs() == (1 if shares_graph_between_runs() else 2)
        if documents == 5:
            model.eval()
            with torch.no_grad():
                step(model, 2, 50)
            model.train()
    check_that_documents_are_apart(model)
    assert graphs() == (1 if shares_graph_between_runs() else 2)


def check_that_documents_are_apart(model):
    """Other tokens in the first document leave the second one's hidden states as they are."""
    ids = torch.randint(1, VOCABULARY, (1, 24), generator = torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, :11] = 1
    first, second = (
        model.base_model.model.model(input_ids = x.to(DEVICE), **packed(24, 2)).last_hidden_state[0]
        for x in (ids, other)
    )
    assert torch.equal(first[11:], second[11:])
    assert not torch.equal(first[:11], second[:11])


def test_a_packed_block_that_is_demoted_still_keeps_documents_apart(build):
    """A block that runs uncompiled after all reads the lengths that the caller gave."""
    from unsloth.utils import packed_attention  # noqa: F401

    model = build()
    reference = eager(model, 1, 24, 0, 2)
    for layer in get_layers(model):
        layer.__dict__["_unsloth_block_mode"] = 0
    demoted = step(model, 1, 24, 0, 2)
    assert graphs() == 0
    assert_bit_equal(demoted, reference)


@pytest.mark.parametrize("why", ["evaluation", "no kernel", "switched off", "marked"])
def test_packed_rows_that_cannot_compile_run_as_before(build, monkeypatch, why):
    """Evaluation, no kernel, UNSLOTH_BLOCK_COMPILE_PACKED=0, a caller's mark: upstream's path."""
    from unsloth.utils import packed_attention

    model = build()
    reference = eager(model, 1, 24, 0, 2)
    if why == "evaluation":
        model.eval()
    elif why == "no kernel":
        monkeypatch.setattr(packed_attention, "_last", {})
        monkeypatch.setattr(packed_attention, "_varlen_runs", lambda *arguments: False)
    elif why == "marked":
        make = fast_models.packed

        def marked(*arguments):
            found = make(*arguments)
            found["packed_seq_lengths"]._unsloth_uncompiled = True
            return found

        monkeypatch.setattr(fast_models, "packed", marked)
    else:
        monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE_PACKED", "0")
    with torch.no_grad() if why == "evaluation" else contextlib.nullcontext():
        loss, _ = step(model, 1, 24, 0, 2)
    assert graphs() == 0
    assert torch.equal(loss, reference[0])


# Llama's packed rows under a checkpoint are those of the first test.
FAMILIES = [("mistral", 16, False), ("qwen2", 4, True), ("qwen3", 16, False)]
FAMILIES += [("llama", 16, True)] if DEVICE == "cuda" else []


@pytest.mark.parametrize("family, bits, checkpointing", FAMILIES)
def test_many_steps_with_an_evaluation_need_few_graphs(build, family, bits, checkpointing):
    """Packed batches of 2 to 4 documents."""
    many_steps(build, family, bits, checkpointing, packing = True)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError])
def test_a_kernel_that_raises_is_not_one(monkeypatch, error):
    """A build without it, or a GPU that it was not written for."""
    from unsloth.utils import packed_attention

    def broken(*arguments):
        raise error("no kernel image")

    monkeypatch.setattr(packed_attention, "flash_varlen", broken)
    monkeypatch.setattr(torch, "device", lambda *arguments: DEVICE)
    shape = (torch.float16, 64, 2, 2, None)
    assert packed_attention._kernel_runs.__wrapped__(0, *shape) is False


def test_a_set_up_that_raises_costs_no_model(build, monkeypatch):
    """Told as a warning; the blocks run packed rows uncompiled, as before."""
    from unsloth.utils import packed_attention

    def broken(layers):
        raise KeyError("ours")

    monkeypatch.setattr(packed_attention, "prepare_packed_rows", broken)
    with pytest.warns(UserWarning, match = "packed rows stay uncompiled.*ours"):
        model = build()
    reference = eager(model, 1, 24, 0, 2)
    assert_bit_equal(step(model, 1, 24, 0, 2), reference)
    assert graphs() == 0


def test_a_mask_given_by_position_is_seen(monkeypatch):
    """Under checkpointing the block is called with ``causal_mask`` as its second argument."""
    from unsloth.utils import packed_attention

    hidden, lengths = torch.zeros(1, 4, 8), torch.tensor([2, 2])
    given = {packed_attention.LENGTHS: lengths}
    mask = torch.ones(4, 4, dtype = torch.bool)
    assert packed_attention._plain(hidden, (hidden,), given)
    assert packed_attention._plain(hidden, (hidden, None), given)
    assert not packed_attention._plain(hidden, (hidden, mask), given)
    assert not packed_attention._plain(hidden, (hidden, None, mask), given)
    assert not packed_attention._plain(hidden, (hidden,), {**given, "causal_mask": mask})


def test_inference_mode_makes_no_row_for_training(monkeypatch):
    """GRPO scores a batch in inference mode and trains on it: offsets made there are not kept for it."""
    import types

    from unsloth.utils import packed_attention

    made = lambda lengths, kwargs, total, device: torch.ones(2)  # noqa: E731
    monkeypatch.setattr(packed_attention, "_last", {})
    monkeypatch.setattr(packed_attention, "_varlen_runs", lambda *given: True)
    monkeypatch.setattr(packed_attention, "_make_row", made)
    hidden, given = torch.zeros(1, 4, 8), {packed_attention.LENGTHS: torch.tensor([2, 2])}
    attention = types.SimpleNamespace(config = None)
    with torch.inference_mode():
        assert packed_attention._row(attention, hidden, given).is_inference()
    row = packed_attention._row(attention, hidden, given)
    assert not row.is_inference() and packed_attention._row(attention, hidden, given) is row


def test_blocks_with_experts_stay_uncompiled():
    """Their packed batches run as without this change."""
    from unsloth.models.llama import LlamaAttention_fast_forward
    from unsloth.utils.packed_attention import prepare_packed_rows

    class Attention(torch.nn.Module):
        forward = LlamaAttention_fast_forward

    class ToyExperts(torch.nn.Module):
        """As GraniteMoeParallelExperts, which goes by another name in its block."""

    parts = {"mlp": torch.nn.Linear(1, 1), "experts": torch.nn.ModuleList(), "inner": ToyExperts()}
    blocks = [torch.nn.ModuleDict({"self_attn": Attention(), name: parts[name]}) for name in parts]
    prepare_packed_rows(blocks)
    assert [bool(block._forward_pre_hooks) for block in blocks] == [True, False, False]
