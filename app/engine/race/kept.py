"""Races kept on disk, so that a later start on the same card holds none.

    <cache>/race/<the card's UUID>.json

A file counts only while card, driver, versions and everything else in its key are the same, and
where nobody else may have written it (`app.engine.hub.trust`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from app.engine.hub.trust import PRIVATE_MODE, is_closed, make_folder, whole_file
from app.engine.race.results import Results

_log = logging.getLogger(__name__)

CARD = "card"
"""The entry of a key that names the file."""


@dataclass(frozen=True, slots=True)
class _Kept:
    key: dict[str, str]
    results: Results


_FILE = TypeAdapter(_Kept)


def recall(cache: Path, key: Mapping[str, str]) -> Results | None:
    """Return the race that was kept for *key*; None where there is none that can be trusted."""
    path = _path(cache, key)
    with suppress(OSError, ValidationError):
        if is_closed(path, cache):
            kept = _FILE.validate_json(path.read_bytes())
            return kept.results if kept.key == dict(key) else None
    return None


def race_once(
    cache: Path, key: Mapping[str, str], run: Callable[[], Results], *, again: bool = False
) -> Results:
    """Return the race that was kept for *key*, or hold one by *run* and keep it.

    One that was disturbed is not kept: the next start tries anew. With *again* it is held anyway.
    """
    if not again and (known := recall(cache, key)) is not None:
        return known
    results = run()
    if not results.disturbed:
        _keep(cache, key, results)
    return results


def _keep(cache: Path, key: Mapping[str, str], results: Results) -> None:
    path = _path(cache, key)
    try:
        make_folder(path.parent, cache, PRIVATE_MODE)
        with whole_file(path) as file:
            file.write(_FILE.dump_json(_Kept(dict(key), results), indent=1))
    except OSError as error:
        _log.warning(
            "The race could not be kept in KLEIN_CACHE_DIR (%s); the next start holds it again.",
            error.strerror,
        )


def _path(cache: Path, key: Mapping[str, str]) -> Path:
    return cache / "race" / f"{key[CARD]}.json"
