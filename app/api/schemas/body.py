"""From bytes on the wire to values: JSON bodies, and the content types that routes accept."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any, NoReturn

from fastapi import Request

from app.errors import InvalidRequest, Kind, KleinError

_LARGE_BYTES = 256 * 1024  # parsing more than this would hold up the event loop noticeably


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


async def read_json(request: Request) -> dict[str, Any]:
    """Read the body as one JSON object."""
    # `request.body()` would keep the bytes for as long as the request waits for its pictures.
    async with aclosing(request.stream()) as stream:
        body = b"".join([chunk async for chunk in stream])
    value = await asyncio.to_thread(_parse, body) if len(body) > _LARGE_BYTES else _parse(body)
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be one JSON object.", code="invalid_json")
    return value


def _parse(body: bytes) -> object:
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # bad UTF-8 and overlong integers are ValueErrors too
        raise InvalidRequest(
            "The body is not valid JSON; check quotes, commas and UTF-8.", code="invalid_json"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are no JSON
