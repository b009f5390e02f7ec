"""What commands print besides results: one look for all bars, and none where nobody watches."""

from __future__ import annotations

import io
import re
import sys
import threading

import pytest

from app.cli.console import Progress, aligned, plain, progress_bar


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


def drawn(clock: list[float], *shares: float, total_bytes: int = 0) -> str:
    """The last line after *shares*, one each second."""
    progress = Progress(lambda: clock[0])
    for share in shares:
        progress(share, "download", total_bytes)
        clock[0] += 1
    return sys.stderr.getvalue().rsplit("\r", 1)[1].removesuffix("\x1b[K")


@pytest.mark.parametrize(
    ("shares", "total_bytes", "told"),
    [
        ((0.0, 0.1, 0.2), 1_000_000_000, "download, 100.0 MB/s, 0:08 left"),
        ((0.0, 0.0001, 0.0002), 0, "download, 2:46:38 left"),
        ((0.5,), 1_000_000_000, "download"),
        ((0.5, 0.5), 1_000_000_000, "download"),
        ((0.5, 0.9, 0.1), 1_000_000_000, "download"),
        (tuple(each / 100 for each in range(20)), 0, "download, 1:21 left"),
        ((0.0, *[0.5] * 15), 10, "download"),
    ],
)
def test_speed_and_time_left_are_those_of_the_last_seconds(
    monkeypatch, shares, total_bytes, told
) -> None:
    """Not before they are known, nor where nothing moves, nor across two stages."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert drawn([0.0], *shares, total_bytes=total_bytes).rpartition("| ")[2] == told


def test_a_bar_fits_into_one_line(monkeypatch) -> None:
    """A longer text is cut; a terminal that has no blocks gets other letters."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert len(drawn([0.0], 0.5, 0.51)) < 80
    Progress()(0.5, "x" * 200)
    assert max(map(len, re.split("[\r\x1b]", sys.stderr.getvalue()))) == 79
    assert "█" in sys.stderr.getvalue()

    class Plain(Terminal):
        encoding = "latin-1"

    monkeypatch.setattr(sys, "stderr", Plain())
    assert "|##########          |" in drawn([0.0], 0.5)


def test_what_a_terminal_would_obey_is_taken_out() -> None:
    """Texts of others are printed as they are, but for control characters."""
    assert plain("a\x1b[31mé\n") == "a?[31mé?"
