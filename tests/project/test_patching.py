# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Decorators, what a target relies on, refusals, and what happens when something of ours raises."""

import importlib.metadata
import importlib.util
import re
import textwrap

import pytest
from fake_unsloth import PREAMBLE, ROOT, python, run, write

# --- decorators --------------------------------------------------------------------------------

LAYER = """
    class Layer:
        @staticmethod
        def scale(x):
            return ("stock", x)

        @classmethod
        def make(cls, x):
            return ("stock", x)

        def plain(self, x):
            return ("stock", x)
    """


@pytest.mark.parametrize("name", ["scale", "make", "plain"])
def test_a_method_stays_what_it_is(fake, name):
    """The decorator takes and returns the plain function, as it does below @staticmethod in the fork."""
    write(fake, {"unsloth/kernels/utils.py": "def fast(x):\n    pass\n" + textwrap.dedent(LAYER)})
    run(
        f"""
        catalogue(Patch("m", "t", (T("unsloth.kernels.utils:Layer.{name}", "replace_scale"),)))
        from unsloth.kernels.utils import Layer
        kind = type(vars(Layer)["{name}"])
        assert states() == {{"m": "applied"}} and kind.__name__ == dict(
            scale = "staticmethod", make = "classmethod", plain = "function"
        )["{name}"]
        patched = ("patched", ("stock", 1))
        assert Layer().{name}(1) == patched
        assert "{name}" == "plain" or Layer.{name}(1) == patched
        with unsloth_patches.stock():
            assert Layer().{name}(1) == ("stock", 1) and type(vars(Layer)["{name}"]) is kind
        assert Layer().{name}(1) == patched
        unsloth_patches.undo()
        assert Layer().{name}(1) == ("stock", 1) and type(vars(Layer)["{name}"]) is kind
        """,
        fake,
    )


def test_two_decorators_of_a_static_method_chain(fake):
    run(
        """
        target = T("unsloth.kernels.utils:Layer.scale", "replace_scale")
        catalogue(Patch("a", "t", (target,)), Patch("b", "t", (target,)))
        from unsloth.kernels.utils import Layer
        assert Layer.scale(1) == Layer().scale(1) == ("patched", ("patched", ("stock", 1)))
        with unsloth_patches.stock():
            assert Layer.scale(1) == ("stock", 1)
        unsloth_patches.undo()
        assert Layer.scale(1) == ("stock", 1)
        """,
        fake,
    )


# --- what a target relies on -------------------------------------------------------------------

UTILS = """
    from .tables import *
    LIMIT = 3
    class Layer: pass
    if LIMIT == 3:
        def fast(x, mode = "a", *, scale = 1): return ("stock", x)
    else:
        def fast(y): return ("other device", y)
    """


def test_a_callable_that_tells_no_parameters_is_no_function_that_is_known():
    """Built-in ones may have no signature."""
    from unsloth_patches.fingerprints import live_parameter_misfit

    assert live_parameter_misfit(type, ("name",)) == "it tells no parameters"
    assert live_parameter_misfit(type, ()) == ""


@pytest.mark.parametrize(
    "relies, reason",
    [
        ("signature = ('x', '*')", ""),
        ("signature = ('x', 'mode', '*', 'scale')", ""),
        ("""signature = ('x', "mode='a'", '*', 'scale=1')""", ""),
        ("signature = ('*', 'scale', 'mode')", ""),
        ("names = ('LIMIT', 'TABLE', 'unsloth.user:use')", ""),
        ("signature = ('mode', 'x')", "its first parameters are (x, mode), not (mode, x)"),
        (
            "signature = ('x', 'mode', 'scale')",
            "its first parameters are (x, mode), not (x, mode, scale)",
        ),
        ("signature = ('x', 'mode')", "it has other parameters too: scale"),
        ("""signature = ('x', "mode='b'", '*')""", "the default of mode is 'a', not 'b'"),
        ("signature = ('x', '*', 'scale', 'bias')", "it has no parameter bias"),
        (
            "names = ('LIMIT', 'SIZE')",
            "unsloth.kernels.utils has no SIZE, which the patch relies on",
        ),
        ("names = ('unsloth.user:gone',)", "unsloth.user has no gone, which the patch relies on"),
        ("names = ('unsloth.gone:use',)", "unsloth.gone has no use, which the patch relies on"),
    ],
)
def test_a_target_says_what_it_relies_on(fake, relies, reason):
    """Known from the source before anything is replaced; a body that is edited does not matter."""
    tables = "TABLE = {}\n"
    write(fake, {"unsloth/kernels/utils.py": UTILS, "unsloth/kernels/tables.py": tables})
    run(
        f"""
        catalogue(Patch("p", "t", (
            T("unsloth.late:slow", "replace_slow"), T("unsloth.kernels.utils:fast", "replace_fast", {relies}),
        )))
        reason = {reason!r}
        assert ("will be skipped" in reasons()["p"]) == bool(reason) and reason in reasons()["p"]
        import unsloth.late
        assert states() == {{"p": "skipped" if reason else "applied"}}, reasons()
        assert reason in reasons()["p"]
        assert unsloth.fast(1)[0] == unsloth.late.slow(1)[0] == ("stock" if reason else "patched")
        """,
        fake,
    )


def test_a_signature_holds_for_the_live_function_too(fake):
    """Another library put its own in the place before a late import; and one that the source has not."""
    write(fake, {"unsloth/kernels/utils.py": UTILS, "unsloth/kernels/tables.py": ""})
    for theirs in ("lambda a: a", "print"):
        run(
            f"""
            unsloth_patches.undo()
            import unsloth.kernels.utils as utils
            utils.fast = theirs = {theirs}
            relies = dict(signature = ("x", "*"))
            catalogue(Patch("p", "t", (T("unsloth.kernels.utils:fast", "replace_fast", **relies),)))
            unsloth_patches.install()
            assert states() == {{"p": "skipped"}} and utils.fast is theirs, reasons()
            assert "first parameters are" in reasons()["p"]
            """,
            fake,
        )


def test_names_hold_for_the_live_module_too(fake):
    run(
        """
        unsloth_patches.undo()
        import unsloth.user
        del unsloth.user.use
        relies = dict(names = ("unsloth.user:use",))
        catalogue(Patch("p", "t", (T("unsloth.kernels.utils:fast", "replace_fast", **relies),)))
        unsloth_patches.install()
        assert states() == {"p": "skipped"} and "unsloth.user has no use" in reasons()["p"], reasons()
        """,
        fake,
    )


def test_a_class_has_no_signature(fake):
    run(
        """
        catalogue(Patch("p", "t", (
            T("unsloth.kernels.utils:Layer", "replace_fast", signature = ("x",)),
        )))
        import unsloth
        assert states() == {"p": "skipped"} and "it is no function" in reasons()["p"]
        """,
        fake,
    )


# --- which definition is the live one ----------------------------------------------------------

TWO = """
    GPU = False
    if GPU:
        {first}
    else:
        {second}
    """
FUNCTIONS = ("def fast(x): return ('gpu', x)", "def fast(x): return ('stock', x)")
CLASSES = (
    "class fast:\n            def run(self): return 'gpu'",
    "class fast:\n            def run(self): return 'stock'",
)


@pytest.mark.parametrize("definitions", [FUNCTIONS, CLASSES], ids = ["function", "class"])
def test_the_definition_that_is_live_decides(fake, definitions):
    """One of two is known: the patch applies where that is the live one, and not where it is the other."""
    first, second = definitions
    utils = TWO.format(first = first, second = second)
    write(fake, {"unsloth/kernels/utils.py": utils})
    body = """
        from unsloth_patches.fingerprints import _definitions, _parsed, fingerprint_node
        first, second = map(fingerprint_node, _definitions(_parsed("unsloth/kernels/utils.py"), "fast"))
        assert first != second
        def known(print):
            return (T("unsloth.kernels.utils:fast", "replace_fast", fingerprints = frozenset({print})),)
        catalogue(Patch("first", "t", known(first)), Patch("second", "t", known(second)))
        import unsloth
        assert states() == {"first": "skipped", "second": "applied"}, reasons()
        assert f"does not know ({second})" in reasons()["first"]
        """
    run(body, fake)


@pytest.mark.parametrize(
    "block",
    [
        "if A:\n    {}\nelif B:\n    {}\nelse:\n    {}",
        "try:\n    {}\nexcept A:\n    {}\nexcept B:\n    {}\nelse:\n    {}",
        "with A:\n    {}\n{}",
        "for a in A:\n    {}\nelse:\n    {}",
        "while A:\n    {}\n{}",
        "if A:\n    try:\n        {}\n    except B:\n        {}",
        "def other():\n    {}\nclass Other:\n    {}\n{}",
    ],
)
@pytest.mark.parametrize("kind", ["def fast(): return {}", "class fast: number = {}"])
def test_a_definition_is_found_in_every_branch(tmp_path, block, kind):
    """In each of them once, and nowhere inside another function or class."""
    from unsloth_patches.fingerprints import fingerprint_file

    count = 1 if "Other" in block else block.count("{}")
    path = tmp_path / "module.py"
    path.write_text(block.format(*(kind.format(number) for number in range(block.count("{}")))))
    assert len(fingerprint_file(str(path), "fast")) == count
    assert fingerprint_file(str(path), "slow") == set()


def test_a_class_without_methods_that_is_defined_twice_is_not_known(fake):
    """It cannot be told which of them is live."""
    first, second = ("class fast: mode = 'gpu'", "class fast: mode = 'stock'")
    write(fake, {"unsloth/kernels/utils.py": TWO.format(first = first, second = second)})
    run(
        """
        from unsloth_patches.fingerprints import fingerprint_file
        known = fingerprint_file("unsloth/kernels/utils.py", "fast")
        catalogue(Patch("p", "t", (
            T("unsloth.kernels.utils:fast", "replace_fast", fingerprints = frozenset(known)),
        )))
        import unsloth
        assert len(known) == 2 and states() == {"p": "skipped"} and "no source" in reasons()["p"]
        """,
        fake,
    )


def test_a_reload_of_an_edited_file_is_judged_by_the_new_text(fake):
    """A source that was read before the edit is not taken for the one that runs."""
    run(
        """
        from pathlib import Path
        from unsloth_patches.upstream_source import upstream_fingerprints
        known = frozenset(upstream_fingerprints(FAST.targets[0]))
        target = T("unsloth.kernels.utils:fast", "replace_fast", fingerprints = known)
        catalogue(Patch("p", "t", (target,)))
        import unsloth.kernels.utils as utils
        assert states() == {"p": "applied"}
        source = Path(utils.__file__)
        source.write_text(source.read_text().replace('("stock", x)', '("edited", x)'))
        importlib.reload(utils)
        assert states() == {"p": "skipped"} and utils.fast(1) == ("edited", 1), reasons()
        """,
        fake,
    )


# --- what has moved ----------------------------------------------------------------------------

MOVED = {
    "unsloth/kernels/utils.py": """
        from .moved import fast, Layer
        LIMIT = 3
        """,
    "unsloth/kernels/moved.py": """
        def fast(x): return ("stock", x)
        class Layer:
            @staticmethod
            def scale(x): return ("stock", x)
        """,
}


@pytest.mark.parametrize(
    "name, relies",
    [
        ("fast", ""),
        ("fast", "signature = ('x',)"),
        ("Layer", ""),
        ("Layer.scale", ""),
        ("Layer.scale", "signature = ('x',)"),
    ],
)
def test_what_has_moved_is_skipped_with_what_needs_it(fake, name, relies):
    """Its replacement relies on what stands beside it; known from the source, before anything is imported."""
    write(fake, MOVED)
    run(
        f"""
        catalogue(
            Patch("p", "t", (T("unsloth.kernels.utils:{name}", "replace_scale", {relies}),)),
            Patch("q", "t", (T("unsloth.user:use", "replace_slow"),), requires = ("p",)),
        )
        expected = "unsloth.kernels.utils:{name} moved to unsloth.kernels.moved, where this patch does not follow"
        assert reasons()["p"].startswith(f"will be skipped: {{expected}}; `python -m unsloth_patches doctor`")
        import unsloth
        assert states() == {{"p": "skipped", "q": "skipped"}} and reasons()["p"].startswith(expected)
        assert unsloth.user.use(1) == unsloth.fast(1) == unsloth.kernels.utils.Layer.scale(1) == ("stock", 1)
        """,
        fake,
    )


def test_what_a_module_only_imports_is_replaced_in_that_module_alone(fake):
    """Where the catalogue says so; whoever else has it keeps what was imported."""
    write(fake, MOVED)
    run(
        """
        catalogue(Patch("p", "t", (T("unsloth.kernels.utils:fast", "replace_fast", imported = True),)))
        import unsloth
        assert states() == {"p": "applied"} and unsloth.fast(1) == ("patched", ("stock", 1))
        assert unsloth.kernels.moved.fast(1) == ("stock", 1)
        """,
        fake,
    )


LIVE_ELSEWHERE = """
    try:
        from .moved import fast, Layer
    except ImportError:
        def fast(x): pass
        class Layer:
            @staticmethod
            def scale(x): pass
    """


@pytest.mark.parametrize("name", ["fast", "Layer", "Layer.scale"])
def test_the_definition_that_is_live_can_be_elsewhere(fake, name):
    """The source has one here too, for another installation."""
    write(fake, {**MOVED, "unsloth/kernels/utils.py": LIVE_ELSEWHERE})
    run(
        f"""
        catalogue(Patch("p", "t", (T("unsloth.kernels.utils:{name}", "replace_scale"),)))
        assert "will apply" in reasons()["p"]
        import unsloth
        assert states() == {{"p": "skipped"}} and "moved to unsloth.kernels.moved" in reasons()["p"], reasons()
        assert unsloth.fast(1) == unsloth.kernels.utils.Layer.scale(1) == ("stock", 1)
        """,
        fake,
    )


MADE = """
    import functools
    from .moved import fast as other, decorator, Made
    {}
    """
DECORATORS = """
    def fast(x): return ("stock", x)
    def decorator(function):
        return lambda x: function(x)
    class Made:
        def __init__(self, function): functools.update_wrapper(self, function)
        def __call__(self, x): return ("stock", x)
    """


@pytest.mark.parametrize(
    "definition",
    [
        "@functools.wraps(other)\n    def fast(x): return other(x)",
        "@decorator\n    def fast(x): return other(x)",
        "@Made\n    def fast(x): return other(x)",
        "@functools.lru_cache\n    def fast(x): return other(x)",
        "fast = functools.partial(other)",
        "fast = lambda x: other(x)",
        "fast = decorator(other)",
    ],
)
def test_what_is_made_of_another_modules_function_has_not_moved(fake, definition):
    """Whatever its ``__module__`` says: ``functools.wraps`` takes the other's, a closure has its maker's."""
    made = {
        "unsloth/kernels/utils.py": textwrap.dedent(MADE).format(
            textwrap.dedent("    " + definition)
        ),
        "unsloth/kernels/moved.py": "import functools\n" + textwrap.dedent(DECORATORS),
    }
    write(fake, made)
    run(
        """
        catalogue(FAST)
        assert "will apply" in reasons()["fast"]
        import unsloth
        assert states() == {"fast": "applied"} and unsloth.fast(1) == ("patched", ("stock", 1)), reasons()
        """,
        fake,
    )


def test_a_method_that_its_class_took_from_another_module_has_not_moved(fake):
    """Who calls it, does so by the class, which is where it was."""
    utils = """
        from .moved import fast
        class Layer:
            scale = staticmethod(fast)
        """
    write(fake, {**MOVED, "unsloth/kernels/utils.py": utils})
    run(
        """
        catalogue(Patch("p", "t", (T("unsloth.kernels.utils:Layer.scale", "replace_scale"),)))
        import unsloth
        assert states() == {"p": "applied"}, reasons()
        assert unsloth.kernels.utils.Layer.scale(1)[0] == "patched" and unsloth.fast(1) == ("stock", 1)
        """,
        fake,
    )


def test_a_module_that_took_a_name_before_it_was_replaced_gets_the_new_one(fake):
    """Imported by the name's own module, as it was executed; of two decorators it gets the last."""
    utils = "TABLE = ['stock']\ndef fast(x): return ('stock', x)\nfrom .early import read, call\n"
    early = "from .utils import TABLE, fast as mine\ndef read(): return TABLE\ndef call(x): return mine(x)\n"
    write(fake, {"unsloth/kernels/utils.py": utils, "unsloth/kernels/early.py": early})
    run(
        """
        table = Patch("table", "t", (T("unsloth.kernels.utils:TABLE", "replace_table"),))
        catalogue(FAST, Patch("again", "t", FAST.targets), table)
        import unsloth_patches.unsloth.repl as repl
        repl.replace_table = lambda stock: [*stock, "patched"]
        from unsloth.kernels import utils
        twice, once = ("patched", ("patched", ("stock", 1))), ("stock", 1)
        assert set(states().values()) == {"applied"}
        assert utils.read() == utils.TABLE == ["stock", "patched"] and utils.call(1) == utils.fast(1) == twice
        with unsloth_patches.stock():
            assert utils.read() == ["stock"] and utils.call(1) == once
        assert utils.read() == ["stock", "patched"] and utils.call(1) == twice
        unsloth_patches.undo()
        assert utils.read() == utils.TABLE == ["stock"] and utils.call(1) == utils.fast(1) == once
        """,
        fake,
    )


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason = "Unsloth is not installed")
def test_the_catalogue_says_which_targets_are_only_imported():
    from unsloth_patches.fingerprints import find_definitions
    from unsloth_patches.registry import PATCHES
    from unsloth_patches.upstream_source import source_file

    for target in (target for patch in PATCHES for target in patch.targets):
        home, found = find_definitions(target.module, target.name, source_file)
        if found:
            assert target.imported == (home != target.module), target
    marks = {}
    for target in (target for patch in PATCHES for target in patch.targets):
        assert marks.setdefault(target.attribute, target.imported) == target.imported, target


# --- requirements ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "replacement, state", [("replace_raising", "failed"), ("replace_refusing", "skipped")]
)
def test_a_patch_whose_requirement_failed_is_not_applied(fake, replacement, state):
    run(
        f"""
        first = Patch("first", "t", (T("unsloth.kernels.utils:fast", "{replacement}"),))
        slow = Patch("slow", "t", (T("unsloth.late:slow", "replace_slow"),), requires = ("first",))
        more = Patch("more", "t", (T("unsloth.user:use", "replace_slow"),), requires = ("slow",))
        catalogue(first, slow, more)
        import unsloth.late
        assert states() == {{"first": "{state}", "slow": "skipped", "more": "skipped"}}
        assert reasons()["slow"].startswith("needs first, which is {state}: ")
        assert unsloth.late.slow(1) == ("stock", 1) == unsloth.user.use(1)
        """,
        fake,
    )


def test_a_requirement_that_fails_later_takes_what_needs_it_along(fake):
    run(
        """
        below = Patch("below", "t", (*FAST.targets, T("unsloth.late:slow", "replace_raising")))
        above = Patch("above", "t", (T("unsloth.user:use", "replace_slow"),), requires = ("below",))
        other = Patch("other", "t", (T("unsloth.kernels.utils:Layer.scale", "replace_scale"),))
        catalogue(below, above, other)
        import unsloth
        assert set(states().values()) == {"applied"}
        import unsloth.late
        assert states() == {"below": "failed", "above": "skipped", "other": "applied"}
        assert reasons()["above"] == "needs below, which is failed: ValueError: boom"
        assert unsloth.user.use(1) == unsloth.fast(1) == ("stock", 1)
        assert unsloth.kernels.utils.Layer.scale(1)[0] == "patched"
        """,
        fake,
    )


def test_status_says_before_that_a_requirement_will_be_out(fake):
    run(
        """
        gone = Patch("gone", "t", (T("unsloth.gone:f", "replace_fast"),))
        between = Patch("between", "t", (T("unsloth:user.use", "replace_fast"),), requires = ("gone",))
        catalogue(gone, between, Patch("fast", "t", FAST.targets, requires = ("between",)))
        expected = "needs gone, which is to be skipped: this Unsloth has no module unsloth.gone"
        assert reasons()["fast"] == f"will be skipped: {expected}"  # not the one between
        import unsloth
        assert reasons()["fast"] == expected and unsloth.fast(1) == ("stock", 1)
        """,
        fake,
    )


# --- refusals, each provoked once --------------------------------------------------------------


@pytest.mark.parametrize(
    "target, reason",
    [
        (
            "T('unsloth.kernels.utils:gone', 'replace_fast')",
            "unsloth.kernels.utils:gone is not there",
        ),
        (
            "T('unsloth.kernels.utils:Layer.gone', 'replace_fast')",
            "unsloth.kernels.utils:Layer.gone is not there",
        ),
        (
            "T('unsloth.kernels.utils:gone', 'replace_fast', fingerprints = frozenset({'0'}))",
            "unsloth.kernels.utils:gone is not defined in this Unsloth",
        ),
        ("T('unsloth.gone:fast', 'replace_fast')", "this Unsloth has no module unsloth.gone"),
        ("T('unsloth.kernels.utils:fast', 'replace_refusing')", "upstream text changed"),
    ],
)
def test_a_patch_that_does_not_fit_leaves_stock(fake, target, reason):
    """With a second target that would fit: never half patched."""
    run(
        f"""
        catalogue(Patch("p", "t", (T("unsloth.user:use", "replace_slow"), {target})))
        import unsloth
        assert unsloth.user.use(1) == ("stock", 1) == unsloth.fast(1)
        assert {reason!r} in reasons()["p"], reasons()
        assert states() == {{"p": "skipped"}}
        """,
        fake,
    )


def test_an_older_release_is_refused_by_a_patch_for_a_newer_one(fake):
    write(fake, {"unsloth/_version.py": '__version__ = "2026.9.30"\n'})
    run(
        """
        def since(name, release):
            return Patch(name, "t", FAST.targets, since = release)
        catalogue(since("new", "2026.10.1"), since("same", "2026.9.30"), since("old", "2026.9.4"))
        import unsloth
        assert states() == {"new": "skipped", "same": "applied", "old": "applied"}
        assert reasons()["new"] == (
            "not in this release: made for Unsloth 2026.10.1 and newer, this is 2026.9.30"
        )
        """,
        fake,
    )


@pytest.mark.parametrize("name", ["Layer", "Layer.scale"])
def test_a_class_is_not_replaced_late(fake, name):
    body = f"""
        catalogue(Patch("p", "t", (T("unsloth.kernels.utils:{name}", "replace_scale"),)))
        unsloth_patches.install()
        assert states()["p"] == "skipped" and "is a class or a part of one" in reasons()["p"]
        assert "unsloth was imported before unsloth_patches" in reasons()["p"]
        assert unsloth.kernels.utils.Layer.scale(1) == ("stock", 1)
        """
    python("import unsloth\n" + textwrap.dedent(PREAMBLE) + textwrap.dedent(body), fake)


def test_what_this_release_lacks_is_not_waited_for(fake):
    """An optional target whose module, or whose name, an old release has not."""
    run(
        """
        absent = [
            T("unsloth.gone:f", "replace_fast", optional = True),
            T("unsloth.user:gone", "replace_fast", optional = True),
        ]
        catalogue(
            Patch("p", "t", (*FAST.targets, *absent)),
            Patch("q", "t", (T("unsloth.late:slow", "replace_slow"), absent[0])),
        )
        assert reasons()["p"] == (
            "will apply; waits for unsloth.kernels.utils; not in this release: unsloth.gone, unsloth.user"
        )
        import unsloth
        rows = {row.name: row for row in unsloth_patches.status()}
        assert rows["p"].state == "applied" and (rows["p"].brief, rows["p"].replaced) == ("", 1)
        assert rows["p"].reason == "not in this release: unsloth.gone, unsloth.user"
        assert rows["q"].reason == "will apply; waits for unsloth.late; not in this release: unsloth.gone"
        assert rows["q"].brief == "will apply"
        """,
        fake,
    )


# --- something raises, then use again ----------------------------------------------------------


def test_stock_after_an_exception_is_whole(fake):
    """Raised in the body, in a nested block, by an import inside: everything is back, and works again."""
    write(fake, {"unsloth/broken.py": "raise KeyError('broken')\n"})
    run(
        """
        catalogue(FAST, Patch("scale", "t", (T("unsloth.kernels.utils:Layer.scale", "replace_scale"),)))
        import unsloth
        from unsloth.kernels.utils import Layer
        def inner():
            with unsloth_patches.stock():
                raise KeyError
        for raising in (lambda: 1 / 0, inner, lambda: importlib.import_module("unsloth.broken")):
            for _ in range(2):
                try:
                    with unsloth_patches.stock():
                        assert unsloth.fast(1) == unsloth.user.use(1) == Layer.scale(1) == ("stock", 1)
                        raising()
                except (KeyError, ZeroDivisionError):
                    pass
                else:
                    raise AssertionError
                patched = ("patched", ("stock", 1))
                assert unsloth.fast(1) == unsloth.user.use(1) == Layer.scale(1) == patched
                assert set(states().values()) == {"applied"}
        """,
        fake,
    )


def test_a_module_reloaded_inside_stock_keeps_its_new_replacement(fake):
    """The block's end must not put back what was made of the functions before the reload."""
    run(
        """
        catalogue(FAST)
        import unsloth.kernels.utils as utils
        old = utils.fast
        with unsloth_patches.stock():
            importlib.reload(utils)
            new = utils.fast
            assert new(1) == ("patched", ("stock", 1)) and new is not old
        assert utils.fast is new and states() == {"fast": "applied"}
        """,
        fake,
    )


def test_a_module_that_raises_is_patched_when_it_is_imported_again(fake):
    write(
        fake,
        {
            "unsloth/late.py": "import os\n1 / ('READY' in os.environ)\ndef slow(x): return ('stock', x)\n"
        },
    )
    run(
        """
        import os
        catalogue(Patch("slow", "t", (T("unsloth.late:slow", "replace_slow"),)))
        import unsloth
        try:
            import unsloth.late
        except ZeroDivisionError:
            pass
        assert states() == {"slow": "pending"}
        os.environ["READY"] = "1"
        import unsloth.late
        assert unsloth.late.slow(1) == ("patched", ("stock", 1)) and states() == {"slow": "applied"}
        """,
        fake,
    )


# --- names of variables ------------------------------------------------------------------------

OLD, NEW = "UNSLOTH_PATCHES_FULLGRAPH", "UNSLOTH_BLOCK_FULLGRAPH"


@pytest.mark.parametrize(
    "given, value, said",
    [
        ({OLD: "strict"}, "strict", f"{OLD} is now called {NEW}"),
        ({OLD: "strict", NEW: "off"}, "off", f"{OLD}=strict is ignored, because {NEW}=off is set"),
        ({OLD: "off", NEW: "off"}, "off", ""),
        ({NEW: "off"}, "off", ""),
        ({"UNSLOTH_FULLGRAPH": "strict"}, "strict", "UNSLOTH_FULLGRAPH is now called"),
        ({"UNSLOTH_FULLGRAPH": "1"}, None, ""),
        ({"UNSLOTH_FULLGRAPH": "True"}, None, ""),
        ({}, None, ""),
    ],
)
def test_an_old_variable_is_read_with_a_warning(fake, given, value, said):
    """Once, naming both names; a process that this one starts says nothing again."""
    code = f"""
        import os, subprocess, sys
        import unsloth_patches
        unsloth_patches.undo(), unsloth_patches.install()
        assert os.environ.get("{NEW}") == {value!r}
        if len(sys.argv) == 1 and {said!r} and "ignored" not in {said!r}:
            again = [sys.executable, "-c", "import unsloth_patches"]
            assert subprocess.run(again, capture_output = True).stderr == b""
        """
    cleared = dict.fromkeys((OLD, NEW, "UNSLOTH_FULLGRAPH"))
    error = python(textwrap.dedent(code), fake, {**cleared, **given}).stderr
    assert error.count("FutureWarning: unsloth_patches: ") == bool(said) and said in error
    assert not said or next(iter(given)) in error and NEW in error


def test_no_variable_has_a_name_that_unsloth_uses_otherwise():
    """unsloth_zoo sets variables of its own in the process; those of both mean the same in both."""
    text = (ROOT / "docs" / "settings.md").read_text(encoding = "utf-8")
    ours = set(re.findall(r"`(UNSLOTH_[A-Z0-9_]+)`", text))
    upstream = set()
    for name in ("unsloth", "unsloth_zoo"):
        for file in importlib.metadata.files(name):
            if file.suffix == ".py":
                upstream.update(re.findall(r"UNSLOTH_[A-Z0-9_]+", file.read_text("utf-8")))
    shared = {"UNSLOTH_BNB_TRITON", "UNSLOTH_CE_FP32_HEAD_GRAD", "UNSLOTH_FSDP2_SHARDED_LOAD"}
    assert len(ours) > 15 and ours & upstream == shared


def test_the_other_old_variable(fake):
    code = "import os, unsloth_patches; print(os.environ['UNSLOTH_FSDP2_OFFLOAD'])"
    done = python(code, fake, {"UNSLOTH_PATCHES_OFFLOAD": "all", "UNSLOTH_FSDP2_OFFLOAD": None})
    assert done.stdout.strip() == "all" and "UNSLOTH_FSDP2_OFFLOAD" in done.stderr


@pytest.mark.parametrize("first", ["unsloth.late:slow", "unsloth.kernels.utils:fast"])
def test_a_late_import_waits_for_a_module_and_replaces_in_the_others(fake, first):
    """Whichever of a patch's modules is not imported yet, before or after the one that is."""
    body = f"""
        late, fast = T("unsloth.late:slow", "replace_slow"), T("unsloth.kernels.utils:fast", "replace_fast")
        targets = (late, fast) if {first!r} == late.attribute else (fast, late)
        catalogue(Patch("p", "t", targets))
        unsloth_patches.install()
        assert unsloth.fast(1) == ("patched", ("stock", 1))
        import unsloth.late
        assert unsloth.late.slow(1)[0] == "patched"
        """
    python("import unsloth\n" + textwrap.dedent(PREAMBLE) + textwrap.dedent(body), fake)
