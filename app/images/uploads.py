"""Uploads: checked by their first bytes, then by their header, and only then decoded.

A file of half a megabyte can hold 169 million pixels, so the size is checked before pixels are
decoded. A large baseline JPEG is decoded at half its size, so that the whole is never in memory;
of one with several scans all coefficients would have to be. Error messages are fixed texts: those
of a decoder may contain addresses and paths.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from app.domain import Mask, RawImage
from app.errors import InvalidRequest

MAX_PIXELS = 25_000_000
MAX_JPEG_PIXELS = 64_000_000
"""Of a baseline JPEG; above `MAX_PIXELS` it is decoded at half its width and height."""
MIN_SIDE = 64
MAX_RATIO = 8
REFERENCE_PIXELS = 1024 * 1024
REFERENCE_MULTIPLE = 16
OPAQUE = 255
BLACK_UP_TO, WHITE_FROM = 8, 247
"""The luma of what a mask without transparency keeps, and of what it repaints."""
MAX_BETWEEN = 0.05
"""The part of such a mask's pixels that may lie between: smooth edges."""
MAX_SCANS = 100
"""Limit of scans of a JPEG. Each covers the whole image; an encoder makes about ten."""

# Pillow's own limit lies far above this one and, up to twice its value, only warns.
Image.MAX_IMAGE_PIXELS = None

Data = bytes | bytearray | memoryview
_Refuse = Callable[[str], InvalidRequest]
"""Makes the error about one upload from a reason, a fixed text."""

_DAMAGED = "is damaged or cut short; save it anew and send it again"

_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
"""A marker that has a length or ends the image: TEM, the restarts and the start have none."""
_TURNED = frozenset({5, 6, 7, 8})
"""Orientations by which width and height change places."""
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"


@dataclass(frozen=True, slots=True)
class Original:
    """A decoded file, upright; *width* and *height* are its own, *image* may have half of each."""

    image: RawImage
    width: int
    height: int


def decode_upload(
    data: Data, *, what: str, index: int = 0, max_pixels: int = MAX_PIXELS
) -> RawImage:
    """Decode a reference image; as `decode_original`, whose size is of no interest."""
    return decode_original(data, what=what, index=index, max_pixels=max_pixels).image


def decode_original(
    data: Data, *, what: str, index: int = 0, max_pixels: int = MAX_PIXELS
) -> Original:
    """Decode a reference image: PNG, JPEG or still WebP; upright, 8 bits, transparency on white.

    A JPEG may have more than *max_pixels*, up to `MAX_JPEG_PIXELS`.

    Raises:
        InvalidRequest: it cannot be used; `param` is *what*, and the message names *index*.
    """
    refuse = partial(_refusal, f"The image at index {index}", what, "invalid_image")
    picture = _open(data, ("PNG", "JPEG", "WEBP"), refuse)
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        raise refuse(f"is {width}x{height}; both sides need at least {MIN_SIDE} pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise refuse(f"is {width}x{height}; its ratio may be {MAX_RATIO}:1 at most")
    if width * height > max_pixels:
        _halve(picture, data, refuse, max_pixels)
    with _decoding(refuse):
        upright = ImageOps.exif_transpose(picture)
        if picture.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED:
            width, height = height, width
        return Original(_from_pillow(_flatten(upright)), width, height)


def decode_mask(
    data: Data, width: int, height: int, *, takes_black_and_white: bool = False
) -> tuple[Mask, bool]:
    """Decode the mask for a first image of *width* x *height*: transparent areas are repainted.

    Of one without transparency that *takes_black_and_white* allows, white areas are. Return the
    mask, and whether it was read as black and white.

    Raises:
        InvalidRequest: it cannot be used; `param` is `mask`.
    """
    refuse = partial(_refusal, "The mask", "mask", "invalid_mask")
    picture = _open(data, ("PNG", "WEBP"), refuse)
    _check_pixels(picture, refuse, MAX_PIXELS, "scale it and its picture down")
    if not takes_black_and_white and not picture.has_transparency_data:
        raise refuse("has no alpha channel; make what is to be repainted transparent")
    with _decoding(refuse):
        upright = ImageOps.exif_transpose(picture)
        alpha = _alpha(upright)
        is_painted = takes_black_and_white and alpha.getextrema()[0] == OPAQUE
        weights = _flatten(upright).convert("L") if is_painted else ImageOps.invert(alpha)
    if weights.size != (width, height):
        raise refuse(
            f"is {weights.width}x{weights.height} and the first image {width}x{height}; make both "
            "the same size"
        )
    if is_painted:
        return Mask(width, height, _read_black_and_white(weights, refuse)), True
    if weights.getextrema()[1] != OPAQUE:
        raise refuse("has no transparent pixel; make what is to be repainted transparent")
    return Mask(width, height, weights.tobytes()), False


def _read_black_and_white(luma: Image.Image, refuse: _Refuse) -> bytes:
    """Return the weights of a mask without transparency, whose grey pixels repaint in part."""
    counts = luma.histogram()
    between = sum(counts[BLACK_UP_TO + 1 : WHITE_FROM])
    if between > MAX_BETWEEN * luma.width * luma.height:
        raise refuse(
            "has neither a transparent pixel nor only black and white ones; make what is to be "
            "repainted transparent, or white and the rest black"
        )
    if not any(counts[WHITE_FROM:]):
        raise refuse("repaints nothing; make what is to be repainted transparent, or white")
    black, white = bytes(BLACK_UP_TO + 1), bytes([OPAQUE]) * (OPAQUE + 1 - WHITE_FROM)
    return luma.tobytes().translate(black + bytes(range(BLACK_UP_TO + 1, WHITE_FROM)) + white)


def decode_painted_mask(data: Data, width: int, height: int, *, is_inverted: bool) -> Mask:
    """Decode a mask as AUTOMATIC1111 reads it: white is repainted, or what is not transparent.

    Alpha counts where any pixel is transparent, brightness elsewhere. Where it *is_inverted*, the
    rest is repainted. A mask of another size is scaled to *width* x *height*.

    Raises:
        InvalidRequest: it cannot be used; `param` is `mask`.
    """
    refuse = partial(_refusal, "The mask", "mask", "invalid_mask")
    picture = _open(data, ("PNG", "JPEG", "WEBP"), refuse)
    _check_pixels(picture, refuse, MAX_PIXELS)
    with _decoding(refuse):
        upright = ImageOps.exif_transpose(picture)
        weights = _alpha(upright)
        if weights.getextrema()[0] == OPAQUE:
            weights = _flatten(upright).convert("L")
        if weights.size != (width, height):
            weights = weights.resize((width, height), Image.Resampling.BILINEAR)
        if is_inverted:
            weights = ImageOps.invert(weights)
    if weights.getextrema()[1] == 0:
        raise refuse("repaints nothing; make what is to be repainted white")
    return Mask(width, height, weights.tobytes())


def prepare_reference(image: RawImage) -> RawImage:
    """Scale a reference to the size at which klein reads it, pixel for pixel as diffusers does.

    Above one megapixel it is scaled down to that; then it is centre-cropped to multiples of 16.
    """
    picture = to_pillow(image)
    pixels = image.width * image.height
    if pixels > REFERENCE_PIXELS:
        scale = math.sqrt(REFERENCE_PIXELS / pixels)
        size = int(image.width * scale), int(image.height * scale)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    width, height = (
        side // REFERENCE_MULTIPLE * REFERENCE_MULTIPLE for side in (picture.width, picture.height)
    )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return _from_pillow(picture.crop((left, top, left + width, top + height)))


def resize(image: RawImage, width: int, height: int) -> RawImage:
    """Scale *image* to *width* x *height*, whatever its aspect ratio."""
    return _from_pillow(to_pillow(image).resize((width, height), Image.Resampling.LANCZOS))


def to_pillow(image: RawImage) -> Image.Image:
    """Convert pixels to a Pillow image."""
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)


def _from_pillow(picture: Image.Image) -> RawImage:
    return RawImage(picture.width, picture.height, picture.tobytes())


def _refusal(subject: str, param: str, code: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{subject} {reason}.", param=param, code=code)


@contextmanager
def _decoding(refuse: _Refuse) -> Iterator[None]:
    """Turn whatever Pillow raises into a refusal."""
    try:
        yield
    except MemoryError:
        raise refuse("needs too much memory to decode; scale it down") from None
    except Exception:
        raise refuse(_DAMAGED) from None


def _open(data: Data, formats: tuple[str, ...], refuse: _Refuse) -> Image.Image:
    """Read the header, and refuse files that must not be decoded, whatever their size."""
    kind = _kind(bytes(data[:12]))
    if kind not in formats:
        raise refuse(f"is none of {', '.join(formats)}; save it as one of these")
    if kind == "JPEG" and _count_scans(data) > MAX_SCANS:
        raise refuse(f"has more than {MAX_SCANS} scans; save it as a baseline JPEG")
    try:
        picture = Image.open(io.BytesIO(data), formats=(kind,))
    except Exception:
        # Hostile bytes make decoders raise any exception; none of it may reach the client.
        raise refuse(_DAMAGED) from None
    # The further frames of an MPO file are views from other lenses, not an animation.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise refuse("is animated; send a still picture")
    return picture


def _check_pixels(
    picture: Image.Image, refuse: _Refuse, most: int, advice: str = "scale it down"
) -> None:
    if picture.width * picture.height > most:
        raise refuse(f"has more than {most / 1e6:g} million pixels; {advice}")


def _halve(picture: Image.Image, data: Data, refuse: _Refuse, max_pixels: int) -> None:
    """Have a file above *max_pixels* decoded at half its size; refuse all but baseline JPEGs."""
    is_jpeg = isinstance(picture, JpegImageFile)
    _check_pixels(picture, refuse, MAX_JPEG_PIXELS if is_jpeg else max_pixels)
    if "progressive" in picture.info or _count_scans(data) > 1:
        raise refuse(
            f"is a progressive JPEG of more than {max_pixels / 1e6:g} million pixels; save it as a "
            "baseline JPEG, or scale it down"
        )
    picture.draft(None, (picture.width // 2, picture.height // 2))


def _count_scans(data: Data) -> int:
    """Count the scans of a JPEG's first image, at most one above the limit."""
    scans, at = 0, 2
    while scans <= MAX_SCANS and (marker := _MARKER.search(data, at)) is not None:
        if marker[1] == _END_OF_IMAGE:
            break
        scans += marker[1] == _START_OF_SCAN
        # The segment's length comes first, so nothing within it is taken for a marker.
        at = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return scans


def _kind(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _alpha(picture: Image.Image) -> Image.Image:
    """Return the alpha channel; without one, that of an opaque picture."""
    if not picture.has_transparency_data:
        return Image.new("L", picture.size, OPAQUE)
    return picture.convert("RGBA").getchannel("A")


def _flatten(picture: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB; transparent pixels become white."""
    if picture.mode.startswith("I"):
        # 16-bit greyscale, which `convert` would clip to white.
        grey = picture.convert("I").point(lambda level: level * (1 / 256))
        return grey.convert("L").convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white
