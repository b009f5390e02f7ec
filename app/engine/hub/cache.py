"""The cache on disk: each published file once, and one folder of links for each way to load them.

    <cache>/hub/<owner>--<name>/<revision>/<path>
    <cache>/models/<key>/<precision>/<path>

Variants share files, so the first tree holds them by where they were published and the second says
which belong together. A file is moved to its place only after its size and SHA-256 were verified; a
record beside it then states its size, mtime and inode. While all three match, a start trusts the
file without reading its gigabytes; when they do not, as after copying a cache, or where others may
write (`app.engine.hub.trust`), it is hashed again. The device number is not compared: it changes
where the same volume is mounted again.

A file of that size and hash in Hugging Face's own cache is linked instead of downloaded: as
a second name of the same bytes, or, from another file system, by a symbolic link.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from app.engine.hub.fetch import hash_file, partial_path, size_of
from app.engine.hub.hf_cache import find_file
from app.engine.hub.trust import is_closed, make_folder, whole_file, why_swappable
from app.engine.models.entry import RemoteFile
from app.errors import StartupError

_log = logging.getLogger(__name__)

_LOADABLE = (
    *("*.safetensors*", "*.gguf", "*.bin*", "*.ckpt", "*.pt", "*.pth", "*.pkl"),
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"),
)
"""Weights, configs and tokenizer files: names that some loader looks for."""


@dataclass(frozen=True, slots=True)
class HubCache:
    """The tree of published files. Any process may read it; one that adds to it holds its lock."""

    cache_dir: Path

    def path(self, file: RemoteFile) -> Path:
        """Return the path of *file*."""
        owner = file.repository.replace("/", "--")
        return self.cache_dir / "hub" / owner / file.revision / file.path

    def is_present(self, file: RemoteFile) -> bool:
        """Return whether *file* exists; an existing file has been verified once."""
        return self.path(file).is_file()

    def missing_bytes(self, file: RemoteFile) -> int:
        """Return the bytes of *file* that are still to be downloaded."""
        if self.is_present(file) or find_file(file) is not None:
            return 0
        return max(0, file.size_bytes - size_of(partial_path(self.path(file))))

    def is_verified(self, file: RemoteFile) -> bool:
        """Return whether *file* is unchanged since its hash was verified.

        False too where another user may write the file or its record.
        """
        record = self._record(file)
        try:
            return (
                self._is_closed(file)
                and is_closed(record, self.cache_dir)
                and record.read_text() == self._stamp(file)
            )
        except (OSError, UnicodeDecodeError):
            return False

    def mark_verified(self, file: RemoteFile) -> None:
        """Record that the hash of *file* was verified.

        Where other users may write, nothing is recorded that would be trusted once the folder is
        closed.
        """
        record = self._record(file)
        if self._is_closed(file):
            with whole_file(record) as written:
                written.write(self._stamp(file).encode())
                os.fchmod(written.fileno(), 0o644)
        else:
            record.unlink(missing_ok=True)

    def check(self, file: RemoteFile, on_bytes: Callable[[int], None]) -> bool:
        """Hash *file*; record it where it matches, delete it where it does not."""
        path = self.path(file)
        right = size_of(path) == file.size_bytes and hash_file(path, on_bytes) == file.sha256
        if right:
            # A cache that is mounted read-only is hashed at every start.
            with contextlib.suppress(OSError):
                self.mark_verified(file)
        else:
            path.unlink()
        return right

    def adopt(self, file: RemoteFile, on_bytes: Callable[[int], None]) -> bool:
        """Link *file* from Hugging Face's cache; return whether the right one was there."""
        path, source = self.path(file), find_file(file)
        if source is None:
            return False
        make_folder(path.parent, self.cache_dir)
        link = path.with_name(f".{path.name}.link")
        link.unlink(missing_ok=True)
        try:
            link.hardlink_to(source)
        except OSError:
            # Another file system, or another user's file.
            link.symlink_to(source)
        try:
            if hash_file(link, on_bytes) != file.sha256:
                return False
            link.replace(path)
        except PermissionError:
            return False
        finally:
            link.unlink(missing_ok=True)
        self.mark_verified(file)
        _log.info("%s is taken from Hugging Face's cache.", file.path)
        return True

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock on adding files; call *on_wait* until it is acquired."""
        folder = self.cache_dir / "hub"
        make_folder(folder, self.cache_dir)
        # Do not follow a link that another user may have put there, and do not truncate.
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "r+") as lock:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                on_wait()
                time.sleep(0.2)
            yield

    def link(self, name: str, files: Iterable[RemoteFile]) -> Path:
        """Link the *files* of one load into its folder; remove links of an earlier catalogue.

        Raises:
            StartupError: a file among them that a loader may read comes from no download.
        """
        folder = self.cache_dir / "models" / name
        wanted = {folder / file.path: self.path(file) for file in files}
        for path in list(folder.rglob("*")):
            if path.is_symlink():
                if path not in wanted or path.resolve() != wanted[path].resolve():
                    path.unlink()
            elif path in wanted or (
                not path.is_dir() and any(fnmatch(path.name.lower(), kind) for kind in _LOADABLE)
            ):
                raise StartupError(
                    f"{path.relative_to(self.cache_dir)} in KLEIN_CACHE_DIR is no file of a "
                    "download; remove it and start again."
                )
            elif not path.is_dir():
                _log.warning("%s is no file of a download; no loader reads it.", path)
        for link, target in wanted.items():
            if not link.is_symlink():
                make_folder(link.parent, self.cache_dir)
                link.symlink_to(os.path.relpath(target, link.parent))
        return folder

    def _is_closed(self, file: RemoteFile) -> bool:
        """Return whether nobody else may write *file* or replace what a link leads to."""
        path = self.path(file)
        is_linked = path.is_symlink()
        return is_closed(path, self.cache_dir) and not (is_linked and why_swappable(path))

    def _record(self, file: RemoteFile) -> Path:
        return Path(f"{self.path(file)}.verified")

    def _stamp(self, file: RemoteFile) -> str:
        stat = self.path(file).stat()
        return f"{file.sha256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n"
