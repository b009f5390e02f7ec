"""Who imports what of the tests, and what they import before they run.

Tools and benchmarks import no other part than their support: a benchmark that imported a test, or
its conftest, would run that test's fixtures and break when it is moved; `tests.support` is written
to be imported. The half of `make test` that asks services imports no torch, which takes each of its
processes seconds.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tools", "benchmarks")


def imported(source: str) -> Iterator[str]:
    """The modules that *source* imports anywhere, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{each.name}" for each in node.names)


def is_of_tests(name: str) -> bool:
    """Whether *name* is of the tests' package outside `tests.support`."""
    return name.split(".")[0] == "tests" and name.split(".")[:2] != ["tests", "support"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_the_support_of_the_tests_is_imported(folder: str) -> None:
    """tools/ and benchmarks/ import `tests.support` and no other module of tests/."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    found = {str(path): [*filter(is_of_tests, imported(path.read_text()))] for path in paths}

    assert paths
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import tests.api.live", ["tests.api.live"]),
        ("def f():\n    from tests import conftest", ["tests.conftest"]),
        ("from tests.support import server", []),
        ("from tests import support", []),
        ("from tests.support.server import Server", []),
        ("import testscenarios", []),
        ("import tests.support.server", []),
    ],
)
def test_every_spelling_of_an_import_is_seen(source: str, expected: list[str]) -> None:
    """Also inside functions and with `from`."""
    assert [*filter(is_of_tests, imported(source))] == expected


HEAVY = ("torch", "transformers", "diffusers")
COLLECT = f"""
import sys, pytest
sys.argv[1:] = ["--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]]
assert pytest.main(sys.argv[1:]) == 0
sys.exit(", ".join(name for name in {HEAVY} if name in sys.modules) or 0)
"""


@pytest.mark.full
def test_reading_the_tests_that_ask_services_imports_no_torch() -> None:
    """A test that needs it imports it, or stands in the other half."""
    listed = re.search(r"^ENGINE_TESTS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    assert listed
    others = listed[1].replace("\\\n", " ").split()
    assert all((ROOT / each).exists() for each in others)
    ignored = [f"--ignore={each}" for each in ("tests/gpu", *others)]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *ignored], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
