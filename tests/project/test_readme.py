# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What people read first is true: links lead somewhere, figures are the committed ones."""

import importlib.util
import re

import pytest
from toy_project import ROOT

from unsloth_patches.registry import PATCHES, SUPPORTED_UPSTREAM

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("patches/*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCED = re.compile(r"```.*?```", re.S)


def anchors(page):
    """The anchors that a forge makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text()), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids = lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    """Relative links only: the others need a network."""
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links {link}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links {link}: no such heading"


def test_the_first_table_has_the_committed_figures():
    """``python scripts/headline.py`` would change nothing."""
    spec = importlib.util.spec_from_file_location("headline", ROOT / "scripts" / "headline.py")
    headline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(headline)
    text = README.read_text()
    assert headline.update(text) == text
    assert text.count("docs/results/") >= len(headline.rows())


def test_every_patch_is_named_and_no_other():
    """Names in braces share their beginning: ``tool-call-{parser, stream}``."""
    table = README.read_text().partition("## The patches")[2].partition("\n\nEach ")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    text = re.sub(
        r"([\w-]+)\{([^}]+)\}",
        lambda found: ", ".join(found[1] + name.strip() for name in found[2].split(",")),
        ", ".join(cells),
    )
    named = {name.strip() for name in text.split(",")} - {"patches", "---"}
    helpers = {patch.name for patch in PATCHES if not patch.modules and not patch.targets}
    assert named == {patch.name for patch in PATCHES} - helpers


def test_the_matrix_of_releases_has_every_patch_and_release():
    """``python scripts/patches.py rebase --all`` writes it."""
    text = (ROOT / "docs/releases.md").read_text().partition("<!-- matrix")[2]
    rows = re.findall(r"^\| (.+) \|$", text.partition("<!-- end")[0], re.M)
    head, _, *cells = [row.split(" | ") for row in rows]
    assert head == ["patch", *SUPPORTED_UPSTREAM]
    assert [row[0] for row in cells] == [patch.name for patch in PATCHES]


def test_it_is_one_page():
    """150 lines, install among the first ten."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert any("pip install" in line for line in lines[:10])
