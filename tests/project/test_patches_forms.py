# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""scripts/patches.py test on a toy project, where upstream's source comes from, and its messages."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from toy_project import ENTRY, HEADER, MESSAGE, ROOT, TEST, run_python, write, write_registry

from _patches import PatchesError, forms, upstream
from _patches.build import build_fork
from _patches.git import Git
from _patches.project import Project

# ----------------------------------------------------------------------------------- releases


def pip_says(
    monkeypatch,
    returncode,
    stdout = "",
    stderr = "",
):
    done = subprocess.CompletedProcess([], returncode, stdout, stderr)
    monkeypatch.setattr(upstream.subprocess, "run", lambda *_, **__: done)


def test_download_errors_show_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_PATCHES_CACHE", str(tmp_path))
    pip_says(monkeypatch, 1, stderr = "ERROR: ... (from versions: 1.0, 1.1)")
    with pytest.raises(PatchesError, match = r"unsloth==9.9:\n.*from versions: 1.0, 1.1") as error:
        upstream.get_release("unsloth", "9.9")
    assert "check the network" in error.value.remedy


@pytest.mark.parametrize("version", ["nonsense", "", "1.0; rm -rf /", "../1.0", "--pre"])
def test_version_is_validated(version):
    with pytest.raises(PatchesError, match = "is not a version number"):
        upstream.get_release("unsloth", version)


def test_a_changed_file_is_not_taken_for_upstream(cache, monkeypatch):
    """One edited byte in the cache: the release is fetched anew instead."""
    (cache / "unsloth-1.0/unsloth/sub/b.py").write_text("TABLE = {}\n")
    asked = []
    monkeypatch.setattr(upstream, "_download", lambda *arguments: asked.append(arguments))
    with pytest.raises(PatchesError, match = "does not match its own RECORD"):
        upstream.get_release("unsloth", "1.0")
    assert len(asked) == 1


def test_a_wheel_with_another_sha256_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_PATCHES_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "unsloth-9.9-py3-none-any.whl"
    wheel.write_bytes(b"not the one")
    monkeypatch.setattr(upstream, "_pip_download", lambda *_: wheel)
    with pytest.raises(PatchesError, match = "patches/UPSTREAM pins abc"):
        upstream.get_release("unsloth", "9.9", "abc")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_tree_than_the_pinned_one_is_refused(root, tmp_path):
    pins = {**upstream.read_pins(root / "patches/UPSTREAM"), "tree": "0" * 40}
    upstream.write_pins(pins, root / "patches/UPSTREAM")
    with pytest.raises(PatchesError, match = "pins 0000"):
        build_fork(Project(root), tmp_path / "fork")


def test_missing_git_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PatchesError, match = "git is not installed"):
        Git(tmp_path).run("status")


# ---------------------------------------------------------------------------------- the forms


@pytest.mark.parametrize("form", ["import", "fork", "stock"])
def test_forms(root, tmp_path, monkeypatch, cache, form):
    """The same file passes in the import form and in the fork, and fails on stock, by real pytest runs."""
    monkeypatch.setenv("PYTHONPATH", str(cache / "unsloth-1.0"))
    result = forms.run_form(Project(root), form, [], tmp_path)
    (file,) = result.files
    assert result.ok, file.verdict
    # On stock the rest of a file is left out once one of its tests has failed.
    assert (file.passed, file.failed, file.skipped) == ((0, 1, 1) if form == "stock" else (2, 0, 0))
    assert result.summaries[0].startswith(
        f"{form} / cpu: {'1 failed, 1 skipped' if form == 'stock' else '2 passed'}"
    )


def test_gloo_and_cpu_share_an_import(root, tmp_path, monkeypatch):
    """Without a GPU: one process imports Unsloth and is forked for each; a crash of one is not the other's."""
    monkeypatch.setattr(forms.shutil, "which", lambda name: None if "nvidia" in name else name)
    shared = (
        "import os, sys\n\nassert 'unsloth' in sys.modules\nsys.modules['unsloth'].files = "
        "getattr(sys.modules['unsloth'], 'files', 0) + 1\n\n\n"
        "def test_alone():\n    assert sys.modules['unsloth'].files == 1\n"
    )
    crash = "\n\ndef teardown_module():\n    os._exit(3)\n"
    write(root, {"tests/test_ranks.py": HEADER + shared, "tests/test_other.py": HEADER + shared})
    others = '"tests/test_ranks.py": "gloo", "tests/test_other.py": "cpu"'
    write_registry(root, entry = ENTRY.replace('"cpu"', f'"cpu", {others}'))
    result = forms.run_form(Project(root), "fork", [], tmp_path / "both")
    assert result.ok and [each.passed for each in result.files] == [2, 1, 1]
    assert [line.split(":")[0] for line in result.summaries] == ["fork / cpu", "fork / gloo"]
    write(root, {"tests/test_ranks.py": HEADER + shared + crash})
    result = forms.run_form(Project(root), "fork", [], tmp_path / "crash")
    assert [bool(each.verdict) for each in result.files] == [False, False, True]


def test_parallel_processes(root, tmp_path, monkeypatch, cache):
    """--jobs: a process a file, of different backends too, with the results of one process a backend."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(cache / "unsloth-1.0"), str(ROOT)]))
    text = (
        TEST
        + "\n\ndef test_process():\n    import sys\n\n    assert 'test_area' not in sys.modules\n"
    )
    write(root, {"tests/test_other.py": text.replace("test_area", "test_other", 1)})
    write(root, {"tests/test_broken.py": "def test_broken():\n    assert False\n"})
    others = '"tests/test_other.py": "interpreter", "tests/test_broken.py": "cpu"'
    write_registry(root, entry = ENTRY.replace('"cpu"', f'"cpu", {others}'))
    result = forms.run_form(Project(root), "fork", [], tmp_path, jobs = 3)
    counts = {each.file: (each.passed, each.failed) for each in result.files}
    assert counts["tests/test_area.py"] == (2, 0)
    assert counts["tests/test_other.py"] == (3, 0)
    assert counts["tests/test_broken.py"] == (0, 1)
    assert len(result.summaries) == 3 and not result.ok
    with pytest.raises(PatchesError, match = "0 processes"):
        forms.run_form(Project(root), "fork", [], tmp_path, jobs = 0)


def test_form_alone(root, tmp_path, cache, monkeypatch):
    """A test that needs another patch than those that its own requires passes in the fork and not alone."""
    monkeypatch.setenv("PYTHONPATH", str(cache / "unsloth-1.0"))
    write(root, {"tests/test_other.py": TEST, "patches/messages/other.md": MESSAGE})
    other = (
        'Patch(name="other", title="Test it", targets=(), tests={{"tests/test_other.py": "cpu"}}'
    )
    failed = {}
    for requires in ("", ', requires=("double-area",)'):
        write_registry(root, entry = f"{ENTRY.rstrip().removesuffix(')')}{other}{requires}),\n)\n")
        for form in ("fork", "alone"):
            scratch = tmp_path / f"{form}-{bool(requires)}"
            scratch.mkdir()
            result = forms.run_form(Project(root), form, [], scratch)
            failed[form, requires] = [each.failed for each in result.files]
    assert failed.pop(("alone", "")) == [0, 2]
    assert set(map(tuple, failed.values())) == {(0, 0)}


def test_form_upstream(root, tmp_path, monkeypatch, cache):
    """One process for all files, unsloth imported before them; what skips needs a reason, what fails is told."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("PYTHONPATH", str(cache / "unsloth_zoo-1.0"))
    skips = "import pytest\n\npytest.skip('needs a GPU', allow_module_level = True)\n"
    process = (
        "import os, sys\n\nassert 'unsloth' in sys.modules\n\n\n"
        "def test_process():\n    assert os.environ['UNSLOTH_COMPILE_DISABLE'] == '1'\n"
    )
    write(root, {"tests/test_skips.py": HEADER + skips, "tests/test_process.py": HEADER + process})
    others = '"tests/test_skips.py": "gloo", "tests/test_process.py": "interpreter"'
    write_registry(root, entry = ENTRY.replace('"cpu"', f'"cpu", {others}'))
    result = forms.run_form(Project(root), "upstream", [], tmp_path)
    counts = {each.file: (each.passed, each.failed, each.skipped) for each in result.files}
    assert counts["tests/test_area.py"] == (2, 0, 0)
    assert counts["tests/test_skips.py"] == (0, 0, 1)
    assert counts["tests/test_process.py"] == (1, 0, 0)
    assert result.ok and len(result.summaries) == 1


def test_stock_form_refuses_a_test_that_proves_nothing(root, tmp_path):
    write(root, {"tests/test_area.py": HEADER + "def test_nothing():\n    pass\n"})
    result = forms.run_form(Project(root), "stock", ["tests/test_area.py"], tmp_path)
    assert not result.ok and "prove nothing" in result.files[0].verdict


def test_stock_form_refuses_an_import_at_the_top(root, tmp_path):
    """A file that cannot even be collected fails for a reason that says nothing about the patch."""
    write(root, {"tests/test_area.py": HEADER + "import unsloth.sub.double\n" + TEST})
    result = forms.run_form(Project(root), "stock", [], tmp_path)
    assert not result.ok and "could not be collected" in result.files[0].verdict


@pytest.mark.parametrize("form", ["fork", "stock"])
def test_fork_and_stock_hide_unsloth_patches(root, tmp_path, form):
    """Even where it is installed, unsloth_patches cannot be imported, and Unsloth is the one asked for."""
    text = HEADER + (
        "import importlib, os, pytest, unsloth\n\n\n"
        "def test_hidden():\n"
        "    with pytest.raises(ModuleNotFoundError, match = 'hidden in form'):\n"
        "        importlib.import_module('unsloth' + '_patches')\n"
        "    assert unsloth.__file__.startswith(os.environ['UNSLOTH_PATCHES_HOME'])\n\n\n"
        "def test_area():\n    assert unsloth.area(3) == 18\n"
    )
    write(root, {"tests/test_area.py": text})
    (file,) = forms.run_form(Project(root), form, [], tmp_path).files
    assert (file.passed, file.failed) == ((1, 1) if form == "stock" else (2, 0))


def run_pytest(root, *files, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env = {**os.environ, **environment},
        cwd = root,
        capture_output = True,
        text = True,
    )


def test_backends_do_not_share_a_process(root, cache):
    """pytest on files of both backends stops with the command to use instead; each alone runs."""
    second = TEST.replace("test_area", "test_area_again")
    write(root, {"tests/test_other.py": second})
    entry = ENTRY.replace('"cpu"', '"cpu", "tests/test_other.py": "interpreter"')
    write_registry(root, entry = entry)
    stock = str(cache / "unsloth-1.0")
    done = run_pytest(root, "tests", PYTHONPATH = stock)
    assert done.returncode == 4
    assert "test_area.py (cpu) and test_other.py (interpreter)" in done.stderr
    assert "python scripts/patches.py test" in done.stderr
    assert run_pytest(root, "tests/test_other.py", PYTHONPATH = stock).returncode == 0


def test_unknown_form_is_named(root):
    done = run_pytest(root, "tests", UNSLOTH_PATCHES_FORM = "both")
    assert done.returncode == 4
    assert "UNSLOTH_PATCHES_FORM='both'" in done.stdout + done.stderr


def test_a_crash_is_not_taken_for_a_failing_test(root, tmp_path):
    """pytest dies after a test has failed: stock's file did fail, but the run proves nothing."""
    text = TEST + "\n\ndef teardown_module():\n    import os\n\n    os._exit(3)\n"
    write(root, {"tests/test_area.py": text})
    result = forms.run_form(Project(root), "stock", [], tmp_path)
    assert not result.ok


def test_failing_tests_are_told(root, tmp_path):
    write(root, {"tests/test_area.py": TEST.replace("18", "19")})
    result = forms.run_form(Project(root), "fork", [], tmp_path)
    assert not result.ok and result.files[0].verdict == "1 failed"


def test_unknown_test_file_and_form(root, tmp_path):
    with pytest.raises(PatchesError, match = "is no test of a patch"):
        forms.run_form(Project(root), "fork", ["tests/test_none.py"], tmp_path)
    with pytest.raises(PatchesError, match = "unknown form 'both'"):
        forms.run_form(Project(root), "both", [], tmp_path)


# ----------------------------------------------------------------------------------- the tool


def run_tool(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/patches.py"), *arguments],
        env = {**os.environ, **environment},
        capture_output = True,
        text = True,
    )


def test_fork_refuses_a_folder_with_content(tmp_path):
    (tmp_path / "kept").write_text("mine")
    done = run_tool("fork", str(tmp_path))
    assert done.returncode == 2
    assert "is not an empty folder" in done.stderr and "remedy:" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_tool_imports_no_torch():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import patches; patches.Project(); "
    code += (
        "print(sorted({'torch', 'unsloth', 'unsloth_patches', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(ROOT, code) == ["[]"]


def test_what_an_older_release_lacks_is_left_out_of_the_import_form(monkeypatch, tmp_path):
    """By ``since``, by what a patch requires, and by targets that are all absent and optional."""
    project = Project()
    newest = SimpleNamespace(version = project.supported[-1], locate_file = lambda name: ROOT)
    monkeypatch.setattr(forms.importlib.metadata, "distribution", lambda name: newest)
    assert set(forms._in_installed_release(project)) == set(project.backends())
    older = SimpleNamespace(version = "2026.10.7", locate_file = lambda name: tmp_path / name)
    monkeypatch.setattr(forms.importlib.metadata, "distribution", lambda name: older)
    kept = set(forms._in_installed_release(project))
    assert {"tests/test_chat_template.py", "tests/test_checkpoint_recompute.py"} <= kept
    newer = ("lora_products", "step_graphs", "fsdp2_offload_plan", "loss_options_sft")
    assert not kept & {f"tests/test_{name}.py" for name in newer}
