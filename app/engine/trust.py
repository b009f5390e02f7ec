"""Whose files they are: what lies in the cache is believed only where nobody else can have put it.

A mark that says "hashed and right", weights rounded on an earlier start, and compiled code, which
is run, are believed where each of them and every folder from the cache's own down to it belongs to
this user or to root, and nobody else may write there. root may do anything anyway. What an operator
names by KLEIN_MODEL is not asked: it may belong to anyone.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SHARED_MODE = 0o755
PRIVATE_MODE = 0o700


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
    be believed goes. What is published stays, and is hashed once more.
    """
    place = shlex.quote(str(root))
    return (
        f"set KLEIN_CACHE_DIR to a folder of this user's own, or run: chown -R {os.geteuid()} "
        f"{place} && chmod -R go-w {place} && find {place} -name '*.verified' -delete && "
        f"rm -rf {place}/compiled {place}/converted"
    )


def is_own(path: Path) -> bool:
    """Whether *path* itself, not what a link leads to, belongs to this user or to root."""
    return path.lstat().st_uid in (0, os.geteuid())


def _chain(path: Path, root: Path) -> Iterator[Path]:
    """*root*, and each folder on the way down to *path*."""
    yield root
    for part in path.relative_to(root).parts:
        root = root / part
        yield root


def _fault(path: Path) -> str:
    """What is wrong with one file or folder. Links are followed: who may write decides what they
    lead to."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or not is_own(path):
        return f"{path} belongs to another user"
    if found.st_mode & _OTHERS:
        return f"others may write to {path}"
    return ""
