"""Races kept on disk, so that a later start on the same kind of card holds none.

    <cache>/race/<the card's name and memory>.json
    <cache>/race/<the same>-text-encoder.json  (`app.engine.race.encoder`)

Cards of one kind share a race: each would else choose for itself, and a seed's pixels would depend
on the card. A file counts only while card, driver, versions and everything else in its key are the
same, and where nobody else may have written it (`app.engine.hub.trust`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from app.engine.hub.trust import PRIVATE_MODE, is_closed, lock_file, make_folder, whole_file
from app.engine.race.results import Results

_log = logging.getLogger(__name__)

CARD = "card"
"""The entry of a key that names the file."""
_WAIT_S = 120.0
"""For another process's race: some seconds, and a minute where kernels have to be compiled."""


# An error that is not a number is kept as such: null would say that none was measured.
@with_config(ConfigDict(ser_json_inf_nan="constants"))
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
    cache: Path,
    key: Mapping[str, str],
    run: Callable[[], Results],
    *,
    again: bool = False,
    is_outdated: Callable[[Results], bool] = lambda results: False,
) -> Results:
    """Return the race that was kept for *key*, unless it *is_outdated*, or hold one and keep it.

    One that was disturbed is not kept: the next start tries anew. With *again* it is held anyway.
    Of processes that start together one holds it, and the others wait.
    """

    def known() -> Results | None:
        kept = None if again else recall(cache, key)
        return None if kept is None or is_outdated(kept) else kept

    if (kept := known()) is not None:
        return kept
    with _alone(cache, key):
        if (kept := known()) is not None:
            return kept
        results = run()
        if not results.disturbed:
            _keep(cache, key, results)
    return results


def forget_race(cache: Path, key: Mapping[str, str]) -> None:
    """Delete what was kept for the card of *key*, if it can be deleted."""
    with suppress(OSError):
        _path(cache, key).unlink()


@contextmanager
def _alone(cache: Path, key: Mapping[str, str]) -> Iterator[None]:
    """Wait for the processes that are at it, where they can be seen."""
    path = _path(cache, key).with_suffix(".lock")
    with ExitStack() as held:
        try:
            make_folder(path.parent, cache, PRIVATE_MODE)
            held.callback(os.close, lock_file(path, _WAIT_S))
        except OSError as error:
            _log.debug("The race's place cannot be locked: %s.", error.strerror)
        yield


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
    return cache / "race" / f"{re.sub(r'[^A-Za-z0-9]+', '-', key[CARD])}.json"
