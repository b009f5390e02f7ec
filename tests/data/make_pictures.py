"""Make the two pictures that the PNG encoder is measured on: `python tests/data/make_pictures.py`.

`smooth.png` has gradients, soft and hard edges and the faint noise that a VAE leaves; `grainy.png`
has texture at every scale and a photograph's grain. Both are seeded and 1024x1024.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 1024
Field = NDArray[np.float32]


def make_smooth(seed: int) -> Image.Image:
    """Draw softly lit balls before a sky."""
    rng = np.random.default_rng(seed)
    y, x = _grid()
    canvas = np.stack([90 + 110 * y + 30 * x, 130 + 60 * y - 20 * x, 200 - 80 * y + 10 * x], -1)
    for _ in range(9):
        (left, top), radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.06, 0.22)
        edge = _disc(x - left, y - top, radius, softness=rng.uniform(0.001, 0.03))
        light = 1 - 0.5 * np.hypot(x - left + 0.3 * radius, y - top + 0.3 * radius) / radius
        colour = rng.uniform(20, 240, 3) * np.clip(light, 0.2, 1)[..., None]
        canvas += (colour - canvas) * edge
    return _to_picture(canvas + rng.normal(0, 0.4, canvas.shape))


def make_grainy(seed: int) -> Image.Image:
    """Draw discs before a rough wall, seen through film."""
    rng = np.random.default_rng(seed)
    y, x = _grid()
    octaves = ((4, 30), (9, 18), (24, 12), (64, 8), (160, 5), (400, 4))
    wall = sum(height * _noise(rng, cells) for cells, height in octaves)
    canvas = np.stack([120 + wall + 30 * y, 110 + 0.9 * wall, 95 + 0.75 * wall + 20 * x], -1)
    for _ in range(6):
        (left, top), radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.05, 0.2)
        edge = _disc(x - left, y - top, radius, softness=0.002)
        canvas += (rng.uniform(20, 240, 3) - canvas) * edge * 0.8
    grain = rng.normal(0, 3.0, (SIDE, SIDE, 1)) + rng.normal(0, 1.5, canvas.shape)
    return _to_picture(canvas + grain)


def _grid() -> Field:
    return np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE


def _disc(x: Field, y: Field, radius: float, *, softness: float) -> Field:
    distance = (np.hypot(x, y) - radius) / softness
    return (1 / (1 + np.exp(np.clip(distance, -40, 40))))[..., None]


def _noise(rng: np.random.Generator, cells: int) -> Field:
    field = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    smooth = np.asarray(field.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return smooth / smooth.std()


def _to_picture(canvas: Field) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


if __name__ == "__main__":
    folder = Path(__file__).parent
    make_smooth(seed=1).save(folder / "smooth.png", optimize=True)
    make_grainy(seed=2).save(folder / "grainy.png", optimize=True)
