"""CHANGELOG.md has a section for the version that the package has."""

from __future__ import annotations

import re
from pathlib import Path

from app import __version__

CHANGELOG = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text()
HEADINGS = re.findall(r"^## \[([\w.]+)\](?: - (\d{4}-\d\d-\d\d))?$", CHANGELOG, re.M)


def test_the_packages_version_is_the_newest_that_is_told():
    """Above it stands only what is not released yet, which has no date."""
    assert HEADINGS[0] == ("Unreleased", "")
    assert HEADINGS[1][0] == __version__
    assert all(day for _, day in HEADINGS[1:])


def test_versions_fall():
    """The newest is first, and none is told twice."""
    numbers = [tuple(map(int, version.split("."))) for version, _ in HEADINGS[1:]]

    assert numbers == sorted(set(numbers), reverse=True)
