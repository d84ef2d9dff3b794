#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Refusals, handlers and restores: which tests reach each, and does one fail when it is taken out?

    python scripts/guards.py copy DIR         # every one can be switched off there, by its name
    (cd DIR && GUARDS_LOG=$PWD/reached python scripts/patches.py test --form import)
    (cd DIR && GUARDS_LOG=$PWD/reached python -m pytest tests/project/test_hooks.py tests/project/test_patching.py)
    python scripts/guards.py test DIR         # goes on where it was stopped; prints what nothing notices

Taken out means: a ``raise`` or a warning is passed over, a handler raises what it caught, a ``finally`` does nothing
where something raised, an ``is`` with another object says the opposite.
"""

import argparse
import ast
import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN_FILES = ("fingerprints.py", "hooks.py", "patching.py", "states.py")
WARNINGS = {"info", "print", "warn", "warning", "warning_once"}
# Builtins, so that each module finds them; the log is written once a guard and test.
START = """
import builtins, os
def guard_out(name):
    out = os.environ.get("GUARD_OUT")
    if out is None and (name, os.environ.get("PYTEST_CURRENT_TEST")) not in guard_out.seen:
        guard_out.seen.add((name, os.environ.get("PYTEST_CURRENT_TEST")))
        with open(os.environ.get("GUARDS_LOG", os.devnull), "a") as log:
            log.write(name + "\\t" + os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0] + "\\n")
    return out == name
guard_out.seen = set()
if not hasattr(builtins, "guard_out"):
    builtins.guard_out = guard_out
"""


class Switchable(ast.NodeTransformer):
    """Puts a switch at every guard of a file; ``names`` tells them."""

    def __init__(self, file):
        self.file, self.names, self.depth = file, [], 0

    def _out(self, node, kind):
        self.names.append(f"{self.file}:{node.lineno}:{node.col_offset}:{kind}")
        return ast.parse(f"guard_out({self.names[-1]!r})", mode = "eval").body

    def visit_FunctionDef(self, node):
        if any("jit" in ast.unparse(each) for each in node.decorator_list):
            return node  # of Triton
        self.depth += 1
        node.body = [self.visit(each) for each in node.body]
        self.depth -= 1
        return node

    def visit_Raise(self, node):
        out = self._out(node, "raise")
        return ast.If(out, [ast.Pass()], [self.generic_visit(node)])

    def visit_ExceptHandler(self, node):
        out = self._out(node, "except")
        self.generic_visit(node)
        node.body.insert(0, ast.If(out, [ast.Raise()], []))
        return node

    def visit_Try(self, node):
        out = self._out(node.finalbody[0], "finally") if node.finalbody else None
        self.generic_visit(node)
        if out is not None:
            raising = ast.parse("__import__('sys').exc_info()[0]", mode = "eval").body
            skipped = ast.BoolOp(ast.And(), [out, raising])
            node.finalbody = [ast.If(skipped, [ast.Pass()], node.finalbody)]
        return node

    def visit_Expr(self, node):
        called = getattr(node.value, "func", None)
        if getattr(called, "attr", getattr(called, "id", "")) not in WARNINGS:
            return self.generic_visit(node)
        return ast.If(self._out(node, "warning"), [ast.Pass()], [node])

    def visit_Compare(self, node):
        identity = len(node.ops) == 1 and isinstance(node.ops[0], (ast.Is, ast.IsNot))
        if not identity or isinstance(node.comparators[0], ast.Constant) or not self.depth:
            return self.generic_visit(node)
        return ast.Compare(self._out(node, "is"), [ast.NotEq()], [self.generic_visit(node)])


def copy(folder):
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd = ROOT, text = True).split():
        (folder / name).parent.mkdir(parents = True, exist_ok = True)
        shutil.copyfile(ROOT / name, folder / name)
    package, names = folder / "unsloth_patches", []
    for file in (*sorted(package.glob("unsloth/**/*.py")), *(package / n for n in OWN_FILES)):
        switchable = Switchable(file.relative_to(package).as_posix())
        tree = switchable.visit(ast.parse(file.read_text(encoding = "utf-8")))
        if switchable.names:
            after = [
                n
                for n, each in enumerate(tree.body)
                if isinstance(each, ast.ImportFrom) and each.module == "__future__"
            ] or [0]  # the docstring
            tree.body.insert(after[-1] + 1, ast.parse(f"exec({START!r}, {{}})").body[0])
            file.write_text(ast.unparse(ast.fix_missing_locations(tree)) + "\n", encoding = "utf-8")
        names += switchable.names
    (folder / "guards.json").write_text(json.dumps(names))
    print(len(names), "guards in", folder)


def test(folder):
    reached, done = collections.defaultdict(set), folder / "noticed.json"
    for line in (folder / "reached").read_text().splitlines():
        name, _, case = line.partition("\t")
        reached[name].add(case)
    noticed = json.loads(done.read_text()) if done.exists() else {}
    for name in json.loads((folder / "guards.json").read_text()):
        for file in sorted({case.partition("::")[0] for case in reached[name]} - {""}):
            if name in noticed and noticed[name] is not None:
                break  # one test fails
            cases = sorted(case for case in reached[name] if case.startswith(file))[:60]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", *cases]
            ended = subprocess.run(command, cwd = folder, env = {**os.environ, "GUARD_OUT": name})
            noticed[name] = file if ended.returncode else None
            done.write_text(json.dumps(noticed))
        if noticed.get(name) is None:
            print(name, "is passed unnoticed" if name in noticed else "is reached by no test")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description = __doc__, formatter_class = argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices = ["copy", "test"])
    parser.add_argument("folder", type = Path)
    given = parser.parse_args()
    {"copy": copy, "test": test}[given.command](given.folder.resolve())
