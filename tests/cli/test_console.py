"""What commands print besides results: one look for all bars, and none where nobody watches."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from app.cli.console import aligned, progress_bar


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_shows_share_and_work_on_a_terminal(monkeypatch) -> None:
    """The share that was last known, where it is not known now; the line is gone at the end."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    threads = threading.active_count()

    with progress_bar() as show:
        show(0.25, "weights of the transformer")
        show(None, "another process downloads")
        drawn = sys.stderr.getvalue()
        assert threading.active_count() == threads

    assert " 25% |" in drawn
    assert "weights of the transformer" in drawn
    assert drawn.rsplit("\r", 1)[1].startswith(" 25% |")
    assert "another process downloads" in drawn.rsplit("\r", 1)[1]
    assert sys.stderr.getvalue().endswith("\r")


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_a_bar_is_silent_where_there_is_no_terminal(monkeypatch, stream) -> None:
    """In a file or a pipe, and where standard error is closed."""
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar() as show:
        show(0.5, "weights")

    assert stream is None or stream.getvalue() == ""


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    """Without blanks at the ends of lines."""
    assert aligned([["size", "s"], ["512x512", "1.5"]]) == ["size     s", "512x512  1.5"]
