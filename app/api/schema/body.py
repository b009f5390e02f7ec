"""Reading of JSON bodies, and the content types that routes accept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request

from app.api.schema.json_scanner import MAX_PLAIN, Scanner, too_large
from app.errors import InvalidRequest, Kind, KleinError

_PIECE_BYTES = 16_384  # the worst input of this size takes a reader a few milliseconds
_TURN_S = 0.002
FORM, JSON = "multipart/form-data", "application/json"
_PLAIN_FORM = "application/x-www-form-urlencoded"


def content_type(request: Request) -> str:
    """Return the media type of the body in lower case, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_media_type(request: Request, *accepted: str) -> None:
    """Refuse a body of any other type, "" for none, and a compressed one.

    A web page needs a CORS preflight for JSON. `curl -d`, and libraries that are given no file,
    send a form of another type: the error says what to send instead, and where forms are accepted,
    it is this one that is wrong (400).
    """
    encodings = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    if {each.strip() for each in encodings} - {"", "identity"}:
        raise KleinError(
            "The body is compressed, and only plain ones are read here; send it without "
            "Content-Encoding.",
            kind=Kind.UNSUPPORTED_ENCODING,
        )
    found = content_type(request)
    if found not in accepted:
        how = (
            "send each field with -F, and pictures as -F image=@picture.png"
            if FORM in accepted
            else f"add -H 'content-type: {JSON}'"
        )
        message = f"The body must be {' or '.join(filter(None, accepted))}; with curl {how}."
        if found == _PLAIN_FORM and FORM in accepted:
            raise InvalidRequest(message, code="invalid_multipart")
        raise KleinError(message, kind=Kind.UNSUPPORTED_MEDIA)


async def read_json(request: Request, *, has_pictures: bool = False) -> dict[str, Any]:
    """Read the body as one JSON object.

    Only a body that *has_pictures* may be large; each long string is returned as `LongText`.
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
    """Yield the body in small pieces, and yield to the event loop if their reader takes long."""
    since = time.perf_counter()
    # `request.body()` would keep the bytes for as long as the request waits for its images.
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            view = memoryview(chunk)
            for start in range(0, len(view), _PIECE_BYTES):
                yield view[start : start + _PIECE_BYTES]
                if time.perf_counter() - since > _TURN_S:
                    await asyncio.sleep(0)
                    since = time.perf_counter()
