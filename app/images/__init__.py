"""Encode and decode image files: the only room that knows their formats; no HTTP, no torch.

`encode` makes the response's file; `decode_upload` and `decode_mask` validate and decode what a
client sends, in the processes of `app.images.pool`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal

from PIL import ExifTags, Image

from app.domain import RawImage
from app.images.uploads import decode_mask, decode_upload, prepare_reference, resize, to_pillow

__all__ = [
    "OutputFormat",
    "decode_mask",
    "decode_upload",
    "encode",
    "prepare_reference",
    "resize",
]

_MAX_EXIF_TEXT_BYTES = 60_000
"""A JPEG segment, and so all of EXIF, is limited to 64 kB."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The file format; *compression* is the quality of JPEG and WebP, 0 to 100."""

    format: Literal["png", "jpeg", "webp"]
    compression: int = 100

    @property
    def media_type(self) -> str:
        """The value of `Content-Type`."""
        return f"image/{self.format}"


def encode(
    image: RawImage,
    output: OutputFormat,
    metadata: Mapping[str, str] | None = None,
    helpers: Executor | None = None,
) -> bytes:
    """Encode *image* as *output*, with *metadata* where common viewers look for it.

    A PNG is encoded on the calling thread and those of *helpers*, with one text chunk per entry.
    JPEG and WebP get all entries as one JSON object in EXIF's UserComment; texts too long for EXIF
    are cut and end in three dots.
    """
    if output.format == "png":
        # Imported late: the decoder processes do without numpy and its threads.
        from app.images.png import encode_png

        return encode_png(image, metadata or {}, helpers)
    buffer = io.BytesIO()
    picture = to_pillow(image)
    exif = _encode_exif(metadata) if metadata else b""
    if output.format == "webp":
        picture.save(buffer, "WEBP", quality=output.compression, exif=exif)
    else:
        # Pillow reads a quality of 0 as "the default".
        quality = max(1, output.compression)
        subsampling = "4:4:4" if quality >= 90 else "4:2:0"
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
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
