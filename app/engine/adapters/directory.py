"""Adapter files in folders: found, named, checked by their headers, and hashed once.

A folder may be anybody's, such as ComfyUI's `loras/`, and is only read. What lies in it is
untrusted: the walk is bounded in depth and number, a file counts only if it is regular, and a link
only if it stays in the folders or nobody else can have made it. A file's name becomes a key, and no
key ever becomes a path. No torch here: the process that speaks HTTP lists adapters.

A file named `My style.safetensors` is the adapter `My-style`. Where files in several folders have
one name, those in subfolders have the folder's in front: `sub-My-style`. Of those whose names are
equal even so the first by path has it, and the others are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from app.domain import ALIASES
from app.engine.adapters.layout import AdapterRefused, Layout, Shapes, read_layout, refusal
from app.engine.adapters.names import targets_of
from app.engine.checkpoint.safetensors_header import LENGTH_BYTES, HeaderError, parse_json
from app.engine.hub.fetch import hash_file
from app.engine.hub.trust import is_closed, whole_file, why_swappable
from app.engine.models.registry import MODELS

FOLDER = "loras"
"""In the cache, and in the folder of a model that comes with the package."""
SUFFIX = ".safetensors"
MAX_FILES = 1000
MAX_ENTRIES = 20_000
"""Files and folders of any kind that a walk looks at."""
MAX_DEPTH = 6
"""Of folders below the first."""
MAX_NAME = 100
MAX_HEADER_BYTES = 4_000_000
"""An adapter of klein has 0.1 MB; to parse more would hold up the process that speaks HTTP."""

_MAX_RECORD_BYTES = 1_000_000
SETTLE_S = 2.0
"""A file that was changed less than so long ago may still be being written."""
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_PICTURES = tuple(
    f"{mark}.{kind}" for mark in (".preview", "") for kind in ("png", "jpg", "jpeg", "webp")
)
_SHA256 = re.compile("[0-9a-f]{64}")


class Stamp(NamedTuple):
    """What tells a file from another, and from what it was before it changed."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that can be used."""

    name: str
    """Made from the file's name; what requests name it by."""
    sha256: str
    size_bytes: int
    rank: int
    """As `Lora.rank`."""
    created: int
    """When the file was changed, in seconds since 1970."""
    preview: bool
    """Whether a picture lies beside the file."""
    path: str = field(repr=False)
    """Never shown to a client."""


@dataclass(frozen=True, slots=True)
class RefusedFile:
    """A file that is not listed: its path below the folder, and a sentence."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What is known of the folders; *is_whole* once every file has been looked at."""

    adapters: tuple[Adapter, ...] = ()
    refused: tuple[RefusedFile, ...] = ()
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class File:
    """An adapter's file as the walk found it."""

    name: str
    path: Path
    below: Path
    """Its path below the folder."""
    stamp: Stamp
    preview: bool


class _Stopped(Exception):
    """The directory is to stop."""


class Directory:
    """The adapter files in *folders*, of which those that come first win names.

    Hashes are kept in *record*, where nobody else may write to it or its folder; None keeps them in
    memory only. Used by one thread, but for `stop`.
    """

    def __init__(
        self,
        folders: Iterable[Path],
        *,
        record: Path | None = None,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._folders = tuple(folders)
        self._record = record
        self._settle_s = settle_s
        self._is_stopped = False
        self._hashes = _read_record(record)
        self._recorded = dict(self._hashes)
        self._verdicts: dict[tuple[Path, Stamp], int | str] = {}
        """The rank of each file that was looked at, or why it is refused."""
        self._listed: dict[tuple[str, str], Adapter] = {}
        """By name and path."""

    def stop(self) -> None:
        """Have `look` end soon, and from then on at once."""
        self._is_stopped = True

    def look(self, shapes: Shapes, first: Collection[str] = ()) -> Iterator[Listing]:
        """List the adapters of the model of *shapes*; again after each file that has to be read.

        Those named in *first* are read first.
        """
        files, refused = self.walk()
        new = [file for file in files if (file.path, file.stamp) not in self._verdicts]
        settled = [file for file in new if not self._is_settling(file)]
        if new:
            yield replace(self._listing(files, refused), is_whole=False)
        try:
            for file in sorted(settled, key=lambda file: file.name not in first):
                try:
                    self._judge(file, shapes)
                except OSError as error:
                    files.remove(file)
                    refused.append(_refused(file.below, f"cannot be read ({error.strerror})"))
                yield replace(self._listing(files, refused), is_whole=False)
        except _Stopped:
            return
        finally:
            self._forget_all_but(files)
        yield replace(self._listing(files, refused), is_whole=len(new) == len(settled))

    def hash_first(self, names: Collection[str]) -> None:
        """Hash the files of *names* ahead of `look`."""
        with contextlib.suppress(OSError, _Stopped):
            for file in self.walk()[0]:
                if file.name in names:
                    self.hash(file)

    def hash(self, file: File) -> str:
        """Return the SHA-256 of *file*, which is read unless it was before.

        Raises:
            OSError: it cannot be read, or is being changed.
        """
        if file.stamp not in self._hashes:
            found = hash_file(file.path, self._check_stopped)
            if _stamp(file.path.stat()) != file.stamp:
                raise OSError(0, "it is being changed")
            self._hashes[file.stamp] = found
        return self._hashes[file.stamp]

    def examine(self, file: File, shapes: Shapes) -> Adapter:
        """Read one *file*, whatever is known of it.

        Raises:
            AdapterRefused: it cannot be used.
            OSError: it cannot be read.
        """
        return _describe(file, _read(file, shapes).rank, self.hash(file))

    def holds_any(self, shapes: Shapes, limit_s: float) -> bool:
        """Return whether a file fits the model of *shapes*, by its header.

        True too where that cannot be known within *limit_s* seconds.
        """
        end = time.monotonic() + limit_s
        for file in self.walk()[0]:
            with contextlib.suppress(AdapterRefused, OSError):
                if time.monotonic() > end or _read(file, shapes):
                    return True
        return False

    def walk(self) -> tuple[list[File], list[RefusedFile]]:
        """Find the files, without reading them, and name them; return them by name."""
        walk = _Walk(self._folders)
        files: dict[str, File] = {}
        for file in _named(walk.files):
            if is_model_name(file.name):
                reason = f"would be called {file.name}, as a model is; rename it"
            elif file.name in files:
                reason = f"would be called {file.name}, as {files[file.name].below} is; rename it"
            else:
                files[file.name] = file
                continue
            walk.refused.append(_refused(file.below, reason))
        return sorted(files.values(), key=lambda file: file.name), walk.refused

    def _is_settling(self, file: File) -> bool:
        return 0 <= time.time() - file.stamp.changed_ns / 1e9 < self._settle_s

    def _judge(self, file: File, shapes: Shapes) -> None:
        """Read the header of *file*, and hash it if that fits."""
        verdict: int | str
        try:
            verdict = _read(file, shapes).rank
            self.hash(file)
        except AdapterRefused as refused:
            verdict = str(refused)
        self._verdicts[file.path, file.stamp] = verdict

    def _check_stopped(self, done: int) -> None:
        if self._is_stopped:
            raise _Stopped

    def _listing(self, files: Iterable[File], refused: Sequence[RefusedFile]) -> Listing:
        adapters, reasons = [], list(refused)
        for file in files:
            verdict = self._verdicts.get((file.path, file.stamp))
            before = self._listed.get((file.name, str(file.path)))
            if isinstance(verdict, str):
                reasons.append(RefusedFile(printable(file.below), printable(verdict)))
            elif verdict is not None:
                adapters.append(_describe(file, verdict, self._hashes[file.stamp]))
            elif before is not None:
                # It was replaced: until it has been read, an image made without it is no better.
                adapters.append(before)
        self._listed = {(each.name, each.path): each for each in adapters}
        return Listing(tuple(adapters), tuple(sorted(reasons, key=lambda each: each.file)))

    def _forget_all_but(self, files: Sequence[File]) -> None:
        """Forget what is known of files other than *files*, and write down the hashes of these."""
        known = {(file.path, file.stamp) for file in files}
        self._verdicts = {key: self._verdicts[key] for key in self._verdicts.keys() & known}
        stamps = {file.stamp for file in files}
        self._hashes = {stamp: sha for stamp, sha in self._hashes.items() if stamp in stamps}
        if self._record is None or self._hashes == self._recorded:
            return
        self._recorded = dict(self._hashes)
        text = json.dumps({":".join(map(str, stamp)): sha for stamp, sha in self._hashes.items()})
        with contextlib.suppress(OSError):
            if is_closed(self._record.parent, self._record.parent):
                with whole_file(self._record) as written:
                    written.write(text.encode())


class _Walk:
    """One walk through folders: the files that may be adapters, unnamed, and what is refused."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.files: list[File] = []
        self.refused: list[RefusedFile] = []
        self._places = _resolved(folders)
        self._seen: set[tuple[int, int]] = set()
        self._entries = 0
        for folder in folders:
            left = deque([Path()])
            while left and self._has_room(left[0]):
                left += self._enter(folder, left.popleft())

    def _has_room(self, below: Path) -> bool:
        is_full = len(self.files) >= MAX_FILES or self._entries >= MAX_ENTRIES
        if is_full:
            self.refused.append(
                _refused(below, f"was not looked at: more than {MAX_FILES} adapters or other files")
            )
        return not is_full

    def _enter(self, folder: Path, below: Path) -> Iterator[Path]:
        """Look at what lies in the folder *below*; yield its own folders."""
        here = folder / below
        try:
            found = here.stat()
            with os.scandir(here) as entries:
                children = sorted(
                    (each for each in entries if not each.name.startswith(".")),
                    key=lambda each: each.name,
                )[: MAX_ENTRIES - self._entries]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self.refused.append(_refused(below, f"cannot be read ({error.strerror})"))
            return
        if (found.st_dev, found.st_ino) in self._seen:
            return
        self._seen.add((found.st_dev, found.st_ino))
        self._entries += len(children)
        beside = {each.name for each in children}
        for child in children:
            if self._take(child, below / child.name, beside):
                yield below / child.name

    def _take(self, child: os.DirEntry[str], below: Path, beside: Collection[str]) -> bool:
        """Take *child* if it may be an adapter; return whether it is a folder to enter."""
        suffix = below.suffix.lower()
        try:
            is_folder = child.is_dir()
            if not is_folder and suffix not in (SUFFIX, *_PICKLES):
                return False
            reason = self._why_not(child, below, is_folder=is_folder)
            if not reason and not is_folder:
                stamp = _stamp(child.stat())
                has_preview = any(below.stem + end in beside for end in _PICTURES)
                self.files.append(File("", Path(child.path), below, stamp, has_preview))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason:
            self.refused.append(_refused(below, reason))
        return is_folder and not reason

    def _why_not(self, child: os.DirEntry[str], below: Path, *, is_folder: bool) -> str:
        if child.is_symlink() and not self._is_safe(Path(child.path)):
            return "is a link out of the folder that others may change, or that leads nowhere"
        if is_folder:
            return "lies too deep" if len(below.parts) > MAX_DEPTH else ""
        if below.suffix.lower() in _PICKLES:
            return "may run code when it is read; only safetensors files are"
        return "" if child.is_file() else "is no regular file"

    def _is_safe(self, link: Path) -> bool:
        return is_safe_link(link, self._places)


def is_safe_link(link: Path, folders: Iterable[Path]) -> bool:
    """Return whether *link* stays in the resolved *folders*, or nobody else can have made it."""
    try:
        target = link.resolve(strict=True)
        return any(target.is_relative_to(each) for each in folders) or not why_swappable(link)
    except (OSError, RuntimeError):
        return False


def name_of(path: Path | str) -> str:
    """Make an adapter's name from a file's: ASCII letters, digits, dots, dashes, underscores."""
    text = re.sub(rf"\{SUFFIX}$", "", str(path), flags=re.IGNORECASE)
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:MAX_NAME]
    return name or f"lora-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def printable(text: Path | str) -> str:
    """Return *text*, which may hold a file's name, fit for a terminal and a line of the log."""
    return "".join(each if each.isprintable() else "?" for each in str(text)[:500])


def is_model_name(name: str) -> bool:
    """Return whether a request that names *name* could mean a model."""
    lower = name.lower()
    return lower in {key.lower() for key in MODELS} or lower.startswith(ALIASES)


def find_preview(path: Path) -> Path | None:
    """Return the picture beside the adapter's file at *path*: `style.preview.png`, `style.png`."""
    for end in _PICTURES:
        picture = path.with_name(path.stem + end)
        if picture.is_file() and (
            not picture.is_symlink() or is_safe_link(picture, _resolved([path.parent]))
        ):
            return picture
    return None


def _named(files: Sequence[File]) -> list[File]:
    """Name *files*, those first that have the name if others have it too."""
    own = [name_of(file.below.name) for file in files]
    counts = Counter(own)
    named = [
        replace(file, name=name if counts[name] == 1 else name_of("-".join(file.below.parts)))
        for file, name in zip(files, own, strict=True)
    ]
    return sorted(named, key=lambda file: len(file.below.parts))


def _read(file: File, shapes: Shapes) -> Layout:
    """Read the header of *file*.

    Raises:
        AdapterRefused: it does not fit *shapes*, or is too long.
        OSError: it cannot be read.
    """
    # A pipe that has taken the file's place must not hold up the thread.
    handle = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise refusal(file.path, "it is no regular file")
        length = int.from_bytes(os.read(handle, LENGTH_BYTES), "little")
    finally:
        os.close(handle)
    if MAX_HEADER_BYTES < length < file.stamp.size_bytes:
        raise refusal(file.path, f"its header has more than {MAX_HEADER_BYTES / 1e6:g} MB")
    return read_layout(file.path, targets_of(shapes), shapes)


def _describe(file: File, rank: int, sha256: str) -> Adapter:
    stamp = file.stamp
    created = int(stamp.changed_ns // 1_000_000_000)
    return Adapter(file.name, sha256, stamp.size_bytes, rank, created, file.preview, str(file.path))


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _refused(below: Path, reason: str) -> RefusedFile:
    return RefusedFile(printable(below), printable(f"{below.name or 'The folder'} {reason}."))


def _resolved(folders: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(folder.resolve() for folder in folders)


def _read_record(record: Path | None) -> dict[Stamp, str]:
    """Read the hashes that an earlier process has kept; none that others may have written."""
    with contextlib.suppress(OSError, HeaderError, ValueError, TypeError, AttributeError):
        if record is not None and is_closed(record, record.parent):
            with record.open("rb") as file:
                found = parse_json(file.read(_MAX_RECORD_BYTES))
            return {
                Stamp(*map(int, key.split(":"))): value
                for key, value in found.items()
                if _SHA256.fullmatch(value)
            }
    return {}
