"""One rehearsal of a release, for all that is held of its files."""

from __future__ import annotations

import datetime
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.server import ROOT
from tools import release

VERSION = "9.8.7"
DAY = datetime.date(2027, 1, 31)


@dataclass(frozen=True)
class Rehearsal:
    """A release that was made in *folder*."""

    folder: Path
    version: str = VERSION

    @property
    def wheel(self) -> Path:
        """The wheel."""
        return self.folder / f"klein_server-{self.version}-py3-none-any.whl"

    @property
    def sdist(self) -> Path:
        """The sources."""
        return self.folder / f"klein_server-{self.version}.tar.gz"


@pytest.fixture(scope="package")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """A release of this checkout, with what is not committed yet, and one change to tell of."""
    repository = tmp_path_factory.mktemp("repository")
    _git(ROOT, "clone", "--quiet", "--no-hardlinks", ".", str(repository))
    changes = _git(ROOT, "diff", "--binary", "HEAD")
    if changes:
        subprocess.run(["git", "apply", "-"], cwd=repository, input=changes, check=True)
    changelog = repository / "CHANGELOG.md"
    heading = "## [Unreleased]\n"
    changelog.write_text(changelog.read_text().replace(heading, f"{heading}\n- A change.\n", 1))
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    _git(repository, *who, "commit", "--quiet", "--all", "--message", "As it stands")
    folder = tmp_path_factory.mktemp("release")
    release.release(VERSION, folder, DAY, repository=repository)
    return Rehearsal(folder)


def _git(place: Path, *words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=place, capture_output=True, check=True)
    return done.stdout
