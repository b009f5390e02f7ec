"""What the machine itself does to a process, kept out of the seconds that tests assert."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_ORDER = Path("/sys/module/page_reporting/parameters/page_reporting_order")
_NEVER = "11"
"""Larger than any free block of memory is (MAX_PAGE_ORDER is 10)."""


@contextlib.contextmanager
def without_page_reporting() -> Iterator[None]:
    """Keep a virtual machine from giving freed memory back to its host.

    While a gigabyte is given back, its processors stand still for a tenth of a second now and
    then, in whatever process. Without the right to change that, or on real hardware, nothing
    happens.
    """
    try:
        order = _ORDER.read_text()
        _ORDER.write_text(_NEVER)
    except OSError:
        order = _NEVER
    if order.strip() == _NEVER:  # also where another process of the tests has changed it
        yield
        return
    try:
        yield
    finally:
        _ORDER.write_text(order)
