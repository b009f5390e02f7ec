"""The kernel of `fp8_gated`, which says what it computes; imported on Hopper only.

It is written in Gluon, as that of `fp8_attention_triton`. In a program one warp copies tiles to
shared memory, and two warpgroups of four warps compute 64 rows each: gates and values of the same
outputs, whose weights lie far apart, are two tiles of one step. There are as many programs as
multiprocessors, each for several tiles; while a warpgroup writes its last tile, the next is being
copied.

Only the tile is constant: neither a new number of rows nor a new width compiles anything.
"""

# The decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from app.engine.kernels.tiles_triton import in_tiles, ring
from app.engine.kernels.triton_check import processors

_ROWS = 64
"""Rows of a tile that one warpgroup computes: those of the tensor cores' instruction."""
_GROUPS = 2
_OUTPUTS = 128
_DEPTH = 128
"""Inputs that are multiplied in a step."""
_STAGES = 4
"""Steps whose tiles are in shared memory at a time."""
_BAND = 12
"""Rows of tiles that are computed together, so that the GPU's cache keeps what they share."""
_REGISTERS, _COPY_REGISTERS = tl.constexpr(240), tl.constexpr(24)
_LIMIT = tl.constexpr(448.0)
"""The largest e4m3."""


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
    tiles = triton.cdiv(rows, _GROUPS * _ROWS) * triton.cdiv(width, _OUTPUTS)
    with torch.cuda.device(x.device):
        _multiply[(min(tiles, processors(x.device)),)](
            in_tiles(x, _ROWS, _DEPTH),
            in_tiles(weight, _OUTPUTS, _DEPTH),
            in_tiles(out, _ROWS, _OUTPUTS),
            x_scale,
            weight_scale,
            inverse,
            rows,
            width,
            depth,
            GROUPS=_GROUPS,
            STAGES=_STAGES,
            BAND=_BAND,
        )


@gluon.jit(do_not_specialize=["rows", "width"])
def _multiply(
    left: gl.tensor,
    right: gl.tensor,
    made: gl.tensor,
    x_scale: gl.tensor,
    weight_scale: gl.tensor,
    inverse: gl.tensor,
    rows: gl.tensor,
    width: gl.tensor,
    depth: gl.tensor,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
) -> None:
    """Compute all tiles of *made* [rows, width]."""
    ROWS: gl.constexpr = left.block_shape[0]
    OUTPUTS: gl.constexpr = right.block_shape[0]
    DEPTH: gl.constexpr = right.block_shape[1]
    x_held = gl.allocate_shared_memory(left.dtype, [STAGES * GROUPS, ROWS, DEPTH], left.layout)
    gates = gl.allocate_shared_memory(right.dtype, [STAGES, OUTPUTS, DEPTH], right.layout)
    values = gl.allocate_shared_memory(right.dtype, [STAGES, OUTPUTS, DEPTH], right.layout)
    results = gl.allocate_shared_memory(made.dtype, [GROUPS, ROWS, OUTPUTS], made.layout)
    full, free = ring(STAGES, GROUPS)
    fence_async_shared()
    held = (x_held, gates, values)
    work = (gl.cdiv(rows, GROUPS * ROWS), gl.cdiv(width, OUTPUTS), gl.cdiv(depth, DEPTH))
    scales = (x_scale, weight_scale, inverse)
    gl.warp_specialize(
        [
            (_compute, (0, held, full, free, work, scales, results, made, GROUPS, BAND)),
            (_compute, (1, held, full, free, work, scales, results, made, GROUPS, BAND)),
            (_copy, (left, right, held, full, free, work, width, GROUPS, BAND)),
        ],
        [4, 1],
        [_REGISTERS, _COPY_REGISTERS],
    )


@gluon.jit
def _copy(
    left: gl.tensor,
    right: gl.tensor,
    held: gl.tuple,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    work: gl.tuple,
    width: gl.tensor,
    GROUPS: gl.constexpr,
    BAND: gl.constexpr,
) -> None:
    """Copy what the warpgroups compute from, as soon as there is room for it."""
    x_held, gates, values = held
    high, wide, steps = work
    STAGES: gl.constexpr = gates.shape[0]
    ROWS: gl.constexpr = left.block_shape[0]
    OUTPUTS: gl.constexpr = right.block_shape[0]
    DEPTH: gl.constexpr = right.block_shape[1]
    count = 0
    for tile in range(gl.program_id(0), high * wide, gl.num_programs(0)):
        row, column = _place(tile, high, wide, BAND)
        column *= OUTPUTS
        for step in range(steps):
            stage = count % STAGES
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, GROUPS * left.block_type.nbytes + 2 * right.block_type.nbytes)
            for group in gl.static_range(GROUPS):
                place = x_held.index(stage * GROUPS + group)
                first = (row * GROUPS + group) * ROWS
                tma.async_copy_global_to_shared(left, [first, step * DEPTH], bar, place)
            gate, value = gates.index(stage), values.index(stage)
            tma.async_copy_global_to_shared(right, [column, step * DEPTH], bar, gate)
            tma.async_copy_global_to_shared(right, [width + column, step * DEPTH], bar, value)
            count += 1


@gluon.jit
def _compute(
    group: gl.constexpr,
    held: gl.tuple,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    work: gl.tuple,
    scales: gl.tuple,
    results: gl.shared_memory_descriptor,
    made: gl.tensor,
    GROUPS: gl.constexpr,
    BAND: gl.constexpr,
) -> None:
    """Compute 64 rows of each tile.

    A step's tiles are free once its products are done, for which those of the next step wait.
    """
    x_held, gates, values = held
    high, wide, steps = work
    x_scale, weight_scale, inverse = scales
    STAGES: gl.constexpr = gates.shape[0]
    OUTPUTS: gl.constexpr = gates.shape[1]
    ROWS: gl.constexpr = x_held.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUTPUTS, 32])
    factor = gl.load(x_scale) * gl.load(weight_scale)
    cast = factor * gl.load(inverse)
    place = results.index(group)
    count = 0
    for tile in range(gl.program_id(0), high * wide, gl.num_programs(0)):
        row, column = _place(tile, high, wide, BAND)
        gate = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
        value = gl.zeros([ROWS, OUTPUTS], gl.float32, layout)
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            x = x_held.index(stage * GROUPS + group)
            gate = warpgroup_mma(x, gates.index(stage).permute((1, 0)), gate, is_async=True)
            value = warpgroup_mma(x, values.index(stage).permute((1, 0)), value, is_async=True)
            gate, value = warpgroup_mma_wait(2, deps=[gate, value])
            if step > 0:
                mbarrier.arrive(free.index((count - 1) % STAGES))
            count += 1
        gate, value = warpgroup_mma_wait(0, deps=[gate, value])
        mbarrier.arrive(free.index((count - 1) % STAGES))
        # silu(x) = x * (1 + tanh(x / 2)) / 2: one instruction of the few units that a logistic
        # function takes two of; its error, 2^-11, is far below e4m3's.
        gate *= 0.5 * factor
        tanh = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [gate], gl.float32, is_pure=True, pack=1
        )
        y = (gate * tanh + gate) * (value * cast)
        y = gl.maximum(y, -_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        y = gl.minimum(y, _LIMIT, propagate_nan=tl.PropagateNan.ALL)
        tma.store_wait(0)
        place.store(y.to(made.dtype))
        fence_async_shared()
        first = (row * GROUPS + group) * ROWS
        tma.async_copy_shared_to_global(made, [first, column * OUTPUTS], place)
    tma.store_wait(0)


@gluon.jit
def _place(
    tile: gl.tensor, high: gl.tensor, wide: gl.tensor, BAND: gl.constexpr
) -> tuple[gl.tensor, gl.tensor]:
    """Return the row and the column, in tiles, of a tile: BAND rows of tiles, then the next."""
    first = tile // (BAND * wide) * BAND
    inside = tile % (BAND * wide)
    size = gl.minimum(high - first, BAND)
    return first + inside % size, inside // size
