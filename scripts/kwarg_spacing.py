#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""Unsloth's code style on top of ruff's: ``f(x, dim = 0)``.

- spaces around ``=`` in keyword arguments and defaults (not inside f-strings, where ``{f(a=1)=}``
  prints its own text);
- a ``def`` with three or more parameters and a default has one parameter a line; any other goes on
  one line, or its parameters on the next, if that fits into 100 columns;
- no blank line after the imports of an indented block of up to three statements.

    python scripts/kwarg_spacing.py FILE...           rewrite files in place
    python scripts/kwarg_spacing.py --ruff FILE...    run `ruff format` on them first
    python scripts/kwarg_spacing.py --check FILE...   change nothing, exit 1 if something would change

ruff takes the spaces out again, so the two are run together and only their joint result is compared
with the file: running them twice changes nothing.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import libcst as cst
from libcst import matchers

LINE_LENGTH = 100
RUFF_VERSION = "0.6.9"  # Unsloth's; later ones lay out code differently
SPACED = cst.AssignEqual(cst.SimpleWhitespace(" "), cst.SimpleWhitespace(" "))
SPACE = cst.SimpleWhitespace(" ")
NOTHING = cst.SimpleWhitespace("")


def format_source(source: str, for_ruff: bool = False) -> str:
    """The source in this style; idempotent. Raises ValueError for text that is not Python.

    for_ruff: parameters that need not stand one a line are joined even if they do not fit: ruff breaks them.
    """
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError as error:
        raise ValueError(f"line {error.raw_line}: {error.message}") from None
    return module.visit(_Style(module.default_indent, for_ruff)).code


class _Style(cst.CSTTransformer):
    def __init__(self, indent: str, for_ruff: bool):
        super().__init__()
        self.default_indent = indent
        self.for_ruff = for_ruff
        self.indents: List[str] = []

    def visit_IndentedBlock(self, node):
        self.indents.append(self.default_indent if node.indent is None else node.indent)

    def leave_IndentedBlock(self, original_node, updated_node):
        self.indents.pop()
        body = list(updated_node.body)
        for place in range(1, len(body) if len(body) <= 3 else 0):
            if _is_import(body[place - 1]) and not _is_import(body[place]):
                body[place] = _without_blank_lines(body[place])
        return updated_node.with_changes(body = body)

    def visit_FormattedString(self, node):
        return False

    def leave_Arg(self, original_node, updated_node):
        if updated_node.keyword is None:
            return updated_node
        return updated_node.with_changes(equal = _spaced(updated_node.equal))

    def leave_Param(self, original_node, updated_node):
        if updated_node.default is None:
            return updated_node
        return updated_node.with_changes(equal = _spaced(updated_node.equal))

    def leave_FunctionDef(self, original_node, updated_node):
        # A comment between parameters has a place only where it stands.
        whitespace = (updated_node.whitespace_before_params, updated_node.params)
        if any(matchers.findall(node, matchers.Comment()) for node in whitespace):
            return updated_node
        parameters = _parameters(updated_node.params)
        if len(parameters) >= 3 and any(p.default is not None for p in parameters):
            return _one_a_line(updated_node)
        joined = _joined(updated_node)
        if self.for_ruff:
            return joined
        first_line = "".join(self.indents) + _signature(joined)
        fits = "\n" not in first_line and len(first_line) <= LINE_LENGTH
        return joined if fits else updated_node


def _is_import(statement) -> bool:
    imports = (cst.Import, cst.ImportFrom)
    return isinstance(getattr(statement, "body", None), tuple) and isinstance(
        statement.body[0], imports
    )


def _without_blank_lines(statement):
    lines = getattr(statement, "leading_lines", ())
    kept = getattr(statement, "decorators", ()) or any(line.comment for line in lines)
    return statement if kept or not lines else statement.with_changes(leading_lines = [])


def _spaced(equal):
    """An ``=`` with spaces; one that stands beside a line break is left as it is."""
    sides = (
        (equal.whitespace_before, equal.whitespace_after)
        if equal != cst.MaybeSentinel.DEFAULT
        else ()
    )
    broken = any(isinstance(side, cst.ParenthesizedWhitespace) for side in sides)
    return equal if broken else SPACED


def _signature(function: cst.FunctionDef) -> str:
    """``def f(...) -> T:`` as it would be written, without decorators and body."""
    bare = function.with_changes(
        decorators = [],
        leading_lines = [],
        lines_after_decorators = [],
        body = cst.SimpleStatementSuite([cst.Pass()], leading_whitespace = NOTHING),
    )
    code = cst.Module([]).code_for_node(bare).rstrip("\n")
    return code[: -len("pass")]


def _parameters(params: cst.Parameters) -> list:
    star = [params.star_arg] if isinstance(params.star_arg, cst.Param) else []
    kwargs = [params.star_kwarg] if params.star_kwarg else []
    return [*params.posonly_params, *params.params, *star, *params.kwonly_params, *kwargs]


def _items(params: cst.Parameters) -> list:
    """(field, index or None, node) of everything between the parentheses, in order."""
    items = [("posonly_params", i, p) for i, p in enumerate(params.posonly_params)]
    if isinstance(params.posonly_ind, cst.ParamSlash):
        items.append(("posonly_ind", None, params.posonly_ind))
    items += [("params", i, p) for i, p in enumerate(params.params)]
    if isinstance(params.star_arg, (cst.Param, cst.ParamStar)):
        items.append(("star_arg", None, params.star_arg))
    items += [("kwonly_params", i, p) for i, p in enumerate(params.kwonly_params)]
    if params.star_kwarg is not None:
        items.append(("star_kwarg", None, params.star_kwarg))
    return items


def _laid_out(
    function: cst.FunctionDef,
    before: cst.BaseParenthesizableWhitespace,
    between: cst.BaseParenthesizableWhitespace,
    last_comma,
) -> cst.FunctionDef:
    """The function with this whitespace before its first parameter and after every comma."""
    params = function.params
    items = _items(params)
    comma = cst.Comma(whitespace_after = between)
    for position, (field, index, node) in enumerate(items):
        changes = {"comma": last_comma if position == len(items) - 1 else comma}
        if isinstance(node, cst.Param):
            changes["whitespace_after_param"] = NOTHING
        elif isinstance(node, cst.ParamSlash):
            changes["whitespace_after"] = NOTHING
        changed = node.with_changes(**changes)
        if index is not None:
            group = list(getattr(params, field))
            group[index] = changed
            changed = group
        params = params.with_changes(**{field: changed})
    return function.with_changes(params = params, whitespace_before_params = before)


def _line_break(indent: str) -> cst.ParenthesizedWhitespace:
    return cst.ParenthesizedWhitespace(indent = True, last_line = cst.SimpleWhitespace(indent))


def _one_a_line(function: cst.FunctionDef) -> cst.FunctionDef:
    step = _line_break("    ")
    return _laid_out(function, step, step, cst.Comma(whitespace_after = _line_break("")))


def _joined(function: cst.FunctionDef) -> cst.FunctionDef:
    # A bare star is followed by a parameter, so it is never last; a slash may be, with its own comma rule.
    return _laid_out(function, NOTHING, SPACE, cst.MaybeSentinel.DEFAULT)


def ruff_format(source: str, path: Path) -> str:
    """What ``ruff format`` makes of the text. Raises ValueError with ruff's words if it cannot."""
    command = [_ruff(), "format", "--isolated", f"--line-length={LINE_LENGTH}"]
    command += ["--target-version=py39", f"--stdin-filename={path}", "-"]
    done = subprocess.run(command, input = source.encode(), capture_output = True)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors = "replace").strip())
    return done.stdout.decode()


@functools.lru_cache(maxsize = None)
def _ruff() -> str:
    """ruff of this Python environment, else the one on PATH. Raises ValueError for another version."""
    beside = Path(sys.executable).with_name("ruff.exe" if sys.platform == "win32" else "ruff")
    ruff = str(beside) if beside.exists() else "ruff"
    try:
        found = subprocess.run([ruff, "--version"], capture_output = True, text = True).stdout.split()
    except OSError:
        found = []
    if found[1:2] != [RUFF_VERSION]:
        raise ValueError(
            f"ruff {RUFF_VERSION} is needed, {' '.join(found[1:]) or 'none'} is there; "
            "run `pre-commit run format --all-files`, which brings it"
        )
    return ruff


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description = __doc__.splitlines()[0])
    parser.add_argument("files", nargs = "+", type = Path)
    parser.add_argument("--ruff", action = "store_true", help = "run `ruff format` first")
    parser.add_argument("--check", action = "store_true", help = "change nothing")
    options = parser.parse_args(arguments)
    code = 0
    for path in options.files:
        try:
            source = path.read_bytes().decode("utf-8")
            wanted = ruff_format(format_source(source, True), path) if options.ruff else source
            wanted = format_source(wanted)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            print(f"{path}: cannot format: {error}", file = sys.stderr)
            code = 2
            continue
        if wanted == source:
            continue
        code = max(code, 1)
        print(f"{path}: {'would be ' if options.check else ''}reformatted")
        if not options.check:
            path.write_bytes(wanted.encode("utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
