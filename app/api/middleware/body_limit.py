"""Limits on request bodies: the size of one, the time to receive it, and the sum of all.

The limits apply only when a body is read: a route that refuses for another reason never waits for
it. All bodies together are limited too, or a few dozen clients could fill the memory; no client has
more than three quarters of that sum, or one slow sender would keep all others out. Bytes received
and still held are counted, not the announced length. A small body is always admitted: a text-only
request has a few hundred bytes, and one for each socket does no harm.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InvalidRequest, Kind, KleinError, Unavailable
from app.limits import three_quarters
from app.request_context import current_request, nothing

BODIES_AT_ONCE = 8
"""The memory for all bodies, in bodies of the largest size."""
SMALL_BYTES = 64 * 1024
"""A body is counted from this size on, and waits for no place in the queue until it is read."""
RETRY_S = 5


class BodyLimit:
    """ASGI middleware: refuses a body that is too large, takes too long, or finds no room.

    A body is too large by its Content-Length or by the bytes received. *max_bytes* is for one body.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, limit_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._limit_s = limit_s
        self._held: Counter[str] = Counter()
        """Bytes that the bodies being read hold, by client."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a body that cannot exceed the limits."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = current_request.get()
        expected = _content_length(scope)
        received = counted = held = 0
        late_at: float | None = asyncio.get_running_loop().time() + self._limit_s

        async def receive_some() -> Message:
            nonlocal received, counted, held, late_at
            self._check(expected)
            try:
                async with asyncio.timeout_at(late_at):
                    message = await receive()
            except TimeoutError:
                raise InvalidRequest(
                    f"The body took longer than {self._limit_s:g} s to arrive; send it faster, "
                    "or send less."
                ) from None
            if not message.get("more_body", False):
                late_at = None  # from here on `receive` waits for the disconnect
            received += len(message.get("body", b""))
            self._check(received)
            if received > SMALL_BYTES:
                more, counted = received - counted, received
                held += more
                self._hold(context.client, more)
            return message

        def release_body() -> None:
            nonlocal counted, held
            self._release(context.client, held)
            counted, held = received, 0

        context.release_body = release_body
        try:
            await self._app(scope, receive_some, send)
        finally:
            release_body()
            # The function and the context refer to each other.
            context.release_body = nothing

    def _hold(self, client: str, size_bytes: int) -> None:
        """Count *size_bytes* more, also where a limit is exceeded."""
        self._held[client] += size_bytes
        max_bytes = BODIES_AT_ONCE * self._max_bytes
        if self._held[client] > three_quarters(max_bytes):
            raise _too_many("Too many of your own large requests are being read")
        if self._held.total() > max_bytes:
            raise _too_many("Too many large requests are being read")

    def _release(self, client: str, size_bytes: int) -> None:
        self._held[client] -= size_bytes
        if not self._held[client]:
            del self._held[client]

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise KleinError(
                f"The body is larger than {self._max_bytes:,} bytes; send less or smaller images.",
                kind=Kind.TOO_LARGE,
            )


def is_large(scope: Scope) -> bool:
    """Whether the body may exceed `SMALL_BYTES`, by Content-Length or because it is chunked."""
    is_chunked = "transfer-encoding" in Headers(scope=scope)
    return is_chunked or _content_length(scope) > SMALL_BYTES


def _too_many(what: str) -> Unavailable:
    return Unavailable(
        f"{what}; try again in a few seconds.", kind=Kind.QUEUE_FULL, retry_after_s=RETRY_S
    )


def _content_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "")
    # Leading zeros are valid; the first digits of a longer number are too many already.
    return int(text.lstrip("0")[:20] or 0) if text.isdecimal() else 0
