"""docs/security.md lists every limit with the test that holds it, and those tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
_ID = re.compile(r"`((?:\w+/)+\w+\.py)::(\w+)`")
PAGES = ("docs/security.md", "SECURITY.md")


def defined(path: Path) -> set[str]:
    """The names of the functions in a file, methods too."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page: str) -> None:
    """A limit whose test was renamed or dropped would else be promised by nothing."""
    named = _ID.findall((ROOT / page).read_text())

    assert named
    assert [each for each in named if not (TESTS / each[0]).is_file()] == []
    assert [each for each in named if each[1] not in defined(TESTS / each[0])] == []


def test_every_limit_has_a_test() -> None:
    """Each row of each table names at least one."""
    rows = [line for line in (ROOT / PAGES[0]).read_text().splitlines() if line.startswith("| ")]
    limits = [row for row in rows if not row.startswith("| limit |")]

    assert len(limits) > 60
    assert [row for row in limits if not _ID.search(row.rpartition(" | ")[2])] == []


def test_every_promise_has_a_test() -> None:
    """Each promise of SECURITY.md names the tests that hold it."""
    section = (ROOT / PAGES[1]).read_text().partition("## What is promised")[2]
    promises = re.split(r"^- ", section.partition("\n## ")[0], flags=re.MULTILINE)[1:]

    assert len(promises) >= 8
    assert [each for each in promises if not _ID.search(each)] == []
