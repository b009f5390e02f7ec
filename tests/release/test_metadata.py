"""What the package says of itself is so."""

from __future__ import annotations

import re
import subprocess
import tomllib

from packaging.specifiers import SpecifierSet

from tests.support.server import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_klein_is_the_only_command() -> None:
    """A package that is installed for everybody takes no other name."""
    assert PROJECT["scripts"] == {"klein": "app.cli.main:main"}
    assert "gui-scripts" not in PROJECT
    assert "entry-points" not in PROJECT


def test_the_author_is_the_project() -> None:
    """No person, and no address that nobody reads."""
    assert PROJECT["authors"] == [{"name": "The klein-server project"}]


def test_the_pythons_it_names_are_those_it_takes() -> None:
    """Each classifier's Python is one that pip installs it for; the image's is among them."""
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    (image,) = re.findall(r"^ARG BASE=python:(3\.\d+)", (ROOT / "Dockerfile").read_text(), re.M)

    assert image in named
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(each) for each in named)


def test_every_file_beside_the_code_goes_into_the_wheel() -> None:
    """A new kind of file in the package needs a line in pyproject.toml, or it is missing there."""
    listed = subprocess.run(
        ["git", "ls-files", "app"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    taken = {
        path.relative_to(ROOT).as_posix()
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }

    assert [path for path in listed if not path.endswith(".py") and path not in taken] == []
