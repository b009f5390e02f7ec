"""Answers that are written by hand, because what they refuse never reaches the app: a head that
cannot be read, a body without a clear end, a connection too many. OpenAI's error object, as
everywhere.
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
    """Raised through the parser by its callbacks; *status* and the text are what the client
    reads.
    """

    def __init__(
        self, text: str = "This is not a valid HTTP request.", *, status: int = 400
    ) -> None:
        super().__init__(text)
        self.status = status

    def answer(self) -> bytes:
        """The whole answer; the connection is closed behind it."""
        return _answer(self.status, InvalidRequest(str(self)))


def head_too_large() -> Unreadable:
    """431: more bytes or lines than any client of ours needs."""
    return Unreadable(
        f"The request's head has more than {MAX_HEAD_BYTES:,} bytes or {MAX_HEADER_LINES} lines; "
        "send fewer or shorter headers and a shorter address.",
        status=431,
    )


def too_many_connections() -> bytes:
    """503 for a connection that finds no place."""
    error = Unavailable(
        "Too many connections are open; close those that you do not use and try again in "
        f"{_RETRY_S} seconds.",
        kind=Kind.QUEUE_FULL,
        retry_after_s=_RETRY_S,
    )
    advice = f"retry-after: {retry_after(error.retry_after_s)}"
    return _answer(REPLIES[error.kind].status, error, advice)


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
