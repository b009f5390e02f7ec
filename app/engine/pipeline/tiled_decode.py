"""VAE decode in overlapping tiles, so that its memory does not grow with the image.

All tiles of an image have the same size: the last row and column are moved inwards instead of
cropped, so the decoder sees one shape. Overlaps are blended with weights that rise linearly
from each edge. `AutoencoderKLFlux2.enable_tiling()` does nothing up to 1024x1024 and crops the last
tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

TILE = 72
"""The usual side of a tile in latents, 576 pixels: four at 1024x1024, with 27 % more work."""

OVERLAP = 16
"""Overlap of adjacent tiles in latents, at least."""


def starts(length: int, longest: int = TILE) -> tuple[int, list[int]]:
    """Return the side of the tiles along *length*, `TILE` to *longest*, and where they start.

    As few as possible, then as small: the first at 0, the last flush, the others evenly. No smaller
    than `TILE`, since the norms of a tile see nothing else of the image.
    """
    if length <= longest:
        return length, [0]
    count = -(-(length - OVERLAP) // (longest - OVERLAP))
    tile = max(TILE, -(-(length + (count - 1) * OVERLAP) // count))
    return tile, [round(number * (length - tile) / (count - 1)) for number in range(count)]


def decode_tiled(
    decode: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    scale: int,
    longest: int = TILE,
) -> torch.Tensor:
    """Decode [1, c, h, w] in tiles to [1, 3, scale * h, scale * w], in the input's dtype.

    *longest* is the longest side of a tile in latents.
    """
    height, width = latents.shape[2:]
    (tile_h, rows), (tile_w, columns) = starts(height, longest), starts(width, longest)
    total = torch.zeros(
        (1, 3, height * scale, width * scale), device=latents.device, dtype=torch.float32
    )
    weight = torch.zeros_like(total[:, :1])
    down, across = _ramp(tile_h, len(rows), scale), _ramp(tile_w, len(columns), scale)
    ramp = (down[:, None] * across[None, :]).to(latents.device)
    for row in rows:
        for column in columns:
            tile = latents[:, :, row : row + tile_h, column : column + tile_w].contiguous()
            top, left = row * scale, column * scale
            place = (..., slice(top, top + tile_h * scale), slice(left, left + tile_w * scale))
            total[place] += decode(tile).float() * ramp
            weight[place] += ramp
    return (total / weight).to(latents.dtype)


def _ramp(tile: int, count: int, scale: int) -> torch.Tensor:
    """Return weights along a tile: rising over the overlap at both ends, 1 for a single tile."""
    side = tile * scale
    if count == 1:
        return torch.ones(side)
    rise = (torch.arange(side) + 1) / (OVERLAP * scale)
    return torch.minimum(rise, rise.flip(0)).clamp(max=1.0)
