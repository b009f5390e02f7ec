"""Operations shared by the fused blocks and the Qwen3 layers."""

from __future__ import annotations

import torch
from torch.nn import functional


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
