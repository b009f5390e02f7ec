"""The transformer's RoPE tables, cached by shape."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each [text tokens + image tokens, 128]."""

Grid = tuple[int, int]
"""Rows and columns of an image's tokens."""

_REFERENCE_TIME = 10
"""References have time ids 10, 20, ...: `Flux2KleinPipeline._prepare_image_ids`."""


class RopeTable:
    """RoPE tables by shape in an LRU cache of *kept* entries. Not thread-safe."""

    def __init__(self, embed: Any, device: torch.device, *, kept: int = 8) -> None:
        self._embed = embed
        self._device = device
        self._kept = kept
        self._tables: OrderedDict[tuple[int, tuple[Grid, ...]], Rope] = OrderedDict()

    def get(self, text_length: int, grids: tuple[Grid, ...]) -> Rope:
        """Return the table for *text_length* tokens and *grids*, of the output, then references."""
        key = (text_length, grids)
        if key not in self._tables:
            self._tables[key] = self._compute(text_length, grids)
            while len(self._tables) > self._kept:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def _compute(self, text_length: int, grids: tuple[Grid, ...]) -> Rope:
        one = torch.arange(1)
        text = torch.cartesian_prod(one, one, one, torch.arange(text_length))  # [text_length, 4]
        pictures = [
            torch.cartesian_prod(
                torch.tensor([number * _REFERENCE_TIME]),
                torch.arange(height),
                torch.arange(width),
                one,
            )
            for number, (height, width) in enumerate(grids)
        ]
        # Text and image separately, as diffusers' forward does: the last bits of a vectorised
        # cosine depend on the row's position in the tensor.
        tables = [self._embed(ids.to(self._device)) for ids in (text, torch.cat(pictures))]
        cos, sin = (torch.cat(halves) for halves in zip(*tables, strict=True))
        return cos, sin
