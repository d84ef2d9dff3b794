#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Single faults in the code, one at a time: do the tests that are meant for it notice? Cosmic Ray makes and
runs them; this draws a sample, says which tests are meant, and prints the outcome.

    python scripts/mutants.py draw mutants.sqlite --seed 21 --count 165
    cosmic-ray exec scripts/mutants.toml mutants.sqlite
    python scripts/mutants.py table mutants.sqlite

Files are changed in place, so take a clone of its own. ``exec`` goes on where it was stopped.
"""

import argparse
import ast
import collections
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN_TESTS = ["tests/project/test_hooks.py", "tests/project/test_patching.py"]
OWN_FILES = ("fingerprints.py", "hooks.py", "patching.py")


def tests_of_files():
    """File -> the tests of its patch, by the backend that each needs; those of a process's own last."""
    from _patches.project import Project

    found = {f"unsloth_patches/{name}": {"project": OWN_TESTS} for name in OWN_FILES}
    for patch in Project().patches:
        tests = collections.defaultdict(list)
        for test, backend in sorted(patch.tests.items(), key = lambda item: (item[1], item[0])):
            tests[backend].append(test)
        found.update({f"unsloth_patches/unsloth/{module}": tests for module in patch.modules})
    return found


class _Bare(ast.NodeTransformer):
    """Drops annotations, which nothing reads."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)


def _changes_something(mutation):
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutation.module_path.read_text(encoding = "utf-8")
    mutated = mutate_code(code, get_operator(mutation.operator_name)(), mutation.occurrence)
    try:
        before, after = (ast.dump(_Bare().visit(ast.parse(text))) for text in (code, mutated))
    except SyntaxError:
        return False
    return before != after


def draw(session, seed, count):
    """A place is drawn first, then one of its mutants: operators with many variants weigh no more."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import use_db

    if subprocess.run(["git", "diff", "--quiet", "HEAD"]).returncode:
        raise SystemExit(f"mutants: {ROOT} has changes; commit them, or take a clone")
    places, drawn, chance = collections.defaultdict(list), [], random.Random(seed)
    with use_db(":memory:") as every:
        init([Path(file) for file in sorted(tests_of_files())], every, {})
        for item in every.work_items:
            places[str(item.mutations[0].module_path), tuple(item.mutations[0].start_pos)].append(
                item
            )
    for place in chance.sample(sorted(places), len(places)):
        item = chance.choice(
            sorted(
                places[place],
                key = lambda i: (i.mutations[0].operator_name, i.mutations[0].occurrence),
            )
        )
        if len(drawn) < count and _changes_something(item.mutations[0]):
            drawn.append(item)
    with use_db(str(session)) as chosen:
        chosen.clear()
        chosen.add_work_items(drawn)


def test():
    """Exit code: 1 once a test of the changed file's patch fails; with no change, of any patch."""
    changed = subprocess.check_output(["git", "diff", "--name-only", "HEAD"], text = True).split()
    known = tests_of_files()
    variables = dict(os.environ, UNSLOTH_PATCHES_FORM = "import", CUDA_VISIBLE_DEVICES = "")
    for file in changed or known:
        for tests in known[file].values():  # Unsloth has one backend a process
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", *tests]
            if subprocess.run(command, env = variables).returncode:
                return 1
    return 0


def table(session):
    """Lines of Markdown: counts a file, then the survivors."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome

    counts, survivors = collections.defaultdict(collections.Counter), []
    with use_db(str(session), WorkDB.Mode.open) as done:
        for item, result in done.completed_work_items:
            file = str(item.mutations[0].module_path).replace("unsloth_patches/", "")
            survived = result.test_outcome == TestOutcome.SURVIVED
            counts[file].update(of = 1, noticed = int(not survived))
            if survived:
                lines = [line for line in result.diff.splitlines() if line[:1] in "+-"]
                old, new = (line[1:].strip() for line in lines[3:5])
                survivors.append(f"- `{file}:{item.mutations[0].start_pos[0]}` `{old}` -> `{new}`")
    yield "| file | noticed | of |\n| --- | ---: | ---: |"
    yield from (f"| `{file}` | {n['noticed']} | {n['of']} |" for file, n in sorted(counts.items()))
    together = sum(counts.values(), collections.Counter())
    yield f"| together | {together['noticed']} | {together['of']} |\n"
    yield from sorted(survivors)


def main():
    parser = argparse.ArgumentParser(
        description = __doc__, formatter_class = argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest = "command", required = True)
    drawing = commands.add_parser("draw", help = "a seeded sample into a session of Cosmic Ray")
    drawing.add_argument("session", type = Path)
    drawing.add_argument("--seed", type = int, default = 21)
    drawing.add_argument("--count", type = int, default = 165)
    commands.add_parser("test", help = "the tests of the file that is changed; Cosmic Ray calls it")
    commands.add_parser("table", help = "what came out").add_argument("session", type = Path)
    given = parser.parse_args()
    if given.command != "test":
        given.session = given.session.resolve()
    os.chdir(ROOT)  # Cosmic Ray names files from there
    if given.command == "draw":
        draw(given.session, given.seed, given.count)
    elif given.command == "test":
        sys.exit(test())
    else:
        print("\n".join(table(given.session)))


if __name__ == "__main__":
    main()
