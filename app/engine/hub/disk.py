"""What lies in the cache on disk: how much of which kind, when it was last used, what can go.

A process holds what it loaded by a shared `flock`, until it ends in whatever way. Whoever prunes
needs an exclusive one. Looking for open files in /proc would not do: weights on the GPU need no
open file, and a container sees no processes but its own, while locks are the file system's. The
lock on downloads (`HubCache.locked`) is held while anything is deleted.

The time of last use is the mtime of a quantized file, of the folder of compiled code and of the
record beside a published file: nothing compares these, and mounts with noatime keep them.

Only what has exactly the names that klein gives is listed, and deleted: KLEIN_CACHE_DIR may be a
folder that others use too, such as Hugging Face's own cache.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import mkdtemp

from app.engine.hub.cache import HubCache
from app.engine.hub.trust import why_open
from app.engine.models.entry import RemoteFile
from app.engine.models.registry import MODELS

COMPILED = "compiled"
QUANTIZED = "converted"

_OLD = r"\.old-[a-z0-9_]{8}"
"""Ends the hidden name of what an interrupted pruning left of a folder."""

_REVISION = re.compile(rf"[0-9a-f]{{40}}|\.[0-9a-f]{{40}}{_OLD}")
_COMPILED_FOLDER = re.compile(rf"{COMPILED}|\.{COMPILED}{_OLD}")
_RACE_FOLDER = re.compile("race")
_QUANTIZED_FILE = re.compile(r"(encoder|transformer)-[A-Za-z0-9._]+-[0-9a-f]{12}\.safetensors")
_TEMPORARY = re.compile(r"\.[a-z0-9_]{8}\.part")

_PATIENCE_S = 1.0
_MAX_LINKS = 40


class Kind(StrEnum):
    """What something in the cache is."""

    PUBLISHED = "published"
    QUANTIZED = "quantized"
    COMPILED = "compiled"
    PARTIAL = "partial"
    RACE = "race results"


@dataclass(frozen=True, slots=True)
class Stored:
    """One thing in the cache that is kept or deleted whole; *used_at* in seconds since the epoch.

    Compiled code is one thing, since its files refer to each other, and so are the files of one
    revision of a repository. A file with more than one name, as one shared with Hugging Face's
    cache, counts 0 bytes: deleting it here frees nothing.
    """

    kind: Kind
    name: str
    path: Path
    size_bytes: int
    used_at: float


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was deleted, what was kept (in use, or others may write there), and what is left."""

    removed: tuple[Stored, ...]
    kept: tuple[Stored, ...]
    left_bytes: int
    is_downloading: bool
    """Whether another process downloads into the cache, so that nothing was deleted."""


class _Busy(Exception):
    """Another process holds the lock on downloads."""


_held: list[int] = []


def hold(path: Path) -> None:
    """Note by its mtime that *path* is in use now, and keep it from being pruned until `release`.

    Where *path* cannot be locked, as on some network drives, it is only noted.
    """
    with suppress(OSError):
        os.utime(path)
    _keep(path)


def hold_published(path: Path, cache_dir: Path) -> None:
    """Hold *path*, or what it links to, where that is a published file of the cache.

    Its own mtime stays, which its record and the quantized weights made of it name. One that is a
    link into another cache is held by its record alone.
    """
    hub = (cache_dir / "hub").resolve()
    with suppress(OSError, RuntimeError):
        for _ in range(_MAX_LINKS):
            path = path.parent.resolve() / path.name
            if path.is_relative_to(hub):
                hold(Path(f"{path}.verified"))
                if _is_own_file(path):
                    _keep(path)
                return
            path = path.parent / path.readlink()


def release() -> None:
    """Give back everything that this process holds."""
    while _held:
        os.close(_held.pop())


def survey(cache_dir: Path) -> list[Stored]:
    """List what the cache holds, kind by kind; change nothing, lock nothing."""
    places: dict[Kind, Iterable[Path]] = {
        Kind.PUBLISHED: _revisions(cache_dir),
        Kind.QUANTIZED: _named(cache_dir / QUANTIZED, _QUANTIZED_FILE, _is_own_file),
        Kind.COMPILED: _named(cache_dir, _COMPILED_FOLDER, _is_own_folder),
        Kind.PARTIAL: (
            *(part for revision in _revisions(cache_dir) for part in _parts(revision)),
            *_named(cache_dir / QUANTIZED, _TEMPORARY, _is_own_file),
        ),
        Kind.RACE: _named(cache_dir, _RACE_FOLDER, _is_own_folder),
    }
    found = []
    for kind, paths in places.items():
        for path in paths:
            # What has gone meanwhile, or may not be looked at, is not listed.
            with suppress(OSError):
                found.append(_describe(kind, path, cache_dir))
    order = list(Kind)
    return sorted(found, key=lambda each: (order.index(each.kind), each.used_at))


def sums(stored: Iterable[Stored]) -> dict[str, int]:
    """Return the bytes of each kind that is there."""
    found: dict[str, int] = {}
    for each in stored:
        found[each.kind.value] = found.get(each.kind.value, 0) + each.size_bytes
    return found


def prune(
    cache_dir: Path,
    limit_bytes: int,
    *,
    served: Collection[RemoteFile] | None = None,
    is_trial: bool = False,
) -> Pruned:
    """Delete until the cache takes at most *limit_bytes*, or nothing is left that may go.

    Derived files go first, the least recently used before others, then the published files of
    which none is in *served*; with None no published file goes. What is in use stays, as do
    downloads and folders that others may write to. With *is_trial* nothing is deleted.

    Raises:
        OSError: something cannot be deleted.
    """
    stored = survey(cache_dir)
    left = sum(each.size_bytes for each in stored)
    if left <= limit_bytes:
        return Pruned((), (), left, is_downloading=False)
    removed, kept = [], []
    try:
        with HubCache(cache_dir).locked(_refuse):
            for each in _candidates(stored, cache_dir, served):
                if left <= limit_bytes:
                    break
                # Through a link that others put there, files elsewhere would be deleted.
                is_safe = not why_open(each.path.parent, cache_dir)
                if is_safe and _remove(each, is_trial=is_trial):
                    removed.append(each)
                    left -= each.size_bytes
                else:
                    kept.append(each)
            if removed and not is_trial:
                _remove_dangling(cache_dir)
    except _Busy:
        return Pruned((), (), left, is_downloading=True)
    return Pruned(tuple(removed), tuple(kept), left, is_downloading=False)


def _candidates(
    stored: Iterable[Stored], cache_dir: Path, served: Collection[RemoteFile] | None
) -> list[Stored]:
    """Return what may be deleted, in that order."""
    derived = [
        each
        for each in stored
        if each.kind in (Kind.QUANTIZED, Kind.COMPILED)
        or (each.kind is Kind.PARTIAL and each.path.parent == cache_dir / QUANTIZED)
    ]
    derived.sort(key=lambda each: each.used_at)
    if served is None:
        return derived
    hub = HubCache(cache_dir)
    wanted = {hub.path(file) for file in served}
    published = [
        each
        for each in stored
        if each.kind is Kind.PUBLISHED
        and not any(each.path in path.parents for path in wanted)
        # A download that was interrupted goes on with what is there.
        and not _parts(each.path)
    ]
    return [*derived, *sorted(published, key=lambda each: each.used_at)]


def _remove(stored: Stored, *, is_trial: bool) -> bool:
    """Delete *stored*, unless a process holds it or a file in it; return whether it may go."""
    held = [stored.path]
    if stored.kind is Kind.PUBLISHED:
        # Files of another cache are none of ours; the records beside the links to them are.
        held += [path for path in _inside(stored.path) if _is_own_file(path)]
    with ExitStack() as locked:
        for path in held:
            try:
                locked.callback(os.close, _lock(path, fcntl.LOCK_EX))
            except OSError:
                # Held by a process, or on a file system without locks: nobody can tell.
                return False
        if is_trial:
            return True
        if re.search(f"{_OLD}$", stored.path.name):
            shutil.rmtree(stored.path)
        elif stored.path.is_dir():
            # A service that starts meanwhile finds a whole folder or none. Should this process
            # end here, the next survey lists what is left.
            grave = Path(mkdtemp(prefix=f".{stored.path.name}.old-", dir=stored.path.parent))
            stored.path.rename(grave / stored.path.name)
            shutil.rmtree(grave)
        else:
            stored.path.unlink(missing_ok=True)
    return True


def _describe(kind: Kind, path: Path, cache_dir: Path) -> Stored:
    name, used_at = path.name, path.lstat().st_mtime
    inside: dict[Path, os.stat_result] = {}
    for each in _inside(path) if path.is_dir() else (path,):
        # One that has gone meanwhile is not counted.
        with suppress(OSError):
            inside[each] = each.lstat()
    if kind is Kind.PUBLISHED:
        owners = [
            key
            for key, entry in MODELS.items()
            if any(path in HubCache(cache_dir).path(file).parents for file in entry.files)
        ]
        name = f"{path.parent.name} {path.name[:8]} ({', '.join(owners) or 'of no model'})"
        records = [found for each, found in inside.items() if each.suffix == ".verified"]
        inside = {each: found for each, found in inside.items() if not each.name.endswith(".part")}
        used_at = max((found.st_mtime for found in records or inside.values()), default=0.0)
    size = sum(found.st_size for found in inside.values() if found.st_nlink == 1)
    return Stored(kind, name, path, size, used_at)


def _revisions(cache_dir: Path) -> Iterator[Path]:
    """Yield the folders of revisions of the catalogue's repositories."""
    for name in sorted({name for entry in MODELS.values() for name in entry.repositories}):
        folder = cache_dir / "hub" / name.replace("/", "--")
        yield from _named(folder, _REVISION, _is_own_folder)


def _named(folder: Path, name: re.Pattern[str], is_right: Callable[[Path], bool]) -> list[Path]:
    """Return what lies in *folder* with such a name and *is_right*; none where it is missing."""
    return [path for path in folder.glob("*") if name.fullmatch(path.name) and is_right(path)]


def _parts(revision: Path) -> list[Path]:
    return [path for path in _inside(revision) if path.name.endswith(".part")]


def _inside(folder: Path) -> Iterator[Path]:
    """Yield the files below *folder*, and links to files; nothing through a link."""
    return (Path(above, name) for above, _, names in os.walk(folder) for name in names)


def _is_own_file(path: Path) -> bool:
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def _is_own_folder(path: Path) -> bool:
    with suppress(OSError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False


def _keep(path: Path) -> None:
    """Lock *path* until `release`; a pruning, or its trial, has a moment to finish with it."""
    patient_until = time.monotonic() + _PATIENCE_S
    with suppress(OSError):
        while True:
            try:
                _held.append(_lock(path, fcntl.LOCK_SH))
            except BlockingIOError:
                if time.monotonic() > patient_until:
                    raise
                time.sleep(0.02)
            else:
                return


def _lock(path: Path, operation: int) -> int:
    """Lock *path*, a file or folder but no link, without waiting; return its descriptor.

    Raises:
        OSError: it is locked already, missing, or cannot be locked.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_dangling(cache_dir: Path) -> None:
    """Remove the links of each load (`HubCache.link`) of which a published file is gone.

    Links to elsewhere stay, and all in folders that are links or that others may write to.
    """
    models, hub = cache_dir / "models", (cache_dir / "hub").resolve()
    for key in MODELS:
        for folder in (models / key).glob("*"):
            if any(each.is_symlink() for each in (models, models / key, folder)):
                continue
            links = [path for path in _inside(folder) if _leads_into(path, hub)]
            if all(link.exists() for link in links):
                continue
            for link in links:
                if not why_open(link.parent, cache_dir):
                    link.unlink()


def _leads_into(link: Path, hub: Path) -> bool:
    # Links in a circle lead nowhere.
    with suppress(OSError, RuntimeError):
        return link.is_symlink() and link.resolve().is_relative_to(hub)
    return False


def _refuse() -> None:
    raise _Busy
