"""From what was sent to what an edit works on: references, a mask, and the size of the result.

Judging and decoding one file is `app.images.uploads`' business; here it is decided which picture
plays which part. Runs in a decoder process. Nothing is ever fetched: a picture comes with the
request or not at all.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.domain import Mask, RawImage
from app.errors import InvalidRequest
from app.images.uploads import decode_mask, decode_upload, prepare_reference, resize

MAX_UPLOAD_BYTES = 50_000_000

_RATIO_TOLERANCE = 0.02

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Upload:
    """One picture as it came; *param* is what an error calls it."""

    content: bytes | bytearray | memoryview = field(repr=False)
    param: str
    is_base64: bool = False

    def read(self, code: str) -> bytes | bytearray | memoryview:
        """Give the bytes of the file; raises `InvalidRequest` with *code*."""
        data = self.content
        if self.is_base64:
            try:
                data = base64.b64decode(data, validate=True)
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
    size: Size


def prepare(
    images: Sequence[Upload],
    mask: Upload | None,
    size: Size | None,
    nearest: Callable[[int, int], Size],
    begin: Callable[[Upload, str], None] = lambda upload, code: None,
) -> Edit:
    """Decode all, and decide the size: the one asked for, or the first picture's own as *nearest*
    allows it.

    The picture under a mask is scaled to the result's size, so that what the mask keeps comes back
    pixel for pixel; the others are brought to what the model reads. *begin* is told before each
    file is read, with the code of the errors about it.

    Raises:
        InvalidRequest: one of them cannot be used.
    """
    begin(images[0], "invalid_image")
    first = _decode(images[0], 0)
    prepared = [prepare_reference(first)]
    weights = None
    if mask is not None:
        begin(mask, "invalid_mask")
        weights = decode_mask(mask.read("invalid_mask"), first.width, first.height)
    result = size or nearest(prepared[0].width, prepared[0].height)
    if weights is not None:
        _check_ratio(result, first, prepared[0])
        prepared[0] = resize(first, *result)
    del first  # a large original is not kept while the others are decoded
    for index, image in enumerate(images[1:], 1):
        begin(image, "invalid_image")
        prepared.append(prepare_reference(_decode(image, index)))
    return Edit(tuple(prepared), weights, result)


def _decode(image: Upload, index: int) -> RawImage:
    return decode_upload(image.read("invalid_image"), what=image.param, index=index)


def _check_ratio(result: Size, original: RawImage, prepared: RawImage) -> None:
    wanted = result[0] / result[1]
    for image in (original, prepared):
        if abs(wanted * image.height / image.width - 1) <= _RATIO_TOLERANCE:
            return
    raise InvalidRequest(
        f"With a mask the result must have the first picture's shape, {original.width}x"
        f"{original.height}; send size auto, or a size with this ratio.",
        param="size",
    )
