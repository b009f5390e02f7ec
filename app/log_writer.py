"""Where log lines go: a bounded queue and one thread that writes them.

Logging never blocks. A standard error that nobody reads, such as a full pipe or a stopped terminal,
would otherwise block the event loop at its next line, and with it the service. Lines that find the
queue full are dropped and counted, and the count is logged once lines flow again. `O_NONBLOCK`
would not do: it holds for every process that shares the file descriptor, the parent shell among
them.

Repeated lines are rate-limited too, or whoever can provoke one fills the disk: asyncio logs that it
is out of file descriptors thousands of times a second, and a refused request of 19 bytes costs a
line of 265.
"""

from __future__ import annotations

import logging
import os
import re
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

ACCESS = "app.api.access"
"""The logger of the one line per request."""

MAX_WAITING_BYTES = 4 * 1024 * 1024
MAX_LINE_CHARACTERS = 64 * 1024
FLUSH_S = 2.0
"""Seconds that a process waits at its exit for its lines to be read."""

WINDOW_S = 10.0
MOST_ACCESS = 250
"""Lines of requests without an image, in one window."""
MOST_OWN = 50
"""Equal lines of one of this program's loggers, in one window."""
MOST_FOREIGN = 1
"""Equal lines of a library's logger, in one window."""

_MAX_KINDS = 256
_MAX_SAMPLE = 120
_DIGITS = re.compile(r"(?:0x[0-9a-f]+|[0-9])+")

Write = Callable[[bytes], object]


@dataclass(slots=True)
class _Window:
    """Lines of one kind since *began*; the first *most* of them are written."""

    logger: str
    level: int
    sample: str
    most: int
    began: float
    seen: int = 0

    @property
    def left_out(self) -> int:
        """How many lines were not written."""
        return max(0, self.seen - self.most)

    def told(self, now: float) -> logging.LogRecord:
        """Return the line that counts those left out."""
        seconds = max(1, round(now - self.began))
        if self.logger == ACCESS:
            text = f"{self.left_out} requests more were answered in the last {seconds} s."
        else:
            text = (
                f"{self.left_out} lines more like this one were left out in the last {seconds} s: "
                f"{self.sample}"
            )
        return _record(self.logger, self.level, text)


class Limiter:
    """Limits lines of one kind in a window of time; counts the rest, for a line at its end.

    A kind is a logger, a level and the first line of a message; for a library's message without its
    digits, or an address or a position in it would make each line another kind. All lines about
    requests are of one kind, but those of images are never left out: the GPU limits their rate.
    Used by one thread at a time.
    """

    def __init__(
        self, *, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._clock = clock
        self._windows: OrderedDict[tuple[str, int, str], _Window] = OrderedDict()
        self._over: list[_Window] = []

    def admits(self, record: logging.LogRecord) -> bool:
        """Return whether *record* is to be written; count it where not."""
        if record.name == ACCESS and hasattr(record, "images"):
            return True
        window = self._window(record.name, *_kind(record))
        window.seen += 1
        return window.seen <= window.most

    def due(self, *, is_last: bool = False) -> list[logging.LogRecord]:
        """Return the counts of windows that have ended, or of all where *is_last* is set."""
        now = self._clock()
        for key, window in list(self._windows.items()):
            if is_last or now >= window.began + self._window_s:
                self._over.append(self._windows.pop(key))
        over, self._over = self._over, []
        return [window.told(now) for window in over if window.left_out]

    def wait_s(self) -> float | None:
        """Return the seconds until a window ends, None where there is none."""
        began = [window.began for window in self._windows.values() if window.left_out]
        return max(0.0, min(began) + self._window_s - self._clock()) if began else None

    def _window(self, logger: str, level: int, sample: str, most: int) -> _Window:
        now = self._clock()
        key = (logger, level, sample)
        window = self._windows.get(key)
        if window is not None and now < window.began + self._window_s:
            return window
        if window is not None:
            self._over.append(self._windows.pop(key))
        elif len(self._windows) >= _MAX_KINDS:
            self._over.append(self._windows.popitem(last=False)[1])
        self._windows[key] = _Window(logger, level, sample, most, now)
        return self._windows[key]


class LineHandler(logging.Handler):
    """Formats in the caller's thread and context, and writes in a thread of its own."""

    def __init__(
        self,
        write: Write,
        *,
        limiter: Limiter | None = None,
        max_bytes: int = MAX_WAITING_BYTES,
        flush_s: float = FLUSH_S,
    ) -> None:
        super().__init__()
        self._write = write
        self._limiter = limiter or Limiter()
        self._max_bytes = max_bytes
        self._flush_s = flush_s
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._is_broken = self._is_stuck = self._is_closed = False
        threading.Thread(target=self._run, name="log writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line; count it where the queue is full."""
        try:
            with self._changed:
                is_admitted = self._limiter.admits(record)
                self._changed.notify_all()  # a count is due when its window ends
            if is_admitted:
                self.say(self.format(record))
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Log that a line could not be formatted.

        logging's own method would write a traceback, and block until it is read.
        """
        self.say(self.format(_record(__name__, logging.ERROR, f"A line of {record.name} is odd.")))

    def say(self, line: str) -> None:
        """Queue *line* unchanged."""
        data = line[:MAX_LINE_CHARACTERS].encode(errors="backslashreplace") + b"\n"
        with self._changed:
            if self._waiting_bytes + len(data) > self._max_bytes:
                self._dropped += 1
            else:
                self._queue(data)

    def flush(self) -> None:
        """Wait until all lines are written, `flush_s` at most; after one timeout, do not wait."""
        with self._changed:
            if self._is_stuck:
                return
            self._is_stuck = not self._changed.wait_for(self._is_idle, self._flush_s)
            self._tell(is_last=True)
            if not self._is_stuck:
                self._is_stuck = not self._changed.wait_for(self._is_idle, self._flush_s)

    def close(self) -> None:
        """Write the queued lines, then end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _is_idle(self) -> bool:
        return not self._lines

    def _queue(self, data: bytes) -> None:
        self._lines.append(data)
        self._waiting_bytes += len(data)
        self._changed.notify_all()

    def _run(self) -> None:
        """Write line after line; each stays in the queue until it is written."""
        while self._has_line():
            try:
                self._write(self._lines[0])
            except (OSError, ValueError):  # the reader has gone, the disk is full, or it is closed
                self._is_broken = True
            else:
                self._is_broken = self._is_stuck = False
            with self._changed:
                self._dropped += self._is_broken
                self._waiting_bytes -= len(self._lines.popleft())
                self._changed.notify_all()

    def _has_line(self) -> bool:
        """Wait for a line; return False once the handler is closed and none is left."""
        with self._changed:
            self._tell()
            while not self._lines and not self._is_closed:
                self._changed.wait(self._limiter.wait_s())
                self._tell()
            return bool(self._lines)

    def _tell(self, *, is_last: bool = False) -> None:
        """Queue the counts of dropped lines, once there is room again."""
        if self._lines or self._is_broken:
            return
        records = self._limiter.due(is_last=is_last)
        if self._dropped:
            told = f"{self._dropped} lines were dropped, since nobody read standard error."
            records.insert(0, _record(__name__, logging.WARNING, told))
            self._dropped = 0
        for record in records:
            self._queue(self.format(record).encode(errors="backslashreplace") + b"\n")


def write_to(stream: TextIO | None) -> Write:
    """Return a function that writes to *stream*, past its buffer.

    A writer that blocks would hold the buffer's lock while the interpreter ends.
    """
    if stream is None:
        return lambda data: None
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return lambda data: (stream.write(data.decode()), stream.flush())
    return lambda data: _write_all(descriptor, data)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # a process that shares the file descriptor made it non-blocking
            ready = select.poll()
            ready.register(descriptor, select.POLLOUT)
            ready.poll()


def _kind(record: logging.LogRecord) -> tuple[int, str, int]:
    """Return the level and the sample of a line's kind, and how many are written in a window."""
    if record.name == ACCESS:
        return logging.INFO, "", MOST_ACCESS
    sample = record.getMessage().partition("\n")[0]
    if record.name == "app" or record.name.startswith("app."):
        return record.levelno, sample[:_MAX_SAMPLE], MOST_OWN
    return record.levelno, _DIGITS.sub("0", sample)[:_MAX_SAMPLE], MOST_FOREIGN


def _record(logger: str, level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord(logger, level, "", 0, text, None, None)
