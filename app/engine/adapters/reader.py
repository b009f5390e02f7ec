"""Reads an adapter file into branches of diffusers' modules, the same for every layout.

Low-rank adapters (LoRA, arXiv 2106.09685) add scale * (x A^T) B^T to a layer's output, Kronecker
adapters (LoKr, arXiv 2309.14859) scale * x (W1 (x) W2)^T, W1 and W2 perhaps products themselves.
The scale is alpha / rank, where alpha is a tensor of the layer or stands in PEFT's config in the
file's metadata; without either it is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from app.engine.adapters.layout import Alphas, Layer, Shapes, read_layout, refusal
from app.engine.adapters.names import Target
from app.engine.checkpoint.safetensors_io import SafetensorsFile

_ALPHA_LIMIT = 1e6


@dataclass(frozen=True, slots=True)
class LowRank:
    """A branch scale * (x A^T) B^T: *down* is A, [rank, in], *up* is B, [out, rank]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Kronecker:
    """A branch scale * x (left (x) right)^T, of whose outputs *rows* are taken, in this order.

    *left* is [a, b] and *right* [c, d], where b * d is the layer's number of inputs.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    rows: tuple[slice, ...]


Branch = LowRank | Kronecker


def read_adapter(path: Path, names: Mapping[str, Target], shapes: Shapes) -> dict[str, Branch]:
    """Read the adapter at *path* for a model's *names* and *shapes*: a branch for each module.

    Modules of one fused layer share the tensor A.

    Raises:
        AdapterRefused: it is damaged, of another kind, or of another model, or a value is not
            finite.
        OSError: it cannot be read.
    """
    layout = read_layout(path, names, shapes)
    branches: dict[str, Branch] = {}
    with SafetensorsFile(path) as file:
        for layer in layout.layers:
            tensors = {word: file.tensors[key].read() for word, (key, _) in layer.tensors.items()}
            if not all(torch.isfinite(each).all() for each in tensors.values()):
                raise refusal(path, f"{layer.name} has values that are not finite")
            scale = _scale(layer, tensors, layout.alphas)
            if not abs(scale) < _ALPHA_LIMIT:
                raise refusal(path, f"the scale of {layer.name} is {scale:.3g}")
            branches |= _branches(layer, scale, tensors)
    return branches


def _scale(layer: Layer, tensors: Mapping[str, torch.Tensor], alphas: Alphas) -> float:
    """Return alpha / rank."""
    rank = layer.divisor
    if not rank:
        return 1.0
    if (alpha := tensors.get("alpha")) is not None:
        return float(alpha.float()) / rank
    return alphas.of(layer) / (math.sqrt(rank) if alphas.is_root else rank)


def _branches(layer: Layer, scale: float, tensors: Mapping[str, torch.Tensor]) -> dict[str, Branch]:
    """Return the branch of each module of *layer*."""
    modules = layer.target.modules
    if layer.rank:
        up, down = tensors["up"], tensors["down"]
        if layer.target.is_swapped:
            up = up.roll(len(up) // 2, 0)
        parts = up.chunk(len(modules))
        return {name: LowRank(down, part, scale) for name, part in zip(modules, parts, strict=True)}
    left, right = (_factor(tensors, word) for word in ("w1", "w2"))
    outputs = len(left) * len(right)
    if layer.target.is_swapped:
        rows = (slice(outputs // 2, outputs), slice(outputs // 2))
        return {modules[0]: Kronecker(left, right, scale, rows)}
    size = outputs // len(modules)
    return {
        name: Kronecker(left, right, scale, (slice(number * size, (number + 1) * size),))
        for number, name in enumerate(modules)
    }


def _factor(tensors: Mapping[str, torch.Tensor], word: str) -> torch.Tensor:
    """Return one factor of a Kronecker product, multiplied out in float32 where it is a product."""
    if (whole := tensors.get(word)) is not None:
        return whole
    first, second = tensors[f"{word}_a"], tensors[f"{word}_b"]
    return (first.float() @ second.float()).to(first.dtype)
