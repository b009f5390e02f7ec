"""What lies in the cache on disk: how much of which kind, when it was last used, what can go.

A process holds what it loaded by a shared `flock`, until it ends in whatever way. Whoever prunes
needs an exclusive one. Looking for open files in /proc would not do: weights on the GPU need no
open file, and a container sees no processes but its own, while locks are the file system's. The
lock on downloads (`HubCache.locked`) is held while anything is deleted.

The time of last use is the mtime of a quantized file, of the folder of compiled code and of the
record beside a published file: nothing compares these, and mounts with noatime keep them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterable
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
    revision of a repository.
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


def hold(path: Path, mark: Path | None = None) -> None:
    """Note that *path* is in use now, and keep it from being pruned until `release`.

    The mtime of *mark*, else that of *path*, says when. Where *path* cannot be locked, as on some
    network drives, it is only noted.
    """
    with suppress(OSError):
        os.utime(mark or path)
    with suppress(OSError):
        _held.append(_lock(path, fcntl.LOCK_SH))


def hold_published(path: Path, cache_dir: Path) -> None:
    """Hold *path*, or what it links to, where that is a published file of the cache.

    Its own mtime stays, which its record and the quantized weights made of it name.
    """
    target = path.resolve()
    if target.is_relative_to((cache_dir / "hub").resolve()):
        hold(target, Path(f"{target}.verified"))


def release() -> None:
    """Give back everything that this process holds."""
    while _held:
        os.close(_held.pop())


def survey(cache_dir: Path) -> list[Stored]:
    """List what the cache holds, kind by kind; change nothing, lock nothing."""
    hub, converted = cache_dir / "hub", cache_dir / QUANTIZED
    places: dict[Kind, Iterable[Path]] = {
        Kind.PUBLISHED: (path for path in hub.glob("*/*") if path.is_dir()),
        Kind.QUANTIZED: converted.glob("*.safetensors"),
        Kind.COMPILED: cache_dir.glob(f"{COMPILED}*"),
        Kind.PARTIAL: (*hub.rglob("*.part"), *converted.glob(".*.part")),
        Kind.RACE: cache_dir.glob("race*"),
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
            if not is_trial:
                _remove_dangling(cache_dir / "models")
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
        or (each.kind is Kind.PARTIAL and each.path.parent.name == QUANTIZED)
    ]
    derived.sort(key=lambda each: each.used_at)
    if served is None:
        return derived
    hub = HubCache(cache_dir)
    wanted = {hub.path(file) for file in served}
    published = [
        each
        for each in stored
        if each.kind is Kind.PUBLISHED and not any(each.path in path.parents for path in wanted)
    ]
    return [*derived, *sorted(published, key=lambda each: each.used_at)]


def _remove(stored: Stored, *, is_trial: bool) -> bool:
    """Delete *stored*, unless a process holds it or a file in it; return whether it may go."""
    held = [stored.path]
    if stored.kind is Kind.PUBLISHED:
        held += [path for path in stored.path.rglob("*") if path.is_file()]
    with ExitStack() as locked:
        for path in held:
            try:
                locked.callback(os.close, _lock(path, fcntl.LOCK_EX))
            except OSError:
                # Held by a process, or on a file system without locks: nobody can tell.
                return False
        if is_trial:
            return True
        if stored.path.is_dir():
            # A service that starts meanwhile finds a whole folder or none. Should this process
            # end here, the next survey lists what is left.
            grave = Path(mkdtemp(prefix=f"{stored.path.name}-", dir=stored.path.parent))
            stored.path.rename(grave / stored.path.name)
            shutil.rmtree(grave)
        else:
            stored.path.unlink(missing_ok=True)
    return True


def _describe(kind: Kind, path: Path, cache_dir: Path) -> Stored:
    inside = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    if kind is Kind.PUBLISHED:
        owners = [
            key
            for key, entry in MODELS.items()
            if any(path in HubCache(cache_dir).path(file).parents for file in entry.files)
        ]
        name = f"{path.parent.name} {path.name[:8]} ({', '.join(owners) or 'of no model'})"
        records = [each for each in inside if each.suffix == ".verified"]
        inside = [each for each in inside if each.suffix != ".part"]
        used_at = max((each.stat().st_mtime for each in records or inside), default=0.0)
    else:
        name, used_at = path.name, path.stat().st_mtime
    return Stored(kind, name, path, sum(each.lstat().st_size for each in inside), used_at)


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


def _remove_dangling(models: Path) -> None:
    """Remove the folders of links (`HubCache.link`) of which a target is gone."""
    for folder in models.glob("*/*"):
        links = [path for path in folder.rglob("*") if path.is_symlink()]
        if not all(link.exists() for link in links):
            for link in links:
                link.unlink()


def _refuse() -> None:
    raise _Busy
