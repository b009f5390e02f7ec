"""Whose files they are: what lies in the cache is believed only where nobody else can have put it.

A mark that says "hashed and right", weights rounded on an earlier start, and compiled code, which
is run, are believed where each of them and every folder from the cache's own down to it belongs to
this user or to root, and nobody else may write there. For compiled code the folders above the cache
are asked too: whoever may rename one of them can put another cache there. root may do anything
anyway. What an operator names by KLEIN_MODEL is not asked: it may belong to anyone.
"""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SHARED_MODE = 0o755
PRIVATE_MODE = 0o700
ANOTHER_FOLDER = "set KLEIN_CACHE_DIR to a folder of this user's own"


def why_open(path: Path, root: Path) -> str:
    """Say in words who else may write to *path* or to a folder above it, up to *root*; empty where
    nobody may, or where *path* is not there.
    """
    try:
        return next((fault for each in _chain(path, root) if (fault := _fault(each))), "")
    except FileNotFoundError:
        return ""


def is_closed(path: Path, root: Path) -> bool:
    """Whether *path* is there, and nobody else may write to it or to a folder above, up to
    *root*.
    """
    return path.exists() and not why_open(path, root)


def why_tree_open(folder: Path, root: Path) -> str:
    """Say who else may write to *folder*, to what lies in it, or to a folder above it."""
    if fault := why_open(folder, root):
        return fault
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            try:
                if fault := _fault(Path(above, name)):
                    return fault
            except FileNotFoundError:
                continue
    return ""


def why_swappable(path: Path) -> str:
    """Say who else may put another thing in the place of *path*: who may write to a folder on the
    way to it, from / down and through links. In a sticky one only owners may rename.
    """
    ways = (_fault(each, may_be_sticky=True) for each in _passed(path))
    return next((fault for fault in ways if fault), "")


def make_folder(folder: Path, root: Path, mode: int = _SHARED_MODE) -> None:
    """Make *folder* and what is missing above it; from *root* down nobody else may write there.

    Raises:
        OSError: it cannot be made.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    for each in _chain(folder, root):
        each.mkdir(mode=mode if each == folder else _SHARED_MODE, exist_ok=True)


def close_umask() -> None:
    """Let nothing that this process makes be open to others for writing."""
    os.umask(os.umask(_OTHERS) | _OTHERS)


def remedy(root: Path) -> str:
    """Say how an operator ends it: the folder is closed, then what others may have left there to
    be believed goes. What is published stays, and is hashed once more. Where the file system gives
    every file the same owner and rights, only another folder helps.
    """
    if not _keeps_rights(root):
        return f"{ANOTHER_FOLDER}, on a file system that keeps owners and rights"
    place = shlex.quote(str(root))
    return (
        f"{ANOTHER_FOLDER}, or run: chown -R {os.geteuid()} "
        f"{place} && chmod -R go-w {place} && find {place} -name '*.verified' -delete && "
        f"rm -rf {place}/compiled {place}/converted"
    )


def is_own(path: Path) -> bool:
    """Whether *path* itself, not what a link leads to, belongs to this user or to root."""
    return path.lstat().st_uid in (0, os.geteuid())


def may_go_on(part: Path) -> bool:
    """Whether the partial file *part* may be continued: it is hashed when it is whole, and root on
    another user's volume would else begin anew at each start.
    """
    return not part.is_symlink() and (is_own(part) or os.geteuid() == 0)


def _keeps_rights(folder: Path) -> bool:
    """Whether a file that is made in *folder* has the owner and rights that it is made with, unlike
    on a Windows drive in WSL2, FAT or some network drives.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            found = os.fstat(file.fileno())
    except OSError:
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS


def _passed(path: Path) -> Iterator[Path]:
    """Each folder and link on the way from / to *path*, without what lies at its end."""
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
    """*root*, and each folder on the way down to *path*."""
    yield root
    for part in path.relative_to(root).parts:
        root = root / part
        yield root


def _fault(path: Path, *, may_be_sticky: bool = False) -> str:
    """What is wrong with one file or folder. Links are followed: who may write decides what they
    lead to."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or not is_own(path):
        return f"{path} belongs to another user"
    if found.st_mode & _OTHERS and not (may_be_sticky and found.st_mode & stat.S_ISVTX):
        return f"others may write to {path}"
    return ""
