"""Downloads a variant's files into the cache: missing ones only, trusted once verified.

One that Hugging Face's own cache holds is linked from there instead.
With every file in place the network is not used at all. A file that differs from the catalogue in
size or SHA-256 is deleted and named, before a loader reads it.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.domain import LoadProgress, WorkerStage
from app.engine.hub.cache import HubCache
from app.engine.hub.fetch import Hub, damaged, fetch
from app.engine.hub.hf_cache import find_file
from app.engine.hub.trust import make_folder, remedy, why_open
from app.engine.models.entry import ModelEntry, RemoteFile
from app.engine.models.registry import MODELS, files_for
from app.errors import StartupError

_log = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]

_REPORT_EVERY_S = 0.5
_BUSY = "another process is downloading into the same cache"


def ensure(
    variant: ModelEntry,
    cache_dir: Path,
    precision: str,
    on_progress: OnProgress,
    *,
    hub: Hub | None = None,
) -> Path:
    """Download the missing files of *variant* for *precision*; return the folder of one load.

    The folder is in diffusers' layout; a transformer that is published as one file lies at its top
    instead of in `transformer/`.

    Raises:
        StartupError: a file cannot be downloaded, is damaged, or the disk is full.
    """
    files = files_for(variant, precision)
    _check_allowed(files)
    store = HubCache(cache_dir)
    meter = _Meter(on_progress, files)
    with _explained_disk_errors():
        _warn_if_open(store, files)
        _check_present(store, files, meter)
        if not all(store.is_present(file) for file in files):
            with store.locked(lambda: on_progress(LoadProgress(WorkerStage.DOWNLOAD, None, _BUSY))):
                _check_room(store, files)
                _fetch_missing(store, files, hub or Hub(), meter)
        return store.link(f"{variant.spec.id}/{precision}", files)


def lay_out_shared(
    variant: ModelEntry, cache_dir: Path, folder: Path, on_progress: OnProgress
) -> bool:
    """Link an earlier download's files that every precision of *variant* needs into *folder*.

    Nothing is downloaded; what Hugging Face's cache holds counts as downloaded. Files that others
    may have written are hashed first. Return whether all files exist.

    Raises:
        StartupError: a file is damaged; it is deleted.
    """
    store = HubCache(cache_dir)
    with _explained_disk_errors():
        _warn_if_open(store, variant.shared)
        if not _adopt_missing(store, variant.shared, on_progress):
            return False
        _check_present(store, variant.shared, _Meter(on_progress, variant.shared))
        for file in variant.shared:
            link = folder / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            # Not resolved: `disk.hold_published` finds the cache's own path by this link.
            link.symlink_to(store.path(file).absolute())
    return True


def find_shared(variant: ModelEntry, cache_dir: Path) -> dict[RemoteFile, Path]:
    """Return where the files lie that `lay_out_shared` would link, unhashed; none unless all do."""
    store = HubCache(cache_dir)
    found = {
        file: store.path(file) if store.is_present(file) else find_file(file)
        for file in variant.shared
    }
    there = {file: path for file, path in found.items() if path is not None}
    return there if len(there) == len(found) else {}


def missing_bytes(variant: ModelEntry, cache_dir: Path, precision: str) -> int:
    """Return the bytes to download before *variant* can be loaded at *precision*."""
    store = HubCache(cache_dir)
    return sum(store.missing_bytes(file) for file in files_for(variant, precision))


def choose_file(variant: ModelEntry, cache_dir: Path, wanted: str, instead: str) -> str:
    """Return *instead* where it is there and *wanted* is not, else *wanted*: a download is spared.

    Both are keys of `ModelEntry.transformers`; an empty *instead* is none.
    """
    if instead not in variant.transformers or not missing_bytes(variant, cache_dir, wanted):
        return wanted
    return wanted if missing_bytes(variant, cache_dir, instead) else instead


def verify(
    variant: ModelEntry, cache_dir: Path, precision: str, on_progress: OnProgress
) -> dict[RemoteFile, bool | None]:
    """Hash every file in the cache again and delete those that are not the published ones.

    Return, for each file, whether it matches; None for a missing one.
    """
    files = files_for(variant, precision)
    store = HubCache(cache_dir)
    meter = _Meter(on_progress, files)
    found: dict[RemoteFile, bool | None] = {}
    for file in files:
        found[file] = store.check(file, meter.on_bytes(file)) if store.path(file).exists() else None
        meter.add(file)
    return found


class _Meter:
    """Sums the bytes of several files and reports them, at most twice a second.

    It counts the verification, until `begin` says what else.
    """

    def __init__(self, on_progress: OnProgress, files: tuple[RemoteFile, ...]) -> None:
        self._on_progress = on_progress
        self._total = sum(file.size_bytes for file in files)
        self._stage, self._done, self._reported_at = WorkerStage.VERIFY, 0, 0.0
        self._reported: int | None = None

    def begin(self, stage: WorkerStage) -> None:
        """Start counting for *stage*."""
        self._stage, self._done, self._reported_at = stage, 0, 0.0

    def on_bytes(self, file: RemoteFile) -> Callable[[int], None]:
        """Return the callback for the bytes done of *file*."""

        def report(done: int) -> None:
            now = time.monotonic()
            is_end = done == file.size_bytes and self._reported != self._done + done
            if now - self._reported_at >= _REPORT_EVERY_S or is_end:
                self._reported_at, self._reported = now, self._done + done
                numbers = f"{self._reported / 1e9:.2f} of {self._total / 1e9:.2f} GB"
                fraction = min(1.0, self._reported / max(1, self._total))
                self._on_progress(LoadProgress(self._stage, fraction, f"{numbers}, {file.path}"))

        return report

    def add(self, file: RemoteFile) -> None:
        """Count *file* as done."""
        self._done += file.size_bytes


def _check_allowed(files: tuple[RemoteFile, ...]) -> None:
    allowed = {name for entry in MODELS.values() for name in entry.repositories}
    if foreign := {file.repository for file in files} - allowed:
        raise StartupError(
            f"{min(foreign)} is not a repository of the catalogue; nothing is downloaded "
            f"from elsewhere than {', '.join(sorted(allowed))}."
        )


def _warn_if_open(store: HubCache, files: tuple[RemoteFile, ...]) -> None:
    places = (store.path(file) if store.is_present(file) else store.cache_dir for file in files)
    if reason := next((why for place in places if (why := why_open(place, store.cache_dir))), ""):
        _log.warning(
            "The files of KLEIN_CACHE_DIR are hashed at each start, because %s; to end this, %s",
            reason,
            remedy(store.cache_dir),
        )


def _check_present(store: HubCache, files: tuple[RemoteFile, ...], meter: _Meter) -> None:
    """Hash files that have changed since they were verified, and refuse damaged ones."""
    for file in files:
        if (
            store.is_present(file)
            and not store.is_verified(file)
            and not store.check(file, meter.on_bytes(file))
        ):
            raise damaged(file)
        meter.add(file)


def _check_room(store: HubCache, files: tuple[RemoteFile, ...]) -> None:
    needed = sum(store.missing_bytes(file) for file in files)
    free = shutil.disk_usage(store.cache_dir).free
    if needed > free:
        raise _too_small(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _fetch_missing(store: HubCache, files: tuple[RemoteFile, ...], hub: Hub, meter: _Meter) -> None:
    meter.begin(WorkerStage.DOWNLOAD)
    for file in sorted(files, key=store.is_present, reverse=True):
        if not store.is_present(file) and not store.adopt(file, meter.on_bytes(file)):
            make_folder(store.path(file).parent, store.cache_dir)
            fetch(file, store.path(file), hub, meter.on_bytes(file))
            store.mark_verified(file)
        meter.add(file)


def _adopt_missing(store: HubCache, files: tuple[RemoteFile, ...], on_progress: OnProgress) -> bool:
    """Link what is missing from Hugging Face's cache; return whether all files exist then."""
    missing = tuple(file for file in files if not store.is_present(file))
    if any(store.missing_bytes(file) for file in missing):
        return False
    if not missing:
        return True
    meter = _Meter(on_progress, missing)
    with store.locked(lambda: on_progress(LoadProgress(WorkerStage.DOWNLOAD, None, _BUSY))):
        return all(store.adopt(file, meter.on_bytes(file)) for file in missing)


def _too_small(numbers: str) -> StartupError:
    return StartupError(
        f"The disk of KLEIN_CACHE_DIR is too small: {numbers}; make room, or set KLEIN_CACHE_DIR "
        "to a folder on another disk."
    )


@contextmanager
def _explained_disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _too_small("it filled up during the download") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StartupError(
                "KLEIN_CACHE_DIR may not be used by this user; make the folder and what lies in it "
                "readable and writable, or set another one."
            ) from None
        if error.filename is None:
            raise
        raise StartupError(
            f"KLEIN_CACHE_DIR cannot be used ({error.strerror}: {error.filename}); remove what is "
            "in the way, or set another folder."
        ) from None
