"""One HTTP connection, with limits that uvicorn's own protocol lacks.

They are on the size of a request's head, the time to receive it, the number of pipelined requests,
the idle time, and the rate at which a response is taken. Without them a header of any size is
buffered (CVE-2025-48956), as are ten thousand pipelined requests, and a socket that sends nothing,
or only line ends, is never closed. h11 would limit the head, but parses in Python, and small chunks
are the next attack.

`Upgrade` is ignored, as RFC 9110 7.8 allows, and the request answered as any other. llhttp has no
such mode: after the head it takes all bytes for another protocol. So a new parser continues with
the body, after a minimal head of the same framing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api.http_limits.connections import ConnectionTable, Phase
from app.api.http_limits.intake import Framing, Intake
from app.api.http_limits.pacing import MeteredTransport, Pace
from app.api.http_limits.refusals import (
    MAX_HEAD_BYTES,
    MAX_HEADER_LINES,
    Unreadable,
    head_too_large,
    too_many_connections,
)
from app.api.pieces import CONNECTION

_MAX_UNPARSED_BYTES = 64 * 1024
_MAX_AHEAD_BYTES = 64 * 1024
"""Bytes parsed of requests that wait for an earlier response."""
_TURN_BYTES = 64 * 1024
"""Bytes parsed before yielding to the event loop."""
_STALLED_S = 1.0


class _ReadControl(FlowControl):
    """Uvicorn's flow control of reading, left to the connection, which has a buffer of its own.

    The connection reads on while a request is answered, or a disconnect would not be noticed.
    """

    def __init__(self, transport: asyncio.Transport, on_resume: Callable[[], None]) -> None:
        super().__init__(transport)
        self._on_resume = on_resume

    def pause_reading(self) -> None:
        """Do nothing: what is received stays unparsed."""

    def resume_reading(self) -> None:
        """Resume parsing."""
        self._on_resume()


class GuardedProtocol(HttpToolsProtocol):
    """The HTTP/1.1 protocol of one connection; used from the event loop's thread only."""

    transport: MeteredTransport
    head_limit_s = 20.0
    """Seconds from the connection, or from a request's first byte, to the end of its head."""
    idle_limit_s = 5.0
    """Seconds from a response to the next request's first byte; line ends do not count."""
    linger_s = 10.0
    """Seconds that an upload may go on after its response, or after the shutdown begins.

    Its bytes are discarded.
    """
    max_pipelined = 8
    """Requests that are parsed and not answered, at most."""
    min_bytes_per_s = 16 * 1024
    """The least rate at which a response must be taken; a slower one is aborted."""
    max_taking_s = 120.0
    """The longest time in which a large response must be taken; a slower one is aborted."""
    pace_window_s = 30.0
    """Seconds over which the rate is averaged, so that a short pause is harmless."""

    def __init__(self, *arguments: Any, table: ConnectionTable, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._table = table
        self.answers = table.answers
        self._pace = Pace(
            min_bytes_per_s=self.min_bytes_per_s,
            most_s=self.max_taking_s,
            window_s=self.pace_window_s,
        )
        self.waiting_bytes = 0
        """Bytes of a response that are ready but not written yet."""
        self._intake = Intake()
        self._framing = Framing(is_between=True)
        self._is_replaying = False
        self._is_over = False
        self._has_asked = False
        self._head_bytes = self._head_lines = 0
        self._fed_bytes = 0
        self._ahead_bytes = 0
        self._answering: RequestResponseCycle | None = None
        self._last_words = b""
        self._parsing: asyncio.Handle | None = None
        self._limit: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request's response is not complete."""
        return self._answering is not None

    @property
    def unsent_bytes(self) -> int:
        """Bytes of responses that are ready but not taken by the client."""
        return self.waiting_bytes + self.transport.unsent_bytes

    @property
    def taken_bytes(self) -> int:
        """Bytes that the client has taken so far."""
        return self.transport.taken_bytes

    # Callbacks of the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, or answer 503 if there are too many connections."""
        super().connection_made(transport)
        self.transport = MeteredTransport(transport, self._may_close)
        self.flow = _ReadControl(self.transport, self._parse_soon)
        peer = transport.get_extra_info("peername")
        if self._table.admit(self, str(peer[0]) if peer else ""):
            self._close_in(self.head_limit_s)
        else:
            self.transport.write(too_many_connections())
            self.transport.inner.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything, and tell the app."""
        self._table.leave(self)
        self._stop_limit()
        if self._parsing is not None:
            self._parsing.cancel()
        self._end_input()
        self.pipeline.clear()
        self._disconnect()
        if self.scope:
            self.scope.pop("extensions", None)  # breaks a reference cycle
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Buffer *data*, and parse as much as there is room for."""
        if not self._is_over:
            self._intake += data
            self._parse()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Continue a response that is being written: its client may still read.

        A client that waits for its response has disconnected.
        """
        if self._answering is None or not self.waiting_bytes:
            return None
        self._answering.keep_alive = False
        return True

    def abort(self) -> None:
        """Close now; unsent bytes are lost."""
        self.transport.abort()

    def look(self, now: float) -> None:
        """Abort the connection if its client is too slow; else update its phase."""
        unsent_bytes = self.unsent_bytes
        if self._pace.is_too_slow(now, taken_bytes=self.taken_bytes, unsent_bytes=unsent_bytes):
            self._table.abort_slow(self)
        elif unsent_bytes and self._pace.stalled_s(now) >= _STALLED_S:
            self._table.move(self, Phase.STALLED)
        else:
            self._settle_phase()

    def shutdown(self) -> None:
        """Begin the shutdown: finish the current response, and answer nothing else."""
        if self.transport.is_closing():
            return
        if self._answering is None:
            self.transport.inner.close()
            return
        self._answering.keep_alive = False
        if self.pipeline or self._framing.is_between or self._framing.is_in_head:
            self._end_input()
            self.pipeline.clear()
            self.cycle = self._answering
        else:  # its body is still being received
            self._stop_limit()
            self._limit = self.loop.call_later(self.linger_s, self.abort)

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        """Begin a request, at its first byte."""
        if self._is_replaying:
            return
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]
        self._framing = Framing(is_in_head=True)
        self._head_bytes = self._head_lines = 0
        if self._has_asked:
            self._close_in(self.head_limit_s)
        self._settle_phase()

    def on_url(self, url: bytes) -> None:
        """Count a part of the request target."""
        if self._is_replaying:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header; a trailer is counted and dropped (RFC 9110 6.5.1)."""
        if self._is_replaying:
            return
        self._head_lines += 1
        self._count(len(name) + len(value) + len(": \r\n"))
        if self._framing.is_in_head:
            self._framing.add_header(name.lower(), value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the app; the app's own limits apply to the body."""
        if self._is_replaying:
            return
        if self._framing.is_chunked and self.parser.get_http_version() != "1.1":
            raise Unreadable("Transfer-Encoding needs HTTP/1.1; send a Content-Length.")
        super().on_headers_complete()
        self._framing.is_in_head = False
        self._has_asked = True
        self._fed_bytes = 0
        self._stop_limit()
        self._settle_phase()

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body to the app."""
        self._fed_bytes = 0
        if self._framing.left_bytes:
            self._framing.left_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        if self.parser.should_upgrade():
            return  # llhttp takes the body for another protocol; it is still to be received
        super().on_message_complete()
        self._framing = Framing(is_between=True)
        self._fed_bytes = 0
        if not self.cycle.keep_alive:
            self._end_input()
        if self._answering is None:
            self._wait_for_more()

    # Callbacks of the app's side.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Continue with the next pipelined request, or wait for the client."""
        self._answering = None
        super().on_response_complete()
        self._unset_keepalive_if_required()  # any byte would stop uvicorn's own timer
        if not self.pipeline:
            self._ahead_bytes = 0
        if self._answering is not None or self.transport.is_closing():
            return
        if self._last_words:
            self.transport.write(self._last_words)
            self.transport.close()
        else:
            self._wait_for_more()

    # Parsing.

    def _parse_soon(self) -> None:
        if self._parsing is None and self._intake:
            self._parsing = self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        if self._parsing is not None:
            self._parsing.cancel()
            self._parsing = None
        left = _TURN_BYTES
        while self._has_room() and (piece := self._intake.take(self._framing)):
            self._feed(piece)
            left -= len(piece)
            if left <= 0:
                self._parse_soon()
                break
        if len(self._intake) < _MAX_UNPARSED_BYTES:
            self.transport.inner.resume_reading()
        else:
            self.transport.inner.pause_reading()

    def _has_room(self) -> bool:
        """Whether more may be parsed: neither too many requests wait, nor too much of a body."""
        if self._is_over or self.transport.is_closing():
            return False
        if self.pipeline:
            return (
                len(self.pipeline) + 1 < self.max_pipelined and self._ahead_bytes < _MAX_AHEAD_BYTES
            )
        return (
            self.cycle is None
            or self.cycle.response_complete
            or len(self.cycle.body) <= HIGH_WATER_LIMIT
        )

    def _feed(self, piece: bytes) -> None:
        self._fed_bytes += len(piece)
        if self.pipeline:
            self._ahead_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(piece[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, Unreadable) else Unreadable())
        else:
            # A header, a trailer or a chunk extension without an end.
            if self._fed_bytes > MAX_HEAD_BYTES:
                self._refuse(head_too_large())

    def _ignore_upgrade(self, behind: bytes) -> None:
        self._intake[:0] = behind
        self.parser = httptools.HttpRequestParser(self)
        if head := self._framing.head_again():
            self._is_replaying = True
            self.parser.feed_data(head)
            self._is_replaying = False
        else:
            self.on_message_complete()

    def _refuse(self, why: Unreadable) -> None:
        """Answer earlier requests, then answer with the error *why* and close."""
        self._end_input()
        if not self._framing.is_between and not self._framing.is_in_head:
            # The error is in the newest request's body.
            if not self.pipeline:
                if self._answering is not None and not self.cycle.response_started:
                    self.transport.write(why.answer())
                self.transport.close()
                return
            self.pipeline.popleft()
            # Others wait in the pipeline only while one is answered.
            self.cycle = self._answering  # type: ignore[assignment]
        if self._answering is not None:
            self._last_words = why.answer()
        else:
            self.transport.write(why.answer())
            self.transport.close()

    def _count(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES or self._head_lines > MAX_HEADER_LINES:
            raise head_too_large()

    def _end_input(self) -> None:
        """Parse nothing more, and keep nothing of what is received."""
        self._is_over = True
        self._intake.clear()

    # Time limits.

    def _settle_phase(self) -> None:
        if self._answering is not None or self.unsent_bytes:
            phase = Phase.BUSY
        elif self._framing.is_between and self._has_asked:
            phase = Phase.IDLE
        else:
            phase = Phase.ASKING
        self._table.move(self, phase)

    def _wait_for_more(self) -> None:
        """Set the time limit for what the client sends next; no response is pending."""
        if self._framing.is_between:
            self._close_in(self.idle_limit_s)
        elif not self._framing.is_in_head:
            self._close_in(self.linger_s)
        self._settle_phase()

    def _close_in(self, seconds: float) -> None:
        self._stop_limit()
        self._limit = self.loop.call_later(seconds, self._on_limit, seconds)

    def _on_limit(self, seconds: float) -> None:
        if self._answering is not None or self.unsent_bytes:
            # An earlier request of this connection is still being answered.
            self._close_in(seconds)
        else:
            self.transport.inner.close()

    def _may_close(self) -> bool:
        if self._framing.is_between:
            return True
        self._end_input()
        self._disconnect()
        self._close_in(self.linger_s)
        return False

    def _disconnect(self) -> None:
        """Tell the app that the client of the current request has disconnected.

        Uvicorn tells the newest request only, which may wait behind this one.
        """
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()
            self._answering = None

    def _stop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
