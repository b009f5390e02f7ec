"""Rotary position embeddings of the transformer, by shape."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
Grid = tuple[int, int]

_REFERENCE_TIME = 10
"""References stand at the times 10, 20, ...: `Flux2KleinPipeline._prepare_image_ids`."""


class RopeTable:
    """Rotary tables by shape, the last few kept. The engine's thread alone uses it."""

    def __init__(self, embed: Any, device: torch.device, *, kept: int = 8) -> None:
        self._embed = embed
        self._device = device
        self._kept = kept
        self._tables: OrderedDict[tuple[int, tuple[Grid, ...]], Rope] = OrderedDict()

    def get(self, text_length: int, grids: tuple[Grid, ...]) -> Rope:
        """Return the table for a prompt of *text_length* and *grids*: picture first, then
        references.
        """
        key = (text_length, grids)
        if key not in self._tables:
            self._tables[key] = self._compute(text_length, grids)
            while len(self._tables) > self._kept:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def _compute(self, text_length: int, grids: tuple[Grid, ...]) -> Rope:
        one = torch.arange(1)
        text = torch.cartesian_prod(one, one, one, torch.arange(text_length))
        pictures = [
            torch.cartesian_prod(
                torch.tensor([number * _REFERENCE_TIME]),
                torch.arange(height),
                torch.arange(width),
                one,
            )
            for number, (height, width) in enumerate(grids)
        ]
        # Apart, as the model's own forward does: vectorised cosines differ by where a row lies.
        tables = [self._embed(ids.to(self._device)) for ids in (text, torch.cat(pictures))]
        cos, sin = (torch.cat(halves) for halves in zip(*tables, strict=True))
        return cos, sin
