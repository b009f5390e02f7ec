"""A cache that an earlier release put in `./~/.cache/klein`, below a folder called `~`.

Until the default of `KLEIN_CACHE_DIR` was expanded, that folder was made wherever the service was
started. It is reported, with the command that moves it; nothing is moved automatically.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from app.settings import Settings

_WRONG = Path("~", ".cache", "klein")


@dataclass(frozen=True, slots=True)
class OldCache:
    """The old cache's path, and the shell command that moves it to the right place."""

    folder: Path
    command: str

    @property
    def what(self) -> str:
        """What is wrong, one sentence."""
        return f"A cache of an earlier version lies in {shlex.quote(str(self.folder))}, unused."

    @property
    def sentence(self) -> str:
        """What is wrong, and what to do."""
        return f"{self.what} This moves it to where it is looked for: {self.command}"


def find_old_cache(settings: Settings) -> OldCache | None:
    """Look for it below the current folder."""
    try:
        folder = Path.cwd() / _WRONG
        if not folder.is_dir() or (right := settings.cache_dir) == folder:
            return None
        is_empty = not right.exists() or not any(right.iterdir())
        can_link = not is_empty and right.stat().st_dev == folder.stat().st_dev
    except OSError:
        return None
    return OldCache(folder, _command(folder, right, is_empty=is_empty, can_link=can_link))


def _command(folder: Path, right: Path, *, is_empty: bool, can_link: bool) -> str:
    old, new, above = (shlex.quote(str(path)) for path in (folder, right, right.parent))
    if is_empty:
        move = f"mkdir -p {above} && mv -T {old} {new}"
    else:
        move = f"cp {'-alf' if can_link else '-af'} {old}/. {new}/ && rm -r {old}"
    # The name of the empty folder that is left is dangerous to type.
    left = " ".join(shlex.quote(str(path)) for path in (folder.parent, folder.parent.parent))
    return f"{move} && rmdir --ignore-fail-on-non-empty {left}"
