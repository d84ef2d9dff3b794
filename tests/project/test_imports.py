# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Which module imports which: one way only, imports inside functions included."""

import ast
from importlib.util import resolve_name

import pytest
from fake_unsloth import ROOT

PACKAGE = "unsloth_patches"
LANDS = f"{PACKAGE}.unsloth"


def modules(root):
    """Dotted name -> file of every module of the package."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path, known):
    """Modules of ``known`` that one module names in an import statement, wherever it stands.

    What Python imports on the way, the packages around a module, is not counted: each package would be
    in a circle with whatever it imports.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding = "utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield from (
                    each for each in ([whole] if whole in known else [base]) if each in known
                )


def as_ours(name):
    """``unsloth.kernels.x`` is ours where we have it: the alias finder serves it."""
    return f"{PACKAGE}.{name}" if name.partition(".")[0] == "unsloth" else name


def graph(root):
    known = modules(root)
    names = set(known) | {name[len(PACKAGE) + 1 :] for name in known if name.startswith(LANDS)}
    return {
        name: {as_ours(each) for each in imported(name, path, names - {"unsloth"})} - {name}
        for name, path in known.items()
    }


def circles(edges):
    """Groups of modules that reach each other (strongly connected components of two and more)."""
    reach = {name: set(targets) for name, targets in edges.items()}
    for middle in edges:
        for name in edges:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {
        frozenset({a, *(b for b in reach[a] if a in reach[b])}) for a in edges if a in reach[a]
    }
    return [set(group) for group in groups]


@pytest.fixture(scope = "module")
def edges():
    return graph(ROOT)


def test_no_circle(edges):
    """Function-level imports included."""
    assert [sorted(group) for group in circles(edges)] == []


def test_what_lands_imports_nothing_of_the_rest(edges):
    outside = {
        (name, each)
        for name, targets in edges.items()
        for each in targets
        if name.startswith(LANDS) and not each.startswith(LANDS)
    }
    assert outside == set()


def test_imports_run_one_way(edges):
    """What is below knows nothing of what is above: the command line, then the demo and benchmarks, …"""
    layers = ["cli", "doctor", "reporting", "patching", "states", "upstream_source", "registry"]
    for above, name in enumerate(layers):
        for higher in layers[:above]:
            assert f"{PACKAGE}.{higher}" not in edges[f"{PACKAGE}.{name}"], (name, higher)
    for name, targets in edges.items():
        if f"{PACKAGE}.cli" in targets:
            assert name == f"{PACKAGE}.__main__"


@pytest.mark.parametrize(
    "text",
    [
        "from . import b",
        "from .b import f",
        "def g():\n    from .b import f",
        "def g():\n    import unsloth_patches.unsloth.b",
        "class A:\n    def g(self):\n        from unsloth.b import f",
    ],
)
def test_a_circle_is_found(tmp_path, text):
    """However the import is written, in a function too, and through a third module."""
    folder = tmp_path / PACKAGE / "unsloth"
    folder.mkdir(parents = True)
    for name, content in {"a": text, "b": "from .c import h", "c": "from .a import g"}.items():
        (folder / f"{name}.py").write_text(content, encoding = "utf-8")
    assert circles(graph(tmp_path)) == [{f"{LANDS}.{name}" for name in "abc"}]
