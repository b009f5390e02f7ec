"""The transformer's RoPE tables, cached by shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each [text tokens + image tokens, head size]."""

Grid = tuple[int, int]
"""Rows and columns of an image's tokens."""

_KEPT_TABLES = 8


def rope_tables(
    embed: Callable[[torch.Tensor], Rope], device: torch.device, reference_time: int
) -> Callable[[int, tuple[Grid, ...]], Rope]:
    """Return a function of a text length and the grids, of the output, then references.

    It keeps the tables that were used last. *embed* maps ids [n, 4] to cos and sin; references have
    the multiples of *reference_time* as time ids.
    """

    @lru_cache(_KEPT_TABLES)
    def table(text_length: int, grids: tuple[Grid, ...]) -> Rope:
        one = torch.arange(1)
        text = torch.cartesian_prod(one, one, one, torch.arange(text_length))  # [text_length, 4]
        pictures = [
            torch.cartesian_prod(
                torch.tensor([number * reference_time]),
                torch.arange(height),
                torch.arange(width),
                one,
            )
            for number, (height, width) in enumerate(grids)
        ]
        # Text and image separately, as diffusers' forward does: the last bits of a vectorised
        # cosine depend on the row's position in the tensor.
        tables = [embed(ids.to(device)) for ids in (text, torch.cat(pictures))]
        cos, sin = (torch.cat(halves) for halves in zip(*tables, strict=True))
        return cos, sin

    return table
