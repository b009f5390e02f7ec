"""What commands share with the terminal: options, notes and progress on standard error, tables."""

from __future__ import annotations

import os
import sys
import time
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Row = TypeVar("Row")
Options = Mapping[str, Mapping[str, Any]]
"""Options by their names, such as `-o --output`, with what `ArgumentParser.add_argument` takes."""


class RefuseKey(Action):
    """Ends the program where a key stands on the command line, without repeating it."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        """Refuse it, whatever its value."""
        parser.error(
            "a key on the command line is read by everyone who lists the processes; put it into a "
            "file, and name that by KLEIN_API_KEYS_FILE for klein serve, else by KLEIN_KEY_FILE"
        )


ENV_FILE = "--env-file"
REFUSED_KEYS = "--api-key --api-keys --key"
COMMON: Options = {
    "--json": {"action": "store_true", "help": "answer with one JSON document, for programs"},
    ENV_FILE: {
        "type": Path,
        "metavar": "FILE",
        "help": "read variables from this file too, such as .env; those that are set win",
    },
    REFUSED_KEYS: {"action": RefuseKey, "nargs": "?", "help": SUPPRESS},
}
"""The options of every command."""
MODEL: Options = {"--model": {"help": "catalogue key, local folder, or auto (KLEIN_MODEL)"}}
PRECISION: Options = {"--precision": {"help": "arithmetic of the transformer (KLEIN_PRECISION)"}}
PLAN: Options = {"--plan": {"help": "what stays on the GPU at 8 bit (KLEIN_PLAN)"}}
CACHE_DIR: Options = {"--cache-dir": {"help": "where models are kept (KLEIN_CACHE_DIR)"}}
LOADING: Options = {**MODEL, **PRECISION, **PLAN, **CACHE_DIR}
"""The settings that a command which loads a model is given most often."""
SIZE: Options = {"--size": {"help": "WIDTHxHEIGHT; the model's own size where left out"}}
STEPS: Options = {"--steps": {"type": int, "help": "denoising steps; the model's own if left out"}}

STAGES = {
    "starting": "starting the worker",
    "download": "downloading the model",
    "verify": "verifying the model's files",
    "loading": "loading the libraries",
    "weights": "loading the weights",
    "warm-up": "warming up",
    "restarting": "restarting the worker",
    "asleep": "asleep",
}
"""What a service says it is at while its model is loaded, in words."""

_WIDTH = 20
_EIGHTHS = " ▏▎▍▌▋▊▉"
_PACE_S = 10.0
"""The speed is that of so many seconds."""
_KNOWN_S = 1.0
"""After so many seconds the speed means something."""


def add_options(parser: ArgumentParser, options: Options) -> None:
    """Add a command's own *options* to its *parser*, and those of every command."""
    for names, described in {**options, **COMMON}.items():
        parser.add_argument(*names.split(), **described)


def note(text: str) -> None:
    """Print *text* on standard error, under the program's name."""
    print(f"klein: {text}", file=sys.stderr, flush=True)


def plain(text: object) -> str:
    """Return *text*, which may be another program's, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def tabulate(columns: Mapping[str, Callable[[Row], str]], rows: Iterable[Row]) -> list[list[str]]:
    """Return a table with the names of *columns* as its head; each reads its cell from a row."""
    return [list(columns), *([read(row) for read in columns.values()] for row in rows)]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of *table*, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


class Progress:
    """A line on standard error that says what is being done, how far it is, and how fast.

    It is drawn on a terminal only, and removed at the end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_shown = sys.stderr is not None and sys.stderr.isatty()
        self._clock = clock
        self._share = 0.0
        self._seen: deque[tuple[float, float]] = deque()
        """When which share was done, in the last seconds."""

    def __call__(self, share: float | None, text: str, total_bytes: int = 0) -> None:
        """Show that *share* of the work is done, 0..1; None leaves it as it was.

        Where *total_bytes* are to be moved, the speed is shown too.
        """
        if not self.is_shown:
            return
        self._share = self._share if share is None else min(1.0, max(0.0, share))
        pace = "" if share is None else self._pace(total_bytes)
        line = f"{self._share:4.0%} |{_bar(self._share)}| {plain(text)}{pace}"
        self._write(f"\r{line[: _columns() - 1]}\x1b[K")

    def clear(self) -> None:
        """Remove the line, so that something else can be printed there."""
        if self.is_shown:
            self._write("\x1b[2K\r")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def _pace(self, total_bytes: int) -> str:
        now = self._clock()
        if self._seen and self._share < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, self._share))
        while now - self._seen[0][0] > _PACE_S and len(self._seen) > 2:
            self._seen.popleft()
        seconds, grown = now - self._seen[0][0], self._share - self._seen[0][1]
        if seconds < _KNOWN_S or grown <= 0:
            return ""
        speed = f", {grown * total_bytes / seconds / 1e6:.1f} MB/s" if total_bytes else ""
        return f"{speed}, {_duration((1 - self._share) * seconds / grown)} left"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield the line that shows the progress, and remove it at the end."""
    progress = Progress()
    try:
        yield progress
    finally:
        progress.clear()


def _bar(share: float) -> str:
    whole, part = divmod(round(share * _WIDTH * 8), 8)
    bar = "█" * whole + (_EIGHTHS[part] if whole < _WIDTH else "")
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    if not encoding.lower().startswith("utf"):
        bar = "#" * whole
    return bar.ljust(_WIDTH)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
