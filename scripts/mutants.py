#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Put single faults into the code and see whether the tests meant for it notice.

    python scripts/mutants.py sample --seed 21 --count 200 mutants.json      (needs cosmic-ray)
    python scripts/mutants.py run mutants.json results.json --jobs 2
    python scripts/mutants.py table results.json

A mutant is one of cosmic-ray's at a seeded place of what lands in Unsloth, or of patching.py, hooks.py and
fingerprints.py. Each runs against its own patch's tests in the import form, until the first failure. Tests
that fail unmutated are left out; a run that takes three times as long as unmutated counts as noticed.
"""

import argparse
import ast
import collections
import concurrent.futures
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT_TESTS = {
    "patching.py": ["tests/project/test_patching.py", "tests/project/test_hooks.py"],
    "hooks.py": ["tests/project/test_hooks.py"],
    "fingerprints.py": ["tests/project/test_hooks.py", "tests/project/test_patching.py"],
}


def tests_of_modules():
    """File below the root -> the tests of its patch."""
    from _patches.project import Project

    lands = {
        f"unsloth_patches/unsloth/{module}": sorted(patch.tests)
        for patch in Project().patches
        for module in patch.modules
    }
    return {**lands, **{f"unsloth_patches/{name}": each for name, each in PROJECT_TESTS.items()}}


class _Bare(ast.NodeTransformer):
    """Drops annotations, which nothing reads."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)


def _meaning(code):
    return ast.dump(_Bare().visit(ast.parse(code)))


def sample(seed, count):
    """``count`` mutants: a place is drawn first, so that operators with many variants weigh no more."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {name: get_operator(name) for name in operator_names()}
    operators = {name: each() for name, each in operators.items() if not each.arguments()}
    places = collections.defaultdict(list)
    tests = tests_of_modules()
    for file in sorted(tests):
        nodes = list(ast_nodes(get_ast((ROOT / file).read_text(encoding = "utf-8"))))
        for name, operator in sorted(operators.items()):
            found = (at for node in nodes for at in operator.mutation_positions(node))
            for occurrence, (start, _) in enumerate(found):
                places[file, tuple(start)].append((name, occurrence))
    draw, drawn = random.Random(seed), []
    for file, start in draw.sample(sorted(places), len(places)):
        name, occurrence = draw.choice(places[file, start])
        code = (ROOT / file).read_text(encoding = "utf-8")
        mutated = mutate_code(code, operators[name], occurrence)
        try:
            if not mutated or _meaning(mutated) == _meaning(code):
                continue
        except SyntaxError:
            continue
        lines = zip(code.splitlines(), mutated.splitlines())
        line, (old, new) = next(
            ((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1]),
            (start[0], (code.splitlines()[start[0] - 1], "(a line less)")),
        )
        drawn.append(dict(
            file = file, line = line, operator = name.partition("/")[2], old = old.strip(),
            new = new.strip(), tests = tests[file], code = mutated,
        ))  # fmt: skip
        if len(drawn) == count:
            break
    return dict(seed = seed, places = len(places), mutants = drawn)


def _run_tests(tree, test, timeout):
    """(exit code, or None when it was stopped; seconds; the last lines)."""
    environment = {**os.environ, "UNSLOTH_PATCHES_FORM": "import", "CUDA_VISIBLE_DEVICES": ""}
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [each for each in path if each and not (Path(each) / "unsloth_patches").is_dir()]
    environment["PYTHONPATH"] = os.pathsep.join([str(tree), *others])
    scratch = tempfile.mkdtemp(prefix = "run-", dir = tree)
    environment.update(UNSLOTH_COMPILE_LOCATION = scratch + "/compiled", TMPDIR = scratch)
    command = [sys.executable, "-m", "pytest", test, "-x", "-q", "--tb=line", "--color=no"]
    command += ["-p", "no:cacheprovider", f"--rootdir={tree}"]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd = tree, env = environment, stdout = subprocess.PIPE, stderr = subprocess.STDOUT,
        encoding = "utf-8", errors = "replace", start_new_session = True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout = timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        output, code = "stopped", None
    finally:
        try:  # ranks and compile workers of the test too
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        shutil.rmtree(scratch, ignore_errors = True)
    return code, time.monotonic() - began, output.strip().splitlines()[-6:]


def run(mutants, jobs, slowest, seconds, unmutated):
    """Adds ``outcome`` to each: noticed, survived, or why it did not run.

    unmutated: test -> its seconds, None where it fails; what is missing is measured first.
    """
    deadline = time.monotonic() + seconds
    trees, whole = queue.Queue(), tempfile.mkdtemp(prefix = "mutants-")
    for number in range(jobs):
        tree = Path(whole) / str(number)
        for name in ("unsloth_patches", "tests", "scripts", "patches"):
            shutil.copytree(ROOT / name, tree / name, ignore = shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        trees.put(tree)
    tests = sorted({test for mutant in mutants for test in mutant["tests"]} - set(unmutated))

    def measure(test):
        tree = trees.get()
        limit = min(slowest, max(1, deadline - time.monotonic()))
        code, took, last = _run_tests(tree, test, limit)
        trees.put(tree)
        passes = code == 0 and " passed" in last[-1]  # a file that is skipped whole notices nothing
        unmutated[test] = took if passes else None
        print(f"unmutated {test}: {'passes' if passes else last} ({took:.0f} s)", flush = True)

    def judge(mutant):
        concurrent.futures.wait([measured[test] for test in mutant["tests"] if test in measured])
        usable = [test for test in mutant["tests"] if unmutated[test] is not None]
        usable.sort(key = unmutated.get)
        if not usable or time.monotonic() > deadline:
            return "not run: " + ("out of time" if usable else "its tests fail unmutated here")
        tree = trees.get()
        file = tree / mutant["file"]
        original = file.read_text(encoding = "utf-8")
        for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):
            cached.unlink()
        file.write_text(mutant["code"], encoding = "utf-8")
        try:
            for test in usable:
                left = deadline + 20 - time.monotonic()
                code, _, last = _run_tests(tree, test, min(left, 3 * unmutated[test] + 20))
                if code is None and time.monotonic() >= deadline + 19:
                    return "not run: out of time"
                if code != 0:
                    mutant["by"] = last[-2:] if code else ["timeout"]
                    return "noticed"
            left_out = len(usable) < len(mutant["tests"])
            return "survived" + " the tests that pass unmutated here" * left_out
        finally:
            file.write_text(original, encoding = "utf-8")
            for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):
                cached.unlink()
            trees.put(tree)

    def follow(mutant):
        mutant["outcome"] = judge(mutant)
        place = f"{mutant['file'].replace('unsloth_patches/', '')}:{mutant['line']}"
        print(
            f"{time.strftime('%T')} {mutant['outcome']:9} {place} {mutant['new'][:70]}", flush = True
        )

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        measured = {test: pool.submit(measure, test) for test in tests}  # these come first
        list(pool.map(follow, mutants))
    shutil.rmtree(whole, ignore_errors = True)


def table(mutants):
    """Lines of Markdown: counts per module, then the survivors."""
    counts = collections.defaultdict(collections.Counter)
    for mutant in mutants:
        counts[mutant["file"]][mutant["outcome"].partition(":")[0]] += 1
    rows = [
        (
            file.replace("unsloth_patches/", ""),
            each["noticed"],
            sum(each.values()) - each["not run"],
        )
        for file, each in sorted(counts.items())
    ]
    yield "| module | noticed | of |"
    yield "| --- | ---: | ---: |"
    yield from (f"| `{file}` | {noticed} | {total} |" for file, noticed, total in rows)
    yield f"| together | {sum(row[1] for row in rows)} | {sum(row[2] for row in rows)} |"
    for mutant in mutants:
        if mutant["outcome"].startswith("survived"):
            yield f"- `{mutant['file']}:{mutant['line']}` `{mutant['old']}` -> `{mutant['new']}`"


def main():
    parser = argparse.ArgumentParser(
        description = __doc__, formatter_class = argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest = "command", required = True)
    sampling = commands.add_parser("sample")
    sampling.add_argument("--seed", type = int, default = 21)
    sampling.add_argument("--count", type = int, default = 200)
    sampling.add_argument("mutants", type = Path)
    running = commands.add_parser("run")
    running.add_argument("mutants", type = Path)
    running.add_argument("results", type = Path)
    running.add_argument("--jobs", type = int, default = 1)
    running.add_argument("--slowest", type = float, default = 300, help = "seconds a test file may take")
    running.add_argument("--seconds", type = float, default = 1e6, help = "for everything")
    commands.add_parser("table").add_argument("results", type = Path)
    given = parser.parse_args()
    if given.command == "sample":
        given.mutants.write_text(json.dumps(sample(given.seed, given.count), indent = 1))
    elif given.command == "run":
        found = json.loads(given.mutants.read_text())
        known = found.setdefault("unmutated", {})
        run(found["mutants"], given.jobs, given.slowest, given.seconds, known)
        given.results.write_text(json.dumps(found, indent = 1))
    else:
        print("\n".join(table(json.loads(given.results.read_text())["mutants"])))


if __name__ == "__main__":
    main()
