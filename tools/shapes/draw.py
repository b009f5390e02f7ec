"""Pixels: shapes as signed distance fields, drawn in batches on whatever device is given.

A distance below zero is inside. Fields are computed in units of the shape's radius and scaled to
pixels, so that the soft edge is one pixel wide at every size. Knows no words but the shapes' names.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.shapes.scenes import COLOURS, SHAPES, Mark, Picture

Field = Callable[[Tensor, Tensor], Tensor]
NO_MARK = -1.0
MOST_MARKS = 2
# shape, x, y, radius, red, green, blue
MARK_NUMBERS = 7


def numbers(picture: Picture) -> tuple[list[list[float]], list[float]]:
    """A picture as plain numbers: one row for each mark, and the background's colour in 0..1."""
    rows = [_row(mark) for mark in picture.marks]
    rows += [[NO_MARK, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]] * (MOST_MARKS - len(rows))
    return rows, [value / 255 for value in COLOURS[picture.background]]


def _row(mark: Mark) -> list[float]:
    colour = [value / 255 for value in COLOURS[mark.colour]]
    return [float(SHAPES.index(mark.shape)), mark.x, mark.y, mark.radius, *colour]


def distances(marks: Tensor, width: int, height: int) -> Tensor:
    """Signed distances in pixels, [n, marks, height, width], for marks [n, marks, 7]."""
    device = marks.device
    ys = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    xs = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    shape, cx, cy, radius = (marks[..., index, None, None] for index in range(4))
    x, y = (xs - cx) / radius, (ys[:, None] - cy) / radius
    x, y = x.expand(-1, -1, height, -1), y.expand(-1, -1, -1, width)
    result = torch.full_like(x, 1e3)
    for index, name in enumerate(SHAPES):
        result = torch.where(shape == index, FIELDS[name](x, y), result)
    return result * radius


def render(marks: Tensor, background: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Images [n, 3, height, width] in 0..1 and each mark's coverage [n, marks, height, width]."""
    coverage = (0.5 - distances(marks, width, height)).clamp(0.0, 1.0)
    image = background[:, :, None, None].expand(-1, -1, height, width)
    for index in range(marks.shape[1]):
        alpha = coverage[:, index, None]
        image = image + alpha * (marks[:, index, 4:7, None, None] - image)
    return image, coverage


def draw(picture: Picture) -> NDArray[np.uint8]:
    """One picture as height x width x 3 bytes."""
    marks, background = tensors([picture])
    image, _ = render(marks, background, picture.width, picture.height)
    pixels: NDArray[np.uint8] = np.asarray((image[0] * 255).round().byte().permute(1, 2, 0))
    return pixels


def tensors(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """Pictures of one size as the two tensors that `render` takes."""
    rows, backgrounds = zip(*(numbers(picture) for picture in pictures), strict=True)
    return torch.tensor(rows), torch.tensor(backgrounds)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y) - 1.0


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2)
    return outside + torch.maximum(dx, dy).clamp(max=0)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.82, 0.82)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    # Apex (0, -1), base from (-1, 0.75) to (1, 0.75): two slanted edges and the base.
    slanted = (1.75 * x.abs() - (y + 1.0)) / (1.75**2 + 1.0) ** 0.5
    return torch.maximum(slanted, y - 0.75)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.7 + y.abs() - 1.0) * 0.7 / math.sqrt(0.7**2 + 1.0)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Folds the plane onto one of ten half-points (https://iquilezles.org/articles/distfunctions2d/).
    kx, ky, inner = 0.809016994375, -0.587785252292, 0.42
    x, y = x.abs(), -y
    for sign in (1.0, -1.0):
        fold = 2.0 * (sign * kx * x + ky * y).clamp(min=0)
        x, y = x - fold * sign * kx, y - fold * ky
    x, y = x.abs(), y - 1.0
    bx, by = -inner * ky, inner * kx - 1.0
    along = ((x * bx + y * by) / (bx * bx + by * by)).clamp(0.0, 1.0)
    distance = torch.sqrt((x - bx * along) ** 2 + (y - by * along) ** 2)
    return distance * torch.sign(y * bx - x * by)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    # Two arcs and two straight edges meeting below, from the same source as the star.
    x, y = 0.6 * x.abs(), 0.55 - 0.6 * y
    arc = torch.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - 0.125**0.5
    fold = 0.5 * (x + y).clamp(min=0)
    nearest = torch.minimum(x * x + (y - 1.0) ** 2, (x - fold) ** 2 + (y - fold) ** 2)
    edge = torch.sqrt(nearest) * torch.sign(x - y)
    return torch.where(x + y > 1.0, arc, edge) / 0.6


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.sqrt(x * x + y * y) - 0.7).abs() - 0.28


FIELDS: dict[str, Field] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
}
