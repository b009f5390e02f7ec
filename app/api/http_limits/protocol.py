"""One HTTP connection, with the limits that uvicorn's own lacks: how large a request's head may be,
how long it may take to arrive, how many requests are read ahead of their answers, how long nothing
may happen, and how slowly an answer may be taken.

Without them a header of any size is gathered in memory (CVE-2025-48956), ten thousand pipelined
requests are, and a socket that says nothing, or only line ends, is kept for ever. h11 would limit
the head, but parses in Python, and small chunks are the next attack.

`Upgrade` is ignored, as RFC 9110 7.8 allows, and the request answered as any other. llhttp has no
such mode: after the head it takes everything for another protocol. So a fresh parser goes on with
the body, fed before with a small head of the same framing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.http_limits.connections import ConnectionTable, Phase
from app.api.http_limits.held import Holding
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
"""Of requests that wait behind another one's answer."""
_TURN_BYTES = 64 * 1024
"""Parsed in one go; then others have their turn."""
_STALLED_S = 1.0


class _ReadControl(FlowControl):
    """Uvicorn's wishes about reading, left to the connection, which knows what waits unparsed.

    It goes on reading while a request is answered, or nobody would learn that the client has gone.
    """

    def __init__(self, transport: asyncio.Transport, on_resume: Callable[[], None]) -> None:
        super().__init__(transport)
        self._on_resume = on_resume

    def pause_reading(self) -> None:
        """Nothing: what comes is left unparsed."""

    def resume_reading(self) -> None:
        """Somebody wants more."""
        self._on_resume()


class GuardedProtocol(HttpToolsProtocol):
    """Used from the event loop's thread only, one for each connection."""

    head_limit_s = 20.0
    """Seconds from the connection, or from a request's first byte, to the end of its head."""
    idle_limit_s = 5.0
    """Seconds from an answer to the next request's first byte; line ends are none."""
    linger_s = 10.0
    """Seconds that an upload may go on once it has been answered, or once the service ends; its
    bytes are thrown away."""
    max_pipelined = 8
    """Requests that are parsed and not answered."""
    min_bytes_per_s = 16 * 1024
    """An answer that is taken more slowly is cut off."""
    max_taking_s = 120.0
    """So is one that would take longer than this in all, if it is large."""
    pace_window_s = 30.0
    """Seconds over which that is averaged, so that a short pause costs nothing."""

    def __init__(self, *arguments: Any, table: ConnectionTable, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._table = table
        self._metered: MeteredTransport | None = None
        self._pace = Pace(
            min_bytes_per_s=self.min_bytes_per_s,
            most_s=self.max_taking_s,
            window_s=self.pace_window_s,
        )
        self.waiting_bytes = 0
        """Of an answer that is ready, what is not written yet."""
        self._intake = Intake()
        self._framing = Framing()
        self._is_in_head = False
        self._is_replaying = False
        self._is_over = False
        self._is_lingering = False
        self._has_asked = False
        self._head_bytes = self._head_lines = 0
        self._fed_bytes = 0
        self._ahead_bytes = 0
        self._answering: Any = None
        self._last_words = b""
        self._parsing: asyncio.Handle | None = None
        self._limit: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request has no whole answer yet."""
        return self._answering is not None

    @property
    def unsent_bytes(self) -> int:
        """Of answers that are ready, what the client has not taken."""
        return self.waiting_bytes + (self._metered.unsent_bytes if self._metered else 0)

    @property
    def taken_bytes(self) -> int:
        """All that the client has taken so far."""
        return self._metered.taken_bytes if self._metered else 0

    # What the transport tells.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, unless there is no place."""
        peer = transport.get_extra_info("peername")
        if not self._table.admit(self, str(peer[0]) if peer else ""):
            self.transport = transport
            transport.write(too_many_connections())
            transport.close()
            return
        self._metered = MeteredTransport(transport, self._may_close)
        super().connection_made(self._metered)
        self.flow = _ReadControl(self._metered, self._parse_soon)
        self._close_in(self.head_limit_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget everything, and tell the app."""
        self._table.leave(self)
        self._stop_limit()
        if self._parsing is not None:
            self._parsing.cancel()
        self._intake.clear()
        self.pipeline.clear()
        self._let_go()
        if self.scope:
            self.scope.pop("extensions", None)  # no circle is left
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse *data*, as far as there is room for what it holds."""
        if not self._is_over:
            self._intake.add(data)
            self._parse()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Go on with an answer that is being written: its client may still read. One that waits
        for its answer has gone."""
        if self._answering is None or not self.waiting_bytes:
            return None
        self._answering.keep_alive = False
        return True

    def abort(self) -> None:
        """Close now; what is unsent is lost."""
        self.transport.abort()

    # What an answer tells.

    def hold(self, client: str, pictures: list[bytes]) -> Holding:
        """Count the *pictures* that are kept for *client* while they are taken here."""
        return self._table.answers.hold(client, self, pictures)

    def release_body(self, holding: Holding, picture: bytes) -> None:
        """*picture* is written."""
        self._table.answers.release_body(holding, picture)

    def end_holding(self, holding: Holding) -> None:
        """The answer has ended."""
        self._table.answers.end(holding)

    def look(self, now: float) -> None:
        """Cut the connection off if its client is too slow; else say what it is doing."""
        unsent_bytes = self.unsent_bytes
        if self._pace.is_too_slow(now, taken_bytes=self.taken_bytes, unsent_bytes=unsent_bytes):
            self._table.cut(self)
        elif unsent_bytes and self._pace.stalled_s(now) >= _STALLED_S:
            self._table.move(self, Phase.STALLED)
        else:
            self._settle_phase()

    def shutdown(self) -> None:
        """The service ends: what is being answered is answered to its end, nothing else."""
        if self._is_lingering:
            return
        if self._answering is None:
            self._finish()
            return
        self._answering.keep_alive = False
        if self.pipeline or self._framing.is_between or self._is_in_head:
            self._is_over = True
            self._intake.clear()
            self.pipeline.clear()
            self.cycle = self._answering
        else:  # it is still coming
            self._stop_limit()
            self._limit = self.loop.call_later(self.linger_s, self.abort)

    # What the parser tells.

    def on_message_begin(self) -> None:
        """A request's first byte has come."""
        if self._is_replaying:
            return
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]
        self._framing.begin()
        self._is_in_head = True
        self._head_bytes = self._head_lines = 0
        if self._has_asked or self._limit is None:
            self._close_in(self.head_limit_s)
        self._settle_phase()

    def on_url(self, url: bytes) -> None:
        """Count a part of the address."""
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
        if self._is_in_head:
            self._framing.add_header(name.lower(), value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: the app answers, and its own limits hold for the body."""
        if self._is_replaying:
            return
        self._framing.end_head(self.parser.get_http_version())
        super().on_headers_complete()
        self._is_in_head = False
        self._has_asked = True
        self._fed_bytes = 0
        self._stop_limit()
        self._settle_phase()

    def on_body(self, body: bytes) -> None:
        """Pass a part of the body on."""
        self._fed_bytes = 0
        if self._framing.left_bytes:
            self._framing.left_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole too."""
        if self.parser.should_upgrade():
            return  # llhttp takes the body for another protocol; it is still to come
        super().on_message_complete()
        self._framing.end()
        self._fed_bytes = 0
        if not self.cycle.keep_alive:
            self._is_over = True
            self._intake.clear()
        if self._answering is None:
            self._wait_for_more()

    # What the app's side tells.

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """An answer is written; the next request's turn, or the client's."""
        self._answering = None
        super().on_response_complete()
        self._unset_keepalive_if_required()  # any byte would stop uvicorn's own limit
        if not self.pipeline:
            self._ahead_bytes = 0
        if self._answering is not None or self.transport.is_closing():
            return
        if self._last_words:
            self.transport.write(self._last_words)
            self.transport.close()
            return
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
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

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
            # A header, a trailer or a chunk's extension that does not end.
            if self._fed_bytes > MAX_HEAD_BYTES:
                self._refuse(head_too_large())

    def _ignore_upgrade(self, behind: bytes) -> None:
        self._intake.put_back(behind)
        self.parser = httptools.HttpRequestParser(self)
        if head := self._framing.head_again():
            self._is_replaying = True
            self.parser.feed_data(head)
            self._is_replaying = False
        else:
            self.on_message_complete()

    def _refuse(self, why: Unreadable) -> None:
        """Say what cannot be read, in its turn, and close; what came before it is answered."""
        self._is_over = True
        self._intake.clear()
        if not self._framing.is_between and not self._is_in_head:
            # It is in the newest request's body.
            if not self.pipeline:
                if self._answering is not None and not self.cycle.response_started:
                    self.transport.write(why.answer())
                self.transport.close()
                return
            self.pipeline.popleft()
            self.cycle = self._answering
        if self._answering is not None:
            self._last_words = why.answer()
        else:
            self.transport.write(why.answer())
            self.transport.close()

    def _count(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES or self._head_lines > MAX_HEADER_LINES:
            raise head_too_large()

    # Time.

    def _settle_phase(self) -> None:
        if self._answering is not None or self.unsent_bytes:
            phase = Phase.BUSY
        elif self._framing.is_between and self._has_asked:
            phase = Phase.IDLE
        else:
            phase = Phase.ASKING
        self._table.move(self, phase)

    def _wait_for_more(self) -> None:
        """Nothing is to be answered: give the client its time for what comes next."""
        if self._framing.is_between:
            self._close_in(self.idle_limit_s)
        elif not self._is_in_head:
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
            self._finish()

    def _may_close(self) -> bool:
        if self._framing.is_between:
            return True
        self._is_over = self._is_lingering = True
        self._intake.clear()
        self._let_go()
        self._close_in(self.linger_s)
        return False

    def _finish(self) -> None:
        assert self._metered is not None
        self._metered.finish()

    def _let_go(self) -> None:
        """Tell the app that nobody waits for its answer; uvicorn tells the newest request only,
        which may wait behind this one.
        """
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()
            self._answering = None

    def _stop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
