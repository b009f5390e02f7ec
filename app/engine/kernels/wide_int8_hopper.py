"""The matmul of `wide_int8` for Hopper, which says what it computes; imported there only.

It is written in Gluon, as `fp8_gated_triton`. In a program one warp copies tiles to shared memory,
and two warpgroups of four warps compute 64 tokens each, both terms at once: a step's weights are
read for 128 tokens and for both. There are as many programs as multiprocessors, each for several
tiles; while a warpgroup writes its last tile, the next is being copied.

Only the tile is constant: a new number of tokens or width compiles nothing. The sums are of
integers, so they are those of `wide_int8_triton` to the bit.
"""

# The decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math

import torch
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
"""Tokens of a tile that one warpgroup computes: the rows of the tensor cores' instruction."""
_GROUPS = 2
_OUTPUTS, _NARROW = 128, 64
_DEPTH = 128
"""Inputs that are multiplied in a step."""
_STAGES = {2: 4, 4: 3}
"""Steps whose tiles are in shared memory at a time, beside results of so many bytes each."""
_REGISTERS, _COPY_REGISTERS = gl.constexpr(240), gl.constexpr(24)


def multiply(
    terms: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    scale: torch.Tensor,
    own: torch.Tensor | None,
    common: int,
    out: torch.Tensor,
) -> None:
    """Write to *out*, [parts, n, m] in bf16 or float32, the product or its parts along k.

    The other arguments are those of `wide_int8.multiply`. The outputs that padding lacks are a
    launch of their own: they are few tiles, and smaller ones are done earlier.
    """
    cut = len(weight)
    if own is not None:
        cut = min(cut, -(-common // _OUTPUTS) * _OUTPUTS)
        _launch(terms, weight[cut:], scale[cut:], own, out[..., cut:], _NARROW)
    _launch(terms, weight[:cut], scale[:cut], None, out[..., :cut], _OUTPUTS)


def _launch(
    terms: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    scale: torch.Tensor,
    own: torch.Tensor | None,
    out: torch.Tensor,
    width: int,
) -> None:
    """Compute *out* in tiles of *width* outputs; with *own*, without blocks of padding alone."""
    parts, tokens, outputs = out.shape
    if not outputs:
        return
    high, low, scales = terms
    work = (tokens // (_GROUPS * _ROWS), outputs // width, parts)
    with torch.cuda.device(weight.device):
        _multiply[(min(math.prod(work), processors(weight.device)),)](
            in_tiles(high, _ROWS, _DEPTH),
            in_tiles(low, _ROWS, _DEPTH),
            in_tiles(weight, width, _DEPTH),
            in_tiles(out.flatten(0, 1), _ROWS, width),
            scales,
            scale,
            own,
            *work,
            weight.shape[1] // _DEPTH,
            GROUPS=_GROUPS,
            STAGES=_STAGES[out.itemsize],
            SKIPS=own is not None,
        )


@gluon.jit(do_not_specialize=["high_tiles", "wide_tiles", "parts", "steps"])
def _multiply(
    high: gl.tensor,
    low: gl.tensor,
    weight: gl.tensor,
    made: gl.tensor,
    scales: gl.tensor,
    weight_scales: gl.tensor,
    own: gl.tensor,
    high_tiles: gl.tensor,
    wide_tiles: gl.tensor,
    parts: gl.tensor,
    steps: gl.tensor,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    SKIPS: gl.constexpr,
) -> None:
    """Compute all tiles of *made*, [parts * tokens, outputs]; of a part there are high x wide."""
    ROWS: gl.constexpr = high.block_shape[0]
    OUTPUTS: gl.constexpr = weight.block_shape[0]
    DEPTH: gl.constexpr = weight.block_shape[1]
    uppers = gl.allocate_shared_memory(high.dtype, [STAGES * GROUPS, ROWS, DEPTH], high.layout)
    lowers = gl.allocate_shared_memory(low.dtype, [STAGES * GROUPS, ROWS, DEPTH], low.layout)
    factors = gl.allocate_shared_memory(weight.dtype, [STAGES, OUTPUTS, DEPTH], weight.layout)
    results = gl.allocate_shared_memory(made.dtype, [GROUPS, ROWS, OUTPUTS], made.layout)
    bars = ring(STAGES, GROUPS)
    fence_async_shared()
    held = (uppers, lowers, factors)
    work = (high_tiles, wide_tiles, parts, steps, own)
    written = (scales, weight_scales, results, made)
    gl.warp_specialize(
        [
            (_compute, (0, held, bars, work, written, GROUPS, SKIPS)),
            (_compute, (1, held, bars, work, written, GROUPS, SKIPS)),
            (_copy, (high, low, weight, held, bars, work, GROUPS, SKIPS)),
        ],
        [4, 1],
        [_REGISTERS, _COPY_REGISTERS],
    )


@gluon.jit
def _copy(
    high: gl.tensor,
    low: gl.tensor,
    weight: gl.tensor,
    held: gl.tuple,
    bars: gl.tuple,
    work: gl.tuple,
    GROUPS: gl.constexpr,
    SKIPS: gl.constexpr,
) -> None:
    """Copy what the warpgroups compute from, as soon as there is room for it."""
    uppers, lowers, factors = held
    full, free = bars
    STAGES: gl.constexpr = factors.shape[0]
    ROWS: gl.constexpr = high.block_shape[0]
    OUTPUTS: gl.constexpr = weight.block_shape[0]
    DEPTH: gl.constexpr = weight.block_shape[1]
    count = 0
    for tile in range(gl.program_id(0), work[0] * work[1] * work[2], gl.num_programs(0)):
        row, column, _, begin, end = _place(tile, work, GROUPS * ROWS, SKIPS)
        for step in range(begin, end):
            stage = count % STAGES
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 2 * GROUPS * high.block_type.nbytes + weight.block_type.nbytes)
            for group in gl.static_range(GROUPS):
                place = stage * GROUPS + group
                at = [(row * GROUPS + group) * ROWS, step * DEPTH]
                tma.async_copy_global_to_shared(high, at, bar, uppers.index(place))
                tma.async_copy_global_to_shared(low, at, bar, lowers.index(place))
            at = [column * OUTPUTS, step * DEPTH]
            tma.async_copy_global_to_shared(weight, at, bar, factors.index(stage))
            count += 1


@gluon.jit
def _compute(
    group: gl.constexpr,
    held: gl.tuple,
    bars: gl.tuple,
    work: gl.tuple,
    written: gl.tuple,
    GROUPS: gl.constexpr,
    SKIPS: gl.constexpr,
) -> None:
    """Compute 64 tokens of each tile.

    A step's tiles are free once its products are done, for which those of the next step wait.
    """
    uppers, lowers, factors = held
    full, free = bars
    scales, weight_scales, results, made = written
    STAGES: gl.constexpr = factors.shape[0]
    OUTPUTS: gl.constexpr = factors.shape[1]
    ROWS: gl.constexpr = uppers.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUTPUTS, 32])
    own_rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    own_columns = gl.arange(0, OUTPUTS, gl.SliceLayout(0, layout))
    place = results.index(group)
    count = 0
    for tile in range(gl.program_id(0), work[0] * work[1] * work[2], gl.num_programs(0)):
        row, column, part, begin, end = _place(tile, work, GROUPS * ROWS, SKIPS)
        first = (row * GROUPS + group) * ROWS
        row_scale = gl.load(scales + first + own_rows)
        column_scale = gl.load(weight_scales + column * OUTPUTS + own_columns)
        upper = gl.zeros([ROWS, OUTPUTS], gl.int32, layout)
        lower = gl.zeros([ROWS, OUTPUTS], gl.int32, layout)
        for step in range(begin, end):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            factor = factors.index(stage).permute((1, 0))
            at = stage * GROUPS + group
            upper = warpgroup_mma(uppers.index(at), factor, upper, is_async=True)
            lower = warpgroup_mma(lowers.index(at), factor, lower, is_async=True)
            upper, lower = warpgroup_mma_wait(2, deps=[upper, lower])
            if step > begin:
                mbarrier.arrive(free.index((count - 1) % STAGES))
            count += 1
        upper, lower = warpgroup_mma_wait(0, deps=[upper, lower])
        if begin < end:
            mbarrier.arrive(free.index((count - 1) % STAGES))
        value = 256.0 * upper.to(gl.float32) + lower.to(gl.float32)
        value *= gl.expand_dims(row_scale, 1) * gl.expand_dims(column_scale, 0)
        tma.store_wait(0)
        place.store(value.to(made.dtype))
        fence_async_shared()
        at_row = part * (work[0] * GROUPS * ROWS) + first
        tma.async_copy_shared_to_global(made, [at_row, column * OUTPUTS], place)
    tma.store_wait(0)


@gluon.jit
def _place(
    tile: gl.tensor,
    work: gl.tuple,
    ROWS: gl.constexpr,
    SKIPS: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Return a tile's row and column, in tiles, its part, and its first and last step.

    The tiles of one block of weights follow one another, so that these are read once.
    """
    high, wide, parts, steps, own = work
    row = tile % high
    column = tile // high % wide
    part = tile // (high * wide)
    each = gl.cdiv(steps, parts)
    begin = part * each
    end = gl.minimum(begin + each, steps)
    if SKIPS:
        end = gl.where(gl.load(own + row * ROWS) != 0, end, begin)
    return row, column, part, begin, end
