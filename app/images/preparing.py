"""From uploads to the inputs of an edit: references, a mask, and the size of the output.

`app.images.uploads` validates and decodes one file; this module decides the role of each image. It
runs in a decoder process. Nothing is ever fetched: images are part of the request.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from app.domain import Mask, RawImage
from app.errors import InvalidRequest
from app.images.uploads import (
    Original,
    decode_mask,
    decode_original,
    decode_painted_mask,
    prepare_reference,
    resize,
)

MAX_UPLOAD_BYTES = 50_000_000

RATIO_TOLERANCE = 0.02
"""By how much a mask's picture and the result may differ in their ratio of sides."""

TRANSPARENT, AUTO, WHITE, BLACK = "transparent", "auto", "white", "black"
BLACK_AND_WHITE = "mask has no transparency: white was repainted, and black kept"

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Upload:
    """One uploaded image; errors name it by *param*."""

    content: bytes | bytearray | memoryview = field(repr=False)
    param: str
    is_base64: bool = False
    repaints: str = TRANSPARENT
    """Which pixels a mask repaints: `TRANSPARENT`, `WHITE` or `BLACK`; `AUTO` repaints the
    transparent ones, and the white ones where all are opaque."""

    def read(self, code: str) -> bytes | bytearray | memoryview:
        """Return the bytes of the file; raises `InvalidRequest` with *code*."""
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
    """The inputs of an edit, ready for a spec."""

    references: tuple[RawImage, ...]
    mask: Mask | None
    size: Size
    is_black_and_white: bool = False
    """Whether `AUTO` has found a mask without transparency."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the client should know of how its images were read."""
        return (BLACK_AND_WHITE,) if self.is_black_and_white else ()


def prepare(
    images: Sequence[Upload],
    mask: Upload | None,
    size: Size | None,
    nearest: Callable[[int, int], Size],
    begin: Callable[[Upload, str], None] = lambda upload, code: None,
) -> Edit:
    """Decode all images, and choose the output's size.

    The size is what *nearest* returns for the requested one, or for the first image's own: that
    size itself where it can be made. The image under a mask is scaled to the output's size, so that
    unmasked pixels are returned unchanged; the others are scaled to what the model reads. *begin*
    is called before each file is read, with the code of errors about it.

    Raises:
        InvalidRequest: an image cannot be used.
    """
    begin(images[0], "invalid_image")
    first = _decode(images[0], 0)
    prepared = [prepare_reference(first.image)]
    weights, is_black_and_white = None, False
    if mask is not None:
        begin(mask, "invalid_mask")
        weights, is_black_and_white = _decode_mask(mask, first)
    result = nearest(*(size or (prepared[0].width, prepared[0].height)))
    if weights is not None:
        _check_ratio(size or result, first, prepared[0])
        prepared[0] = resize(first.image, *result)
    del first  # a large original is not kept while the others are decoded
    for index, image in enumerate(images[1:], 1):
        begin(image, "invalid_image")
        prepared.append(prepare_reference(_decode(image, index).image))
    return Edit(tuple(prepared), weights, result, is_black_and_white)


def _decode(image: Upload, index: int) -> Original:
    return decode_original(image.read("invalid_image"), what=image.param, index=index)


def _decode_mask(mask: Upload, first: Original) -> tuple[Mask, bool]:
    data = mask.read("invalid_mask")
    if mask.repaints in {TRANSPARENT, AUTO}:
        takes_white = mask.repaints == AUTO
        return decode_mask(data, first.width, first.height, takes_black_and_white=takes_white)
    size = first.image.width, first.image.height
    return decode_painted_mask(data, *size, is_inverted=mask.repaints == BLACK), False


def _check_ratio(result: Size, original: Original, prepared: RawImage) -> None:
    wanted = result[0] / result[1]
    if all(
        abs(wanted * image.height / image.width - 1) > RATIO_TOLERANCE
        for image in (original, prepared)
    ):
        raise InvalidRequest(
            f"With a mask the result must have the first picture's shape, {original.width}x"
            f"{original.height}; leave the size out, or send one with this ratio.",
            param="width",
        )
