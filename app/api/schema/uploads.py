"""Images in text: data URLs and plain base64, and their limit of length; decodes nothing."""

from __future__ import annotations

import re

from app.api.schema.json_scanner import LongText
from app.errors import InvalidRequest
from app.images.preparing import Upload

MAX_URL = 20_971_520
"""Characters of an image in JSON; OpenAI's own limit."""

_DATA_URL = re.compile(rb"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
_HEAD = 64
"""Bytes within which the prefix of a data URL must end."""


def data_url(text: str | LongText, param: str) -> Upload:
    """Take the base64 out of a data URL; any other URL is refused and never fetched."""
    long = _as_long(text, param)
    head = _DATA_URL.match(long.content[:_HEAD])
    if head is None:
        is_data = bytes(long.content[:5]).lower() == b"data:"
        why = "only PNG, JPEG and WebP are read" if is_data else "nothing is fetched"
        raise InvalidRequest(
            f"{param} must be a data URL that begins with data:image/png;base64, or the same with "
            f"jpeg or webp, since {why}.",
            param=param,
            code="unsupported_value",
        )
    return Upload(memoryview(long.content)[head.end() :], param, is_base64=True)


def base64_or_data_url(text: str | LongText, param: str) -> Upload:
    """Take a data URL or plain base64, which has no colon in its alphabet."""
    long = _as_long(text, param)
    if b":" in long.content[:_HEAD]:
        return data_url(long, param)
    return Upload(memoryview(long.content), param, is_base64=True)


def _as_long(text: str | LongText, param: str) -> LongText:
    """Return the characters as bytes; what is not ASCII is not base64 either."""
    if isinstance(text, str):
        text = LongText(bytearray(text.encode("utf-8", "surrogatepass")), len(text))
    if text.length > MAX_URL:
        raise InvalidRequest(
            f"{param} has {text.length:,} characters; the most is {MAX_URL:,}.",
            param=param,
            code="string_above_max_length",
        )
    return text
