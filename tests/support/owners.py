"""Files of other users, in tests that anybody may run: only root can really give a file away.

The sign of a file that was given away is a bit in its mode which nothing else here uses, since it
goes the way that an owner goes: a new file has none, and `chown` takes it away.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

OTHER = 12_345
"""Another user's number."""


class _Owned:
    """What `stat` found, but for the owner."""

    def __init__(self, found: os.stat_result, owner: int) -> None:
        self._found = found
        self.st_uid = owner

    def __getattr__(self, name: str) -> object:
        return getattr(self._found, name)


def give_away(path: Path) -> None:
    """Let *path* belong to the other user, as far as `Path.stat` tells."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_ISUID)


@pytest.fixture(autouse=True)
def owners(monkeypatch):
    """Let `Path.stat` tell of the other user; call it with a number to whom all else belongs."""
    look = Path.stat

    def pretend(everything: int | None) -> None:
        def find(path: Path, *, follow_symlinks: bool = True) -> object:
            found = look(path, follow_symlinks=follow_symlinks)
            is_given = found.st_mode & stat.S_ISUID
            owner = OTHER if is_given else everything
            return found if owner is None else _Owned(found, owner)

        monkeypatch.setattr(Path, "stat", find)

    pretend(None)
    return pretend
