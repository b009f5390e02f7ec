"""The plain response of OpenAI's images API, in a form that the SDK's strict mode accepts.

A key without a value is left out, `usage` is complete, and base64 never passes a JSON encoder: ten
large images would block the event loop there, so it is encoded while the response is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from app.api.openai.request import ImagesRequest
from app.api.pieces import Body, Data
from app.domain import RawImage
from app.service.results import Picture, describe_loras

ECHOED_QUALITIES = frozenset({"low", "medium", "high", "xhigh", "max"})
"""Those that openai-python's strict mode accepts in a response."""
_TOKEN_PIXELS = 16 * 16


def answer(
    pictures: Sequence[Picture],
    *,
    asked: ImagesRequest,
    model: str,
    created: int,
    references: Sequence[RawImage] = (),
    links: Sequence[str] | None = None,
) -> Body:
    """Make the body; each image as base64, or as its URL in *links*."""
    first = pictures[0]
    head: dict[str, Any] = {
        "created": created,
        "model": model,
        "background": "opaque",
        "output_format": first.format,
        "size": f"{first.width}x{first.height}",
        "usage": usage(pictures, references, is_whole=True),
    }
    if asked.quality in ECHOED_QUALITIES:
        head["quality"] = asked.quality
    if first.loras:
        head["loras"] = describe_loras(first.loras)
    if warnings := all_warnings(pictures):
        head["warnings"] = warnings
    parts: list[bytes | Data] = [json.dumps(head).encode()[:-1] + b', "data": [']
    for index, picture in enumerate(pictures):
        parts += [b", "] if index else []
        parts += _item(picture, None if links is None else links[index])
    return Body(*parts, b"]}")


def usage(
    pictures: Sequence[Picture], references: Iterable[RawImage] = (), *, is_whole: bool = False
) -> dict[str, Any]:
    """Count tokens: the prompt's, and one per 16x16 pixels of input and output images."""
    text = pictures[0].prompt_tokens
    seen = sum(image.width * image.height // _TOKEN_PIXELS for image in references)
    made = sum(picture.width * picture.height // _TOKEN_PIXELS for picture in pictures)
    counts: dict[str, Any] = {
        "input_tokens": text + seen,
        "output_tokens": made,
        "total_tokens": text + seen + made,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
    }
    if is_whole:  # the SDK's type of an event has no such key
        counts["output_tokens_details"] = {"text_tokens": 0, "image_tokens": made}
    return counts


def all_warnings(pictures: Iterable[Picture]) -> list[str]:
    """Collect the images' warnings, each sentence once."""
    return list(dict.fromkeys(warning for picture in pictures for warning in picture.warnings))


def _item(picture: Picture, link: str | None) -> list[bytes | Data]:
    seed = b'"seed": %d}' % picture.seed
    if link is not None:
        return [b'{"url": ' + json.dumps(link).encode() + b", " + seed]
    return [b'{"b64_json": "', Data(picture.data, is_base64=True), b'", ' + seed]
