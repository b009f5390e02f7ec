"""Only system tests assert seconds: on a machine that others use, a right program may be late."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TOOLS_ALONE_ARE_NEEDED

TESTS = Path(__file__).resolve().parent
CLOCK = re.compile(
    r"\b(monotonic|perf_counter|thread_time|process_time|time\.time|cpu_s)\(|\btook_s\b"
)
QUIET = re.compile(r"mark\.(system|gpu)\b")
QUIET_ON_A_CARD = re.compile(r"mark\.gpu\b")
GIVING_UP = re.compile(r"^assert time\.monotonic\(\) < deadline\b")
"""The end of a wait's patience, which is no promise."""


def asserted_seconds(source: str, quiet: re.Pattern[str] = QUIET) -> Iterator[str]:
    """The assertions on a clock outside the tests that may have them, whose marks are *quiet*."""
    if not CLOCK.search(source):
        return
    tree = ast.parse(source)
    own = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    if any(text.startswith("pytestmark") and quiet.search(text) for text in own):
        return
    for node in tree.body:
        marks = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
        if any(quiet.search(mark) for mark in marks):
            continue
        for each in ast.walk(node):
            text = ast.unparse(each) if isinstance(each, ast.Assert) else ""
            is_excused = "not is_timed" in text or GIVING_UP.match(text)
            if CLOCK.search(text) and not is_excused:
                yield text


def test_seconds_are_asserted_in_system_tests_only() -> None:
    """In all others order and counters are, or `tests.support.timing` tells the two apart."""
    paths = [path for path in TESTS.rglob("test_*.py") if "gpu" not in path.parts]
    found = {path.name: [*asserted_seconds(path.read_text())] for path in paths}

    assert {name: texts for name, texts in found.items() if texts} == {}


def test_no_seconds_are_asserted_where_others_run_beside() -> None:
    """Not even in the system tests there."""
    paths = [path for path in TESTS.rglob("test_*.py") if "gpu" not in path.parts]
    beside = [
        path
        for path in paths
        if str(path.relative_to(TESTS.parent)).startswith(TOOLS_ALONE_ARE_NEEDED)
    ]
    found = {path.name: [*asserted_seconds(path.read_text(), QUIET_ON_A_CARD)] for path in beside}

    assert len(beside) > 20
    assert {name: texts for name, texts in found.items() if texts} == {}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def test_a():\n    assert time.monotonic() - began < 1", 1),
        ("class TestA:\n    def test_a(self):\n        assert took_s < 1", 1),
        ("@pytest.mark.full\ndef test_a():\n    assert took_s < 1", 1),
        ("@pytest.mark.system\ndef test_a():\n    assert took_s < 1", 0),
        ("pytestmark = pytest.mark.system\ndef test_a():\n    assert took_s < 1", 0),
        ("@TIMED\ndef test_a(is_timed):\n    assert not is_timed or took_s < 1", 0),
        ("def wait():\n    assert time.monotonic() < deadline, 'late'", 0),
    ],
)
def test_every_spelling_of_it_is_seen(source: str, count: int) -> None:
    """Marked or not, alone or in a class."""
    assert len([*asserted_seconds(source)]) == count
