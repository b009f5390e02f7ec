"""Operations shared by the fused blocks and the Qwen3 layers, and those around a block's layers.

A layer whose kernels take in what stands before or after it has a method of the same name as the
function here, `modulated` or `added`. Around any other layer it is torch's, for a compiler to fuse.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def modulated(
    layer: nn.Module, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return *layer* of `modulate`: [1, n, d] -> [1, n, out]."""
    own = getattr(layer, "modulated", None)
    made: torch.Tensor = (
        layer(modulate(x, scale, shift, eps)) if own is None else own(x, scale, shift, eps)
    )
    return made


def added(
    layer: nn.Module,
    residual: torch.Tensor,
    gate: torch.Tensor,
    x: torch.Tensor | None = None,
    feed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return residual + gate * *layer* of `join`: [1, n, d]; the gate is [1, d]."""
    own = getattr(layer, "added", None)
    made: torch.Tensor = (
        residual + gate * layer(join(x, feed)) if own is None else own(residual, gate, x, feed)
    )
    return made


def modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift: [1, n, d]; *scale* and *shift* are [1, d]."""
    return functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def join(x: torch.Tensor | None, feed: torch.Tensor | None) -> torch.Tensor:
    """Return [x, SwiGLU(feed)], of which one may be missing: [1, n, c] and [1, n, 2 * f]."""
    if feed is None:
        assert x is not None
        return x
    return swiglu(feed) if x is None else torch.cat([x, swiglu(feed)], dim=-1)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * value (SwiGLU, arXiv 2002.05202): [..., 2 * f] -> [..., f]."""
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def split_last(x: torch.Tensor, size: int) -> torch.Tensor:
    """Reshape [..., n * size] -> [..., n, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return RMSNorm of *x* over its last dimension (arXiv 1910.07467), normalised in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
