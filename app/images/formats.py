"""The output formats, one registry entry each, and the encoding of an image as one of them.

Whatever names a format takes it from `OUTPUT_FORMATS`: the fields and refusals of both APIs, the
OpenAPI document, `/health` for the page, and the suffixes that `klein generate` accepts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from PIL import ExifTags, Image

from app.domain import RawImage
from app.images.uploads import resize, to_pillow

_MAX_EXIF_TEXT_BYTES = 60_000
"""A JPEG segment, and so all of EXIF, is limited to 64 kB."""

Encoder = Callable[[RawImage, int, Mapping[str, str], Executor | None], bytes]
"""Takes the image, the quality from 0 to 100, metadata, and threads that may share the work."""


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """One output format: how requests and files name it, and what makes it."""

    name: str
    media_type: str
    suffixes: tuple[str, ...]
    """Of file names, each with its dot."""
    encode: Encoder
    aliases: tuple[str, ...] = ()
    """Further names, in OpenAI's API only."""
    has_quality: bool = True
    """Whether the quality changes anything; a lossless format takes only 100."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The file format by its name in `OUTPUT_FORMATS`; *compression* is its quality, 0 to 100."""

    format: str
    compression: int = 100

    @property
    def media_type(self) -> str:
        """The value of `Content-Type`."""
        return OUTPUT_FORMATS[self.format].media_type


def encode(
    image: RawImage,
    output: OutputFormat,
    metadata: Mapping[str, str] | None = None,
    helpers: Executor | None = None,
    size: tuple[int, int] | None = None,
) -> bytes:
    """Encode *image* as *output*, with *metadata* where common viewers look for it.

    It is scaled to *size* first, if that is another than its own.

    A PNG is encoded on the calling thread and those of *helpers*, with one text chunk per entry.
    JPEG and WebP get all entries as one JSON object in EXIF's UserComment; texts too long for EXIF
    are cut and end in three dots.
    """
    if size not in {None, (image.width, image.height)}:
        image = resize(image, *size)
    return OUTPUT_FORMATS[output.format].encode(image, output.compression, metadata or {}, helpers)


def format_names() -> dict[str, str]:
    """Map each format's name, then each alias, to the format's name."""
    aliases = {alias: each.name for each in OUTPUT_FORMATS.values() for alias in each.aliases}
    return {name: name for name in OUTPUT_FORMATS} | aliases


def list_words(words: Iterable[str], joint: str = "or") -> str:
    """Join *words*, at least one, for a sentence: `png, jpeg or webp`."""
    *first, last = words
    return f"{', '.join(first)} {joint} {last}" if first else last


def _encode_png(
    image: RawImage, quality: int, metadata: Mapping[str, str], helpers: Executor | None
) -> bytes:
    # Imported late: the decoder processes do without numpy and its threads.
    from app.images.png import encode_png

    return encode_png(image, metadata, helpers)


def _encode_jpeg(
    image: RawImage, quality: int, metadata: Mapping[str, str], helpers: Executor | None
) -> bytes:
    # Pillow reads a quality of 0 as "the default".
    subsampling = "4:4:4" if quality >= 90 else "4:2:0"
    return _save(image, "JPEG", metadata, quality=max(1, quality), subsampling=subsampling)


def _encode_webp(
    image: RawImage, quality: int, metadata: Mapping[str, str], helpers: Executor | None
) -> bytes:
    return _save(image, "WEBP", metadata, quality=quality)


def _save(
    image: RawImage, pillow_format: str, metadata: Mapping[str, str], **options: int | str
) -> bytes:
    buffer = io.BytesIO()
    exif = _encode_exif(metadata) if metadata else b""
    to_pillow(image).save(buffer, pillow_format, exif=exif, **options)
    return buffer.getvalue()


def _encode_exif(metadata: Mapping[str, str]) -> bytes:
    text = json.dumps(dict(metadata))
    limit = _MAX_EXIF_TEXT_BYTES
    while len(text) > _MAX_EXIF_TEXT_BYTES:
        limit //= 2
        text = json.dumps({key: _cut(value, limit) for key, value in metadata.items()})
    exif = Image.Exif()
    # JSON escapes what is not ASCII, so the character code ASCII suits every prompt.
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + text.encode()
    return exif.tobytes()


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


OUTPUT_FORMATS: dict[str, ImageFormat] = {
    each.name: each
    for each in (
        ImageFormat("png", "image/png", (".png",), _encode_png, has_quality=False),
        ImageFormat("jpeg", "image/jpeg", (".jpg", ".jpeg"), _encode_jpeg, aliases=("jpg",)),
        ImageFormat("webp", "image/webp", (".webp",), _encode_webp),
    )
}
