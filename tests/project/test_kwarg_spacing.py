# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""scripts/kwarg_spacing.py: Unsloth's spaces around ``=`` and its layout of parameters."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
kwarg_spacing = pytest.importorskip("kwarg_spacing", reason = "libcst is not installed")

CASES = {
    "keyword argument": ("f(x, dim=0)\n", "f(x, dim = 0)\n"),
    "dictionary unpacking stays": ("f(*a, **k, b=1)\n", "f(*a, **k, b = 1)\n"),
    "class keyword": (
        "class A(B, metaclass=M):\n    x: int = 1\n",
        "class A(B, metaclass = M):\n    x: int = 1\n",
    ),
    "decorator": ("@d(a=1)\ndef f(): ...\n", "@d(a = 1)\ndef f(): ...\n"),
    "lambda": ("g = lambda a, b=1: a\n", "g = lambda a, b = 1: a\n"),
    "f-strings keep their text": ('s = f"{f(a=1)=}"\n', 's = f"{f(a=1)=}"\n'),
    "two parameters stay on a line": ("def f(a, b=1): ...\n", "def f(a, b = 1): ...\n"),
    "no default stays on a line": ("def f(a, b, c, d): ...\n", "def f(a, b, c, d): ...\n"),
    "three with a default": (
        "def f(a, b, c=1): ...\n",
        "def f(\n    a,\n    b,\n    c = 1,\n): ...\n",
    ),
    "stars, slash and a return type": (
        "class A:\n    def f(self, /, a, *, b=1, **k) -> int:\n        pass\n",
        "class A:\n    def f(\n        self,\n        /,\n        a,\n        *,\n        b = 1,\n        **k,\n"
        "    ) -> int:\n        pass\n",
    ),
    "a # in a default is no comment": (
        'def f(a, b, c="#"): ...\n',
        'def f(\n    a,\n    b,\n    c = "#",\n): ...\n',
    ),
    "exploded without need": ("def f(\n    a,\n    b,\n): ...\n", "def f(a, b): ...\n"),
    "comments keep their place": (
        "def f(\n    a,  # why\n    b=1,\n): ...\n",
        "def f(\n    a,  # why\n    b = 1,\n): ...\n",
    ),
    "no blank line after a short block's imports": (
        "def f():\n    import a\n\n    return a\n",
        "def f():\n    import a\n    return a\n",
    ),
    "a comment, a decorator or a longer block keeps it": (
        "def f():\n    import a\n\n    # why\n    return a\n"
        "def g():\n    import a\n\n    @a\n    def h(): ...\n"
        "def i():\n    import a\n\n    a()\n    a()\n    a()\n",
    )
    * 2,
    "slash at the end": ("def f(\n    a,\n    /,\n): ...\n", "def f(a, /): ...\n"),
}


@pytest.mark.parametrize("source, wanted", CASES.values(), ids = CASES.keys())
def test_style(source, wanted):
    """Each rule, and that it changes neither the meaning nor its own result."""
    assert kwarg_spacing.format_source(source) == wanted
    assert kwarg_spacing.format_source(wanted) == wanted
    assert ast.dump(ast.parse(source)) == ast.dump(ast.parse(wanted))


def test_a_def_that_does_not_fit_stays_broken():
    names = [f"parameter_number_{i}" for i in range(6)]
    source = "def f(\n" + "".join(f"    {name},\n" for name in names) + "): ...\n"
    assert len("def f(" + ", ".join(names) + "): ...") > kwarg_spacing.LINE_LENGTH
    assert kwarg_spacing.format_source(source) == source


def test_ruff_is_left_to_break_what_does_not_fit():
    names = ", ".join(f"parameter_number_{i}" for i in range(6))
    source = "def f(\n    " + names.replace(", ", ",\n    ") + ",\n): ...\n"
    assert kwarg_spacing.format_source(source, for_ruff = True) == f"def f({names}): ...\n"


def test_check_changes_nothing(tmp_path, capsys):
    """Exit codes: 0 clean, 1 something changes, 2 not Python; --check leaves the file alone."""
    file = tmp_path / "a.py"
    file.write_bytes(b"f(a=1)\n")
    assert kwarg_spacing.main(["--check", str(file)]) == 1
    assert file.read_bytes() == b"f(a=1)\n"
    assert kwarg_spacing.main([str(file)]) == 1
    assert file.read_bytes() == b"f(a = 1)\n"
    assert kwarg_spacing.main([str(file)]) == 0
    file.write_bytes(b"def f(:\n")
    assert kwarg_spacing.main([str(file)]) == 2
    assert file.read_bytes() == b"def f(:\n"
    assert "cannot format" in capsys.readouterr().err


def test_another_ruff_is_refused(tmp_path, monkeypatch, capsys):
    """Other versions of ruff lay out code differently, so formatting with them would churn."""
    file = tmp_path / "a.py"
    file.write_bytes(b"f(a=1)\n")
    monkeypatch.setattr(kwarg_spacing, "RUFF_VERSION", "0.0.0")
    kwarg_spacing._ruff.cache_clear()
    assert kwarg_spacing.main(["--ruff", str(file)]) == 2
    assert "ruff 0.0.0 is needed" in capsys.readouterr().err
    assert file.read_bytes() == b"f(a=1)\n"
    kwarg_spacing._ruff.cache_clear()
