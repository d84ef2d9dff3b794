# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the contributors
"""Files of compiled code: whole or absent, of this environment, and from nobody else."""

import errno
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import stat
import sys
import tarfile

import pytest
from backend import require

require("cpu")

import unsloth  # noqa: F401, E402

posix = pytest.mark.skipif(os.name != "posix", reason = "needs POSIX permissions")
CONTENTS = (b"graphs\nof torch", b"kernels of triton")


@pytest.fixture
def files():
    from unsloth.models import compile_cache_files
    return compile_cache_files


@pytest.fixture
def saved(files, tmp_path):
    """A folder with one good file."""
    return files.write_cache(tmp_path, *CONTENTS, frozenset(["a", "b"]))


@pytest.fixture
def read(files, saved):
    """read() -> what the folder's trusted files hold, and what was said of the others."""

    def read():
        said = []
        found = [contents for _, *contents in files.read_caches(saved.parent, said.append)]
        return found, " ".join(said)

    return read


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(read, saved):
    """Both parts, split where they met, and no message; nothing else stands in the folder."""
    assert read() == ([list(CONTENTS)], "")
    assert names(saved.parent) == [saved.name]


def test_a_file_that_holds_more_replaces_one_that_holds_less(files, saved):
    """By the names of what is in it; a file with something of its own stays."""
    more = files.write_cache(saved.parent, b"more", b"", frozenset(["a", "b", "c"]))
    assert names(saved.parent) == [more.name]
    other = files.write_cache(saved.parent, b"other", b"", frozenset(["a", "d"]))
    assert names(saved.parent) == sorted([more.name, other.name])


@posix
def test_the_files_are_for_their_owner_alone(files, tmp_path):
    """Folder 0700 and file 0600, whatever the umask."""
    folder = tmp_path / "a" / "cache"
    previous = os.umask(0)
    try:
        files.check_folder(folder)
        path = files.write_cache(folder, *CONTENTS, frozenset())
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def _change(path, change):
    line, data = path.read_bytes().split(b"\n", 1)
    path.write_bytes(change(line, data))


@pytest.mark.parametrize(
    "change",
    [
        lambda line, data: b"",
        lambda line, data: b"no JSON\n" + data,
        lambda line, data: b"[]\n" + data,
        lambda line, data: b"[" * 10**5 + b"\n" + data,
        lambda line, data: line + b"\n" + data[: len(data) // 2],
        lambda line, data: line + b"\n" + data[:-1] + bytes([data[-1] ^ 1]),
    ],
    ids = ["empty", "no header", "wrong header", "nested header", "cut", "one bit"],
)
def test_a_damaged_file_is_left_out_with_a_message(read, saved, change):
    """Its checksum tells; the message says what to do."""
    _change(saved, change)
    found, said = read()
    assert found == [] and "it is damaged (remedy: delete it" in said


@pytest.mark.parametrize("what", ["torch", "gpu", "unsloth"])
def test_another_environment_is_left_out_with_a_message(files, read, saved, monkeypatch, what):
    """Other versions or another GPU: the file is neither read nor removed."""
    here = dict(files.environment())
    monkeypatch.setattr(files, "environment", lambda: {**here, what: "another"})
    found, said = read()
    assert found == [] and "other versions or another GPU" in said
    files.write_cache(saved.parent, b"more", b"", frozenset(["a", "b", "c"]))
    assert saved.exists() and len(names(saved.parent)) == 2


def test_a_package_that_is_not_there_is_part_of_the_environment(files, monkeypatch):
    """A CPU build has no Triton: its files are no other's."""
    version = importlib.metadata.version

    def without(package):
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert files.environment.__wrapped__()["triton"] == "none"


def test_a_header_that_names_another_environment_is_left_out(read, saved):
    """A file renamed to this environment's key is told by its header."""

    def lie(line, data):
        header = json.loads(line)
        header["environment"]["torch"] = "another"
        return json.dumps(header).encode() + b"\n" + data

    _change(saved, lie)
    found, said = read()
    assert found == [] and "other versions" in said


@posix
@pytest.mark.parametrize("place", ["file", "folder", "link"])
def test_what_others_may_have_written_is_not_read(files, read, saved, tmp_path_factory, place):
    """Artifacts are code: a file or folder open to all, or a link to elsewhere, is refused."""
    if place == "link":
        elsewhere = tmp_path_factory.mktemp("elsewhere") / saved.name
        saved.rename(elsewhere)
        saved.symlink_to(elsewhere)
    else:
        opened = saved if place == "file" else saved.parent
        opened.chmod(stat.S_IMODE(opened.stat().st_mode) | stat.S_IWOTH)
    found, said = read()
    assert found == [] and "is ignored" in said
    if place == "folder":
        with pytest.raises(files.CompileCacheError, match = "everybody may write"):
            files.check_folder(saved.parent)


@posix
@pytest.mark.parametrize("place", ["file", "folder"])
def test_what_another_user_owns_is_not_read(files, read, saved, monkeypatch, place):
    """Neither a file nor a folder of another user's; one's own again is."""
    owner = {"file": 0, "folder": 0}
    real = files._distrust

    def owned(status):
        what = "folder" if stat.S_ISDIR(status.st_mode) else "file"
        fields = list(status)
        fields[stat.ST_UID] = owner[what] or status.st_uid
        return real(os.stat_result(fields))

    monkeypatch.setattr(files, "_distrust", owned)
    owner[place] = os.geteuid() + 1
    found, said = read()
    assert found == [] and "it belongs to another user" in said
    if place == "folder":
        with pytest.raises(files.CompileCacheError, match = "belongs to another user"):
            files.check_folder(saved.parent)
    owner[place] = 0
    assert read() == ([list(CONTENTS)], "")


@posix
def test_root_and_oneself_are_trusted(files, monkeypatch):
    """By user id alone: 0, the own, and nobody else's."""

    def status(uid, mode = 0o100600):
        return os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert files._distrust(status(0)) is None and files._distrust(status(1000)) is None
    assert "another user" in files._distrust(status(1001))
    assert "everybody may write" in files._distrust(status(1000, 0o100602))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("step", ["tempfile.mkstemp", "os.fsync", "os.replace"])
def test_a_full_or_read_only_disk_leaves_nothing_behind(files, tmp_path, monkeypatch, step, code):
    """A clear error, no partial file, and the next try can succeed."""

    def failing(*arguments, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(step, failing)
        with pytest.raises(files.CompileCacheError, match = os.strerror(code)):
            files.write_cache(tmp_path, *CONTENTS, frozenset())
    assert names(tmp_path) == []
    assert files.write_cache(tmp_path, *CONTENTS, frozenset()).exists()


@pytest.mark.parametrize("step", ["pathlib.Path.mkdir", "tempfile.TemporaryFile"])
def test_a_folder_that_cannot_be_made_or_written_is_named(files, tmp_path, monkeypatch, step):
    """Before anything is compiled; once it can be written it serves."""

    def failing(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(step, failing)
        with pytest.raises(files.CompileCacheError, match = "cache' cannot be written .Read-only"):
            files.check_folder(tmp_path / "cache")
    files.check_folder(tmp_path / "cache")


def test_a_file_that_cannot_be_read_or_removed_is_passed_over(files, read, saved, monkeypatch):
    """Told when it is read; one that holds more is written beside it. Later it is read again."""
    real = os.open

    def failing(path, *arguments, **options):
        if str(path) == str(saved):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing)
        found, said = read()
        assert found == [] and "is ignored: " in said and "Permission denied" in said
        files.write_cache(saved.parent, b"more", b"", frozenset(["a", "b", "c"]))
    assert len(names(saved.parent)) == 2
    assert read()[0][-1] in ([b"more", b""], list(CONTENTS)) and len(read()[0]) == 2


@posix
def test_two_processes_share_a_folder(files, tmp_path):
    """Both write and read at once: every file that is read is whole, and both are there at the end."""
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()

    def work(mine):
        complaints = []
        for number in range(40):
            data = f"{mine} {number} ".encode() * 2000
            files.write_cache(
                tmp_path, data, b"t", frozenset(f"{mine}{n}" for n in range(number + 1))
            )
            for path, torchs, tritons in files.read_caches(tmp_path, complaints.append):
                first = torchs[: torchs.index(b" ", 2) + 1]
                if torchs != first * 2000 or tritons != b"t":
                    complaints.append(f"{path} is not whole")
        said.put((mine, [c for c in complaints if "No such file" not in c]))  # removed meanwhile

    processes = [fork.Process(target = work, args = (mine,)) for mine in "ab"]
    for process in processes:
        process.start()
    assert sorted(said.get(timeout = 60) for _ in processes) == [("a", []), ("b", [])]
    for process in processes:
        process.join(60)
    found = {torchs[:5] for _, torchs, _ in files.read_caches(tmp_path, pytest.fail)}
    assert found == {b"a 39 ", b"b 39 "} and len(names(tmp_path)) == 2


# ------------------------------------------------------------------------------ Triton's kernels


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """The module, on a machine with an empty Triton cache and Triton's own manager."""
    knobs = pytest.importorskip("triton").knobs
    from unsloth.models import compile_cache_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(compile_cache_triton, "_used", set())
    before = knobs.cache.manager_class
    knobs.cache.manager_class = None
    yield compile_cache_triton
    knobs.cache.manager_class = before


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
        source = ASTSource(module.copy_one, {"x": "*fp32", "y": "*fp32"})
        kernel = triton.compile(source, target = target)
        assert kernel.asm["cubin"] and ".target sm_90" in kernel.asm["ptx"]
        return found.pop()

    return compile_it


def test_a_kernel_is_found_where_it_was_unpacked(kernels, triton_kernel, tmp_path, monkeypatch):
    """In another folder, on a machine with empty caches; one that is there already is left."""
    assert kernels.watch()
    assert not triton_kernel() and triton_kernel()
    packed, used = kernels.pack(), kernels.used()
    assert len(used) >= 1
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    assert kernels.unpack(packed) == used
    assert triton_kernel()
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / "another").rglob("*.*")}
    kernels.unpack(packed)
    assert found and all(path.stat().st_mtime_ns == time for path, time in found.items())


def test_names_that_lead_out_of_the_folder_are_refused(kernels):
    """An archive may say where its files go; not here."""
    for name in ("../key/file", "key/../../file", "/key/file", "key", "key/a/b", "key/.."):
        buffer = io.BytesIO()
        with tarfile.open(fileobj = buffer, mode = "w") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        with pytest.raises(ValueError, match = "no plain name"):
            kernels.unpack(buffer.getvalue())
    with pytest.raises(ValueError, match = "cannot be read"):
        kernels.unpack(b"not an archive")


def test_a_triton_of_another_kind_is_left_alone(kernels, monkeypatch):
    """None at all, or one without these names: graphs are kept, kernels are not."""
    from triton import knobs

    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    assert not kernels.watch() and knobs.cache.manager_class is None


def test_somebody_elses_cache_manager_stays(kernels):
    """A remote cache, say: it keeps Triton's kernels where it wants."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    Remote = knobs.cache.manager_class = type("Remote", (FileCacheManager,), {})
    assert not kernels.watch()
    assert knobs.cache.manager_class is Remote
