"""Error responses written as bytes, because what they refuse never reaches the app.

They refuse a malformed head, a body of unknown length and a connection beyond the limit, with
OpenAI's error object as everywhere.
"""

from __future__ import annotations

import http
import json
import uuid

from app.api.errors import REPLIES, envelope, retry_after
from app.errors import InvalidRequest, Kind, KleinError, Unavailable

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADER_LINES = 256

_RETRY_S = 5


class Unreadable(Exception):
    """A request that cannot be parsed; *status* and *text* are for the client.

    The parser's callbacks raise it through the parser.
    """

    def __init__(
        self, text: str = "This is not a valid HTTP request.", *, status: int = 400
    ) -> None:
        super().__init__(text)
        self.status = status

    def answer(self) -> bytes:
        """Return the whole response; the connection is closed after it."""
        return _answer(self.status, InvalidRequest(str(self)))


def head_too_large() -> Unreadable:
    """Make the error for a head beyond `MAX_HEAD_BYTES` or `MAX_HEADER_LINES`: 431."""
    return Unreadable(
        f"The request's head has more than {MAX_HEAD_BYTES:,} bytes or {MAX_HEADER_LINES} lines; "
        "send fewer or shorter headers and a shorter address.",
        status=431,
    )


def too_many_connections() -> bytes:
    """Return the response to a connection beyond the limit: 503 with Retry-After."""
    error = Unavailable(
        "Too many connections are open; close those that you do not use and try again in "
        f"{_RETRY_S} seconds.",
        kind=Kind.QUEUE_FULL,
        retry_after_s=_RETRY_S,
    )
    retry = f"retry-after: {retry_after(error.retry_after_s)}"
    return _answer(REPLIES[error.kind].status, error, retry)


def _answer(status: int, error: KleinError, *more: str) -> bytes:
    body = json.dumps(envelope(error)).encode()
    lines = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-request-id: req_{uuid.uuid4().hex}",
        "x-content-type-options: nosniff",
        *more,
        "connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
