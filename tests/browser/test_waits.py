"""Waiting for the page: as a person does who looks again, never by a script that it must run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def test_no_test_waits_by_eval() -> None:
    """`wait_for_function` fails under the page's policy unless it is true at once."""
    calls = {
        path.name: [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "wait_for_function"
        ]
        for path in TESTS.glob("*.py")
    }

    assert "conftest.py" in calls
    assert {name: lines for name, lines in calls.items() if lines} == {}


@pytest.mark.system
def test_what_becomes_true_later_is_waited_for(visit, klein) -> None:
    """Under the page's own policy; what never does so is given up."""
    here = visit(klein)
    here.page.evaluate("void setTimeout(() => { window.isLater = true; }, 300)")

    assert not here.page.evaluate("window.isLater")

    here.wait_until("window.isLater")
    with pytest.raises(AssertionError, match="not true: window"):
        here.wait_until("window.isNever", seconds=0.2)
