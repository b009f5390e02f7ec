"""Small files to upload, made on the spot."""

from __future__ import annotations

import base64
import io

from PIL import Image


def encode(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    """Write *picture* as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width: int = 128, height: int = 128, format: str = "PNG", **options) -> bytes:
    """Make a file of one colour and a stripe."""
    picture = Image.new("RGB", (width, height), (200, 80, 40))
    picture.paste((20, 60, 220), (0, 0, width // 4, height))
    return encode(picture, format, **options)


def rotated_photo(width: int = 128, height: int = 64) -> bytes:
    """Make a landscape JPEG that its EXIF turns upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo(width, height, "JPEG", exif=exif)


def mask(width: int = 128, height: int = 128, format: str = "PNG", box=None, **options) -> bytes:
    """Make a mask that is transparent in *box*, by default in the left half."""
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), box or (0, 0, width // 2, height))
    return encode(picture, format, **options)


def black_and_white_mask(width: int = 128, height: int = 128) -> bytes:
    """Make a mask without transparency that is white in its left half."""
    picture = Image.new("L", (width, height))
    picture.paste(255, (0, 0, width // 2, height))
    return encode(picture)


def data_url(data: bytes, kind: str = "png") -> str:
    """Wrap a file for JSON."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
