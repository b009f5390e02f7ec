"""Files and pixels that the tests of this room share."""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image

from app.domain import RawImage

DATA = Path(__file__).parent.parent / "data"
ORIENTATION = 0x0112


def noise(width: int, height: int) -> RawImage:
    return RawImage(width, height, random.Random(width * height).randbytes(3 * width * height))


def picture(name: str) -> Image.Image:
    return Image.open(DATA / f"{name}.png").convert("RGB")


def raw(image: Image.Image) -> RawImage:
    return RawImage(image.width, image.height, image.tobytes())


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
