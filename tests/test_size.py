"""The counts of tools/size.py, by which the project's size is told."""

from __future__ import annotations

from tools.size import measure, table

SOURCE = '''"""A module."""

import os  # a reason


class A:
    """A class."""

    x: int = 1
    """A field."""

    def f(self) -> int:
        """Return one."""
        # why
        return 1
'''


def test_docstrings_are_no_statements() -> None:
    """Import, class, field, function and return count; five texts do not."""
    size = measure(SOURCE)

    assert size.statements == 5
    assert (size.lines, size.filled_lines, size.comment_lines) == (15, 10, 2)
    assert size.functions == (4,)


def test_the_table_sums_files_up() -> None:
    """One row for each figure."""
    rows = dict(table([measure(SOURCE), measure("x = 1\n")]))

    assert rows["files"] == "2"
    assert rows["statements"] == "6"
    assert rows["file, lines, p50 / p90 / max"] == "1 / 1 / 15"
