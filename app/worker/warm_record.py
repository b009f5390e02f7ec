"""What is known of a worker that once was ready, for this model, card and version.

    <cache>/warm/<digest>.json

It lets a service whose card is taken start asleep: the model is known to load there, and how much
memory it takes. A file that others may have written is none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path

from app.engine.hub.trust import PRIVATE_MODE, is_closed, make_folder, whole_file

_log = logging.getLogger(__name__)


class WarmRecord:
    """The record of one worker; *words* tell model, card and version."""

    def __init__(self, cache: Path, words: tuple[str, ...]) -> None:
        self._cache = cache
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        self._path = cache / "warm" / f"{digest}.json"
        self._kept = self._read()

    @property
    def needed_bytes(self) -> int:
        """The card's memory that the worker took; 0 where there is no record."""
        return self._kept

    def keep(self, needed_bytes: int) -> None:
        """Write that it was ready and took so much, unless that is known; never fail."""
        if needed_bytes <= self._kept:
            return
        self._kept = needed_bytes
        try:
            make_folder(self._path.parent, self._cache, PRIVATE_MODE)
            with whole_file(self._path) as file:
                file.write(json.dumps({"needed_bytes": needed_bytes}).encode())
        except OSError as error:
            _log.debug("The record of a warm worker could not be kept: %s.", error.strerror)

    def _read(self) -> int:
        with suppress(OSError, ValueError, KeyError, TypeError):
            if is_closed(self._path, self._cache):
                return int(json.loads(self._path.read_bytes())["needed_bytes"])
        return 0
