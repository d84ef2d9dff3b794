#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Put single faults into the code and see whether the tests meant for it notice.

    python scripts/mutants.py sample --seed 21 --count 200 mutants.json      (needs cosmic-ray)
    python scripts/mutants.py run mutants.json results.json --jobs 2
    python scripts/mutants.py table results.json

A mutant is one of cosmic-ray's at a seeded place of what lands in Unsloth, or of patching.py, hooks.py and
fingerprints.py. Each runs against its own patch's tests in the import form, until the first failure, which has
to pass unmutated. A run of more than ``--slowest`` seconds that ends unmutated counts as noticed.
Results are saved after each mutant; the same command goes on where it was stopped.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import importlib
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
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


def _hunk(code, mutated):
    """What to find and what to put there: the lines that differ, and as many around as make them the only ones."""
    old, new = code.splitlines(True), mutated.splitlines(True)
    start, end = 0, 0
    while old[start] == new[start]:
        start += 1
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    for around in itertools.count(1):
        first, last = max(0, start - around), max(0, end - around)
        find = "".join(old[first : len(old) - last])
        if code.count(find) == 1:
            return dict(find = find, put = "".join(new[first : len(new) - last]))


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
            new = new.strip(), tests = tests[file], **_hunk(code, mutated),
        ))  # fmt: skip
        if len(drawn) == count:
            break
    return dict(seed = seed, places = len(places), mutants = drawn)


# Imports take longer than most tests: done once, then forked. Unsloth's own, too, for a mutant in a module
# that it does not import.
PRELOADED = (
    "torch torch._inductor.compile_fx torch._inductor.select_algorithm torch.distributed.fsdp "
    "transformers.trainer datasets peft trl bitsandbytes pytest"
)


def serve(tree):
    """The modules of ours that are loaded; then for each line {environment, arguments, log} of stdin: pytest
    in a fork, its pid, its code. tree: the project whose Unsloth to import first; None: without.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in PRELOADED.split() if tree is None else ("unsloth_patches", "unsloth", "pytest"):
        sys.path[0] = str(tree)
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    ours = [name for name in sys.modules if name.startswith("unsloth_patches.")]
    print(json.dumps(ours), file = answers, flush = True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.setsid()
                log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.chdir(asked["cwd"])
                os.environ.update(asked["environment"])
                tempfile.tempdir = None
                sys.path[0] = asked["cwd"]
                import pytest

                code = pytest.main(asked["arguments"])
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(int(code))
        print(pid, file = answers, flush = True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file = answers, flush = True)


class Worker:
    """A copy of the project, and a process per backend that has the slow imports done."""

    def __init__(self, tree):
        self.tree, self.servers = tree, {}
        for name in ("unsloth_patches", "tests", "scripts", "patches", "docs"):
            shutil.copytree(ROOT / name, tree / name, ignore = shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
            shutil.copy(ROOT / file, tree)

    def close(self):
        for server in self.servers.values():
            server.kill()
            server.wait()

    def _environment(self, scratch):
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        others = [each for each in path if each and not (Path(each) / "unsloth_patches").is_dir()]
        return {
            "UNSLOTH_PATCHES_FORM": "import",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(self.tree), *others]),
            "UNSLOTH_COMPILE_LOCATION": f"{scratch}/compiled",
            "TMPDIR": scratch,
        }

    def _server(self, interpreted, full):
        server = self.servers.get((interpreted, full))
        if server is None or server.poll() is not None:
            chosen = {"TRITON_INTERPRET": "1", "UNSLOTH_ALLOW_CPU": "1"} if interpreted else {}
            environment = {**os.environ, **self._environment(str(self.tree)), **chosen}
            server = self.servers[interpreted, full] = subprocess.Popen(
                [sys.executable, __file__, "serve", *([str(self.tree)] if full else [])],
                stdin = subprocess.PIPE, stdout = subprocess.PIPE, stderr = subprocess.DEVNULL,
                env = environment, encoding = "utf-8",
            )  # fmt: skip
            server.loaded = json.loads(server.stdout.readline())
        return server

    def server_for(self, interpreted, module):
        """A server that has not loaded ``module``, where the mutant will be. Asked before it is."""
        if module.startswith("unsloth_patches.unsloth."):
            server = self._server(interpreted, True)
            if module not in server.loaded:
                return server
        return self._server(interpreted, False)

    def run(self, tests, timeout, server):
        """(exit code, or None when it was stopped; the last lines) of pytest in a fork of ``server``."""
        scratch = tempfile.mkdtemp(prefix = "run-", dir = self.tree)
        log = Path(scratch) / "log"
        arguments = [*tests, "-x", "-q", "--tb=line", "--color=no", "-p", "no:cacheprovider"]
        arguments.append(f"--rootdir={self.tree}")
        asked = dict(
            cwd = str(self.tree), environment = self._environment(scratch), arguments = arguments,
            log = str(log),
        )  # fmt: skip
        began = time.monotonic()
        print(json.dumps(asked), file = server.stdin, flush = True)
        pid = int(server.stdout.readline())
        stopper = threading.Timer(timeout, _kill_group, (pid,))
        stopper.start()
        code = int(server.stdout.readline() or 99)  # nothing: the server itself was killed
        stopper.cancel()
        _kill_group(pid)  # ranks and compile workers of the test too
        lines = log.read_text("utf-8", errors = "replace").strip().splitlines()[-6:]
        shutil.rmtree(scratch, ignore_errors = True)
        stopped = time.monotonic() - began >= timeout
        return (None if stopped else code), lines or ["no output"]

    def by_backend(self, tests):
        """The tests of one process each: those of the CPU backend first, which are quick."""
        groups = collections.defaultdict(list)
        for test in tests:
            text = (self.tree / test).read_text("utf-8")
            interpreted = 'require("interpreter")' in text
            groups[interpreted, 'require("gloo")' in text].append(test)
        return sorted(groups.items())


def _kill_group(pid):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _put_in(mutant, code):
    """``code`` with the mutant in it; None where that place is no longer there."""
    return code.replace(mutant["find"], mutant["put"]) if code.count(mutant["find"]) == 1 else None


def run(found, save, jobs, slowest, seconds, again):
    """Adds ``outcome`` to each mutant: noticed, survived, or why it did not run; keeps those that are there.

    What notices a mutant has to pass without it: found["confirmed"] keeps test -> whether it does.
    """
    deadline = time.monotonic() + seconds
    workers, lock, done = queue.Queue(), threading.Lock(), []
    confirmed = found.setdefault("confirmed", {})
    todo = [
        m for m in found["mutants"] if m.get("outcome", "not run").startswith(("not run", *again))
    ]
    whole = tempfile.mkdtemp(prefix = "mutants-")
    for number in range(jobs):
        workers.put(Worker(Path(whole) / str(number)))

    def passes_unmutated(worker, what, server, limit):
        """what: a test, or files where none is named (an error while collecting, or an endless run)."""
        key = " ".join(what)
        if key not in confirmed:
            code, last = worker.run(what, limit, server)
            confirmed[key] = code == 0
            if code != 0:
                print(f"fails unmutated: {key}: {last}", flush = True)
        return confirmed[key]

    def judge(mutant, worker):
        file, failing = worker.tree / mutant["file"], []
        original = file.read_text(encoding = "utf-8")
        mutated = _put_in(mutant, original)
        if mutated is None:
            return "not run: this code has changed"
        module = mutant["file"][: -len(".py")].replace("/", ".")
        for (interpreted, _), tests in worker.by_backend(mutant["tests"]):
            server = worker.server_for(interpreted, module)
            limit = min(slowest, deadline + 60 - time.monotonic())
            if limit < 60:
                return "not run: out of time"
            known = [name for name, passes in confirmed.items() if not passes and "::" in name]
            arguments = [*tests, *(f"--deselect={name}" for name in known)]
            _write(file, mutated)
            try:
                code, last = worker.run(arguments, limit, server)
            finally:
                _write(file, original)
            if code == 0 and not any(" passed" in line for line in last[-1:]):
                failing.append("all skipped")
            if code == 0:
                continue
            if code is None and limit < slowest:
                return "not run: out of time"
            failed = [line[len("FAILED ") :] for line in last if line.startswith("FAILED ")]
            names = [line.partition(" - ")[0] for line in failed]
            if not passes_unmutated(worker, names or tests, server, limit):
                failing += names or tests
                continue
            mutant["by"] = [*(names or tests), *(last[-3:] if code else ["endless"])]
            return "noticed"
        return "survived" + f" (failing unmutated: {failing})" * bool(failing)

    def follow(mutant):
        worker = workers.get()
        try:
            mutant["outcome"] = judge(mutant, worker)
        finally:
            workers.put(worker)
        place = f"{mutant['file'].replace('unsloth_patches/', '')}:{mutant['line']}"
        with lock:
            done.append(mutant)
            save()
            print(
                f"{time.strftime('%T')} {len(done)}/{len(todo)} {mutant['outcome']:9} {place} "
                f"{mutant['new'][:70]}", flush = True,
            )  # fmt: skip

    def cost(mutant):
        texts = [(ROOT / test).read_text("utf-8") for test in mutant["tests"]]
        return sum('require("interpreter")' in text for text in texts), len(texts)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(follow, sorted(todo, key = cost)))  # the quick ones first
    while not workers.empty():
        workers.get().close()
    shutil.rmtree(whole, ignore_errors = True)


def _write(file, code):
    file.write_text(code, encoding = "utf-8")
    for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):  # which go by size and second
        cached.unlink()


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
    running.add_argument("--slowest", type = float, default = 900, help = "seconds the tests may take")
    running.add_argument("--seconds", type = float, default = 1e6, help = "for everything")
    running.add_argument("--survivors", action = "store_true", help = "run those that survived again")
    commands.add_parser("serve").add_argument("tree", nargs = "?")
    commands.add_parser("table").add_argument("results", type = Path)
    given = parser.parse_args()
    if given.command == "sample":
        given.mutants.write_text(json.dumps(sample(given.seed, given.count), indent = 1))
    elif given.command == "run":
        file = given.results if given.results.exists() else given.mutants  # goes on where it was
        found = json.loads(file.read_text())

        def save():
            partly = given.results.with_suffix(".partly")
            partly.write_text(json.dumps(found, indent = 1))
            partly.replace(given.results)

        again = ("survived",) if given.survivors else ()
        run(found, save, given.jobs, given.slowest, given.seconds, again)
        save()
    elif given.command == "serve":
        serve(given.tree)
    else:
        print("\n".join(table(json.loads(given.results.read_text())["mutants"])))


if __name__ == "__main__":
    main()
