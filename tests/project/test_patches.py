# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""scripts/patches.py export, check, fork and rebase, on a small project of their own.

The real series is checked by `python scripts/patches.py check`, which pre-commit and CI run.
"""

import ast
import shutil
import tempfile
from pathlib import Path

import pytest
from toy_project import (
    ENTRY,
    HEADER,
    MESSAGE,
    TARGETS,
    UPSTREAM,
    ZOO,
    check_all,
    export_all,
    make_release,
    run_python,
    write,
    write_registry,
)

from _patches import PatchesError, rebase, upstream
from _patches.build import build_base, build_fork, build_patches
from _patches.project import Project

# ------------------------------------------------------------------------- export, check, fork


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding = "utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_a_patch_alone_has_what_its_tests_import():
    """The helpers below tests/_shared come with this patch or with one that it needs."""
    project, lacking = Project(), []
    owners = {name.removesuffix(".py"): p.name for p in project.patches for name in p.shared}
    for patch in project.patches:
        there = {each.name for each in project.required(patch)}
        for file in (*patch.tests, *(f"tests/_shared/{name}" for name in patch.shared)):
            used = owners.keys() & _imported(project.root / file)
            lacking += [(file, name, owners[name]) for name in used if owners[name] not in there]
    assert lacking == []


def test_export_is_clean_and_stable(root, tmp_path):
    """What was exported passes every check, and exporting again changes no byte."""
    assert check_all(root, tmp_path / "check") == []
    outcome = export_all(root, tmp_path / "again")
    assert set(outcome.values()) == {"kept"}


def test_patch_reads_as_a_pull_request(root):
    text = (root / "patches/double-area.patch").read_text(encoding = "utf-8")
    assert "\nSubject: Double the area\n" in text
    assert "\nSo.\n\ndiff --git a/" in text, "no trailers"
    assert text.startswith("From " + "0" * 40)


def test_export_ignores_the_users_git(root, tmp_path, monkeypatch):
    """Signing, CRLF, prefixes, hooks' variables and the clock of the user's git leave no trace."""
    before = (root / "patches/double-area.patch").read_bytes()
    config = tmp_path / "gitconfig"
    config.write_text(
        "[commit]\ngpgsign=true\n[core]\nautocrlf=true\n[diff]\nnoprefix=true\n[format]\nsignature=me\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "somebody")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    export_all(root, tmp_path / "again")
    assert (root / "patches/double-area.patch").read_bytes() == before


def test_fork_behaves_as_the_replacements_say(root, tmp_path):
    """Functions, methods, staticmethods and tables are replaced in the fork by its own lines."""
    build_fork(Project(root), tmp_path / "fork")
    code = (
        "import unsloth as u; print(u.area(3), u.Shape.corners(4), u.Shape().name(), u.TABLE['b'])"
    )
    assert run_python(tmp_path / "fork", code) == ["18", "8", "shape!", "3"]
    text = (tmp_path / "fork/unsloth/sub/b.py").read_text(encoding = "utf-8")
    assert (
        "\nimport os\n\nfrom .double import doubled, exclaimed, with_b\n\nTABLE = {'a': 1}\n"
        in text
    )
    assert "\n    TABLE[key] = os.sep\nOTHER = 1\n\nTABLE = with_b(TABLE)\n" in text
    assert "\n\n@doubled\ndef area(x)" in text
    assert "    @staticmethod\n    @doubled\n    def corners(n)" in text


def test_an_import_can_stand_beside_what_it_decorates(root, tmp_path):
    """Above the definition, or its class; a line to follow that the file lacks is an error."""
    target = 'Target(attribute = "unsloth.sub.b:%s", replacement = "sub.double:%s", import_after = "%s"),'
    write_registry(root, target % ("Shape.corners", "doubled", "beside"))
    build_fork(Project(root), tmp_path / "fork")
    text = (tmp_path / "fork/unsloth/sub/b.py").read_text(encoding = "utf-8")
    assert "x * x\n\n\nfrom .double import doubled\n\n\nclass Shape:\n" in text
    write_registry(root, target % ("Round.corners", "doubled", "beside"))
    build_fork(Project(root), tmp_path / "inherited")
    text = (tmp_path / "inherited/unsloth/sub/b.py").read_text(encoding = "utf-8")
    assert "from .double import doubled\n\n\nclass Round(Shape):\n    corners = static" in text
    write_registry(root, target % ("area", "doubled", "import nothing"))
    with pytest.raises(PatchesError, match = "no line 'import nothing'"):
        build_fork(Project(root), tmp_path / "refused")


def test_zoo_names_are_set_on_the_zoo_and_rebound(root, tmp_path):
    """A target of unsloth_zoo is wired into the file that the entry names, both homes of the name."""
    target = 'Target(attribute = "unsloth_zoo.losses:loss", replacement = "sub.double:doubled"%s),'
    write_registry(root, target % ', wired_in = "unsloth/zoo_user.py"')
    fork = tmp_path / "fork"
    build_fork(Project(root), fork)
    write(fork, ZOO)
    code = "import unsloth.zoo_user as u, unsloth_zoo.losses as z; print(u.loss(1), z.loss(1), u.loss is z.loss)"
    assert run_python(fork, code) == ["2", "2", "True"]
    write_registry(root, target % "")
    with pytest.raises(PatchesError, match = "names no wired_in"):
        build_fork(Project(root), tmp_path / "refused")


def test_optional_targets(root, tmp_path):
    """An optional name is wired where it may exist, and left alone where this release has none."""
    target = 'Target(attribute = "unsloth.sub.b:%s", replacement = "sub.double:with_b", optional = True),'
    write_registry(
        root, target % "branch" + target % "absent" + target.replace("sub.b", "gone") % "x"
    )
    build_fork(Project(root), tmp_path / "fork")
    text = (tmp_path / "fork/unsloth/sub/b.py").read_text(encoding = "utf-8")
    assert "\n\n    @with_b\n    def branch():" in text
    assert "absent" not in text


def test_patches_apply_to_a_clone_with_more_in_it(root, tmp_path):
    """A real clone has other files, .gitattributes and executable bits; none of them is touched."""
    git = build_base(upstream.get_release("unsloth", "1.0"), tmp_path / "clone")
    others = {
        "README.md": "x\n",
        "tests/conftest.py": "y\n",
        ".gitattributes": "*.py text eol=lf\n",
    }
    write(git.folder, others)
    git.run("add", "--all")
    git.run("update-index", "--chmod=+x", "unsloth/sub/b.py")
    git.run("commit", "--quiet", "-m", "the rest")
    before = git.text("ls-tree", "-r", "HEAD").splitlines()
    assert not git.am((root / "patches/double-area.patch").read_bytes())
    after = git.text("ls-tree", "-r", "HEAD").splitlines()
    changed = {line.split("\t")[1] for line in set(before) ^ set(after)}
    assert changed == {"unsloth/sub/b.py", "unsloth/sub/double.py", "tests/test_area.py"}
    assert "100755" in git.text("ls-tree", "HEAD", "unsloth/sub/b.py")


def test_callsite_hunks(root, tmp_path):
    """Hand-edited hunks become part of the commit; one that does not fit is named."""
    hunk = "--- a/unsloth/__init__.py\n+++ b/unsloth/__init__.py\n@@ -1,2 +1,3 @@\n+# edited\n{context}\n from .sub.b import TABLE\n"
    good = {
        "patches/callsites/double-area.diff": hunk.format(context = " from .sub.b import area, Shape")
    }
    write(root, good)
    export_all(root, tmp_path / "fork")
    assert (tmp_path / "fork/unsloth/__init__.py").read_text().startswith("# edited\n")
    assert check_all(root, tmp_path / "check") == []
    write(
        root,
        {"patches/callsites/double-area.diff": hunk.format(context = " from .sub.b import nothing")},
    )
    with pytest.raises(
        PatchesError, match = r"double-area.diff does not apply.*unsloth/__init__.py:1"
    ):
        build_fork(Project(root), tmp_path / "refused")


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        (
            "unsloth_patches/unsloth/sub/double.py",
            "2 * stock(x)",
            "3 * stock(x)",
            "double-area.patch is out of date",
        ),
        ("patches/double-area.patch", "+    assert", "+     assert", "out of date from line"),
        ("patches/series", "double-area.patch\n", "", "series is out of date"),
        ("patches/orphan.patch", "", "x", "orphan.patch belongs to no patch"),
        ("unsloth_patches/unsloth/sub/new.py", "", HEADER, "sub/new.py belongs to no patch"),
        ("tests/test_new.py", "", HEADER, "tests/test_new.py belongs to no patch"),
        (
            "unsloth_patches/unsloth/sub/double.py",
            '"""\n\n',
            '"""\nimport unsloth_patches\n',
            "names unsloth_patches",
        ),
        (
            "unsloth_patches/unsloth/sub/double.py",
            '"""\n\n',
            '"""\nimport unsloth\n',
            "imports unsloth at its top",
        ),
        (
            "unsloth_patches/unsloth/sub/double.py",
            '"""\n\n',
            '"""\nfrom .c import d\n',
            "imports .sub.c",
        ),
        (
            "unsloth_patches/unsloth/sub/double.py",
            '"""\n\n',
            '"""\nmatch 1:\n    case 1: pass\n',
            "not Python 3.9",
        ),
        (
            "unsloth_patches/unsloth/sub/double.py",
            "def doubled",
            "def replaced_area",
            "defines no doubled",
        ),
        ("unsloth_patches/unsloth/sub/double.py", HEADER, "", "does not start with"),
        ("unsloth_patches/unsloth/sub/double.py", "\n", "\r\n", "carriage returns"),
        ("patches/messages/double-area.md", "Motivation:", "Motive:", "no line 'Motivation:'"),
        ("patches/messages/double-area.md", "Why.", "diff --git a b", "git am would cut"),
        ("tests/test_area.py", "import unsloth", "import unsloth_patches", "names unsloth_patches"),
        ("unsloth_patches/registry/__init__.py", '"cpu"', '"gpu"', "names backend 'gpu'"),
        (
            "unsloth_patches/registry/__init__.py",
            "Double the area",
            "[a] doubles.",
            "one capitalised line",
        ),
    ],
)
def test_check_names_what_is_wrong(root, tmp_path, file, old, new, message):
    """Each fault, put in by hand, is found and named."""
    path = root / file
    text = path.read_bytes().decode() if path.is_file() else ""
    assert old in text
    path.write_bytes((text.replace(old, new) if old else new).encode())
    problems = check_all(root, tmp_path / "check")
    assert any(message in problem for problem in problems), problems


def test_check_compares_fingerprints(root, tmp_path):
    """A target whose upstream definition the registry does not know is stale; a known one is not."""
    project = Project(root)
    release = project.pinned_unsloth()
    known = project.fingerprints(project.patches[0].targets[0], release, None)
    assert len(known) == 1
    accepted = ', fingerprints = frozenset({"%s"})'
    write_registry(root, TARGETS.format(prints = accepted % known.pop()))
    assert check_all(root, tmp_path / "known") == []
    write_registry(root, TARGETS.format(prints = accepted % ("0" * 16)))
    problems = check_all(root, tmp_path / "unknown")
    assert any(
        "unsloth.sub.b:area is a version that this patch does not know" in problem
        for problem in problems
    )


def test_relative_imports_of_own_modules_are_fine(root, tmp_path):
    """Every way to import a sibling that the same patch adds."""
    write_registry(
        root, entry = ENTRY.replace("modules = (", 'modules = ("top.py", "sub/other.py", ')
    )
    lines = "from . import other\nfrom .other import x\nfrom .. import top\nfrom ..top import x\n"
    module = root / "unsloth_patches/unsloth/sub/double.py"
    module.write_text(module.read_text() + lines)
    write(root / "unsloth_patches/unsloth", {"sub/other.py": HEADER + "x = 1\n"})
    write(
        root / "unsloth_patches/unsloth",
        {"top.py": HEADER + "from .sub import other\n\nx = other.x\n"},
    )
    export_all(root, tmp_path / "fork")
    assert check_all(root, tmp_path / "check") == []


def test_a_module_that_upstream_has_is_not_overwritten(root, tmp_path, cache):
    shutil.rmtree(cache / "unsloth-1.0")
    make_release(cache, "unsloth", "1.0", {**UPSTREAM, "unsloth/sub/double.py": "x = 1\n"})
    git = build_base(upstream.get_release("unsloth", "1.0"), tmp_path / "pin2")
    pins = {**upstream.read_pins(root / "patches/UPSTREAM"), "tree": git.tree()}
    upstream.write_pins(pins, root / "patches/UPSTREAM")
    with pytest.raises(PatchesError, match = "already has a different double.py"):
        build_fork(Project(root), tmp_path / "fork")


# ------------------------------------------------------------------------------------- rebase


def rebase_on(root, cache, tmp_path, changes):
    files = {**UPSTREAM, **changes}
    make_release(cache, "unsloth", "2.0", {k: v for k, v in files.items() if v is not None})
    kept = Path(tempfile.mkdtemp(dir = tmp_path))
    (outcome,) = rebase.rebase(Project(root), "2.0", tmp_path / "scratch", kept)
    patches = [path.name for path in kept.glob("*.patch")]
    assert len(patches) == (outcome.state != rebase.STALE)
    assert (kept / "series").read_text().split() == patches
    return outcome.state, "\n".join(outcome.notes)


def test_rebase_clean(root, cache, tmp_path):
    changes = {"unsloth/sub/b.py": "# new comment\n" + UPSTREAM["unsloth/sub/b.py"]}
    assert rebase_on(root, cache, tmp_path, changes) == (rebase.CLEAN, "")


def test_rebase_names_the_place(root, cache, tmp_path):
    """The decorated function has another name now: the hunk's place is named, and what is missing."""
    text = UPSTREAM["unsloth/sub/b.py"].replace("def area", "def areas")
    state, notes = rebase_on(root, cache, tmp_path, {"unsloth/sub/b.py": text})
    assert state == rebase.STALE
    assert notes.startswith("unsloth/sub/b.py:4\n") and "defines no area" in notes


def test_rebase_merges_what_moved(root, cache, tmp_path):
    """The context changed beside the edit, not under it: git merges it, and the hunk is named."""
    text = UPSTREAM["unsloth/sub/b.py"].replace("return x * x", "return x * x * 1.0")
    state, notes = rebase_on(root, cache, tmp_path, {"unsloth/sub/b.py": text})
    assert (state, notes) == (rebase.MERGED, "unsloth/sub/b.py:4")


def test_rebase_edits_anew_where_git_cannot_merge(root, cache, tmp_path):
    """The line above the decorator changed: the same decorator fits, beside the function as it is now."""
    text = UPSTREAM["unsloth/sub/b.py"].replace("def area", "# Squared.\ndef area")
    state, notes = rebase_on(root, cache, tmp_path, {"unsloth/sub/b.py": text})
    assert (state, notes) == (rebase.REWIRED, "unsloth/sub/b.py:4")


def test_rebase_names_a_missing_file(root, cache, tmp_path):
    changes = {"unsloth/sub/b.py": None, "unsloth/__init__.py": ""}
    state, notes = rebase_on(root, cache, tmp_path, changes)
    assert state == rebase.STALE
    assert "unsloth/sub/b.py" in notes and "no module unsloth.sub.b" in notes


def test_rebase_leaves_out_an_absent_optional_file(root, cache, tmp_path):
    """The only target in a file that the release lacks is optional: the rest of the patch applies."""
    gone = 'Target(attribute = "unsloth.zoo_user:loss", replacement = "sub.double:doubled"%s),'
    for optional, state in (", optional = True", rebase.CLEAN), ("", rebase.STALE):
        write_registry(root, TARGETS.format(prints = "") + gone % optional)
        export_all(root, tmp_path / f"export-{state}")
        assert "zoo_user.py" in (root / "patches/double-area.patch").read_text(encoding = "utf-8")
        shutil.rmtree(cache / "unsloth-2.0", ignore_errors = True)
        shutil.rmtree(tmp_path / "scratch", ignore_errors = True)
        found, notes = rebase_on(root, cache, tmp_path, {"unsloth/zoo_user.py": None})
        assert found == state, notes
        assert "unsloth/zoo_user.py" in notes


def test_rebase_names_the_fingerprint(root, cache, tmp_path):
    """The hunk still applies, but the function that it replaces is another one: stale."""
    project = Project(root)
    (known,) = project.fingerprints(project.patches[0].targets[0], project.pinned_unsloth(), None)
    write_registry(root, TARGETS.format(prints = f', fingerprints = frozenset({{"{known}"}})'))
    text = UPSTREAM["unsloth/sub/b.py"].replace("return x * x", "return x * x * 1.0")
    state, notes = rebase_on(root, cache, tmp_path, {"unsloth/sub/b.py": text})
    assert state == rebase.STALE
    assert "unsloth.sub.b:area is a version that this patch does not know" in notes


def test_rebase_on_the_pinned_release(root, cache, tmp_path):
    (outcome,) = rebase.rebase(Project(root), "1.0", tmp_path / "scratch")
    assert (outcome.state, outcome.notes) == (rebase.CLEAN, [])


def test_two_patches_wrap_an_inherited_method():
    """The second wraps what the first put into the class body, in the same assignment."""
    from _patches import wiring

    lines = "class A(B):\n    pass\n".splitlines()
    for decorator in ("first", "second", "a" * 70, "last"):
        owner = ast.parse("\n".join(lines)).body[0]
        place, new = wiring._method(owner, "load", decorator, lines)
        lines[place:place] = new
        lines = "\n".join(lines).splitlines()
    assert lines[1:] == [
        "    load = staticmethod(",
        f"        last({'a' * 70}(second(first(B.load))))",
        "    )",
    ]


def test_a_patch_that_changes_nothing_is_refused(root, tmp_path):
    """What a patch before it landed already."""
    entry = ENTRY.rstrip().removesuffix(")") + (
        '    Patch(name = "again", title = "Do it again", targets = (), requires = ("double-area",),\n'
        '        modules = ("sub/double.py",), tests = {{"tests/test_area.py": "cpu"}}),\n)\n'
    )
    write_registry(root, entry = entry)
    write(root, {"patches/messages/again.md": MESSAGE})
    with pytest.raises(PatchesError, match = "again changes nothing in Unsloth"):
        build_patches(Project(root), tmp_path / "built")
