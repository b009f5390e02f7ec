"""What stands around a block's linear layers, done with a layer in as few passes as it allows.

A layer whose kernels take in what stands before or after it has a method of the same name as the
function here, `modulated` or `added`. Around any other it is one kernel of
`app.engine.kernels.blocks`, which also casts the input where the layer has an `input_cast` and
multiplies what was cast so (`multiply`). What adapters add is computed from the same input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from app.engine.kernels import blocks
from app.engine.kernels.blocks import Cast, Change


class Fed(NamedTuple):
    """SwiGLU of a feed as its layer takes it, in the last columns of that layer's input."""

    rows: torch.Tensor
    """[1, n, in]; what stands before SwiGLU is not written yet."""


State = tuple[torch.Tensor, Change | None]
"""Hidden states, [1, n, d], and what is still to be added to them."""


def modulated(
    layer: Any, state: State, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the settled hidden states x, and *layer* of LayerNorm(x) * (1 + scale) + shift.

    [1, n, d] -> [1, n, d] and [1, n, out]; *scale* and *shift* are [1, d].
    """
    if hasattr(type(layer), "modulated"):
        hidden = settle(state)
        product = layer.modulated(hidden, scale, shift, eps)
        if (branch := _branch(layer)) is not None:
            _, normed = blocks.norm_modulate(hidden, None, scale, shift, eps)
            product = branch.add(product, normed)
        return hidden, product
    hidden, normed = blocks.norm_modulate(*state, scale, shift, eps, _input_cast(layer))
    return hidden, _multiply(layer, normed, hidden.dtype)


def fed(
    layer: Any,
    taker: Any,
    state: State,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | Fed]:
    """Return what `modulated` does, up to output *first*, and the others for `added` of *taker*.

    The others are a feed, gate and value of SwiGLU. [1, n, d] -> [1, n, d], [1, n, first] and
    [1, n, 2 * f], or SwiGLU of it where *layer* computes that itself (`gated`).
    """
    cast = _input_cast(layer)
    is_gated = hasattr(type(layer), "gated") and hasattr(type(taker), "gated")
    # What adapters add to a feed has to be there before SwiGLU.
    if cast is None or not is_gated or _branch(layer) is not None:
        hidden, product = modulated(layer, state, scale, shift, eps)
    else:
        hidden, normed = blocks.norm_modulate(*state, scale, shift, eps, cast)
        made: tuple[torch.Tensor, torch.Tensor] | None = layer.gated(
            normed, hidden.dtype, taker, first
        )
        if made is not None:
            return hidden, made[0], Fed(made[1])
        product = _multiply(layer, normed, hidden.dtype)
    rest, feed = torch.tensor_split(product, [first], dim=-1)
    return hidden, rest, feed


def added(
    layer: Any,
    residual: torch.Tensor,
    gate: torch.Tensor,
    heads: torch.Tensor | None = None,
    feed: torch.Tensor | Fed | None = None,
) -> State:
    """Return residual + gate * `joined`, perhaps still to be added; *gate* is [1, d]."""
    if isinstance(feed, Fed):
        if heads is not None:
            blocks.fill(heads, layer.input_cast, feed.rows)
        return residual, Change(gate, _multiply(layer, feed.rows, residual.dtype))
    if hasattr(type(layer), "added"):
        x = None if heads is None else blocks.merge(heads)
        if (branch := _branch(layer)) is not None:
            update = branch.add(None, blocks.join(heads, feed))
            residual = blocks.gate_add(residual, gate, update)
        return layer.added(residual, gate, x, feed), None
    return residual, Change(gate, joined(layer, heads, feed))


def joined(
    layer: Any, heads: torch.Tensor | None = None, feed: torch.Tensor | None = None
) -> torch.Tensor:
    """Return *layer* of heads and SwiGLU(feed) beside each other, of which one may be missing.

    [1, h, n, s] and [1, n, 2 * f] -> [1, n, out].
    """
    given = feed if heads is None else heads
    assert given is not None
    return _multiply(layer, blocks.join(heads, feed, _input_cast(layer)), given.dtype)


def settle(state: State) -> torch.Tensor:
    """Add what is still to be added."""
    hidden, change = state
    return hidden if change is None else blocks.gate_add(hidden, *change)


def _input_cast(layer: Any) -> Cast | None:
    cast: Cast | None = getattr(layer, "input_cast", None)
    return cast


def _branch(layer: Any) -> Any:
    """Return what adapters add to *layer* (`app.engine.adapters.branches`), None without one."""
    return vars(layer).get("branch")


def _multiply(layer: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_cast = x.dtype != dtype
    product: torch.Tensor = layer.multiply(x, dtype) if is_cast else layer(x)
    if (branch := _branch(layer)) is not None:
        product = branch.add(product, x, layer.input_scale if is_cast else None)
    return product
