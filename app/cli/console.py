"""What commands print besides their results: notes and progress on standard error, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock


def note(text: str) -> None:
    """Print *text* on standard error, under the program's name."""
    print(f"klein: {text}", file=sys.stderr, flush=True)


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
    look = "{percentage:3.0f}% |{bar:20}| {desc}"
    with tqdm(
        total=1.0, bar_format=look, dynamic_ncols=True, leave=False, disable=is_silent
    ) as bar:

        def show(share: float | None, text: str) -> None:
            bar.n = bar.n if share is None else share
            bar.set_description_str(text)

        yield show
