"""A contact sheet: images side by side, below each its difference and a caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from app.domain import RawImage
from app.images.uploads import to_pillow

DIFFERENCE_GAIN = 8
"""Factor by which differences are amplified."""

_GAP = 8
_PAPER = "white"
_INK = "#1e1e1e"
_AMPLIFIED = [min(255, DIFFERENCE_GAIN * level) for level in range(256)] * 3


def contact_sheet(
    images: Sequence[RawImage], captions: Sequence[str], reference: RawImage | None
) -> RawImage:
    """Lay *images*, all of one size, side by side, above their differences from *reference*.

    A caption that is wider than its image is cut at the image's edge.
    """
    width, height = images[0].width, images[0].height
    letters = max(10, width // 24)
    font, lines = ImageFont.load_default(letters), math.ceil(1.3 * letters)
    rows = 1 if reference is None else 2
    sheet = Image.new(
        "RGB",
        (len(images) * (width + _GAP) - _GAP, rows * (height + _GAP) + lines),
        _PAPER,
    )
    for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, picture = column * (width + _GAP), to_pillow(image)
        sheet.paste(picture, (x, 0))
        if reference is not None:
            difference = ImageChops.difference(picture, to_pillow(reference))
            sheet.paste(difference.point(_AMPLIFIED), (x, height + _GAP))
        strip = Image.new("RGB", (width, lines), _PAPER)
        ImageDraw.Draw(strip).text((0, 0), caption, _INK, font)
        sheet.paste(strip, (x, sheet.height - lines))
    return RawImage(sheet.width, sheet.height, sheet.tobytes())


def psnr(image: RawImage, reference: RawImage) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite where the images are equal."""
    ours, right = (np.frombuffer(each.pixels, np.uint8) for each in (image, reference))
    error = float(np.mean((ours.astype(np.float64) - right) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
