"""What fused blocks do with a linear layer, whose input some layers take already cast.

A layer may have an `input_cast` (`app.engine.kernels.blocks.Cast`): then `multiply` takes the cast
input, and the kernel that makes the input casts it.
"""

from __future__ import annotations

import torch
from torch import nn

from app.engine.kernels import blocks
from app.engine.kernels.blocks import Cast, Change

State = tuple[torch.Tensor, Change | None]
"""Hidden states, [1, n, d], and what is still to be added to them."""


def input_cast(layer: nn.Module) -> Cast | None:
    """Return how *layer* wants its input cast, if it does."""
    cast: Cast | None = getattr(layer, "input_cast", None)
    return cast


def multiply(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply *x*, cast if *layer* has an `input_cast`, to *dtype*: [1, n, in] -> [1, n, out]."""
    product: torch.Tensor = layer(x) if x.dtype == dtype else layer.multiply(x, dtype)
    return product


def modulated(
    layer: nn.Module, state: State, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the settled hidden states, and the product with their modulated LayerNorm."""
    hidden, change = state
    hidden, normed = blocks.norm_modulate(hidden, scale, shift, eps, input_cast(layer), change)
    return hidden, multiply(layer, normed, hidden.dtype)


def after_swiglu(layer: nn.Module, up: torch.Tensor) -> torch.Tensor:
    """Return the product with swiglu(up): [1, n, 2 * f] -> [1, n, out]."""
    return multiply(layer, blocks.swiglu(up, input_cast(layer)), up.dtype)


def gated(
    layer: nn.Module, x: torch.Tensor, hidden: torch.Tensor, gate: torch.Tensor
) -> State:
    """Return *hidden* with gate * product of *x*, cast as in `multiply`, still to be added."""
    return hidden, Change(gate, multiply(layer, x, hidden.dtype))


def settle(state: State) -> torch.Tensor:
    """Add what is still to be added."""
    hidden, change = state
    return hidden if change is None else blocks.gate_add(hidden, *change)


def split_last(x: torch.Tensor, size: int) -> torch.Tensor:
    """Reshape [..., n * size] -> [..., n, size]."""
    return x.reshape(*x.shape[:-1], -1, size)
