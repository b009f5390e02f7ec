"""What kernels in Gluon share: tiles that they copy, and barriers; imported on Hopper only."""

# The decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def in_tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe *x*, [n, m], in tiles of *rows* x *columns*, which are swizzled by 128 bytes."""
    layout = gl.NVMMASharedLayout(128, 8 * x.itemsize, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


@gluon.jit
def ring(STAGES: gl.constexpr, READERS: gl.constexpr) -> tuple[gl.tensor, gl.tensor]:
    """Make the barriers of STAGES places that are filled in turn: full ones, and free ones.

    A copy arrives at the first, each of READERS, once it has read, at the second.
    """
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    free = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=READERS)
    return full, free
