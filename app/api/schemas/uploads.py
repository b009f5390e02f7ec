"""From what was sent to what an edit works on: references, a mask, and the size of the result.

Judging and decoding is `app.images`' business; here it is decided which picture plays which part.
Runs in a thread. Nothing is ever fetched: a picture comes with the request or not at all.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.api.schemas.openai_fields import MAX_URL
from app.api.schemas.sizes import SizeRule
from app.domain import Mask, RawImage
from app.errors import InvalidRequest
from app.images import decode_mask, decode_upload, prepare_reference, resize

MAX_UPLOAD_BYTES = 50_000_000

_DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp);base64,", re.IGNORECASE)
_RATIO_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Upload:
    """One picture as it came, as bytes or as base64; *param* is what an error calls it."""

    content: bytes | str = field(repr=False)
    param: str

    def read(self, code: str) -> bytes:
        """Give the bytes of the file; raises `InvalidRequest` with *code*."""
        if isinstance(self.content, bytes):
            data = self.content
        else:
            try:
                data = base64.b64decode(self.content, validate=True)
            except ValueError:
                raise InvalidRequest(
                    f"{self.param} is not valid base64; use the standard alphabet with padding.",
                    param=self.param,
                    code=code,
                ) from None
        if len(data) > MAX_UPLOAD_BYTES:
            raise InvalidRequest(
                f"{self.param} has more than {MAX_UPLOAD_BYTES:,} bytes; scale the picture down.",
                param=self.param,
                code=code,
            )
        return data


@dataclass(frozen=True, slots=True)
class Edit:
    """What an edit works on, ready for a spec."""

    references: tuple[RawImage, ...]
    mask: Mask | None
    size: tuple[int, int]


def data_url(text: str, param: str) -> Upload:
    """Take the base64 out of a data URL; any other URL is refused without being looked at."""
    if len(text) > MAX_URL:
        raise InvalidRequest(
            f"{param} has {len(text):,} characters; the most is {MAX_URL:,}.",
            param=param,
            code="string_above_max_length",
        )
    head = _DATA_URL.match(text)
    if head is None:
        raise InvalidRequest(
            f"{param} must be a data URL such as data:image/png;base64,...; nothing is fetched.",
            param=param,
            code="unsupported_value",
        )
    return Upload(text[head.end() :], param)


def base64_or_data_url(text: str, param: str) -> Upload:
    """Take plain base64 too, which no URL is: a colon is not in its alphabet."""
    return data_url(text, param) if ":" in text[:64] or len(text) > MAX_URL else Upload(text, param)


class Decoder:
    """Decodes in threads, few requests at a time: each needs up to 300 MB while it does."""

    def __init__(self, at_a_time: int = 2) -> None:
        self._places = asyncio.Semaphore(at_a_time)

    async def prepare(
        self,
        images: Sequence[Upload],
        mask: Upload | None,
        size: tuple[int, int] | None,
        rule: SizeRule,
    ) -> Edit:
        """Do what `prepare` does, beside the event loop."""
        async with self._places:
            return await asyncio.to_thread(prepare, images, mask, size, rule)


def prepare(
    images: Sequence[Upload], mask: Upload | None, size: tuple[int, int] | None, rule: SizeRule
) -> Edit:
    """Decode all, and decide the size: the one asked for, or the first picture's own.

    The picture under a mask is scaled to the result's size, so that what the mask keeps comes back
    pixel for pixel; the others are brought to what the model reads.
    """
    first = _decode(images[0], 0)
    prepared = [prepare_reference(first)]
    weights = None
    if mask is not None:
        weights = decode_mask(mask.read("invalid_mask"), first.width, first.height)
    result = size or rule.nearest(prepared[0].width, prepared[0].height)
    if weights is not None:
        _check_ratio(result, first, prepared[0])
        prepared[0] = resize(first, *result)
    del first  # a large original is not kept while the others are decoded
    for index, image in enumerate(images[1:], 1):
        prepared.append(prepare_reference(_decode(image, index)))
    return Edit(tuple(prepared), weights, result)


def _decode(image: Upload, index: int) -> RawImage:
    return decode_upload(image.read("invalid_image"), what=image.param, index=index)


def _check_ratio(result: tuple[int, int], original: RawImage, prepared: RawImage) -> None:
    wanted = result[0] / result[1]
    for image in (original, prepared):
        if abs(wanted * image.height / image.width - 1) <= _RATIO_TOLERANCE:
            return
    raise InvalidRequest(
        f"With a mask the result must have the first picture's shape, {original.width}x"
        f"{original.height}; send size auto, or a size with this ratio.",
        param="size",
    )
