"""What commands share with the terminal: options, notes and progress on standard error, tables."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, TypeVar

Row = TypeVar("Row")
Options = Mapping[str, Mapping[str, Any]]
"""Options by their names, such as `-o --output`, with what `ArgumentParser.add_argument` takes."""

MODEL: Options = {"--model": {"help": "catalogue key, local folder, or auto (KLEIN_MODEL)"}}
SIZE: Options = {"--size": {"help": "WIDTHxHEIGHT; the model's own size where left out"}}
STEPS: Options = {"--steps": {"type": int, "help": "denoising steps; the model's own if left out"}}


def add_options(parser: ArgumentParser, options: Options) -> None:
    """Add a command's own *options* to its *parser*."""
    for names, described in options.items():
        parser.add_argument(*names.split(), **described)


def note(text: str) -> None:
    """Print *text* on standard error, under the program's name."""
    print(f"klein: {text}", file=sys.stderr, flush=True)


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


@contextmanager
def progress_bar() -> Iterator[Callable[[float | None, str], None]]:
    """Yield a function that shows what share of the work is done, 0..1, and what is being done.

    None leaves the share as it was. The bar is drawn on standard error, on a terminal only, and
    is removed at the end.
    """
    from tqdm import tqdm

    # Neither tqdm's thread nor its semaphore, which would be shared with the worker.
    tqdm.monitor_interval = 0
    tqdm.set_lock(RLock())
    is_silent = sys.stderr is None or not sys.stderr.isatty()
    with tqdm(
        total=1.0,
        bar_format="{percentage:3.0f}% |{bar:20}| {desc}",
        dynamic_ncols=True,
        leave=False,
        disable=is_silent,
    ) as bar:

        def show(share: float | None, text: str) -> None:
            bar.n = bar.n if share is None else share
            bar.set_description_str(text)

        yield show
