"""One HTTP connection, with the limits that uvicorn's own lacks: how large a request's head may be,
how long it may take to arrive, and how long an upload goes on that has been answered already.

Without them a header of any size is gathered in memory (CVE-2025-48956), and a socket that never
says anything is kept for ever. h11 would limit the head, but parses in Python, and small chunks are
the next attack. What is refused here never reaches the app, so the answer, OpenAI's error object,
is written by hand.
"""

from __future__ import annotations

import asyncio
import http
import json
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import envelope
from app.errors import InvalidRequest

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADER_LINES = 256


class _HeadTooLarge(Exception):
    """The parser stops at this."""


class GuardedProtocol(HttpToolsProtocol):
    """Used from the event loop's thread only, one for each connection."""

    head_limit_s = 20.0
    """Seconds from the connection, or from a request's first byte, to the end of its head."""
    linger_s = 10.0
    """Seconds that an upload may go on once it has been answered; its bytes are thrown away."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._is_in_head = True
        self._is_whole = True
        self._fed_bytes = 0
        self._head_bytes = 0
        self._head_lines = 0
        self._is_too_large = False
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._close_in(self.head_limit_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the limit."""
        self._stop_limit()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse *data*; a head that is too large is refused before its end."""
        if self._is_in_head:
            self._fed_bytes += len(data)
        super().data_received(data)
        if (
            self._is_in_head
            and self._fed_bytes > MAX_HEAD_BYTES
            and not self.transport.is_closing()
        ):
            self._is_too_large = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """A request's first byte has come."""
        super().on_message_begin()
        self._is_in_head, self._is_whole = True, False
        self._head_bytes = self._head_lines = 0
        if self._limit is None:
            self._close_in(self.head_limit_s)

    def on_url(self, url: bytes) -> None:
        """Count a part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header, or one trailer."""
        self._head_lines += 1
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: the app answers, and its own limits hold for the body."""
        self._is_in_head = False
        self._fed_bytes = 0
        self._stop_limit()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole too."""
        self._is_whole = True
        self._stop_limit()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is out; an upload that still goes on has little time left."""
        super().on_response_complete()
        if not self._is_whole and not self.transport.is_closing():
            self._close_in(self.linger_s)

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed, unless an answer is already under way."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_refusal(self._is_too_large))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: uvicorn would advise installing a library that the service has no use for."""

    def _count(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > MAX_HEAD_BYTES or self._head_lines > MAX_HEADER_LINES:
            self._is_too_large = True
            raise _HeadTooLarge

    def _close_in(self, seconds: float) -> None:
        self._stop_limit()
        self._limit = self.loop.call_later(seconds, self._on_limit)

    def _on_limit(self) -> None:
        self._limit = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            # An earlier request of this connection is still being answered.
            self._close_in(self.head_limit_s)

    def _stop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


def _refusal(is_too_large: bool) -> bytes:
    status = 431 if is_too_large else 400
    text = (
        f"The request's head has more than {MAX_HEAD_BYTES:,} bytes or {MAX_HEADER_LINES} lines; "
        "send fewer or shorter headers and a shorter address."
        if is_too_large
        else "This is not a valid HTTP request."
    )
    body = json.dumps(envelope(InvalidRequest(text))).encode()
    lines = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-request-id: req_{uuid.uuid4().hex}",
        "x-content-type-options: nosniff",
        "connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
