"""Log lines: none is waited for, none that repeats itself fills a disk, the last is not lost."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import subprocess
import sys
import threading
import time

import pytest

from app.log_writer import (
    ACCESS,
    MOST_ACCESS,
    MOST_OWN,
    Limiter,
    LineHandler,
    _write_all,
    write_to,
)
from tests.support.server import ROOT
from tests.support.timing import TIMED


class Clock:
    """A clock that stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def record(name: str, text: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    """A line."""
    made = logging.LogRecord(name, level, "", 0, text, None, None)
    vars(made).update(extra)
    return made


@pytest.fixture
def narrow():
    """A pipe that holds 4 KiB, as two descriptors: to read from and to write to."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        os.close(end)


def drain(descriptor: int) -> str:
    """All that comes until nothing does for a moment."""
    text = b""
    while select.select([descriptor], [], [], 0.1)[0]:
        text += os.read(descriptor, 65_536)
    return text.decode()


@TIMED
def test_nobody_waits_for_a_pipe_that_is_not_read(narrow, is_timed: bool) -> None:
    """What finds no room is dropped; once somebody reads, that is told with its number."""
    out, into = narrow
    handler = LineHandler(lambda data: _write_all(into, data), max_bytes=10_000, flush_s=0.1)
    started = time.monotonic()
    for number in range(1000):
        handler.emit(record("app.test", f"line {number} {'x' * 90}"))
    handler.flush()
    handler.flush()
    took_s = time.monotonic() - started
    lines = drain(out).splitlines()
    written = [line for line in lines if line.startswith("line ")]

    assert not is_timed or took_s < 2
    numbers = [int(line.split()[1]) for line in written]
    assert numbers == sorted(numbers)
    assert 100 < len(numbers) < 1000
    assert (
        lines[-1] == f"{1000 - len(written)} lines were dropped, since nobody read standard error."
    )
    handler.emit(record("app.test", "and on"))
    handler.flush()
    handler.close()

    assert drain(out) == "and on\n"


def test_a_reader_that_has_gone_hurts_nobody() -> None:
    """Nor one that has closed the stream."""
    out, into = os.pipe()
    os.close(out)
    handler = LineHandler(lambda data: _write_all(into, data), flush_s=5)
    for _ in range(3):
        handler.emit(record("app.test", "x"))
    handler.flush()
    os.close(into)
    handler.emit(record("app.test", "y"))
    handler.flush()
    handler.close()

    assert handler._is_idle()


def test_a_line_is_written_where_its_format_is_wrong(capfd) -> None:
    """Its logger is named; nothing of its arguments is shown, and nobody is interrupted."""
    handler = LineHandler(write_to(sys.stderr))
    wrong = logging.LogRecord("library", logging.INFO, "", 0, "%d of %d", ("secret",), None)
    handler.handle(wrong)
    handler.flush()
    handler.close()

    assert capfd.readouterr().err == "A line of library is odd.\n"


def test_a_librarys_line_is_the_same_one_with_other_numbers() -> None:
    """A position or an address in it makes no new kind; of our own lines it does."""
    limiter = Limiter(clock=Clock())
    lines = [f"odd at {number} in <Task 0x{number:x}>" for number in range(100)]

    assert sum(limiter.admits(record("asyncio", line, logging.ERROR)) for line in lines) == 1
    assert sum(limiter.admits(record("app.x", line, logging.ERROR)) for line in lines) == 100


def test_a_librarys_line_is_written_once_in_ten_seconds() -> None:
    """asyncio says that it is out of descriptors thousands of times a second: once, then a
    count."""
    clock = Clock()
    limiter = Limiter(clock=clock)
    out_of = "socket.accept() out of system resource"
    admitted = [
        limiter.admits(record("asyncio", f"{out_of}\nsocket: {number}", logging.ERROR))
        for number in range(5000)
    ]
    other = limiter.admits(record("asyncio", "something else", logging.ERROR))

    assert (sum(admitted), admitted[0], other) == (1, True, True)
    assert limiter.due() == []
    clock.now += limiter.wait_s()
    (told,) = limiter.due()

    assert told.levelno == logging.ERROR
    assert told.getMessage() == (
        f"4999 lines more like this one were left out in the last 10 s: {out_of}"
    )
    assert limiter.admits(record("asyncio", out_of, logging.ERROR))
    assert limiter.wait_s() is None


def test_our_own_lines_are_limited_more_widely() -> None:
    """A request that fails each time would write a traceback each time."""
    limiter = Limiter(clock=Clock())
    admitted = [limiter.admits(record("app.x", "It failed.")) for _ in range(MOST_OWN + 10)]

    assert admitted == [True] * MOST_OWN + [False] * 10


def test_requests_are_limited_and_pictures_are_not() -> None:
    """A request of 19 bytes costs no line of 265 for ever; whatever the card did is told."""
    clock = Clock()
    limiter = Limiter(clock=clock)
    refused = [
        limiter.admits(record(ACCESS, f"GET /{number}")) for number in range(MOST_ACCESS + 40)
    ]
    pictures = [limiter.admits(record(ACCESS, "POST /generate", images=1)) for _ in range(1000)]
    clock.now += 10
    (told,) = limiter.due()

    assert sum(refused) == MOST_ACCESS
    assert all(pictures)
    assert told.getMessage() == "40 requests more were answered in the last 10 s."


def test_lines_that_never_repeat_fill_no_memory() -> None:
    """Kinds are forgotten, the oldest first, and what they left out is told."""
    limiter = Limiter(clock=Clock())
    letters = str.maketrans("0123456789", "abcdefghij")  # numbers alone make no new kind
    for number in range(5000):
        for _ in range(2):
            limiter.admits(record("library", f"line {number}".translate(letters)))

    assert len(limiter._windows) <= 256
    assert len(limiter.due(is_last=True)) == 5000


def test_what_was_left_out_is_told_while_nothing_else_happens(narrow) -> None:
    """The writer wakes for it by itself."""
    out, into = narrow
    limiter = Limiter(window_s=0.05)
    handler = LineHandler(lambda data: _write_all(into, data), limiter=limiter)
    for _ in range(3):
        handler.emit(record("library", "again"))
    said = drain(out).splitlines()
    handler.close()

    assert said == ["again", "2 lines more like this one were left out in the last 1 s: again"]


def test_the_end_waits_for_the_lines_and_tells_what_was_left_out(narrow) -> None:
    """Flushed, everything is there, in order, though the window is not over."""
    out, into = narrow
    handler = LineHandler(lambda data: _write_all(into, data))
    for number in range(20):
        handler.emit(record("app.x", f"{number}"))
        handler.emit(record("library", "again"))
    handler.flush()
    said = os.read(out, 65_536).decode().splitlines()
    handler.close()

    assert [line for line in said if line.isdecimal()] == [str(number) for number in range(20)]
    assert said[-1].startswith("19 lines more like this one")


ENDING = """
import logging, sys
from app import logs
from app.worker.child import _leave
logs.set_up(style="text", level="info")
for number in range(200):
    logging.getLogger("app.x").info("line %d.", number)
logs.say("last words")
if sys.argv[1] == "hard":
    _leave(0)
"""


@pytest.mark.parametrize("way", ["soft", "hard"])
def test_a_process_that_ends_loses_no_line(way) -> None:
    """Neither in Python's own way nor in the worker's, which skips all clean-up."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING, way], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stderr.splitlines()

    assert len(lines) == 201
    assert lines[-1] == "last words"
    assert done.stdout == ""


@pytest.mark.system
def test_a_process_whose_lines_nobody_reads_ends_all_the_same(narrow) -> None:
    """After two seconds, whatever still waits."""
    script = ENDING.replace("range(200)", "range(2000)").replace('logs.say("last words")', "")
    started = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-c", script, "soft"], cwd=ROOT, stderr=narrow[1], timeout=20, check=False
    ).returncode

    assert code == 0
    assert time.monotonic() - started < 10


def test_a_descriptor_that_others_made_nonblocking_is_waited_for(narrow) -> None:
    """A shell or a terminal's other users may; no line is torn or lost by it."""
    out, into = narrow
    os.set_blocking(into, False)
    writing = threading.Thread(target=_write_all, args=(into, b"y" * 20_000))
    writing.start()
    text = drain(out)
    writing.join(5)

    assert text == "y" * 20_000
