"""`make release`, rehearsed: what it makes, and when it refuses."""

from __future__ import annotations

import datetime
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.release.conftest import DAY, VERSION, Rehearsal
from tools import release

CHANGELOG = """# Changelog

## [Unreleased]

### Added

- One thing.

## [0.1.0] - 2026-01-01

- Another.
"""


def test_what_is_unreleased_becomes_the_releases_section() -> None:
    """With its day; an empty one stays above it for what comes next."""
    made = release.dated(CHANGELOG, "0.2.0", DAY)

    assert "## [Unreleased]\n\n## [0.2.0] - 2027-01-31\n\n### Added\n" in made
    assert release.section(made, "0.2.0") == "### Added\n\n- One thing.\n"
    assert release.section(made, "0.1.0") == "- Another.\n"
    assert release.section(made, "Unreleased") == "\n"


def test_a_section_that_is_there_is_taken_as_it_is() -> None:
    """A second run changes nothing."""
    made = release.dated(CHANGELOG, "0.2.0", DAY)

    assert release.dated(made, "0.2.0", datetime.date(2030, 1, 1)) == made


def test_a_release_that_says_nothing_is_refused() -> None:
    """Users are told what changed."""
    made = release.dated(CHANGELOG, "0.2.0", DAY)

    with pytest.raises(release.ReleaseRefused, match=r"neither a section \[0\.3\.0\]"):
        release.dated(made, "0.3.0", DAY)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("0.0.9", "is older than 0.1.0"), ("next", "is no version"), ("1.0", None)],
)
def test_the_version_must_be_one_and_no_older(
    tmp_path: Path, version: str, reason: str | None
) -> None:
    """It is written where the package says it."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)

    if reason is None:
        release.prepare(tmp_path, version, DAY)
        assert '__version__ = "1.0"' in (tmp_path / "app" / "__init__.py").read_text()
    else:
        with pytest.raises(release.ReleaseRefused, match=reason):
            release.prepare(tmp_path, version, DAY)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    """What lies there may have been sent to somebody."""
    (tmp_path / "klein_server-0.1.0.tar.gz").touch()

    with pytest.raises(release.ReleaseRefused, match="is not empty"):
        release.release("0.2.0", tmp_path, DAY)


@pytest.mark.system
def test_a_rehearsal_makes_every_file_of_a_release(rehearsal: Rehearsal) -> None:
    """Wheel, sdist, lock, bill of materials, notes and tag text, and a patch for the version."""
    names = {path.name for path in rehearsal.folder.iterdir()}

    assert names == {
        rehearsal.wheel.name,
        rehearsal.sdist.name,
        f"klein-server-{VERSION}.lock",
        f"klein-server-{VERSION}.cdx.json",
        "notes.md",
        "tag.txt",
        "release.patch",
        "SHA256SUMS",
    }
    patch = (rehearsal.folder / "release.patch").read_text()
    assert f'+__version__ = "{VERSION}"' in patch
    tag = (rehearsal.folder / "tag.txt").read_text()
    assert tag.startswith(f"klein-server {VERSION}\n\n")
    assert not any(line.startswith("#") for line in tag.splitlines())
    bom = json.loads((rehearsal.folder / f"klein-server-{VERSION}.cdx.json").read_text())
    assert bom["metadata"]["component"]["version"] == VERSION


@pytest.mark.system
def test_the_checksums_are_those_of_all_files(rehearsal: Rehearsal) -> None:
    """sha256sum says so; none is left out."""
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=rehearsal.folder,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    checked = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert checked == {path.name for path in rehearsal.folder.iterdir()} - {"SHA256SUMS"}


@pytest.mark.system
def test_the_wheel_says_what_pyproject_says(rehearsal: Rehearsal) -> None:
    """One command, one top-level name, the licences; what lies in the repository besides is out."""
    with zipfile.ZipFile(rehearsal.wheel) as wheel:
        names = wheel.namelist()
        info = f"klein_server-{VERSION}.dist-info"
        commands = wheel.read(f"{info}/entry_points.txt").decode().split()
        metadata = wheel.read(f"{info}/METADATA").decode()

    assert commands == ["[console_scripts]", "klein", "=", "app.cli.main:main"]
    assert {name.split("/")[0] for name in names} == {"app", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(names)
    for line in ("License-Expression: Apache-2.0", "Author: The klein-server project"):
        assert f"{line}\n" in metadata


@pytest.mark.system
def test_the_sources_hold_no_tests(rehearsal: Rehearsal) -> None:
    """They need the whole checkout; what builds the wheel is there, and it was built from it."""
    with tarfile.open(rehearsal.sdist) as archive:
        names = {name.partition("/")[2].split("/")[0] for name in archive.getnames()}

    assert "tests" not in names
    assert {"app", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md"} <= names
