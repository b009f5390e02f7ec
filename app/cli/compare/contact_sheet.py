"""A contact sheet: images side by side, below each its difference and a caption.

Pixels in, pixels out. Captions use a 5x7 bitmap font of only the glyphs needed, so that the sheet
looks the same on every machine and only `app.images` imports Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.domain import RawImage

Pixels = npt.NDArray[np.uint8]

DIFFERENCE_GAIN = 8
"""Factor by which differences are amplified."""

_GAP = 8
_PAPER = 255
_INK = 30
# Five columns of one byte each, the lowest bit on top.
_DOTS = {
    " ": "0000000000", "-": "0808080808", ".": "0060600000", "0": "3e5149453e", "1": "00427f4000",
    "2": "4261514946", "3": "2141454b31", "4": "1814127f10", "5": "2745454539", "6": "3c4a494930",
    "7": "0171090503", "8": "3649494936", "9": "064949291e", "B": "7f49494936", "G": "3e4149497a",
    "a": "2054545478", "b": "7f48444438", "d": "384444487f", "e": "3854545418", "f": "087e090102",
    "i": "00447d4000", "l": "00417f4000", "n": "7c08040478", "p": "7c14141408", "q": "081414187c",
    "r": "7c08040408", "s": "4854545420", "t": "043f444020", "u": "3c4040207c", "x": "4428102844",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Panel:
    """One column of the sheet: an image and its caption."""

    image: RawImage
    words: str


def contact_sheet(entries: Sequence[Panel], reference: RawImage | None) -> RawImage:
    """Lay *entries*, all of one size, side by side, above their differences from *reference*."""
    columns = [_column(entry, reference) for entry in entries]
    height = columns[0].shape[0]
    gap = np.full((height, _GAP, 3), _PAPER, np.uint8)
    parts = [part for column in columns for part in (column, gap)][:-1]
    return _to_raw(np.concatenate(parts, axis=1))


def psnr(image: RawImage, reference: RawImage) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite where the images are equal."""
    difference = _pixels(image).astype(np.float64) - _pixels(reference)
    error = float(np.mean(difference**2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def lettered(words: str, width: int) -> Pixels:
    """Draw *words* at the largest scale that fits; return uint8 [height, *width*, 3]."""
    known = [_DOTS.get(letter, _DOTS["-"]) for letter in words]
    columns = [int(dots[at : at + 2], 16) for dots in known for at in range(0, 10, 2)]
    bits = np.array([[column >> row & 1 for column in columns] for row in range(7)], np.uint8)
    # A blank column after each glyph.
    spaced = np.insert(bits, range(5, bits.shape[1] + 1, 5), 0, axis=1)
    scale = max(1, min(width // 256 + 1, width // max(1, spaced.shape[1])))
    drawn = np.kron(spaced, np.ones((scale, scale), np.uint8))[:, :width]
    strip = np.full((9 * scale, width), _PAPER, np.uint8)
    strip[scale : 8 * scale, : drawn.shape[1]][drawn == 1] = _INK
    return np.repeat(strip[:, :, None], 3, axis=2)


def _column(entry: Panel, reference: RawImage | None) -> Pixels:
    picture = _pixels(entry.image)
    gap = np.full((_GAP, picture.shape[1], 3), _PAPER, np.uint8)
    strip = lettered(entry.words, picture.shape[1])
    if reference is None:
        return np.concatenate([picture, gap, strip])
    difference = np.abs(picture.astype(np.int16) - _pixels(reference)) * DIFFERENCE_GAIN
    shown = np.minimum(difference, 255).astype(np.uint8)
    return np.concatenate([picture, gap, shown, gap, strip])


def _pixels(image: RawImage) -> Pixels:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)


def _to_raw(pixels: Pixels) -> RawImage:
    return RawImage(pixels.shape[1], pixels.shape[0], pixels.tobytes())
