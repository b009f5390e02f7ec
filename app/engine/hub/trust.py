"""Whether the cache can be trusted: only where no other user can have written to it.

A record that a file was verified, weights quantized on an earlier start, a race that was kept, and
compiled code, which is executed, are trusted where each of them and every folder from the cache's
own down to it belongs to this user or to root, and nobody else may write there. For compiled code
the folders above the cache are checked too: whoever may rename one of them can replace the cache.
root may do anything anyway. The path that an operator names by KLEIN_MODEL is not checked: it may
belong to anyone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SHARED_MODE = 0o755
PRIVATE_MODE = 0o700
ANOTHER_FOLDER = "set KLEIN_CACHE_DIR to a folder of this user's own"

_LOOK_S = 0.1
"""Between two tries to lock a file."""


def why_open(path: Path, root: Path) -> str:
    """Describe who else may write to *path* or to a folder above it, up to *root*.

    Empty where nobody may, or where *path* does not exist.
    """
    return _first_fault(_chain(path, root))


def is_closed(path: Path, root: Path) -> bool:
    """Return whether *path* exists and nobody else may write to it or above it, up to *root*."""
    return path.exists() and not why_open(path, root)


def why_tree_open(folder: Path, root: Path) -> str:
    """Describe who else may write to *folder*, to its contents, or to a folder above it."""
    inside = (
        Path(above, name)
        for above, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )
    return why_open(folder, root) or _first_fault(inside)


def why_swappable(path: Path) -> str:
    """Describe who else may replace *path*.

    That is whoever may write to a folder on the way to it, from / down and through links. In a
    sticky folder only owners may rename.
    """
    faults = (_fault(each, may_be_sticky=True) for each in _passed(path))
    return next(filter(None, faults), "")


def make_folder(folder: Path, root: Path, mode: int = _SHARED_MODE) -> None:
    """Make *folder* and its missing parents; from *root* down nobody else may write there.

    Raises:
        OSError: it cannot be made.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    for each in _chain(folder, root):
        each.mkdir(mode=mode if each == folder else _SHARED_MODE, exist_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside *path* to be written, and rename it to *path* once it is on the disk.

    No reader sees a partial file, and nothing is written through a link.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            # Shows that it is being written (`app.engine.hub.disk`), where the disk has locks.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(handle)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def lock_file(path: Path, wait_s: float) -> int:
    """Make *path* and lock it, waiting for another process's lock for at most *wait_s* seconds.

    Return the open file's descriptor, which holds the lock until it is closed. No link that another
    user may have put there is followed.

    Raises:
        OSError: it cannot be made, or its disk has no locks.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        until = time.monotonic() + wait_s
        while not _is_locked(lock) and time.monotonic() < until:
            time.sleep(_LOOK_S)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _is_locked(descriptor: int) -> bool:
    """Lock an open file for this process, if no other has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def close_umask() -> None:
    """Set the umask so that no file of this process is writable by others."""
    os.umask(os.umask(_OTHERS) | _OTHERS)


def remedy(root: Path) -> str:
    """Return the commands with which an operator makes *root* trusted.

    The folder is closed to others, then what others may have left there to be trusted is removed.
    Published files stay, and are hashed once more. Where the file system gives every file the same
    owner and mode, only another folder helps.
    """
    if not _keeps_rights(root):
        return f"{ANOTHER_FOLDER}, on a file system that keeps owners and rights"
    place = shlex.quote(str(root))
    return (
        f"{ANOTHER_FOLDER}, or run: chown -R {os.geteuid()} "
        f"{place} && chmod -R go-w {place} && find {place} -name '*.verified' -delete && "
        f"rm -rf {place}/compiled {place}/converted {place}/race"
    )


def is_own(path: Path) -> bool:
    """Return whether *path* itself, not the target of a link, belongs to this user or to root."""
    return path.lstat().st_uid in (0, os.geteuid())


def may_go_on(part: Path) -> bool:
    """Return whether the download of the partial file *part* may be resumed.

    It is hashed when it is complete, and root on another user's volume would else begin anew at
    each start.
    """
    return not part.is_symlink() and (is_own(part) or os.geteuid() == 0)


def _keeps_rights(folder: Path) -> bool:
    """Return whether files made in *folder* keep their owner and mode.

    They do not on a Windows drive in WSL2, FAT or some network drives.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            found = os.fstat(file.fileno())
    except OSError:
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS


def _passed(path: Path) -> Iterator[Path]:
    """Yield each folder and link on the way from / to *path*, without its last target."""
    path.stat()  # links that lead in a circle end here
    here, left = Path("/"), list(reversed(path.absolute().parts[1:]))
    yield here
    while left:
        part = left.pop()
        step = here.parent if part == ".." else here / part
        if step.is_symlink():
            yield step
            target = step.readlink()
            here = Path("/") if target.is_absolute() else here
            left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            continue
        here = step
        if left:
            yield here


def _chain(path: Path, root: Path) -> Iterator[Path]:
    """Return *root*, and each folder on the way down to *path*."""
    yield root
    for part in path.relative_to(root).parts:
        root = root / part
        yield root


def _first_fault(paths: Iterable[Path]) -> str:
    """Describe what is wrong with the first faulty path; those that are missing have no fault."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if fault := _fault(path):
                return fault
    return ""


def _fault(path: Path, *, may_be_sticky: bool = False) -> str:
    """Describe what is wrong with one file or folder; empty where nothing is.

    Links are followed: whoever may write to the link's target decides its content.
    """
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or not is_own(path):
        return f"{path} belongs to another user"
    if found.st_mode & _OTHERS and not (may_be_sticky and found.st_mode & stat.S_ISVTX):
        return f"others may write to {path}"
    return ""
