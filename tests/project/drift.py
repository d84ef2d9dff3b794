# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Releases that Unsloth might publish: the installed sources with one target changed, seeded.

python tests/project/drift.py 200             every variant judged by the sources, as the hooks judge
python tests/project/drift.py 200 --import    and Unsloth imported with them, some in each process
python tests/project/drift.py 200 --tests     of those with which Unsloth itself still runs and that no patch refuses,
                                              the patches' tests, too, some in each process (half an hour of a core);
                                              --tests 3: of the first three groups
"""

import argparse
import ast
import collections
import copy
import functools
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from unsloth_patches import fingerprints, upstream_source  # noqa: E402
from unsloth_patches.registry import PATCHES  # noqa: E402

HARMLESS = ("reformat",)  # what no patch may be skipped for
MUTATIONS = (
    "rename_parameter",
    "swap_arguments",
    "add_keyword",
    "change_default",
    "move_function",
    "add_branch",
    "reformat",
)


@dataclass(frozen = True)
class Variant:
    """A target's home with one change. files: module -> its new text; node: the changed function."""

    patch: str
    target: object
    mutation: str
    files: dict
    node: ast.AST

    def __str__(self):
        return f"{self.patch}: {self.mutation} of {self.target.attribute} for {self.target.replacement}"

    def find_file(self, folder):
        """Module -> file, this variant's first."""

        def find(module):
            if module in self.files:
                return folder / f"{module}.py"
            return upstream_source.source_file(module)

        for module, text in self.files.items():
            (folder / f"{module}.py").write_text(text, encoding = "utf-8")
        return find


@functools.lru_cache(None)
def home_of(module, name):
    """(module, definitions) where a name is defined, through imports."""
    return fingerprints.find_definitions(module, name, upstream_source.source_file)


def variants(count, seed):
    """``count`` variants, spread over all targets that have a definition, and over the mutations."""
    choose = random.Random(seed)
    targets = [(patch.name, target) for patch in PATCHES for target in patch.targets]
    made, tried = [], 0
    while len(made) < count:
        if tried % len(targets) == 0:
            choose.shuffle(targets)
        patch, target = targets[tried % len(targets)]
        # Each pass over the targets begins at another mutation.
        at = tried + tried // len(targets)
        variant = mutate(patch, target, MUTATIONS[at % len(MUTATIONS)], choose)
        tried += 1
        made += [variant] if variant else []
    return made


def mutate(patch, target, mutation, choose):
    """None where the target has no definition, or its signature nothing to change."""
    module, nodes = home_of(target.module, target.name)
    if not nodes or mutation == "move_function" and "." in target.name:
        return None
    text = upstream_source.source_file(module).read_text(encoding = "utf-8")
    name = target.name if module == target.module else nodes[0].name
    spans = [(node.lineno - 1, node.end_lineno, copy.deepcopy(node)) for node in nodes]
    changed = None
    for _, _, node in spans:  # a release that changes one device's branch changes them all
        function = _function_of(node, choose if changed is None else random.Random(0))
        if function is None:
            return None
        if mutation not in (*HARMLESS, "move_function"):
            if not globals()[f"_{mutation}"](function, choose):
                return None
        changed = changed or function
    lines = text.splitlines()
    if mutation == "move_function":
        return _moved(patch, target, module, name, text, spans, changed)
    for start, end, node in reversed(spans):
        node.decorator_list, decorators = [], node.decorator_list  # their lines stay as they are
        body = textwrap.indent(ast.unparse(node), " " * node.col_offset).splitlines()
        node.decorator_list = decorators
        lines[start:end] = ["# reformatted" if mutation == "reformat" else "", *body]
        if decorators:  # nothing may stand between a decorator and its function that is no comment
            lines[start] = "# changed"
    return Variant(patch, target, mutation, {module: "\n".join(lines) + "\n"}, changed)


def _moved(patch, target, module, name, text, spans, changed):
    """The function in a new module beside its home, which imports it back."""
    new = f"{module}_moved"
    lines = text.splitlines()
    moved = [textwrap.dedent("\n".join(lines[start:end])) for start, end, _ in spans]
    for start, end, node in reversed(spans):
        first = min([start] + [each.lineno - 1 for each in node.decorator_list])
        indent = " " * node.col_offset
        lines[first:end] = [f"{indent}from {new} import {name}"]
    # With the names that its home has by then; ``import *`` would want all of them.
    names = "{name: value for name, value in vars(home).items() if not name.startswith('__')}"
    head = f"import sys\nhome = sys.modules[{module!r}]\nglobals().update({names})\n"
    # What its home defines further down, as if it imported that from there.
    there = f"vars(__import__('sys').modules[{new!r}])"
    last = f"{there}.update({{**globals(), **{there}}})\n"
    files = {module: "\n".join([*lines, last]), new: head + moved[0] + "\n"}
    if any(node.decorator_list for _, _, node in spans):
        return None  # a fingerprint has the decorators too
    return Variant(patch, target, "move_function", files, changed)


def _function_of(node, choose):
    """The function itself; of a class one of its methods."""
    if hasattr(node, "args"):
        return node
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    return choose.choice(methods) if methods else None


def _named(function):
    arguments = function.args
    return [each for each in [*arguments.posonlyargs, *arguments.args] if each.arg != "self"]


def _rename_parameter(function, choose):
    parameters = _named(function) + function.args.kwonlyargs
    if not parameters:
        return False
    chosen = choose.choice(parameters)
    old, chosen.arg = chosen.arg, f"{chosen.arg}_renamed"
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == old:
            node.id = chosen.arg
    return True


def _swap_arguments(function, choose):
    parameters = _named(function)
    if len(parameters) < 2:
        return False
    one, other = choose.sample(parameters, 2)
    one.arg, other.arg = other.arg, one.arg
    one.annotation, other.annotation = other.annotation, one.annotation
    return True


def _add_keyword(function, choose):
    function.args.kwonlyargs.append(ast.arg("a_new_option"))
    function.args.kw_defaults.append(ast.Constant(None))
    return True


def _change_default(function, choose):
    places = [i for i, each in enumerate(function.args.defaults) if isinstance(each, ast.Constant)]
    if not places:
        return False
    place = choose.choice(places)
    old = function.args.defaults[place].value
    function.args.defaults[place] = ast.Constant(not old if isinstance(old, bool) else 7)
    return True


def _add_branch(function, choose):
    names = [each.arg for each in _named(function) + function.args.kwonlyargs]
    test = ast.Constant(False) if not names else ast.Name(choose.choice(names))
    branch = ast.If(ast.Compare(test, [ast.Is()], [ast.Constant(Ellipsis)]), [ast.Return(None)], [])
    function.body.insert(1 if ast.get_docstring(function) else 0, branch)
    ast.fix_missing_locations(function)
    return True


# --- judging -----------------------------------------------------------------------------------


def judge(variant, folder):
    """(reason that the hooks give, what is wrong with that); the second is empty where all is well."""
    reason = fingerprints.target_misfit(variant.target, variant.find_file(folder))
    if variant.mutation in HARMLESS:
        return reason, f"skipped for nothing: {reason}" if reason else ""
    if reason:
        return reason, "" if variant.target.attribute in reason else "does not name the target"
    if variant.mutation == "move_function":  # what was only imported before is imported still
        return "", "" if variant.target.imported else "did not notice that it moved"
    if variant.target.fingerprints:
        return "", "a replacement of the body did not notice that it changed"
    return "", not_passed_on(variant)


class _Anything:
    """An argument that a wrapper may look at before it passes it on."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __iter__(self):
        return iter(())

    def modules(self):
        return []

    def forward(self):
        pass


def refused(variant, folder):
    """Whether any patch of a changed file is skipped with the variant, not its own alone."""
    find_file = variant.find_file(folder)
    return any(
        fingerprints.target_misfit(target, find_file)
        for target in (target for patch in PATCHES for target in patch.targets)
        if home_of(target.module, target.name)[0] in variant.files
    )


def not_passed_on(variant):
    """What a wrapper does not hand to a stock function of the variant's signature as it was called;
    empty where it hands on everything, so that the change is upstream's own affair."""
    path, _, name = variant.target.replacement.partition(":")
    decorator = getattr(importlib.import_module(f"unsloth_patches.unsloth.{path}"), name)
    stub = copy.deepcopy(variant.node)
    stub.decorator_list, stub.returns = [], None
    for each in ast.walk(stub.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    # Constants stay, for a wrapper that has the same; other defaults can name what only upstream has.
    stub.args.defaults = [_constant(each) for each in stub.args.defaults]
    stub.args.kw_defaults = [each and _constant(each) for each in stub.args.kw_defaults]
    stub.body = ast.parse("seen.append(dict(locals()))\nreturn None").body
    seen = []
    namespace = {"seen": seen, "__name__": variant.target.module}
    exec(ast.unparse(ast.fix_missing_locations(stub)), namespace)
    stock = namespace[stub.name]
    try:
        new = decorator(stock)
    except NotImplementedError:
        return ""  # noticed at the latest moment, with a reason
    except Exception as error:
        # What a decorator asks of its whole module is asked of the real one, with the import.
        return (
            "" if isinstance(error, (KeyError, ImportError)) else f"the decorator fails: {error!r}"
        )
    return _compare_calls(new, stub, seen)


def _constant(default):
    return default if isinstance(default, ast.Constant) else ast.Constant(None)


def _compare_calls(new, stub, seen):
    """Called with everything, and with what has no default: stock sees the same, and its own defaults."""
    arguments = stub.args
    names = [each.arg for each in [*arguments.posonlyargs, *arguments.args]]
    keywords = [each.arg for each in arguments.kwonlyargs]
    required = names[: len(names) - len(arguments.defaults)]
    if not required:
        return ""  # it takes anything
    asked = [each for each, default in zip(keywords, arguments.kw_defaults) if default is None]
    return _compare_call(new, names, keywords, stub, seen) or _compare_call(
        new, required, asked, stub, seen
    )


def _compare_call(new, names, keywords, stub, seen):
    expected = {name: {} if name == "kwargs" else _Anything() for name in [*names, *keywords]}
    values = [expected[name] for name in names]
    arguments = stub.args
    texts = [*arguments.defaults, *filter(None, arguments.kw_defaults)]
    with_default = [each.arg for each in [*arguments.posonlyargs, *arguments.args]]
    with_default = with_default[len(with_default) - len(arguments.defaults) :]
    with_default += [
        each.arg for each, text in zip(arguments.kwonlyargs, arguments.kw_defaults) if text
    ]
    for name, text in zip(with_default, texts):
        expected.setdefault(name, text.value)
    del seen[:]
    try:
        with _quiet():
            result = new(*values, **{name: expected[name] for name in keywords})
            if hasattr(result, "__enter__"):
                result.__enter__()
    except TypeError as error:
        # Of another kind where it looks into its arguments deeper than this stand-in goes.
        own = re.search(r"unexpected keyword|positional argument|multiple values", str(error))
        return f"{error!r}" if own else ""
    except Exception:
        return ""
    if not seen:
        return ""  # it made a function that stock has no part in until it is called
    wrong = [
        name
        for name, value in expected.items()
        if seen[-1].get(name) is not value and seen[-1].get(name) != value
    ]
    return f"not passed on: {', '.join(wrong)}" if wrong else ""


def _quiet():
    import contextlib
    import io
    return contextlib.redirect_stdout(io.StringIO())


# --- importing ---------------------------------------------------------------------------------

IMPORT = """
import json
import unsloth_patches
import unsloth, unsloth.chat_templates
rows = {row.name: row for row in unsloth_patches.status()}
for name, row in rows.items():
    done = unsloth_patches.states.records()[name].replaced
    assert row.state != "failed", row
    assert row.state not in ("skipped", "pending") or not done, f"half applied: {row}"
print("STATES", json.dumps({name: [row.state, row.reason] for name, row in rows.items()}))
"""
TOGETHER = 8  # variants of one import


def _on_cpu(variant):
    return ".cpu" in variant.target.module or "_cpu_init" in variant.target.module


def groups(found, for_tests = False):
    """Variants that one release can have together, on one backend: of other files and other patches; for tests,
    where none is noticed, as many as are of other files or the same change for several patches."""

    def fits(variant, group):
        apart = all(not set(other.files) & set(variant.files) for other in group)
        if for_tests:
            return apart or any(other.files == variant.files for other in group)
        return apart and len(group) < TOGETHER and variant.patch not in {v.patch for v in group}

    made = []
    for variant in found:
        for group in made:
            if _on_cpu(group[0]) == _on_cpu(variant) and fits(variant, group):
                group.append(variant)
                break
        else:
            made.append([variant])
    return made


def release_of(group, folder):
    """Put the variants before the installed sources; the environment that finds them there."""
    modules = {module for variant in group for module in variant.files}
    for package in {module.partition(".")[0] for module in modules}:
        (folder / package).mkdir()
        real = upstream_source.source_file(package).parent
        _mirror(real, folder / package, {m for m in modules if m.startswith(package + ".")})
    for module, text in (item for variant in group for item in variant.files.items()):
        file = folder / (module.replace(".", "/") + ".py")
        if not file.is_file() and file.with_suffix("").is_dir():
            file = file.with_suffix("") / "__init__.py"
        file.unlink(missing_ok = True)
        file.write_text(text, encoding = "utf-8")
    path = filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")])
    return dict(os.environ, UNSLOTH_PATCHES_QUIET = "1", PYTHONPATH = os.pathsep.join(path))


def import_with(group, reasons, world, folder):
    """Import Unsloth with the variants in front; what is wrong with what the hooks made of them."""
    if not _on_cpu(group[0]):
        world = dict(world, UNSLOTH_ALLOW_CPU = "1", TRITON_INTERPRET = "1")
    code = [sys.executable, "-c", IMPORT]
    done = subprocess.run(code, capture_output = True, text = True, env = world, cwd = folder)
    line = next((each for each in done.stdout.splitlines() if each.startswith("STATES ")), "")
    if done.returncode or not line:
        return [" and ".join(map(str, group)) + f"\n{done.stderr[-2000:]}"]
    states = json.loads(line.partition(" ")[2])
    return [
        f"{variant}: applied, although {reason}"
        for variant, reason in zip(group, reasons)
        if reason and states[variant.patch][0] == "applied"
    ]


def leaves_callers_whole(variant):
    """Whether Unsloth itself still runs with it: its own callers are not changed with a function."""
    return variant.mutation in (*HARMLESS, "move_function", "add_branch", "add_keyword")


def test_with(group, world):
    """The tests of the patches that the group's variants are of."""
    names = {variant.patch for variant in group}
    files = [test for patch in PATCHES if patch.name in names for test in patch.tests]
    code = [sys.executable, str(ROOT / "scripts/patches.py"), "test", "--form", "import", *files]
    done = subprocess.run(code, capture_output = True, text = True, env = world)
    print(*re.findall(r"^import / .*", done.stdout, re.MULTILINE), sep = "\n", flush = True)
    # Of each failure its name and what it says: the whole text can be megabytes.
    told = re.findall(r"^(?:_{3,} .+ _{3,}|E  .*|.*ended with code.*)$", done.stdout, re.MULTILINE)
    failed = "\n".join([f"tests of {', '.join(sorted(names))}:", *told[-200:]])
    return [failed] if done.returncode else []


def _mirror(real, folder, modules):
    """Links to everything but the files of these modules and the folders that lead there."""
    paths = {Path(*module.split(".")[1:]) for module in modules}
    for entry in real.iterdir():
        inside = {Path(*path.parts[1:]) for path in paths if path.parts[0] == entry.name}
        if entry.is_dir() and inside:
            (folder / entry.name).mkdir()
            _mirror(
                entry, folder / entry.name, {".".join(["x", *p.parts]) for p in inside if p.parts}
            )
        elif entry.name != "__pycache__":
            (folder / entry.name).symlink_to(entry)


def main():
    parser = argparse.ArgumentParser(description = __doc__)
    parser.add_argument("count", type = int, nargs = "?", default = 200)
    parser.add_argument("--seed", type = int, default = 3407)
    parser.add_argument("--import", dest = "imports", action = "store_true")
    groups_option = dict(type = int, nargs = "?", const = sys.maxsize, default = 0)
    parser.add_argument("--tests", **groups_option, metavar = "GROUPS")
    options = parser.parse_args()
    counts, faults, reasons, everywhere = collections.Counter(), [], {}, {}
    made = variants(options.count, options.seed)
    for variant in made:
        with tempfile.TemporaryDirectory() as folder:
            reasons[id(variant)], wrong = judge(variant, Path(folder))
            everywhere[id(variant)] = refused(variant, Path(folder))
        counts[variant.mutation, "noticed" if reasons[id(variant)] else "harmless"] += 1
        faults += [f"{variant}: {wrong}"] if wrong else []
    for (mutation, verdict), count in sorted(counts.items()):
        print(f"{mutation:18} {verdict:9} {count}", flush = True)
    tried = made
    if options.tests:
        tried = [v for v in made if leaves_callers_whole(v) and not everywhere[id(v)]]
    releases = groups(tried, for_tests = not options.imports)
    releases = releases[: None if options.imports else options.tests]
    for number, group in enumerate(releases, 1):
        told = [reasons[id(each)] for each in group]
        with tempfile.TemporaryDirectory() as folder:
            world = release_of(group, Path(folder))
            found = import_with(group, told, world, folder)
            found += test_with(group, world) if number <= options.tests else []
        faults += found
        print(
            f"import {number} of {len(releases)}: {len(group)} variants, {len(found)} faults",
            *found,
            sep = "\n",
            flush = True,
        )
    targets = len({variant.target for variant in made})
    print(f"{len(made)} variants over {targets} targets, seed {options.seed}: {len(faults)} faults")
    print(*faults, sep = "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
