"""Where pictures are written: names from their seeds, judged before anything is made."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.errors import InvalidRequest
from app.images import OutputFormat
from app.images.formats import OUTPUT_FORMATS, list_words
from app.limits import DRAW, MAX_SEED

STDOUT = "-"


@dataclass(frozen=True, slots=True)
class Output:
    """The file format, and the file of each picture; no files where standard output takes it."""

    format: OutputFormat
    paths: tuple[Path, ...]
    overwrites: bool = False

    @property
    def is_stdout(self) -> bool:
        """Whether the picture goes to standard output."""
        return not self.paths

    def name(self, index: int) -> str:
        """Return how a line for people names picture *index*."""
        return "standard output" if self.is_stdout else str(self.paths[index])

    def write(self, index: int, data: bytes) -> None:
        """Write picture *index*; a file that has come to be there meanwhile stays.

        Raises:
            InvalidRequest: there is such a file.
        """
        if self.is_stdout:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        path = self.paths[index]
        if self.overwrites:
            path.write_bytes(data)
            return
        try:
            file = path.open("xb")
        except FileExistsError:
            raise _taken(path) from None
        try:
            with file:
                file.write(data)
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise


def choose_output(
    where: str | None, format: str | None, seeds: Sequence[int], *, overwrites: bool = False
) -> Output:
    """Return where the pictures of *seeds* go.

    *where* is a file, of which several pictures add their seeds to its name; a folder, in which
    each is named by its seed; `-`, standard output; or None, the current folder.

    Raises:
        InvalidRequest: it cannot be written there, or something is there already.
    """
    if where == STDOUT:
        if len(seeds) > 1:
            raise InvalidRequest("-o - takes one picture; give a folder for several.")
        if sys.stdout.isatty():
            raise InvalidRequest(
                "-o - would write the picture to the terminal; redirect it to a file or a program."
            )
        return Output(OutputFormat(format or "png"), ())
    path = Path(where or ".")
    if path.is_dir() or str(where).endswith(os.sep):
        name = format or "png"
        suffix = OUTPUT_FORMATS[name].suffixes[0]
        paths = [path / f"klein-{seed}{suffix}" for seed in seeds]
    else:
        name = _format_of(path, format)
        paths = [path]
        if len(seeds) > 1:
            paths = [path.with_name(f"{path.stem}-{seed}{path.suffix}") for seed in seeds]
    for each in paths:
        check_output(each)
        if not overwrites and os.path.lexists(each):
            raise _taken(each)
    return Output(OutputFormat(name), tuple(paths), overwrites)


def choose_seed(given: int | None, count: int = 1) -> int:
    """Return the given seed, the first of *count*; draw one for None or -1, as over HTTP.

    Raises:
        InvalidRequest: it is out of range.
    """
    most = MAX_SEED - count + 1
    if given is None or given == DRAW:
        return secrets.randbelow(most + 1)
    if not 0 <= given <= most:
        raise InvalidRequest(f"--seed must lie between {DRAW} and {most}.", param="seed")
    return given


def check_output(path: Path) -> None:
    """Refuse a path at which no file can be written, before anything is generated for it.

    Raises:
        InvalidRequest: its folder is missing or not writable, or *path* is a folder.
    """
    folder = path.parent
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder; give the name of a file in it.")
    if not folder.is_dir():
        raise InvalidRequest(f"There is no folder {folder}; make it first, or give another.")
    # An existing file is overwritten; a new one needs a writable folder.
    if not (os.access(path, os.W_OK) if path.exists() else os.access(folder, os.W_OK | os.X_OK)):
        raise InvalidRequest(f"{path} may not be written by this user; give another place.")


def _format_of(path: Path, asked: str | None) -> str:
    """Return the format by the file's name, or the one *asked* for where the name has no suffix."""
    formats = {suffix: each.name for each in OUTPUT_FORMATS.values() for suffix in each.suffixes}
    found = formats.get(path.suffix.lower())
    if found is None and asked is not None and not path.suffix:
        return asked
    if found is None:
        raise InvalidRequest(f"The output's name must end in {list_words(formats)}.")
    if asked not in (None, found):
        raise InvalidRequest(f"--format {asked} does not fit the name {path.name}; change one.")
    return found


def _taken(path: Path) -> InvalidRequest:
    return InvalidRequest(f"{path} is there already; give another name, or --overwrite.")
