"""Tells services of one user on one card from other programs, by a lock on a file.

    <temporary folder>/klein-<user>/<the card's UUID>

Each service holds a shared lock. Containers do not see each other's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)


class CardClaim:
    """A shared lock on the file of one card, until `close`."""

    def __init__(self, uuid: str, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir()) / f"klein-{os.getuid()}"
        self._file: int | None = None
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            # Another user could have made it.
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                return
            self._file = os.open(folder / uuid, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            _log.debug("The card's file cannot be locked: %s.", error.strerror)

    def is_alone(self) -> bool:
        """Return whether no other service of this user has the card, as far as that is known."""
        if self._file is None:
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # An exchange that failed may have given up the shared lock; another service that asks
            # at this moment may hold it alone.
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return True

    def close(self) -> None:
        """Release the lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
