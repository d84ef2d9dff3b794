# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Compiled code kept in a folder: a later run finds it; what cannot be trusted is left alone."""

import importlib.util
import json
import logging
import os
import stat

import pytest
import torch
from backend import require
from torch._dynamo.utils import counters

require("cpu")

import unsloth  # noqa: F401, E402

torch.set_num_threads(1)
logging.getLogger("torch.__trace").disabled = True  # pytest would capture megabytes a compilation
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


def test_the_files_are_for_their_owner_alone(cache, new_machine, tmp_path):
    """Folder 0700 and file 0600, whatever the umask."""
    trained()
    previous = os.umask(0)
    try:
        path = cache.save_compile_cache(tmp_path / "a" / "cache")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


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


def _damage(path, change):
    line, data = path.read_bytes().split(b"\n", 1)
    path.write_bytes(change(line, data))


@pytest.mark.parametrize(
    "change",
    [
        lambda line, data: b"",
        lambda line, data: b"no JSON\n" + data,
        lambda line, data: b"[]\n" + data,
        lambda line, data: line + b"\n" + data[: len(data) // 2],
        lambda line, data: line + b"\n" + data[:-1] + bytes([data[-1] ^ 1]),
    ],
    ids = ["empty", "no header", "wrong header", "cut", "one bit"],
)
def test_a_damaged_file_is_ignored_with_a_message(cache, saved, capsys, change):
    """Training compiles as if there were none, and the next save puts it right."""
    _damage(saved, change)
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
    assert "is ignored: " in capsys.readouterr().out


@pytest.mark.parametrize("what", ["torch", "gpu", "unsloth"])
def test_another_environment_is_ignored_with_a_message(
    cache, files, saved, capsys, monkeypatch, what
):
    """Other versions or another GPU: the file is neither loaded nor removed."""
    here = dict(files.environment())
    monkeypatch.setattr(files, "environment", lambda: {**here, what: "another"})
    assert cache.load_compile_cache(saved.parent) == 0
    assert "other versions or another GPU" in capsys.readouterr().out
    trained()
    cache.save_compile_cache(saved.parent)
    assert saved.exists() and len(caches(saved.parent)) == 2


def test_a_header_that_names_another_environment_is_ignored(cache, saved, capsys):
    """A file renamed to this environment's key is told by its header."""

    def lie(line, data):
        header = json.loads(line)
        header["environment"]["torch"] = "another"
        return json.dumps(header).encode() + b"\n" + data

    _damage(saved, lie)
    assert cache.load_compile_cache(saved.parent) == 0
    assert "other versions" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason = "needs POSIX permissions")
@pytest.mark.parametrize("place", ["file", "folder", "link"])
def test_what_others_may_have_written_is_not_loaded(cache, saved, capsys, tmp_path_factory, place):
    """Artifacts are code: a file or folder open to all, or a link to elsewhere, is refused."""
    if place == "link":
        elsewhere = tmp_path_factory.mktemp("elsewhere") / saved.name
        saved.rename(elsewhere)
        saved.symlink_to(elsewhere)
    else:
        opened = saved if place == "file" else saved.parent
        opened.chmod(stat.S_IMODE(opened.stat().st_mode) | stat.S_IWOTH)
    assert cache.load_compile_cache(saved.parent) == 0
    assert "ignored" in capsys.readouterr().out
    if place == "folder":
        trained()
        with pytest.raises(cache.CompileCacheError, match = "everybody may write"):
            cache.save_compile_cache(saved.parent)


@pytest.mark.skipif(os.name != "posix", reason = "needs POSIX permissions")
@pytest.mark.parametrize("place", ["file", "folder"])
def test_what_another_user_owns_is_not_loaded(cache, files, saved, capsys, monkeypatch, place):
    """Neither a file nor a folder of another user's; root's and one's own are."""
    owner = {"file": 0, "folder": 0}
    real = files._distrust

    def owned(status):
        what = "folder" if stat.S_ISDIR(status.st_mode) else "file"
        fields = list(status)
        fields[stat.ST_UID] = owner[what] or status.st_uid
        return real(os.stat_result(fields))

    monkeypatch.setattr(files, "_distrust", owned)
    owner[place] = os.geteuid() + 1
    assert cache.load_compile_cache(saved.parent) == 0
    assert "it belongs to another user" in capsys.readouterr().out
    trained()
    assert hits() == 0
    if place == "folder":
        with pytest.raises(cache.CompileCacheError, match = "belongs to another user"):
            cache.save_compile_cache(saved.parent)
    owner[place] = 0
    assert cache.load_compile_cache(saved.parent) > 0


@pytest.mark.skipif(os.name != "posix", reason = "needs POSIX permissions")
def test_root_and_oneself_are_trusted(files, monkeypatch):
    """By user id alone: 0, the own, and nobody else's."""

    def status(uid, mode = 0o100600):
        return os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert files._distrust(status(0)) is None and files._distrust(status(1000)) is None
    assert "another user" in files._distrust(status(1001))
    assert "everybody may write" in files._distrust(status(1000, 0o100602))


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


def test_a_disk_that_is_full_leaves_nothing_behind(cache, new_machine, tmp_path, monkeypatch):
    """A save that fails half way: a clear error, no partial file."""
    trained()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(cache.CompileCacheError, match = "No space left"):
        cache.save_compile_cache(tmp_path)
    assert caches(tmp_path) == []


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


# ------------------------------------------------------------------------------ Triton's kernels


@pytest.fixture
def triton_kernel(monkeypatch, tmp_path):
    """triton_kernel() compiles a kernel for sm_90, on any machine: whether Triton's cache had it."""
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising = False)
    source = tmp_path / "a_kernel.py"
    source.write_text(
        "import triton\nimport triton.language as tl\n\n@triton.jit\ndef copy_one(x, y):\n"
        "    tl.store(y, tl.load(x))\n"
    )
    spec = importlib.util.spec_from_file_location("a_kernel", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = []
    listener = lambda *, cache_hit, **_: found.append(cache_hit)  # noqa: E731
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)

    def compile_it():
        from triton.compiler import ASTSource

        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        signature = {"x": "*fp32", "y": "*fp32"}
        kernel = triton.compile(ASTSource(module.copy_one, signature), target = target)
        assert kernel.asm["cubin"] and ".target sm_90" in kernel.asm["ptx"]
        return found.pop()

    return compile_it


@pytest.fixture
def watching(monkeypatch):
    """As before any load: Triton's own manager; put back afterwards."""
    knobs = pytest.importorskip("triton").knobs
    before = knobs.cache.manager_class
    knobs.cache.manager_class = None
    yield knobs
    knobs.cache.manager_class = before


def test_kernels_of_triton_are_kept_too(
    cache, new_machine, watching, triton_kernel, tmp_path, monkeypatch
):
    """What Triton compiled by itself: found on a machine with empty caches, in another folder."""
    folder = tmp_path / "cache"
    assert cache.load_compile_cache(folder) == 0
    assert not triton_kernel() and triton_kernel()
    trained()
    assert cache.save_compile_cache(folder) is not None
    new_machine()
    assert not triton_kernel(), "the control: without the folder, not found"
    new_machine()
    assert cache.load_compile_cache(folder) >= 2
    assert triton_kernel()
    trained()
    assert cache.save_compile_cache(folder) is None, "nothing new"


def test_a_kernel_that_is_there_is_left(cache, new_machine, watching, triton_kernel, tmp_path):
    """Another process may be using it."""
    from pathlib import Path

    cache.load_compile_cache(tmp_path / "cache")
    triton_kernel()
    trained()
    cache.save_compile_cache(tmp_path / "cache")
    new_machine()
    assert not triton_kernel()
    files = {path: path.stat().st_mtime_ns for path in Path(watching.cache.dir).rglob("*.*")}
    cache.load_compile_cache(tmp_path / "cache")
    assert files and all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert triton_kernel()


def test_names_that_lead_out_of_the_folder_are_refused(new_machine, watching, tmp_path):
    """An archive may say where its files go; not here."""
    import io
    import tarfile

    from unsloth.models import compile_cache_triton

    for name in ("../key/file", "key/../../file", "/key/file", "key", "key/a/b", "key/.."):
        buffer = io.BytesIO()
        with tarfile.open(fileobj = buffer, mode = "w") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        with pytest.raises(ValueError, match = "no plain name"):
            compile_cache_triton.unpack(buffer.getvalue())
    with pytest.raises(ValueError, match = "cannot be read"):
        compile_cache_triton.unpack(b"not an archive")


def test_somebody_elses_cache_manager_stays(cache, new_machine, watching, tmp_path):
    """A remote cache, say: it keeps Triton's kernels where it wants."""
    from triton.runtime.cache import FileCacheManager
    from unsloth.models import compile_cache_triton

    class Remote(FileCacheManager):
        pass

    watching.cache.manager_class = Remote
    assert not compile_cache_triton.watch()
    trained()
    cache.save_compile_cache(tmp_path)
    new_machine()
    assert cache.load_compile_cache(tmp_path) >= 1
    assert watching.cache.manager_class is Remote


def test_a_folder_that_cannot_be_used_stops_training_before_its_first_step(
    cache, new_machine, trainer, tmp_path, monkeypatch
):
    """The folder was asked for: better an error now than a lost cache after hours."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "cache"))
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
