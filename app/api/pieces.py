"""Large responses, sent in small pieces with back-pressure from the client.

A response written in one call is copied by the transport, for every connection that does not read,
and one of ten images blocks the event loop for as long as that takes. Here no body is ever whole:
base64 is encoded piece by piece, and an image is released once it is written.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.disconnect import until_disconnected
from app.api.http_limits.held import HeldAnswers, Holding, Taker
from app.errors import Cancelled
from app.request_context import current_request

PIECE_BYTES = 64 * 1024
_ENCODED_BYTES = PIECE_BYTES // 4 * 3
"""Bytes that become one piece as base64; a multiple of three."""

_TURN_BYTES = 4 * PIECE_BYTES
"""Bytes sent before yielding to the event loop; that takes less than a millisecond."""

CONNECTION = "klein.connection"
"""The ASGI extension by which a response reports to its connection what is unsent."""


class Taking(Taker, Protocol):
    """A connection that sends a response; *waiting_bytes* are ready but not written to it yet."""

    waiting_bytes: int
    answers: HeldAnswers


@dataclass(frozen=True, slots=True)
class Data:
    """An encoded image as a part of a body, sent raw or in base64."""

    data: bytes = field(repr=False)
    is_base64: bool = False

    @property
    def size_bytes(self) -> int:
        """How many bytes are sent, after base64."""
        return (len(self.data) + 2) // 3 * 4 if self.is_base64 else len(self.data)

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes to send, at most `PIECE_BYTES` at a time."""
        view = memoryview(self.data)
        step = _ENCODED_BYTES if self.is_base64 else PIECE_BYTES
        for at in range(0, len(view), step):
            piece = view[at : at + step]
            yield base64.b64encode(piece) if self.is_base64 else piece


class Body:
    """A body of text and images, in order, which can be sent once."""

    def __init__(self, *parts: bytes | Data) -> None:
        self._parts = deque(parts)
        self.size_bytes = sum(
            part.size_bytes if isinstance(part, Data) else len(part) for part in parts
        )

    @property
    def held_bytes(self) -> int:
        """How many bytes it holds: an image is encoded only while it is sent."""
        return sum(len(part.data if isinstance(part, Data) else part) for part in self._parts)

    def copy(self) -> Body:
        """Return another one, which can be sent once too; both hold the same images."""
        return Body(*self._parts)

    @property
    def pictures(self) -> list[bytes]:
        """The images that are not written yet."""
        return [part.data for part in self._parts if isinstance(part, Data)]

    def pieces(self) -> Iterator[tuple[bytes | memoryview, list[bytes]]]:
        """Yield pieces of at most `PIECE_BYTES`, each with the images that end in it."""
        waiting: bytes | memoryview = b""
        ended: list[bytes] = []
        while self._parts:
            part = self._parts.popleft()
            for piece in part.pieces() if isinstance(part, Data) else (part,):
                if len(waiting) + len(piece) > PIECE_BYTES:
                    yield waiting, ended
                    waiting, ended = b"", []
                waiting = b"".join((waiting, piece)) if waiting else piece
            if isinstance(part, Data):
                ended.append(part.data)
        yield waiting, ended


class PieceResponse(Response):
    """A response that sends *body* in pieces, with its Content-Length."""

    def __init__(
        self, body: Body, *, media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(media_type=media_type, headers=headers)
        self.headers["content-length"] = str(body.size_bytes)
        self._pieces = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, until the client disconnects."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        disconnect = asyncio.ensure_future(until_disconnected(receive))
        try:
            await send_body(self._pieces, scope, send, disconnect)
        finally:
            disconnect.cancel()
            await asyncio.wait({disconnect})


async def send_body(
    body: Body, scope: Scope, send: Send, disconnect: asyncio.Future[None], *, is_last: bool = True
) -> None:
    """Send *body* piece by piece, until *disconnect* is done; it ends the response if it *is_last*.

    Every few pieces it yields to the event loop, however fast the client is.
    """
    with _taken(scope, body) as (taking, holding):
        size_bytes, sent_bytes, turn_bytes = body.size_bytes, 0, 0
        for piece, ended in body.pieces():
            if disconnect.done():
                current_request.get().error = Cancelled()
                return
            if taking is not None:
                taking.waiting_bytes = size_bytes - sent_bytes
            sent_bytes += len(piece)
            more = not is_last or sent_bytes < size_bytes
            await send({"type": "http.response.body", "body": piece, "more_body": more})
            if taking is not None and holding is not None:
                taking.waiting_bytes = size_bytes - sent_bytes
                for picture in ended:
                    holding.release_body(picture)
            if sent_bytes < size_bytes and sent_bytes - turn_bytes >= _TURN_BYTES:
                turn_bytes = sent_bytes
                await asyncio.sleep(0)


@contextmanager
def _taken(scope: Scope, body: Body) -> Iterator[tuple[Taking | None, Holding | None]]:
    """Tell the connection of *body*; without a server, as in tests, there is none."""
    taking: Taking | None = (scope.get("extensions") or {}).get(CONNECTION)
    if taking is None:
        yield None, None
        return
    holding = taking.answers.hold(current_request.get().client, taking, body.pictures)
    try:
        yield taking, holding
    finally:
        taking.waiting_bytes = 0
        taking.answers.end(holding)
