# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Inductor's compile workers start with the load of a model, where something will be compiled."""

import pytest
from backend import require

require("interpreter")

import unsloth  # noqa: F401, E402
from torch._inductor import async_compile  # noqa: E402
from unsloth.models import loader  # noqa: E402

CLASSES = ("FastLanguageModel", "FastModel")
SWITCHES = (
    ("UNSLOTH_COMPILE_WORKERS_EARLY", "0"),
    ("UNSLOTH_BLOCK_COMPILE", "0"),
    ("UNSLOTH_COMPILE_DISABLE", "1"),
    ("UNSLOTH_COMPILE_DISABLE", "partial"),
)


@pytest.fixture
def load(monkeypatch):
    """load(class, **arguments): what happens, in order, in a load that Python refuses at the call."""
    for name, _ in SWITCHES:
        monkeypatch.delenv(name, raising = False)
    from unsloth.models import compile_workers

    # Not torch.cuda.is_available: others would remember that there was a GPU.
    monkeypatch.setattr(compile_workers, "_has_gpu", lambda: True)
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 4)
    events = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: events.append("workers"))

    def run(name, **keywords):
        try:
            # The model's name twice: stock's function is reached, and none of it runs.
            getattr(loader, name).from_pretrained("a", model_name = "b", **keywords)
        except TypeError as error:
            events.append(type(error).__name__)
        return events

    return run


@pytest.mark.parametrize("name", CLASSES)
def test_workers_start_before_the_load(load, name):
    """Then comes stock's load, with the arguments as they were given."""
    assert load(name) == ["workers", "TypeError"]


@pytest.mark.parametrize("switch", SWITCHES, ids = "=".join)
def test_nothing_starts_where_nothing_compiles(load, monkeypatch, switch):
    """Switched off by its own variable and by Unsloth's."""
    from unsloth.models.compile_workers import start_compile_workers

    assert start_compile_workers()
    monkeypatch.setenv(*switch)
    assert not start_compile_workers()
    assert load("FastLanguageModel").count("workers") == 1


def test_not_for_vllm_one_thread_or_no_gpu(load, monkeypatch):
    """vLLM has workers of its own; one compile thread means no workers, and so does no GPU."""
    from unsloth.models import compile_workers

    start_compile_workers = compile_workers.start_compile_workers
    assert "workers" not in load("FastLanguageModel", fast_inference = True)
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 1)
    assert not start_compile_workers()
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 4)
    monkeypatch.setattr(compile_workers, "_has_gpu", lambda: False)
    assert not start_compile_workers()
    assert "workers" not in load("FastModel")


def test_a_pytorch_without_the_function(load, monkeypatch):
    """Nothing starts, and the load goes on."""
    monkeypatch.delattr(async_compile, "maybe_warm_pool")
    assert load("FastLanguageModel") == ["TypeError"]


def test_workers_that_cannot_start_cost_no_load(load, monkeypatch):
    """No processes left, say: they start when something compiles, as without this."""
    from unsloth.models.compile_workers import start_compile_workers

    def refusing():
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(async_compile, "maybe_warm_pool", refusing)
    assert not start_compile_workers() and load("FastModel") == ["TypeError"]


@pytest.mark.parametrize("kind", (staticmethod, lambda function: function))
def test_a_plain_function_and_a_staticmethod(load, kind):
    """Each comes back as what it was, and passes on what the load returns and raises."""
    from unsloth.models.compile_workers import start_compile_workers_early

    def stock(name, fast_inference = False):
        return name.upper()

    new = start_compile_workers_early(kind(stock))
    assert isinstance(new, staticmethod) == (kind is staticmethod)

    class Model:
        from_pretrained = staticmethod(getattr(new, "__func__", new))

    assert Model.from_pretrained("a") == "A"
    with pytest.raises(AttributeError):
        Model.from_pretrained(None)
    assert Model.from_pretrained(name = "b", fast_inference = True) == "B"
