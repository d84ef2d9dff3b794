# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Import behaviour, each case in its own process: never half patched, never a broken ``import unsloth``.

Most cases run against a fake Unsloth; the last ones use the installed one.
"""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
from fake_unsloth import PREAMBLE, ROOT, python, run, write


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
        assert row.state == "pending" and row.reason.startswith("for GPUs, not in use here"), row
        assert "unsloth.late" in row.reason
        """,
        fake,
    )


def test_what_the_cpu_backend_leaves_to_the_script_is_not_for_gpus(fake):
    """The chat templates are imported by the script, there as elsewhere."""
    run(
        """
        import unsloth_patches.reporting as reporting
        reporting._CPU_MODULES = ("unsloth.late",)
        catalogue(
            Patch("templates", "t", (T("unsloth.late:slow", "replace_slow"),)),
            Patch("kernels", "t", (T("unsloth.other:slow", "replace_slow"),)),
        )
        sys.modules["unsloth_zoo"] = types.SimpleNamespace(_IS_CPU_BACKEND = True)
        import unsloth
        templates, kernels = unsloth_patches.status()
        assert templates.reason.startswith("will apply; waits for unsloth.late"), templates
        assert str(kernels).startswith("kernels: pending (for GPUs, not in use here"), kernels
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
                T("unsloth.user:fast", "replace_fast", fingerprints = frozenset(accepted), imported = True),
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
        import unsloth.kernels.utils as utils, unsloth.late
        def fast(x): return ("theirs", x)
        utils.fast = fast
        theirs = Patch("fast", "t", (T("unsloth.kernels.utils:fast", "replace_fast", fingerprints = known),))
        catalogue(Patch("slow", "t", (T("unsloth.late:slow", "replace_slow"),)), theirs)
        unsloth_patches.install()
        assert states() == {"slow": "applied", "fast": "skipped"}, reasons()
        assert utils.fast(1) == ("theirs", 1) and unsloth.late.slow(1)[0] == "patched"
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
        assert states()["late"] == "pending" and reasons()["late"].startswith("for GPUs, not in use here"), reasons()
        """
    python(LATE + textwrap.dedent(PREAMBLE) + textwrap.dedent(body), fake)


def test_undo_takes_off_what_a_replacement_wrapped_elsewhere(fake):
    """All of our wraps, and none over which somebody else's lies by now."""
    run(
        """
        from textwrap import TextWrapper
        reaching = (T("unsloth.kernels.utils:fast", "replace_reaching"),)
        places = ("textwrap:TextWrapper.fill", "textwrap:Nobody.fill", "nowhere:fill")
        catalogue(Patch("fast", "t", reaching, wraps_later = places))
        import unsloth
        stock = TextWrapper.fill
        assert unsloth.fast(1) == unsloth.fast(1) == ("patched", ("stock", 1))
        assert TextWrapper.fill is not stock
        unsloth_patches.undo()
        assert unsloth.fast(1) == ("stock", 1) and TextWrapper.fill is stock
        unsloth_patches.install()
        unsloth.fast(1)
        ours = TextWrapper.fill
        TextWrapper.fill = theirs = lambda *args: ours(*args)
        unsloth_patches.undo()
        assert unsloth.fast(1) == ("stock", 1) and TextWrapper.fill is theirs
        """,
        fake,
    )


def test_what_unsloth_lacks_on_this_host_stays_none(fake):
    """Without torch some names of Unsloth are None; the rest of the patch is in."""
    run(
        """
        catalogue(Patch("both", "t", (
            T("unsloth.kernels.utils:fast", "replace_fast"),
            T("unsloth.kernels.utils:nothing", "replace_raising"),
        )))
        import unsloth
        assert states() == {"both": "applied"} and unsloth.kernels.utils.nothing is None
        assert unsloth.fast(1) == ("patched", ("stock", 1))
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
        [thread.join(200) for thread in threads]
        assert not any(thread.is_alive() for thread in threads)
        import unsloth.user, unsloth.late
        assert unsloth.user.use(1) == ("patched", ("stock", 1)) == unsloth.late.slow(1)
        assert states() == {"both": "applied"}
        """,
        fake,
    )


def test_threads_that_ask_first_share_the_records(fake):
    run(
        """
        import threading, time
        from unsloth_patches import states
        catalogue(FAST)
        disabled_names, seen = states.disabled_names, []
        states.disabled_names = lambda: time.sleep(0.2) or disabled_names()
        work = lambda: seen.append(states.records()["fast"])
        threads = [threading.Thread(target = work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len({id(record) for record in seen}) == 1 and seen[0] is states.records()["fast"]
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


TOOLS = {
    "unsloth_patches/unsloth/tools/__init__.py": """
        from .parser import parse
        def use(text):
            return parse(text)
        """,
    "unsloth_patches/unsloth/tools/parser.py": """
        calls = []
        def parse(text):
            calls.append(text)
            return text
        """,
    "unsloth_patches/unsloth/tools/unlisted.py": "value = object()\n",
}
PACKAGE = """
    NEW = Patch("new", "t", FAST.targets, modules = ("tools/__init__.py", "tools/parser.py"))
    catalogue(NEW)
    """


def run_with_package(body, fake):
    write(fake, TOOLS)
    return run(textwrap.dedent(PACKAGE) + textwrap.dedent(body), fake)


@pytest.mark.parametrize("name", ["tools", "tools.parser", "tools.unlisted"])
@pytest.mark.parametrize("first", ["unsloth", "unsloth_patches.unsloth"])
def test_a_package_and_its_modules_are_the_same_by_both_paths(fake, name, first):
    """Whichever is imported first, and if it is the only one; a file that no entry lists is no second copy."""
    run_with_package(
        f"""
        importlib.import_module("{first}.{name}")
        for name in ("tools", "tools.parser", "tools.unlisted"):
            theirs = importlib.import_module("unsloth." + name)
            assert theirs is importlib.import_module("unsloth_patches.unsloth." + name)
            assert theirs.__name__ == theirs.__spec__.name == "unsloth_patches.unsloth." + name
        import unsloth.tools, unsloth_patches.unsloth.tools as ours
        assert unsloth.tools.parser is ours.parser and unsloth.tools.parse is ours.parser.parse
        """,
        fake,
    )


def test_a_package_survives_a_reload_and_a_second_import(fake):
    run_with_package(
        """
        import unsloth.tools.parser as parser, unsloth.tools as tools
        assert importlib.reload(parser) is parser and importlib.reload(tools) is tools
        tools.use("a")
        assert parser.calls == ["a"] and tools.parse is parser.parse
        del sys.modules["unsloth.tools"], sys.modules["unsloth.tools.parser"]
        import unsloth.tools.parser
        assert unsloth.tools is tools and unsloth.tools.parser is parser and parser.calls == ["a"]
        import unsloth.kernels.utils as utils
        importlib.reload(utils)
        assert unsloth.tools is tools and states() == {"new": "applied"}
        """,
        fake,
    )


def test_a_pickled_function_of_a_package_is_found_again(fake):
    """Under one name, whichever path it was imported by, in a process that has not imported Unsloth."""
    pickled = run_with_package(
        """
        import pickle
        from unsloth.tools.parser import parse
        from unsloth.tools import use
        print(pickle.dumps([parse, use]).hex(), parse.__module__)
        """,
        fake,
    ).stdout.split()
    assert pickled[1] == "unsloth_patches.unsloth.tools.parser"
    code = f"""
        import pickle, sys
        parse, use = pickle.loads(bytes.fromhex("{pickled[0]}"))
        assert use("a") == "a" and "unsloth" not in sys.modules
        """
    python(textwrap.dedent(code), fake)


def test_a_package_is_found_without_importing_it(fake):
    run_with_package(
        """
        from importlib.util import find_spec
        spec = find_spec("unsloth.tools")
        assert spec.name == "unsloth.tools" and spec.submodule_search_locations is not None
        assert spec.origin.endswith("__init__.py") and "unsloth.tools" not in sys.modules
        assert find_spec("unsloth.tools.nowhere") is None and find_spec("unsloth.nowhere") is None
        try:
            import unsloth.tools.nowhere
        except ModuleNotFoundError as error:
            assert error.name == "unsloth.tools.nowhere"
        else:
            raise AssertionError
        """,
        fake,
    )


def test_threads_importing_a_package_at_once(fake):
    run_with_package(
        """
        import threading
        sys.setswitchinterval(1e-6)
        import unsloth
        barrier, found = threading.Barrier(8), []
        def work(name):
            barrier.wait()
            found.append(importlib.import_module(name))
        # Not its parser: Python's own locks deadlock where a package imports a module that another thread
        # imports first, whoever made them.
        names = ["unsloth.tools", "unsloth_patches.unsloth.tools"] * 4
        threads = [threading.Thread(target = work, args = (name,)) for name in names]
        [thread.start() for thread in threads]
        [thread.join(200) for thread in threads]
        assert len(found) == 8 and all(each is found[0] for each in found)
        parser = importlib.import_module("unsloth.tools.parser")
        assert found[0].parse is parser.parse
        assert parser is importlib.import_module("unsloth_patches.unsloth.tools.parser")
        """,
        fake,
    )


@pytest.mark.parametrize("upstream", ["unsloth/tools.py", "unsloth/tools/__init__.py"])
def test_a_package_that_upstream_has_is_upstreams(fake, upstream):
    """As a module or as a package."""
    write(fake, {upstream: "value = 'upstream'\n"})
    run_with_package(
        """
        import unsloth, unsloth.tools
        assert unsloth.tools.value == "upstream" and states() == {"new": "upstreamed"}
        assert unsloth.tools.__name__ == "unsloth.tools"
        """,
        fake,
    )


def test_a_module_of_upstream_is_not_hidden_by_ours(fake):
    """One of several new files is there: not our patch, which is skipped; upstream's file is imported."""
    write(fake, {"unsloth/kernels/fresh.py": "value = 'upstream'\n"})
    run(
        """
        files = ("kernels/other.py", "kernels/fresh.py")
        catalogue(Patch("new", "t", FAST.targets, modules = files))
        import unsloth
        from unsloth.kernels.fresh import value
        assert value == "upstream" and unsloth.fast(1) == ("stock", 1)
        assert states() == {"new": "skipped"} and "a module of its own" in reasons()["new"]
        """,
        fake,
    )


def test_a_patch_that_only_adds_modules_is_in_once_unsloth_is(fake):
    """And so is not one whose requirement is out; what brings nothing but tests is no row."""
    run(
        """
        catalogue(
            Patch("tests", "t", (), shared = ("backend.py",)),
            Patch("new", "t", (), modules = ("kernels/fresh.py",), requires = ("tests",)),
            Patch("more", "t", (), modules = ("kernels/more.py",), requires = ("out",)),
            Patch("out", "t", (T("unsloth.gone:f", "replace_fast"),)),
        )
        assert reasons()["new"] == "will apply; waits for unsloth"
        import unsloth
        assert states() == {"new": "applied", "more": "skipped", "out": "pending"}
        assert reasons()["more"] == (
            "needs out, which is to be skipped: this Unsloth has no module unsloth.gone"
        )
        """,
        fake,
    )


@pytest.mark.parametrize(
    "broken", ["states.find_our_module", "states.hooked_modules", "patching.module_imported"]
)
def test_an_error_of_the_hooks_own_never_breaks_the_import(fake, broken):
    """Stock functions run, stderr says why, and once the error is gone the next import is patched."""
    done = run(
        f"""
        from unsloth_patches import patching, reporting, states
        catalogue(FAST)
        whole = {broken}
        def broken(*arguments):
            raise OSError("no such disk")
        {broken} = broken
        import unsloth
        assert unsloth.fast(1) == ("stock", 1)
        {broken} = whole
        for name in [name for name in sys.modules if name.split(".")[0] == "unsloth"]:
            del sys.modules[name]
        import unsloth
        assert unsloth.fast(1) == ("patched", ("stock", 1))
        """,
        fake,
    )
    assert "no patches in unsloth" in done.stderr and "OSError('no such disk')" in done.stderr


def test_an_error_in_the_summary_never_breaks_the_import(fake):
    done = run(
        """
        from unsloth_patches import reporting
        catalogue(FAST)
        reporting.status = lambda: 1 / 0
        import unsloth
        assert unsloth.fast(1) == ("patched", ("stock", 1))
        """,
        fake,
        {"UNSLOTH_PATCHES_QUIET": "0"},
    )
    assert "ZeroDivisionError" in done.stderr


def test_another_finder_that_raises_once_does_not_switch_patching_off(fake):
    """Its error is told, and the name is no longer taken for one that is being looked up."""
    done = run(
        """
        catalogue(FAST)
        class Broken:
            def find_spec(self, name, path = None, target = None):
                if name == "unsloth.kernels.utils":
                    raise OSError("a broken finder")
        sys.meta_path.insert(1, Broken())
        try:
            import unsloth
        except OSError:
            pass
        del sys.meta_path[1]
        import unsloth
        assert unsloth.fast(1) == ("patched", ("stock", 1))
        """,
        fake,
    )
    assert "no patches in unsloth.kernels.utils: OSError('a broken finder')" in done.stderr


def test_hooks_are_placed_once_and_serve_no_other_package(fake):
    run(
        """
        from unsloth_patches import hooks
        catalogue(FAST)
        unsloth_patches.install()
        finders = [each for each in sys.meta_path if isinstance(each, hooks.Finder)]
        assert len(finders) == 1 and hooks.installed()
        assert finders[0].find_spec("unslothful") is None and finders[0].find_spec("json") is None
        unsloth_patches.undo()
        unsloth_patches.undo()
        assert not hooks.installed() and not set(finders) & set(sys.meta_path)
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
    """No torch, transformers, trl, peft or unsloth, and under 30 ms of a core over a bare interpreter (best of 5)."""
    code = textwrap.dedent(
        """
        import sys, time
        start = time.process_time()
        import unsloth_patches
        spent = time.process_time() - start
        heavy = {"torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "numpy", "rich"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        print(spent)
        """
    )
    assert min(float(python(code, ROOT).stdout) for _ in range(5)) < 0.030


needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason = "unsloth is not installed")


@needs_unsloth
def test_the_installed_unsloth_reports_every_patch_as_applied_or_fitting(with_patched_unsloth):
    """Nothing in the catalogue is stale for the pinned release, before and after the real import."""
    code = """
        import unsloth_patches
        for row in unsloth_patches.status():
            assert row.state == "pending" and row.reason.startswith("will apply"), row
        """
    python(textwrap.dedent(code), ROOT)
    code = """
        import unsloth_patches
        for row in unsloth_patches.status():
            assert row.state in ("applied", "pending"), row
        states = {row.name: row.state for row in unsloth_patches.status()}
        assert states["llama-chat-templates"] == "applied"
        """
    with_patched_unsloth(code)


@needs_unsloth
def test_the_oldest_supported_release_takes_every_patch_that_it_has_code_for(tmp_path):
    """From its wheels, in front of the installed release."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from _patches import PatchesError
    from _patches.upstream import get_release
    from unsloth_patches.registry import SUPPORTED_UPSTREAM

    oldest = SUPPORTED_UPSTREAM[0]
    try:
        # Only the packages: a second dist-info beside the installed one confuses importlib.metadata.
        for name in ("unsloth", "unsloth_zoo"):
            (tmp_path / name).symlink_to(get_release(name, oldest).root / name)
    except PatchesError as error:
        pytest.skip(f"the wheels of {oldest} are not to be had here: {error}")
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    code = textwrap.dedent(
        """
        import unsloth_patches
        absent = "not in this release"
        for row in unsloth_patches.status():
            known = ("will apply", absent, "will be skipped: " + absent)
            assert row.state == "pending" and row.reason.startswith(known), row
        import unsloth, unsloth.chat_templates, unsloth_zoo
        print(unsloth.__version__)
        for row in unsloth_patches.status():
            assert row.reason.startswith(absent) or row.state in ("applied", "pending"), row
        """
    )
    # It has no CPU backend; this is its switch for tests of the GPU paths without one.
    world = {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1"}
    done = python(code, os.pathsep.join([str(tmp_path), str(ROOT)]), world)
    assert oldest in done.stdout.split()


@needs_unsloth
def test_chat_templates_captured_before_and_after(with_stock_unsloth):
    """A name taken before a late import is rebound; stock() and undo() reach it too."""
    with_stock_unsloth(
        """
        import sys
        from unsloth.chat_templates import CHAT_TEMPLATES
        assert "unsloth_patches" not in sys.modules
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


@needs_unsloth
def test_a_late_import_of_the_installed_unsloth_blames_nothing_else(with_stock_unsloth):
    """On the CPU backend: what is skipped is skipped for coming late, what is for GPUs says so."""
    with_stock_unsloth(
        """
        import unsloth_patches
        first, *rows = unsloth_patches.status()
        assert first.state == "late", first
        for row in rows:
            late = "unsloth was imported before unsloth_patches" in row.reason
            for_gpus = row.reason.startswith("for GPUs, not in use here")
            known = {"applied": True, "skipped": late, "pending": for_gpus}
            assert known[row.state], row
            assert "is not there" not in row.reason and "_Replaced" not in row.reason, row
        """
    )


@needs_unsloth
def test_a_mistyped_switch_is_told_at_import():
    """On a machine without a GPU nothing reads it later. It is said, and stops nothing; of others that
    are set, or once it is put right, nothing is."""
    code = textwrap.dedent(
        """
        import os, sys
        import unsloth_patches
        unsloth_patches.status()
        assert "torch" not in sys.modules, "status() must leave Unsloth to be imported first"
        import unsloth
        from unsloth_patches.settings import SWITCHES
        def reasons():
            return {row.name: row.reason for row in unsloth_patches.status()}
        patch = SWITCHES["UNSLOTH_BLOCK_FULLGRAPH"].patch
        print(reasons()[patch])
        assert "choose" not in reasons()[SWITCHES["UNSLOTH_LOSS_CHUNK_ROWS"].patch]
        os.environ["UNSLOTH_BLOCK_FULLGRAPH"] = "strict"
        assert "choose" not in reasons()[patch]
        """
    )
    switches = {"UNSLOTH_BLOCK_FULLGRAPH": "stict", "UNSLOTH_FSDP2_OFFLOAD": "all"}
    done = python(
        code, ROOT, {**switches, "UNSLOTH_PATCHES_QUIET": "0", "CUDA_VISIBLE_DEVICES": ""}
    )
    words = "UNSLOTH_BLOCK_FULLGRAPH='stict': choose one of auto, strict, off."
    assert words in done.stdout and f"unsloth_patches: {words}" in done.stderr
    assert done.stderr.count("choose") == 1 and "OFFLOAD" not in done.stderr


@needs_unsloth
def test_undo_gives_the_trainer_its_own_loss_back(with_patched_unsloth):
    """The CPU backend's loss wraps transformers' Trainer when a model is loaded, not at import."""
    with_patched_unsloth(
        """
        import unsloth_patches
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
