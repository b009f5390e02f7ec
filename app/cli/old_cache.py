"""A cache that an earlier release put in `./~/.cache/klein`, below a folder called `~`.

Until the default of `KLEIN_CACHE_DIR` was expanded, that folder was made wherever the service was
started. It is reported, with the command that moves it; nothing is moved automatically.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from app.cli.console import note
from app.settings import Settings

_WRONG = Path("~", ".cache", "klein")


@dataclass(frozen=True, slots=True)
class OldCache:
    """What is wrong, one sentence, and the shell command that moves the old cache."""

    what: str
    command: str

    @property
    def sentence(self) -> str:
        """What is wrong, and what to do."""
        return f"{self.what} This moves it to where it is looked for: {self.command}"


def find_old_cache(settings: Settings) -> OldCache | None:
    """Look for it below the current folder."""
    right = settings.cache_dir
    try:
        folder = Path.cwd() / _WRONG
        if not folder.is_dir() or right == folder:
            return None
        is_empty = not right.exists() or not any(right.iterdir())
        can_link = not is_empty and right.stat().st_dev == folder.stat().st_dev
    except OSError:
        return None
    # The empty folders that are left go too: the name of one is dangerous to type.
    old, new, above, *left = (
        shlex.quote(str(path)) for path in (folder, right, right.parent, *folder.parents[:2])
    )
    if is_empty:
        move = f"mkdir -p {above} && mv -T {old} {new}"
    else:
        move = f"cp {'-alf' if can_link else '-af'} {old}/. {new}/ && rm -r {old}"
    return OldCache(
        f"A cache of an earlier version lies in {old}, unused.",
        f"{move} && rmdir --ignore-fail-on-non-empty {' '.join(left)}",
    )


def tell_old_cache(settings: Settings) -> None:
    """Name it on standard error where there is one."""
    if (old := find_old_cache(settings)) is not None:
        note(old.sentence)
