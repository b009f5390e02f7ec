"""Images in text: data URLs and plain base64, and their limit of length; decodes nothing."""

from __future__ import annotations

import re

from app.api.schema.json_scanner import LongText
from app.errors import InvalidRequest
from app.images.preparing import Upload

MAX_URL = 20_971_520
"""Characters of an image in JSON; OpenAI's own limit."""

_DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
_HEAD = 64
"""Characters within which the prefix of a data URL must end."""


def data_url(text: str | LongText, param: str) -> Upload:
    """Take the base64 out of a data URL; any other URL is refused and never fetched."""
    _check_length(text, param)
    head = _DATA_URL.match(_start(text))
    if head is None:
        raise InvalidRequest(
            f"{param} must be a data URL such as data:image/png;base64,...; nothing is fetched.",
            param=param,
            code="unsupported_value",
        )
    return Upload(_bytes(text)[head.end() :], param, is_base64=True)


def base64_or_data_url(text: str | LongText, param: str) -> Upload:
    """Take a data URL or plain base64, which has no colon in its alphabet."""
    if ":" in _start(text):
        return data_url(text, param)
    _check_length(text, param)
    return Upload(_bytes(text), param, is_base64=True)


def _check_length(text: str | LongText, param: str) -> None:
    length = text.length if isinstance(text, LongText) else len(text)
    if length > MAX_URL:
        raise InvalidRequest(
            f"{param} has {length:,} characters; the most is {MAX_URL:,}.",
            param=param,
            code="string_above_max_length",
        )


def _start(text: str | LongText) -> str:
    return (text.start() if isinstance(text, LongText) else text)[:_HEAD]


def _bytes(text: str | LongText) -> memoryview:
    """Return the characters as bytes; what is not ASCII is not base64 either."""
    content = text.content if isinstance(text, LongText) else text.encode("utf-8", "surrogatepass")
    return memoryview(content)
