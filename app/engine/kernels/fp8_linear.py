"""The matmul of fp8 operands: the GPU's, and the same arithmetic in float32 elsewhere."""

from __future__ import annotations

import torch

from app.engine import torch_private


def multiply_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply fp8 [..., K] by the transpose of fp8 [N, K], times both scales [], to *dtype*."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.is_cuda:
        product = torch_private.scaled_mm(flat, weight, x_scale, weight_scale, dtype)
    else:
        exact = flat.float() @ weight.float().t()
        product = (exact * (x_scale * weight_scale)).to(dtype)
    return product.view(*x.shape[:-1], -1)
