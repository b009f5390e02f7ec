"""docs/index.md lists every guide once, and what a page links to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "RESULTS.md",
    *sorted(DOCS.glob("*.md")),
]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in titles}


def test_every_guide_is_listed_once():
    """In a row that begins with what one wants to do; the index itself is not."""
    rows = re.findall(
        r"^\| [^|]+ \| \[([\w-]+\.md)\]\(\1\) \|$", (DOCS / "index.md").read_text(), re.M
    )

    assert sorted(rows) == sorted({each.name for each in DOCS.glob("*.md")} - {"index.md"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_linked_is_there(page: Path):
    """The file, and the heading in it."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose(page)):
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page

        assert file.exists(), target
        assert not fragment or fragment in anchors(file), target


def test_the_index_is_on_the_first_page():
    """So that whoever reads the README finds the guides."""
    assert "(docs/index.md)" in (ROOT / "README.md").read_text()
