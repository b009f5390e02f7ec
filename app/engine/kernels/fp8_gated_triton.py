"""The Triton kernel of `fp8_gated`, which says what it computes; imported on a card only.

Only the tile is constant: neither a new number of rows nor a new width compiles anything.
"""

# The decorator has no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

_LIMIT = tl.constexpr(448.0)
_ROWS, _HALF, _DEPTH, _BAND = 128, 128, 128, 8


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    inverse: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the kernel's result to *out*, e4m3 [n, f], whose rows may lie further apart."""
    rows, depth = x.shape
    width = weight.shape[0] // 2
    tiles = -(-rows // _ROWS) * -(-width // _HALF)
    # The setting is of the thread, and one call may be another thread's.
    triton.set_allocator(_allocate)
    with torch.cuda.device(x.device):
        _multiply[(min(tiles, _processors(x.device)),)](
            x,
            weight,
            x_scale,
            weight_scale,
            inverse,
            out,
            rows,
            depth,
            width,
            out.stride(0),
            ROWS=_ROWS,
            HALF=_HALF,
            DEPTH=_DEPTH,
            BAND=_BAND,
            num_warps=4,
            num_stages=4,
        )


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Return memory for the descriptors of a launch, which torch gives back in its stream's order.

    torch aligns to 512 bytes, more than any descriptor asks for.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x: tl.tensor,
    weight: tl.tensor,
    x_scale: tl.tensor,
    weight_scale: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    depth: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Compute every so many tiles of ROWS x HALF, which go in bands of BAND rows of tiles.

    A tile's gates and values are rows of *weight* that lie *width* apart, copied as one block. The
    compiler gives the copies to a warp of their own, which fills the next tile's buffers while
    others write the last one.
    """
    left = tl.make_tensor_descriptor(x, [rows, depth], [depth, 1], [ROWS, DEPTH])
    right = tl.make_tensor_descriptor(
        weight, [2, width, depth], [width * depth, depth, 1], [2, HALF, DEPTH]
    )
    made = tl.make_tensor_descriptor(out, [rows, width], [stride, 1], [ROWS, HALF])
    factor = tl.load(x_scale) * tl.load(weight_scale)
    cast = factor * tl.load(inverse)
    high, wide = tl.cdiv(rows, ROWS), tl.cdiv(width, HALF)
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), warp_specialize=True):
        first = tile // (BAND * wide) * BAND
        inside = tile % (BAND * wide)
        size = min(high - first, BAND)
        row = (first + inside % size) * ROWS
        column = inside // size * HALF
        sums = tl.zeros((ROWS, 2 * HALF), dtype=tl.float32)
        for step in range(tl.cdiv(depth, DEPTH)):
            a = left.load([row, step * DEPTH])
            b = tl.reshape(right.load([0, column, step * DEPTH]), (2 * HALF, DEPTH))
            sums = tl.dot(a, b.T, sums)
        gate, value = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
        gate *= factor
        y = gate * tl.sigmoid(gate) * (value * cast)
        y = tl.clamp(y, -_LIMIT, _LIMIT, propagate_nan=tl.PropagateNan.ALL)
        made.store([row, column], y.to(tl.float8e4nv))
