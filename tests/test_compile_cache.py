# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Compiled code kept in a folder: a later run finds it; what cannot be trusted is left alone."""

import pytest
import torch
from backend import require
from torch._dynamo.utils import counters

require("cpu")

import unsloth  # noqa: F401, E402

torch.set_num_threads(1)
VARIABLE = "UNSLOTH_COMPILE_CACHE_DIR"


@pytest.fixture
def cache(monkeypatch):
    from unsloth.models import compile_cache

    monkeypatch.delenv(VARIABLE, raising = False)
    monkeypatch.setattr(compile_cache, "_held", {})
    automatic = {"folder": None, "error": None, "saves": False}
    monkeypatch.setattr(compile_cache, "_automatic", automatic)
    return compile_cache


@pytest.fixture
def files():
    from unsloth.models import compile_cache_files
    return compile_cache_files


@pytest.fixture
def new_machine(monkeypatch, tmp_path_factory):
    """new_machine() forgets all that was compiled, in memory and in PyTorch's and Triton's folders."""
    from torch.compiler._cache import CacheArtifactManager
    from unsloth.models import compile_cache_triton

    def forget():
        folder = tmp_path_factory.mktemp("inductor")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        monkeypatch.setattr(compile_cache_triton, "_used", set())
        torch._dynamo.reset()
        CacheArtifactManager.clear()
        counters.clear()

    forget()
    yield forget
    torch._dynamo.reset()
    CacheArtifactManager.clear()


def sine(x):
    return (x.sin().square() + 2).sum()


def cosine(x):
    return (x.cos().square() + 3).sum()


def trained(function = sine):
    """The gradient of a compiled function: one forward and one backward graph."""
    x = torch.linspace(0.5, 1.5, 8, requires_grad = True)
    torch.compile(function)(x).backward()
    return x.grad


def hits():
    return counters["aot_autograd"]["autograd_cache_hit"]


def caches(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_compiles_nothing(cache, new_machine, tmp_path):
    """What a run saved, the next one on a machine with empty caches finds, with equal results."""
    folder = tmp_path / "cache"
    first = trained()
    path = cache.save_compile_cache(folder)
    assert path.parent == folder and caches(folder) == [path.name]
    new_machine()
    assert cache.load_compile_cache(folder) >= 1
    assert torch.equal(trained(), first)
    assert hits() == 1 and counters["aot_autograd"]["autograd_cache_miss"] == 0
    new_machine()
    assert torch.equal(trained(), first) and hits() == 0, "the control: without the folder, no hit"


def test_saving_twice_writes_once_and_more_replaces_less(cache, new_machine, tmp_path):
    """A run that adds nothing writes nothing; one that knows more leaves one file."""
    trained()
    first = cache.save_compile_cache(tmp_path)
    assert first is not None and cache.save_compile_cache(tmp_path) is None
    trained(cosine)
    second = cache.save_compile_cache(tmp_path)
    assert caches(tmp_path) == [second.name] != [first.name]


def test_runs_that_compile_different_things_keep_each_other(cache, new_machine, tmp_path):
    """Two runs that never saw each other's graphs: both are found afterwards."""
    trained()
    cache.save_compile_cache(tmp_path)
    new_machine()
    trained(cosine)
    cache.save_compile_cache(tmp_path)
    assert len(caches(tmp_path)) == 2
    new_machine()
    cache.load_compile_cache(tmp_path)
    trained()
    trained(cosine)
    assert hits() == 2
    assert cache.save_compile_cache(tmp_path) is None


def scaled(factor):
    """A function like Unsloth's LoRA layers: an autograd Function with its own backward."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient * x * factor

    return lambda x: Scaled.apply(x).sum()


def test_graphs_with_autograd_functions_are_cached(cache, new_machine, tmp_path):
    """As the LoRA layers are; a Function that differs in its backward alone is told apart."""
    import torch._functorch.config as config

    name = "autograd_cache_allow_custom_autograd_functions"
    if not hasattr(config, name):
        pytest.skip("this PyTorch has no such setting")
    # Not monkeypatch: what it takes back, some PyTorch versions take for deleted.
    with config.patch({name: False}):
        trained(scaled(2.0))
        assert (
            counters["aot_autograd"]["autograd_cache_bypass"] == 1
        ), "the control: PyTorch's default"
        new_machine()
        assert cache.cache_lora_functions()
        first = trained(scaled(2.0))
        cache.save_compile_cache(tmp_path)
        new_machine()
        cache.load_compile_cache(tmp_path)
        assert torch.equal(trained(scaled(2.0)), first) and hits() == 1
        assert torch.allclose(trained(scaled(6.0)), 3 * first) and hits() == 1


# ------------------------------------------------------------------------ what is not loaded


@pytest.fixture
def saved(cache, new_machine, tmp_path):
    """A folder with one good cache, on a machine that has forgotten it."""
    trained()
    path = cache.save_compile_cache(tmp_path)
    new_machine()
    cache._held.clear()
    return path


def test_a_damaged_file_is_ignored_and_replaced(cache, saved, capsys):
    """Training compiles as if there were none, and the next save puts it right."""
    saved.write_bytes(saved.read_bytes()[:-1])
    assert cache.load_compile_cache(saved.parent) == 0
    assert "damaged" in capsys.readouterr().out
    trained()
    assert hits() == 0
    assert cache.save_compile_cache(saved.parent) is not None


def test_artifacts_that_pytorch_cannot_read_are_ignored(cache, files, saved, capsys):
    """A file that is whole but holds something else: a message, no error."""
    saved.unlink()
    files.write_cache(saved.parent, b"not torch's", b"", frozenset(["inductor_artifacts:x"]))
    assert cache.load_compile_cache(saved.parent) == 0
    assert "is ignored: PyTorch cannot read it." in capsys.readouterr().out


def test_a_missing_folder_is_an_empty_cache(cache, new_machine, tmp_path):
    """Nothing to load is no error, and loading makes no folder."""
    assert cache.load_compile_cache(tmp_path / "none") == 0
    assert not (tmp_path / "none").exists()
    assert cache.save_compile_cache(tmp_path / "none") is None, "nothing was compiled"


def test_a_path_that_is_no_folder_is_named(cache, new_machine, tmp_path):
    """The error says which path and what to do; nothing is written."""
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(cache.CompileCacheError, match = "file.*is no folder"):
        cache.load_compile_cache(file)
    with pytest.raises(cache.CompileCacheError, match = "file.*cannot be written"):
        cache.save_compile_cache(file)
    assert file.read_text() == "mine"


# ------------------------------------------------------------------ UNSLOTH_COMPILE_CACHE_DIR


class Compiled(torch.nn.Module):
    """A model for Trainer whose loss is a compiled function."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.steps = 0
        self.loss = torch.compile(lambda x, w: (x * w).sin().square().mean())

    def forward(
        self,
        x,
        labels = None,
    ):
        self.steps += 1
        return {"loss": self.loss(x, self.weight)}


@pytest.fixture
def trainer(monkeypatch, tmp_path_factory):
    """trainer(model) -> a transformers.Trainer of two steps; its default callbacks are put back."""
    import transformers

    module = transformers.trainer
    monkeypatch.setattr(module, "DEFAULT_CALLBACKS", list(module.DEFAULT_CALLBACKS))
    monkeypatch.setattr("atexit.register", lambda function: function)

    def make(model):
        arguments = transformers.TrainingArguments(
            output_dir = str(tmp_path_factory.mktemp("out")),
            max_steps = 2,
            report_to = "none",
            save_strategy = "no",
            use_cpu = not torch.cuda.is_available(),
            disable_tqdm = True,
        )
        rows = [{"x": torch.ones(4), "labels": torch.ones(4)}] * 4
        return transformers.Trainer(model = model, args = arguments, train_dataset = rows)

    return make


def _set_up(model):
    from unsloth.models import _block_compile
    _block_compile.patch_block_compile(model)


def test_the_environment_variable_loads_before_and_saves_after_training(
    cache, new_machine, trainer, tmp_path, monkeypatch, capsys
):
    """Two runs of a Trainer: the second one's graphs come from the first one's folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(VARIABLE, str(folder))
    for run in range(2):
        new_machine()
        cache._held.clear()
        cache._automatic.update(folder = None)
        model = Compiled()
        _set_up(model)
        trainer(model).train()
        assert model.steps == 2 and hits() == run
    assert len(caches(folder)) == 1
    said = capsys.readouterr().out
    assert "saved the compile cache" in said and "loaded" in said


@pytest.fixture
def watching():
    """As before any load: Triton's own manager; put back afterwards."""
    knobs = pytest.importorskip("triton").knobs
    before = knobs.cache.manager_class
    knobs.cache.manager_class = None
    yield
    knobs.cache.manager_class = before


def test_kernels_of_triton_are_kept_too(cache, new_machine, watching, tmp_path):
    """What Triton put into its own cache is found on a machine with empty caches."""
    from triton.runtime.cache import get_cache_manager

    folder, key = tmp_path / "cache", "ab" * 32
    assert cache.load_compile_cache(folder) == 0
    get_cache_manager(key).put(b"code", "kernel.cubin")
    trained()
    assert cache.save_compile_cache(folder) is not None
    new_machine()
    assert get_cache_manager(key).get_file("kernel.cubin") is None, "the control"
    assert cache.load_compile_cache(folder) >= 2
    assert get_cache_manager(key).get_file("kernel.cubin") is not None
    trained()
    assert cache.save_compile_cache(folder) is None, "nothing new"


def test_a_triton_folder_that_cannot_be_written_costs_its_kernels_alone(
    cache, new_machine, watching, tmp_path, monkeypatch, capsys
):
    """PyTorch's graphs are found all the same; the message and the count say what was loaded."""
    from triton.runtime.cache import get_cache_manager

    folder, file = tmp_path / "cache", tmp_path / "file"
    cache.load_compile_cache(folder)
    get_cache_manager("ab" * 32).put(b"code" * 2**20, "kernel.cubin")
    first = trained()
    cache.save_compile_cache(folder)
    new_machine()
    file.write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(file / "triton"))
    count = cache.load_compile_cache(folder)
    said = capsys.readouterr().out
    assert "PyTorch's artifacts are loaded, but Triton's kernels are not" in said
    assert f"{file}/triton" in said and "TRITON_CACHE_DIR" in said and "is ignored" not in said
    assert f"loaded {count} compiled artifacts (0." in said, "the kernel has 4 MiB"
    assert torch.equal(trained(), first) and hits() == 1


@pytest.mark.parametrize("folder", ["file/cache", "~nobody-of-this-name/../file/cache"])
def test_a_folder_that_cannot_be_used_stops_training_before_its_first_step(
    cache, new_machine, trainer, tmp_path, monkeypatch, folder
):
    """The folder was asked for: better an error now than a lost cache after hours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "~nobody-of-this-name").mkdir()
    monkeypatch.setenv(VARIABLE, folder)
    model = Compiled()
    _set_up(model)
    with pytest.raises(cache.CompileCacheError, match = "cannot be written"):
        trainer(model).train()
    assert model.steps == 0


def test_one_process_a_machine_saves(cache, new_machine, trainer, tmp_path, monkeypatch):
    """Rank 1 loads but does not write."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    _set_up(Compiled())
    trained()
    cache._finish()
    assert caches(tmp_path / "cache") == []


def test_a_save_that_raises_ends_no_run_and_can_be_done_again(
    cache, new_machine, trainer, tmp_path, monkeypatch, capsys
):
    """The run has trained; what went wrong is told, and the save at exit may still succeed."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    _set_up(Compiled())
    trained()
    save = cache.save_compile_cache

    def full(folder):
        raise cache.CompileCacheError("No space left on device")

    monkeypatch.setattr(cache, "save_compile_cache", full)
    cache._finish()
    assert "was not saved: No space left" in capsys.readouterr().out
    monkeypatch.setattr(cache, "save_compile_cache", save)
    cache._finish()
    assert len(caches(tmp_path / "cache")) == 1


def test_a_pytorch_without_such_caches_says_so(cache, tmp_path, monkeypatch, capsys):
    """The model is set up all the same; nothing is written."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delattr(torch.compiler, "load_cache_artifacts")
    _set_up(Compiled())
    assert f"{VARIABLE} needs PyTorch 2.7" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists() and cache._automatic["folder"] is None


def test_without_the_variable_nothing_happens(cache, new_machine, trainer, tmp_path):
    """No folder, no callback."""
    import transformers

    before = list(transformers.trainer.DEFAULT_CALLBACKS)
    _set_up(Compiled())
    assert transformers.trainer.DEFAULT_CALLBACKS == before
    assert cache._automatic["folder"] is None
