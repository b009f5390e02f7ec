"""The rate at which a client takes its responses.

Bytes taken are the bytes written less those still in the transport's buffer; the kernel's send
buffer is kept small, or megabytes would count as taken that the client has not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass

_KERNEL_UNSENT_BYTES = 128 * 1024
_READ_BYTES = 64 * 1024


class MeteredTransport(asyncio.Transport):
    """A transport that counts bytes, and is not closed in the middle of an upload.

    Otherwise the kernel would reset the connection, and a client that is still sending might never
    read the error. Used from the event loop's thread only.

    Responses are written to this one; *inner* is for the protocol, which pauses reading there, or
    closes it whatever is still to be received. *may_close*, called at the first `close`, tells
    whether nothing more will be received.
    """

    def __init__(self, transport: asyncio.Transport, may_close: Callable[[], bool]) -> None:
        super().__init__()
        self.inner = transport
        self._may_close = may_close
        self._is_half_closed = False
        self._written_bytes = 0
        # An attribute of asyncio's own transport; others ignore it.
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with contextlib.suppress(OSError):  # no TCP
                connection.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _KERNEL_UNSENT_BYTES
                )

    @property
    def unsent_bytes(self) -> int:
        """Bytes written, but not taken by the kernel yet."""
        return self.inner.get_write_buffer_size()

    @property
    def taken_bytes(self) -> int:
        """Bytes that the kernel has taken so far."""
        return self._written_bytes - self.unsent_bytes

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data* as soon as the client takes it; has no effect once it is closed."""
        if self.is_closing():
            return
        self._written_bytes += len(data)
        self.inner.write(data)

    def close(self) -> None:
        """Close once everything is sent, or during an upload only shut down the sending side."""
        if self.is_closing():
            return
        if self._may_close():
            self.inner.close()
            return
        self._is_half_closed = True
        try:
            self.inner.write_eof()
        except OSError:  # the client has disconnected
            self.inner.abort()
        else:
            self.inner.resume_reading()

    def abort(self) -> None:
        """Close now; unsent bytes are lost."""
        self.inner.abort()

    def is_closing(self) -> bool:
        """Whether it is closed or closing."""
        return self._is_half_closed or self.inner.is_closing()


@dataclass(slots=True)
class Pace:
    """The pace of one connection, checked repeatedly, to find clients that are too slow.

    Time counts only while bytes are unsent: a stream that sends nothing for an hour is not slow.
    The more is unsent, the higher is the minimum rate: everything must be taken in *most_s*.
    """

    min_bytes_per_s: float
    most_s: float
    window_s: float
    _most_unsent_bytes: int = 0
    _window: tuple[float, int] | None = None
    _moved: tuple[float, int] = (0.0, 0)

    def is_too_slow(self, now: float, *, taken_bytes: int, unsent_bytes: int) -> bool:
        """Return whether less than the minimum was taken in a whole window."""
        if not unsent_bytes:
            self._window = None
            return False
        if self._window is None:
            self._window = self._moved = (now, taken_bytes)
            self._most_unsent_bytes = 0
        self._most_unsent_bytes = max(self._most_unsent_bytes, unsent_bytes)
        if taken_bytes != self._moved[1]:
            self._moved = (now, taken_bytes)
        begun, taken_before = self._window
        if now - begun < self.window_s:
            return False
        self._window = (now, taken_bytes)
        least_bytes_per_s = max(self.min_bytes_per_s, self._most_unsent_bytes / self.most_s)
        return taken_bytes - taken_before < least_bytes_per_s * (now - begun)

    def stalled_s(self, now: float) -> float:
        """Return for how many seconds nothing was taken of the unsent bytes."""
        return 0.0 if self._window is None else now - self._moved[0]
