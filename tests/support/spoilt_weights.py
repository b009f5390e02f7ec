"""Checkpoints whose files are whole and whose weights are worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def spoil(folder: Path, part: str, damage: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply *damage* to every weight of *part*."""
    from safetensors.torch import load_file, save_file

    for file in (folder / part).glob("*.safetensors"):
        weights = {name: damage(tensor) for name, tensor in load_file(file).items()}
        save_file(weights, file)


def zeroes(weights: torch.Tensor) -> torch.Tensor:
    """The decoder says the same of every pixel."""
    return weights * 0


def not_numbers(weights: torch.Tensor) -> torch.Tensor:
    """As arithmetic that overflows leaves it; counters stay counters."""
    return weights * float("nan") if weights.is_floating_point() else weights
