"""Did a picture follow? A strict comparison of pixels with what should have been drawn.

The judge is told the picture that was asked for and looks at nothing but pixels. Every verdict
lists its faults in words; no faults means that the picture passed. Edges are left out where colours
are measured, and nowhere else.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tools.shapes.draw import FIELDS, distances, tensors
from tools.shapes.scenes import COLOURS, SHAPES, Mark, Picture

LEAST_OVERLAP = 0.7
# A measured colour may differ from the named one by this much in each channel, of 255.
COLOUR_TOLERANCE = 40.0
# What was drawn may have its centre this far from its place, as a share of the shorter side.
PLACE_TOLERANCE = 0.05
# This share of the background must be of the background's colour: no stray objects.
LEAST_CLEAN = 0.97
_OUTLINE = 2.0

_Pixels = NDArray[np.float32]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """What was wrong with a picture, and the overlap of each object with the truth."""

    faults: tuple[str, ...]
    overlaps: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.faults


def judge(asked: Picture, pixels: NDArray[np.uint8]) -> Verdict:
    """Compare a picture of height x width x 3 bytes with what was asked for."""
    if pixels.shape != (asked.height, asked.width, 3):
        return Verdict((f"the picture's shape is {pixels.shape}",), ())
    image = pixels.astype(np.float32)
    fields = _fields(asked)
    faults = _background_faults(asked, image, fields)
    overlaps = []
    for index, mark in enumerate(asked.marks):
        drawn = _drawn(asked, index, image, fields)
        overlap = _overlap(drawn, fields[index] < 0)
        overlaps.append(overlap)
        faults += _mark_faults(asked, mark, image, drawn, fields[index])
        if overlap < LEAST_OVERLAP:
            faults.append(f"the {mark.shape} overlaps the truth by {overlap:.2f}")
    return Verdict(tuple(faults), tuple(overlaps))


def _fields(asked: Picture) -> _Pixels:
    marks, _ = tensors([asked])
    fields: _Pixels = distances(marks, asked.width, asked.height)[0, : len(asked.marks)].numpy()
    return fields


def _background_faults(asked: Picture, image: _Pixels, fields: _Pixels) -> list[str]:
    outside = (fields > 2.0).all(axis=0)
    found = np.median(image[outside], axis=0)
    faults = _colour_faults("the background", asked.background, found)
    near = np.abs(image - _rgb(asked.background)).max(axis=-1) <= 1.5 * COLOUR_TOLERANCE
    clean = float(near[outside].mean())
    if clean < LEAST_CLEAN:
        faults.append(f"only {clean:.3f} of the background is {asked.background}")
    return faults


def _mark_faults(
    asked: Picture, mark: Mark, image: _Pixels, drawn: _Mask, field: _Pixels
) -> list[str]:
    core = field < min(-1.0, 0.5 * float(field.min()))
    faults = _colour_faults(f"the {mark.shape}", mark.colour, np.median(image[core], axis=0))
    if not drawn.any():
        return [*faults, f"there is no {mark.shape}"]
    truth = np.argwhere(field < 0).mean(axis=0)
    distance = float(np.linalg.norm(np.argwhere(drawn).mean(axis=0) - truth))
    if distance > PLACE_TOLERANCE * min(asked.width, asked.height):
        faults.append(f"the {mark.shape} is {distance:.0f} pixels from its place")
    likeliest = _likeliest_shape(asked, mark, drawn)
    if likeliest != mark.shape:
        faults.append(f"the {mark.shape} looks like a {likeliest}")
    return faults


def _likeliest_shape(asked: Picture, mark: Mark, drawn: _Mask) -> str:
    """Which of the known shapes, at this place and size, overlaps best with what was drawn."""
    ys, xs = np.mgrid[: asked.height, : asked.width].astype(np.float32) + 0.5
    x = torch.from_numpy((xs - mark.x) / mark.radius)
    y = torch.from_numpy((ys - mark.y) / mark.radius)
    return max(SHAPES, key=lambda shape: _overlap(drawn, (FIELDS[shape](x, y) < 0).numpy()))


def _drawn(asked: Picture, index: int, image: _Pixels, fields: _Pixels) -> _Mask:
    """The pixels that belong to one object: nearest in colour to it, of the colours asked for.

    Where another object has the same colour, a pixel belongs to the nearer of the two; where it has
    another, its soft outline is nobody's, since mixed colours can look like any third.
    """
    colours = [asked.background, *(mark.colour for mark in asked.marks)]
    palette = np.stack([_rgb(name) for name in dict.fromkeys(colours)])
    own = list(dict.fromkeys(colours)).index(asked.marks[index].colour)
    nearest = np.linalg.norm(image[:, :, None] - palette, axis=-1).argmin(axis=-1)
    mine = nearest == own
    for other, mark in enumerate(asked.marks):
        if other == index:
            continue
        if mark.colour == asked.marks[index].colour:
            mine &= fields[index] < fields[other]
        else:
            mine &= np.abs(fields[other]) > _OUTLINE
    return np.asarray(mine)


def _colour_faults(what: str, name: str, found: _Pixels) -> list[str]:
    nearest = min(COLOURS, key=lambda other: float(np.linalg.norm(found - _rgb(other))))
    far = float(np.abs(found - _rgb(name)).max())
    if nearest == name and far <= COLOUR_TOLERANCE:
        return []
    return [f"{what} is {nearest}, {far:.0f} away from {name}"]


def _overlap(first: _Mask, second: _Mask) -> float:
    return float((first & second).sum() / max(1, (first | second).sum()))


def _rgb(name: str) -> _Pixels:
    return np.array(COLOURS[name], dtype=np.float32)
