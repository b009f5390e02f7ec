"""From bytes on the wire to values: JSON bodies, and the content types that routes accept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request

from app.api.schema.json_scanner import MAX_PLAIN, Scanner, too_large
from app.errors import InvalidRequest, Kind, KleinError

_PIECE_BYTES = 16_384  # of which the worst that a reader may find takes a few milliseconds
_TURN_S = 0.002


def content_type(request: Request) -> str:
    """Name the media type of the body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_json(request: Request) -> None:
    """Refuse any body but JSON; a web page cannot send that type to us unasked, a form it could."""
    if content_type(request) != "application/json":
        raise unsupported_media("application/json")


def unsupported_media(*accepted: str) -> KleinError:
    """Say which types would do; `curl -d` alone sends a form, so the message says what to add."""
    return KleinError(
        f"The body must be {' or '.join(accepted)}; with curl add "
        "-H 'content-type: application/json'.",
        kind=Kind.UNSUPPORTED_MEDIA,
    )


async def read_json(request: Request, *, has_pictures: bool = False) -> dict[str, Any]:
    """Read the body as one JSON object.

    Only where it *has_pictures* may it be large; each long string comes as `LongText`.
    """
    scanner = Scanner()
    received_bytes = 0
    async with aclosing(pieces(request)) as stream:
        async for piece in stream:
            received_bytes += len(piece)
            if received_bytes > MAX_PLAIN and not has_pictures:
                raise too_large(f"is larger than {MAX_PLAIN:,} bytes")
            scanner.feed(piece)
    value = scanner.finish()
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be one JSON object.", code="invalid_json")
    return value


async def pieces(request: Request) -> AsyncGenerator[memoryview, None]:
    """Give the body in small pieces, and way to others whenever their reader has taken long."""
    clock = time.perf_counter
    since = clock()
    # `request.body()` would keep the bytes for as long as the request waits for its pictures.
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            view = memoryview(chunk)
            for start in range(0, len(view), _PIECE_BYTES):
                yield view[start : start + _PIECE_BYTES]
                if clock() - since > _TURN_S:
                    await asyncio.sleep(0)
                    since = clock()
