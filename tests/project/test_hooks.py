# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Import behaviour, each case in its own process: never half patched, never a broken ``import unsloth``.

Most cases run against a fake Unsloth of a few lines (a folder on PYTHONPATH), because what is tested
is ours: order, threads, errors, undo. The catalogue of such a process is replaced before the first
import of ``unsloth``. The last cases use the installed Unsloth.
"""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_UNSLOTH = {
    "unsloth/__init__.py": "from .kernels.utils import fast\nfrom . import user\n",
    "unsloth/kernels/__init__.py": "",
    "unsloth/kernels/utils.py": """
        def fast(x):
            return ("stock", x)

        class Layer:
            @staticmethod
            def scale(x):
                return ("stock", x)
        """,
    "unsloth/user.py": "from .kernels.utils import fast\ndef use(x):\n    return fast(x)\n",
    "unsloth/late.py": "def slow(x):\n    return ('stock', x)\n",
    "unsloth_zoo/__init__.py": "",
}
REPLACEMENTS = """
    def replace_fast(stock):
        def fast(x):
            return ("patched", stock(x))
        return fast

    def replace_slow(stock):
        return lambda x: ("patched", stock(x))

    def replace_reaching(stock):
        # Changes another library, but only once it is called.
        import decimal
        def fast(x):
            decimal.touched = True
            return ("patched", stock(x))
        fast._undo_replacement = lambda: delattr(decimal, "touched")
        return fast

    def replace_scale(stock):
        return staticmethod(lambda x: ("patched", stock.__func__(x)))

    def replace_raising(stock):
        raise ValueError("boom")

    def replace_refusing(stock):
        raise NotImplementedError("upstream text changed")
    """
PREAMBLE = """
    import importlib, sys, types
    import unsloth_patches
    from unsloth_patches import registry
    from unsloth_patches.registry import Patch, Target

    def T(attribute, replacement, **more):
        return Target(attribute, "repl:" + replacement, **more)

    def catalogue(*patches):
        registry.PATCHES = patches
        from unsloth_patches import patching
        patching.PATCHES = patches
        for cache in (patching._records, patching.hooked_modules, patching.new_modules):
            cache.cache_clear()

    FAST = Patch("fast", "t", (T("unsloth.kernels.utils:fast", "replace_fast"),))

    def states():
        return {row.name: row.state for row in unsloth_patches.status()}

    def reasons():
        return {row.name: row.reason for row in unsloth_patches.status()}
    """


@pytest.fixture
def fake(tmp_path):
    """A folder with a fake Unsloth, and a copy of our package with a module of replacements."""
    for name, text in FAKE_UNSLOTH.items():
        path = tmp_path / name
        path.parent.mkdir(parents = True, exist_ok = True)
        path.write_text(textwrap.dedent(text), encoding = "utf-8")
    ours = tmp_path / "unsloth_patches"
    ours.mkdir()
    for name in (
        "__init__",
        "hooks",
        "patching",
        "settings",
        "registry",
        "upstream_source",
        "fingerprints",
    ):
        source = (ROOT / "unsloth_patches" / f"{name}.py").read_text(encoding = "utf-8")
        (ours / f"{name}.py").write_text(source, encoding = "utf-8")
    (ours / "unsloth").mkdir()
    (ours / "unsloth" / "__init__.py").write_text("", encoding = "utf-8")
    (ours / "unsloth" / "repl.py").write_text(textwrap.dedent(REPLACEMENTS), encoding = "utf-8")
    (ours / "unsloth" / "kernels").mkdir()
    (ours / "unsloth" / "kernels" / "__init__.py").write_text("", encoding = "utf-8")
    (ours / "unsloth" / "kernels" / "fresh.py").write_text("value = object()\n", encoding = "utf-8")
    return tmp_path


def python(
    code,
    path,
    environment = None,
):
    """Run code in a process of its own; its stdout, or a failure that shows its stderr."""
    variables = dict(os.environ, PYTHONPATH = str(path), UNSLOTH_PATCHES_QUIET = "1")
    variables.pop("UNSLOTH_PATCHES_DISABLE", None)
    variables.update(environment or {})
    done = subprocess.run(
        [sys.executable, "-c", code],
        # Python puts the current folder first; it must not hide the package under test.
        cwd = path if Path(path).is_dir() else ROOT,
        env = variables,
        capture_output = True,
        text = True,
        timeout = 240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run(
    body,
    fake,
    environment = None,
):
    code = textwrap.dedent(PREAMBLE) + textwrap.dedent(body)
    return python(code, fake, environment)


def test_a_function_is_replaced_for_every_later_importer(fake):
    run(
        """
        catalogue(FAST)
        assert states() == {"fast": "pending"} and "will apply" in reasons()["fast"]
        import unsloth
        assert unsloth.fast(1) == unsloth.user.use(1) == ("patched", ("stock", 1))
        assert states() == {"fast": "applied"}
        import unsloth as again
        assert again.fast(1) == ("patched", ("stock", 1))
        """,
        fake,
    )


def test_a_static_method_stays_one(fake):
    run(
        """
        catalogue(Patch("scale", "t", (T("unsloth.kernels.utils:Layer.scale", "replace_scale"),)))
        from unsloth.kernels.utils import Layer
        assert Layer.scale(1) == Layer().scale(1) == ("patched", ("stock", 1))
        unsloth_patches.undo()
        assert Layer.scale(1) == Layer().scale(1) == ("stock", 1)
        """,
        fake,
    )


def test_unsloth_first_rebinds_aliases(fake):
    run(
        """
        unsloth_patches.undo()
        import unsloth
        catalogue(FAST)
        unsloth_patches.install()
        assert states() == {"fast": "applied"}
        assert unsloth.fast(1) == unsloth.user.use(1) == ("patched", ("stock", 1))
        """,
        fake,
    )


@pytest.mark.parametrize(
    "holder", ["[unsloth.fast]", "{'f': unsloth.fast}", "lambda f = unsloth.fast: f"]
)
def test_unsloth_first_and_held_elsewhere_is_skipped_whole(fake, holder):
    run(
        f"""
        unsloth_patches.undo()
        import unsloth, unsloth.late
        unsloth.user.table = {holder}
        catalogue(Patch("both", "t", (
            T("unsloth.late:slow", "replace_slow"), T("unsloth.kernels.utils:fast", "replace_fast"),
        )))
        unsloth_patches.install()
        assert states() == {{"both": "skipped"}}
        assert "put `import unsloth_patches` first" in reasons()["both"], reasons()
        assert unsloth.fast(1) == ("stock", 1) and unsloth.late.slow(1) == ("stock", 1)
        """,
        fake,
    )


def test_reload_replaces_again(fake):
    run(
        """
        catalogue(FAST)
        import unsloth.kernels.utils as utils
        importlib.reload(utils)
        assert utils.fast(1) == ("patched", ("stock", 1)) and states() == {"fast": "applied"}
        """,
        fake,
    )


def test_a_replacement_that_raises_leaves_stock_and_a_working_import(fake):
    run(
        """
        catalogue(
            Patch("bad", "t", (T("unsloth.kernels.utils:fast", "replace_raising"),)),
            Patch("refused", "t", (T("unsloth.kernels.utils:fast", "replace_refusing"),)),
            Patch("missing", "t", (T("unsloth.kernels.utils:fast", "no_such_function"),)),
        )
        import unsloth
        assert unsloth.fast(1) == ("stock", 1)
        assert states() == {"bad": "failed", "refused": "skipped", "missing": "failed"}
        assert reasons()["bad"] == "ValueError: boom"
        assert reasons()["refused"] == "upstream text changed"
        """,
        fake,
    )


def test_a_later_target_that_fails_takes_the_earlier_one_back(fake):
    run(
        """
        catalogue(Patch("both", "t", (
            T("unsloth.kernels.utils:fast", "replace_fast"), T("unsloth.late:slow", "replace_raising"),
        )))
        import unsloth
        assert unsloth.fast(1) == ("patched", ("stock", 1))
        assert "1 of 2 targets" in reasons()["both"]
        import unsloth.late
        assert states() == {"both": "failed"}
        assert unsloth.fast(1) == unsloth.user.use(1) == ("stock", 1)
        """,
        fake,
    )


def test_a_patch_for_gpus_says_so_on_the_cpu_backend(fake):
    """What waits for a module that Unsloth's CPU backend does not import is not about to apply."""
    run(
        """
        catalogue(Patch("late", "t", (T("unsloth.late:slow", "replace_slow"),)))
        assert unsloth_patches.status()[0].reason.startswith("will apply; waits for unsloth.late")
        sys.modules["unsloth_zoo"] = types.SimpleNamespace(_IS_CPU_BACKEND = True)
        assert unsloth_patches.status()[0].reason.startswith("will apply")
        import unsloth
        (row,) = unsloth_patches.status()
        assert row.state == "pending" and row.reason.startswith("for GPUs: "), row
        assert "unsloth.late" in row.reason
        """,
        fake,
    )


def test_what_the_cpu_backend_leaves_to_the_script_is_not_for_gpus(fake):
    """The chat templates are imported by the script, there as elsewhere."""
    run(
        """
        import unsloth_patches.patching as patching
        patching._CPU_MODULES = ("unsloth.late",)
        catalogue(
            Patch("templates", "t", (T("unsloth.late:slow", "replace_slow"),)),
            Patch("kernels", "t", (T("unsloth.other:slow", "replace_slow"),)),
        )
        sys.modules["unsloth_zoo"] = types.SimpleNamespace(_IS_CPU_BACKEND = True)
        import unsloth
        templates, kernels = unsloth_patches.status()
        assert templates.reason.startswith("will apply; waits for unsloth.late"), templates
        assert str(kernels).startswith("kernels: pending (for GPUs: "), kernels
        """,
        fake,
    )


def test_the_command_line_names_what_it_lacks():
    """Without typer: one line with a remedy, not a traceback."""
    code = "import runpy, sys; sys.modules['typer'] = None; "
    code += "runpy.run_module('unsloth_patches', run_name = '__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd = ROOT,
        capture_output = True,
        text = True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "has no typer" in done.stderr and "pip install typer" in done.stderr


def test_unknown_code_in_a_module_still_to_come_stops_the_whole_patch(fake):
    run(
        """
        known = T("unsloth.kernels.utils:fast", "replace_fast")
        edited = T("unsloth.late:slow", "replace_slow", fingerprints = frozenset({"0" * 16}))
        catalogue(Patch("both", "t", (known, edited)))
        import unsloth
        assert states() == {"both": "skipped"} and unsloth.fast(1) == ("stock", 1)
        assert "does not know" in reasons()["both"]
        """,
        fake,
    )


def test_comments_and_docstrings_do_not_change_a_fingerprint_but_code_does(fake):
    utils = fake / "unsloth/kernels/utils.py"
    body = """
        from unsloth_patches.upstream_source import upstream_fingerprints
        target = T("unsloth.kernels.utils:fast", "replace_fast")
        print(*upstream_fingerprints(target))
        """
    before = run(body, fake).stdout.strip()
    text = utils.read_text(encoding = "utf-8")
    utils.write_text(
        text.replace(
            "def fast(x):", "# a comment\n\ndef fast(x):\n    'A docstring.'  # and a note"
        ),
        encoding = "utf-8",
    )
    assert run(body, fake).stdout.strip() == before != ""
    utils.write_text(text.replace('("stock", x)', '("stock!", x)'), encoding = "utf-8")
    assert run(body, fake).stdout.strip() != before
    run(
        f"""
        known = frozenset({{"{before}"}})
        catalogue(Patch("fast", "t", (T("unsloth.kernels.utils:fast", "replace_fast", fingerprints = known),)))
        import unsloth
        assert states() == {{"fast": "skipped"}} and unsloth.fast(1) == ("stock!", 1)
        """,
        fake,
    )


@pytest.mark.parametrize(
    "line",
    ["from .kernels.utils import fast", "from .kernels.utils import *", "from . import fast"],
)
def test_a_fingerprint_is_found_where_the_name_was_imported_from(fake, line):
    """A target on a module that only hands the name on: known code applies, other code does not."""
    (fake / "unsloth/user.py").write_text(line + "\n", encoding = "utf-8")
    body = """
        from unsloth_patches import fingerprints
        known = fingerprints.fingerprint_file("unsloth/kernels/utils.py", "fast")
        def handed_on(*accepted):
            return Patch("fast", "t", (
                T("unsloth.user:fast", "replace_fast", fingerprints = frozenset(accepted)),
            ))
        catalogue(handed_on(WANTED))
        import unsloth
        assert states() == {"fast": STATE}, reasons()
        """
    for wanted, state in (("*known", '"applied"'), ('"0" * 16', '"skipped"')):
        run(body.replace("WANTED", wanted).replace("STATE", state), fake)


def test_a_function_that_another_library_replaced_is_left_alone(fake):
    run(
        """
        from unsloth_patches.upstream_source import upstream_fingerprints
        known = frozenset(upstream_fingerprints(FAST.targets[0]))
        unsloth_patches.undo()
        import unsloth.kernels.utils as utils
        def fast(x): return ("theirs", x)
        utils.fast = fast
        catalogue(Patch("fast", "t", (T("unsloth.kernels.utils:fast", "replace_fast", fingerprints = known),)))
        unsloth_patches.install()
        assert states() == {"fast": "skipped"} and utils.fast(1) == ("theirs", 1)
        """,
        fake,
    )


def test_disabled_one_all_and_a_misspelt_name(fake):
    body = """
        catalogue(FAST, Patch("slow", "t", (T("unsloth.late:slow", "replace_slow"),)))
        import unsloth, unsloth.late
        print(unsloth.fast(1)[0], unsloth.late.slow(1)[0], *states().values())
        """
    one = run(body, fake, {"UNSLOTH_PATCHES_DISABLE": "fast"})
    assert one.stdout.split() == ["stock", "patched", "skipped", "applied"]
    spoken = {"UNSLOTH_PATCHES_DISABLE": "all", "UNSLOTH_PATCHES_QUIET": "0"}
    all_of_them = run(body, fake, spoken)
    assert all_of_them.stdout.split() == ["stock", "stock", "skipped", "skipped"]
    assert "unsloth_patches: all 2 switched off by UNSLOTH_PATCHES_DISABLE" in all_of_them.stderr
    misspelt = run(body, fake, {"UNSLOTH_PATCHES_DISABLE": "fsat"})
    assert misspelt.stdout.split() == ["patched", "patched", "applied", "applied"]
    assert "'fsat', which is no patch. Known: fast, slow, all." in misspelt.stderr


def test_a_patch_whose_requirement_is_out_is_skipped(fake):
    run(
        """
        slow = Patch("slow", "t", (T("unsloth.late:slow", "replace_slow"),), requires = ("fast",))
        catalogue(FAST, slow)
        import unsloth.late
        assert unsloth.late.slow(1) == ("stock", 1) and states()["slow"] == "skipped"
        assert reasons()["slow"].startswith("needs fast, which is skipped")
        """,
        fake,
        {"UNSLOTH_PATCHES_DISABLE": "fast"},
    )


def test_two_patches_on_one_function_chain_and_come_apart(fake):
    run(
        """
        catalogue(FAST, Patch("more", "t", (T("unsloth.kernels.utils:fast", "replace_fast"),)))
        import unsloth
        twice = ("patched", ("patched", ("stock", 1)))
        assert unsloth.fast(1) == unsloth.user.use(1) == twice
        with unsloth_patches.stock():
            assert unsloth.fast(1) == unsloth.kernels.utils.fast(1) == ("stock", 1)
        assert unsloth.fast(1) == unsloth.kernels.utils.fast(1) == twice
        unsloth_patches.undo()
        assert unsloth.fast(1) == unsloth.kernels.utils.fast(1) == ("stock", 1)
        """,
        fake,
    )


def test_a_patch_that_fails_late_takes_those_standing_on_it_along(fake):
    run(
        """
        late = T("unsloth.late:slow", "replace_raising")
        catalogue(
            Patch("below", "t", (*FAST.targets, late)),
            Patch("above", "t", (T("unsloth.kernels.utils:fast", "replace_fast"),)),
        )
        import unsloth
        assert states() == {"below": "applied", "above": "applied"}
        import unsloth.late
        assert states() == {"below": "failed", "above": "skipped"}
        assert reasons()["above"] == "stands on below, which is failed: ValueError: boom"
        assert unsloth.fast(1) == unsloth.kernels.utils.fast(1) == ("stock", 1)
        """,
        fake,
    )


def test_stock_undo_and_redo_reach_aliases(fake):
    run(
        """
        catalogue(FAST)
        import unsloth
        patched = ("patched", ("stock", 1))
        for _ in range(2):
            with unsloth_patches.stock():
                assert unsloth.fast(1) == unsloth.user.use(1) == ("stock", 1)
            assert unsloth.fast(1) == unsloth.user.use(1) == patched
        unsloth_patches.undo()
        assert unsloth.fast(1) == unsloth.user.use(1) == ("stock", 1)
        unsloth_patches.install()
        assert unsloth.fast(1) == unsloth.user.use(1) == patched
        """,
        fake,
    )


def test_status_says_what_is_off_and_where(fake):
    """Inside stock() a patch is off there alone, after undo() it is off; what waits still waits."""
    run(
        """
        catalogue(FAST, Patch("slow", "t", (T("unsloth.late:slow", "replace_slow"),)))
        import unsloth
        assert states() == {"fast": "applied", "slow": "pending"}
        with unsloth_patches.stock():
            assert states() == {"fast": "off", "slow": "pending"}
            assert "only inside this stock() block" in reasons()["fast"]
        assert states() == {"fast": "applied", "slow": "pending"} and reasons()["fast"] == ""
        unsloth_patches.undo()
        assert states() == {"fast": "off", "slow": "off"}
        assert "undo()" in reasons()["fast"] and "install() replaces" in reasons()["fast"]
        unsloth_patches.install()
        assert states() == {"fast": "applied", "slow": "pending"}
        """,
        fake,
    )


def test_stock_inside_stock_and_around_undo(fake):
    """The inner block's end does not end the outer one, and what undo() took back stays back."""
    run(
        """
        catalogue(FAST, Patch("slow", "t", (T("unsloth.late:slow", "replace_slow"),)))
        import unsloth
        with unsloth_patches.stock():
            with unsloth_patches.stock():
                assert unsloth.fast(1) == ("stock", 1)
            assert unsloth.fast(1) == ("stock", 1) and states()["fast"] == "off"
            import unsloth.late
            assert unsloth.late.slow(1)[0] == "patched" and states()["slow"] == "applied"
        assert unsloth.fast(1)[0] == "patched" and states()["fast"] == "applied"
        with unsloth_patches.stock():
            unsloth_patches.undo()
        assert unsloth.fast(1) == unsloth.user.use(1) == unsloth.late.slow(1) == ("stock", 1)
        assert states() == {"fast": "off", "slow": "off"}
        """,
        fake,
    )


LATE = "import unsloth\n"


def test_a_late_import_has_a_line_of_its_own(fake):
    """In status() and on stderr, with what it means and the remedy; once undone, it says nothing."""
    body = """
        catalogue(FAST)
        unsloth_patches.install()
        first, fast = unsloth_patches.status()
        assert (first.name, first.state, first.replaces) == ("import order", "late", ())
        assert "the other patches are skipped" in first.reason
        assert "put `import unsloth_patches` before `from unsloth import" in first.reason
        assert fast.state == "applied" and unsloth_patches.status()[0] == first
        unsloth_patches.undo()
        assert states() == {"fast": "off"}
        """
    code = textwrap.dedent(LATE + textwrap.dedent(PREAMBLE) + textwrap.dedent(body))
    done = python(code, fake, {"UNSLOTH_PATCHES_QUIET": "0"})
    assert "unsloth_patches: imported after unsloth: what could" in done.stderr
    in_time = "catalogue(FAST)\nimport unsloth\nassert states() == {'fast': 'applied'}"
    done = python(textwrap.dedent(PREAMBLE) + in_time, fake, {"UNSLOTH_PATCHES_QUIET": "0"})
    assert "imported after" not in done.stderr


def test_late_a_patch_on_a_patched_function_is_not_stopped_by_our_own_notes(fake):
    """The second patch's function is the first one's, which our record of it holds."""
    body = """
        catalogue(FAST, Patch("more", "t", (T("unsloth.kernels.utils:fast", "replace_fast"),)))
        unsloth_patches.install()
        assert states() == {"import order": "late", "fast": "applied", "more": "applied"}, reasons()
        assert unsloth.fast(1) == unsloth.user.use(1) == ("patched", ("patched", ("stock", 1)))
        unsloth_patches.undo()
        assert unsloth.fast(1) == unsloth.user.use(1) == ("stock", 1)
        """
    python(LATE + textwrap.dedent(PREAMBLE) + textwrap.dedent(body), fake)


@pytest.mark.parametrize(
    "first, reason", [(LATE, "unsloth was imported before"), ("", "install()")]
)
def test_late_a_part_of_a_class_is_named_as_the_reason(fake, first, reason):
    body = """
        unsloth_patches.undo()
        import unsloth
        catalogue(Patch("scale", "t", (T("unsloth.kernels.utils:Layer.scale", "replace_scale"),)))
        unsloth_patches.install()
        assert states()["scale"] == "skipped" and "a part of one" in reasons()["scale"], reasons()
        print(reasons()["scale"])
        """
    done = python(first + textwrap.dedent(PREAMBLE) + textwrap.dedent(body), fake)
    assert done.stdout.startswith(reason) and "put `import unsloth_patches` first" in done.stdout


def test_late_a_stand_in_of_the_cpu_backend_is_no_module_that_lacks_a_function(fake):
    """Unsloth's CPU backend makes modules in the place of those that it does not import. Imported late
    or in time, a patch of such a module is for GPUs; it is not skipped for what is missing there."""
    body = """
        sys.modules["unsloth_zoo"] = types.SimpleNamespace(_IS_CPU_BACKEND = True)
        sys.modules["unsloth.late"] = types.ModuleType("unsloth.late")
        catalogue(Patch("late", "t", (T("unsloth.late:slow", "replace_slow"),)))
        unsloth_patches.install()
        assert states()["late"] == "pending" and reasons()["late"].startswith("for GPUs: "), reasons()
        """
    python(LATE + textwrap.dedent(PREAMBLE) + textwrap.dedent(body), fake)


def test_undo_takes_back_what_a_replacement_changed_elsewhere(fake):
    run(
        """
        import decimal
        catalogue(Patch("fast", "t", (T("unsloth.kernels.utils:fast", "replace_reaching"),)))
        import unsloth
        assert unsloth.fast(1) == ("patched", ("stock", 1)) and decimal.touched
        unsloth_patches.undo()
        assert unsloth.fast(1) == ("stock", 1) and not hasattr(decimal, "touched")
        """,
        fake,
    )


def test_stock_comes_back_after_an_exception(fake):
    run(
        """
        catalogue(FAST)
        import unsloth
        try:
            with unsloth_patches.stock():
                raise KeyError
        except KeyError:
            pass
        assert unsloth.fast(1) == ("patched", ("stock", 1))
        """,
        fake,
    )


def test_threads_importing_at_once(fake):
    # A package that imports its submodules while other threads do is a deadlock of Python's own.
    (fake / "unsloth/__init__.py").write_text("", encoding = "utf-8")
    run(
        """
        import threading
        sys.setswitchinterval(1e-6)
        catalogue(Patch("both", "t", (
            T("unsloth.kernels.utils:fast", "replace_fast"), T("unsloth.late:slow", "replace_slow"),
        )))
        barrier = threading.Barrier(8)
        def work(name):
            barrier.wait()
            importlib.import_module(name)
        names = ["unsloth.late", "unsloth.kernels.utils", "unsloth", "unsloth.user"] * 2
        threads = [threading.Thread(target = work, args = (name,)) for name in names]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        assert not any(thread.is_alive() for thread in threads)
        import unsloth.user, unsloth.late
        assert unsloth.user.use(1) == ("patched", ("stock", 1)) == unsloth.late.slow(1)
        assert states() == {"both": "applied"}
        """,
        fake,
    )


def test_new_modules_are_published_at_their_upstream_path(fake):
    run(
        """
        catalogue(Patch("new", "t", FAST.targets, modules = ("kernels/fresh.py",)))
        import unsloth.kernels.fresh as theirs, unsloth_patches.unsloth.kernels.fresh as ours
        assert theirs is ours and ours.__spec__.name == "unsloth_patches.unsloth.kernels.fresh"
        from unsloth.kernels.fresh import value
        assert value is ours.value
        """,
        fake,
    )


def test_a_fork_that_has_the_module_is_recognised(fake):
    (fake / "unsloth/kernels/fresh.py").write_text("value = 'upstream'\n", encoding = "utf-8")
    run(
        """
        catalogue(Patch("new", "t", FAST.targets, modules = ("kernels/fresh.py",)))
        from unsloth.kernels.fresh import value
        import unsloth
        assert value == "upstream" and unsloth.fast(1) == ("stock", 1)
        assert states() == {"new": "upstreamed"}
        """,
        fake,
    )


def test_an_optional_target_may_be_absent_and_a_required_one_may_not(fake):
    run(
        """
        absent = dict(attribute = "unsloth.not_in_this_release:f", replacement = "replace_fast")
        catalogue(
            Patch("a", "t", (*FAST.targets, T(**absent, optional = True))),
            Patch("b", "t", (*FAST.targets, T(**absent))),
        )
        import unsloth
        assert states() == {"a": "applied", "b": "skipped"}
        assert unsloth.fast(1) == ("patched", ("stock", 1))
        """,
        fake,
    )


def test_importing_the_package_is_light(tmp_path):
    """No torch, transformers, trl, peft or unsloth, and under 30 ms over a bare interpreter (best of 5)."""
    code = textwrap.dedent(
        """
        import sys, time
        start = time.perf_counter()
        import unsloth_patches
        spent = time.perf_counter() - start
        heavy = {"torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "numpy", "rich"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        print(spent)
        """
    )
    assert min(float(python(code, ROOT).stdout) for _ in range(5)) < 0.030


needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason = "unsloth is not installed")


@needs_unsloth
def test_the_installed_unsloth_reports_every_patch_as_applied_or_fitting():
    """Nothing in the catalogue is stale for the pinned release, before and after the real import."""
    code = textwrap.dedent(
        """
        import unsloth_patches
        for row in unsloth_patches.status():
            assert row.state == "pending" and row.reason.startswith("will apply"), row
        import unsloth, unsloth.chat_templates
        for row in unsloth_patches.status():
            assert row.state in ("applied", "pending"), row
        states = {row.name: row.state for row in unsloth_patches.status()}
        assert states["llama-chat-templates"] == "applied"
        """
    )
    python(code, ROOT)


@needs_unsloth
def test_the_older_supported_release_takes_every_patch(tmp_path):
    """2026.10.7, from its wheels, in front of the installed release."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from _patches import PatchesError
    from _patches.upstream import get_release

    try:
        # Only the packages: a second dist-info beside the installed one confuses importlib.metadata.
        for name in ("unsloth", "unsloth_zoo"):
            (tmp_path / name).symlink_to(get_release(name, "2026.10.7").root / name)
    except PatchesError as error:
        pytest.skip(f"the wheels of 2026.10.7 are not to be had here: {error}")
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    code = textwrap.dedent(
        """
        import unsloth_patches, unsloth_patches.registry
        newer = {patch.name for patch in unsloth_patches.registry.PATCHES if patch.since}
        for row in unsloth_patches.status():
            outlook = "will be skipped: made for Unsloth" if row.name in newer else "will apply"
            assert row.state == "pending" and row.reason.startswith(outlook), row
        import unsloth, unsloth.chat_templates, unsloth_zoo
        assert unsloth.__version__ == "2026.10.7", unsloth.__version__
        for row in unsloth_patches.status():
            assert row.name in newer or row.state in ("applied", "pending"), row
        """
    )
    # 2026.10.7 has no CPU backend; this is its switch for tests of the GPU paths without one.
    world = {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1"}
    python(code, os.pathsep.join([str(tmp_path), str(ROOT)]), world)


@needs_unsloth
def test_chat_templates_captured_before_and_after():
    """A name taken before a late import is rebound; stock() and undo() reach it too."""
    code = textwrap.dedent(
        """
        from unsloth.chat_templates import CHAT_TEMPLATES
        before = CHAT_TEMPLATES["llama-3.1"][0]
        import unsloth_patches, unsloth.chat_templates as home
        states = {row.name: row.state for row in unsloth_patches.status()}
        assert states["llama-chat-templates"] == "applied", unsloth_patches.status()
        assert CHAT_TEMPLATES is home.CHAT_TEMPLATES
        patched = CHAT_TEMPLATES["llama-3.1"][0]
        assert patched != before
        with unsloth_patches.stock():
            assert CHAT_TEMPLATES["llama-3.1"][0] == before
        assert CHAT_TEMPLATES["llama-3.1"][0] == patched
        unsloth_patches.undo()
        assert home.CHAT_TEMPLATES["llama-3.1"][0] == before
        """
    )
    python(code, ROOT)


@needs_unsloth
def test_a_late_import_of_the_installed_unsloth_blames_nothing_else():
    """On the CPU backend: what is skipped is skipped for coming late, what is for GPUs says so."""
    code = textwrap.dedent(
        """
        import unsloth, unsloth.chat_templates
        import unsloth_patches
        first, *rows = unsloth_patches.status()
        assert first.state == "late", first
        for row in rows:
            late = "unsloth was imported before unsloth_patches" in row.reason
            for_gpus = row.reason.startswith("for GPUs: ")
            known = {"applied": True, "skipped": late, "pending": for_gpus}
            assert known[row.state], row
            assert "is not there" not in row.reason and "_Replaced" not in row.reason, row
        """
    )
    python(code, ROOT, {"CUDA_VISIBLE_DEVICES": ""})


@needs_unsloth
def test_a_mistyped_switch_is_told_at_import():
    """On a machine without a GPU nothing reads it later. It is said, and stops nothing."""
    code = textwrap.dedent(
        """
        import sys
        import unsloth_patches
        unsloth_patches.status()
        assert "torch" not in sys.modules, "status() must leave Unsloth to be imported first"
        import unsloth
        reasons = {row.name: row.reason for row in unsloth_patches.status()}
        print(reasons["fullgraph-report"])
        assert "choose" not in reasons["linear-custom-loss"]
        """
    )
    switches = {"UNSLOTH_PATCHES_FULLGRAPH": "stict", "UNSLOTH_PATCHES_QUIET": "0"}
    done = python(code, ROOT, {**switches, "CUDA_VISIBLE_DEVICES": ""})
    words = "UNSLOTH_PATCHES_FULLGRAPH='stict': choose one of auto, strict, off."
    assert words in done.stdout and f"unsloth_patches: {words}" in done.stderr
    done = python(code, ROOT, {**switches, "UNSLOTH_PATCHES_FULLGRAPH": "strict"})
    assert "choose" not in done.stdout + done.stderr


@needs_unsloth
def test_undo_gives_the_trainer_its_own_loss_back():
    """The CPU backend's loss wraps transformers' Trainer when a model is loaded, not at import."""
    code = textwrap.dedent(
        """
        import unsloth_patches, unsloth
        import unsloth_zoo.cpu.loader as loader
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer
        stock = Trainer.compute_loss
        for _ in range(2):
            model = LlamaForCausalLM(LlamaConfig(
                hidden_size = 8, intermediate_size = 8, num_hidden_layers = 1, vocab_size = 16,
                num_attention_heads = 1, num_key_value_heads = 1,
            ))
            assert loader.patch_chunked_causal_lm_loss(model)
            assert Trainer.compute_loss is not stock
            unsloth_patches.undo()
            assert Trainer.compute_loss is stock
            unsloth_patches.install()
        """
    )
    python(code, ROOT, {"CUDA_VISIBLE_DEVICES": ""})
