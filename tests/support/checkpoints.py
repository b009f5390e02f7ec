"""Tiny checkpoints of klein's shape, written to a temporary folder in under two seconds."""

from __future__ import annotations

from pathlib import Path

import torch

from tools.random_weights import TINY, write_random


def write_tiny_klein(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    is_distilled: bool = True,
) -> Path:
    """Write a whole tiny pipeline in diffusers layout into *folder* and return it.

    The same classes as klein's, 28 text layers of width 32, two double and two single blocks, a VAE
    with batch-norm statistics, a byte-level tokenizer. With *is_distilled* false it passes for the
    base variant.
    """
    return write_random(Path(folder), TINY, seed=seed, dtype=dtype, is_distilled=is_distilled)
