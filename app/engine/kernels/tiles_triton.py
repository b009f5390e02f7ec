"""Tiles that kernels in Gluon copy to shared memory; imported on Hopper only."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def in_tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe *x*, [n, m], in tiles of *rows* x *columns*, which are swizzled by 128 bytes."""
    layout = gl.NVMMASharedLayout(128, 8 * x.itemsize, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
