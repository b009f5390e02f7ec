"""The kernels of `fp8_attention`, which says what they compute; imported on Hopper only.

They are written in Gluon, the part of Triton in which layouts, copies and barriers are explicit.
In a program one warp copies tiles to shared memory, and three warpgroups of four warps compute, 64
queries each. A warpgroup has one product under way at a time: so it needs 160 registers a thread,
three fit on a multiprocessor, and while one waits for the tensor cores the others compute
exponentials, which take as long. There are as many programs as multiprocessors, each for several
tiles; keys and values are copied ahead from one tile to the next. Tiles that would leave most
multiprocessors idle at the end are divided among them by keys, and a last kernel merges the parts.

The tensor cores take values with tokens along memory, so a first kernel transposes them as it
rounds. In each 16 tokens it also changes their order, to the one in which a thread holds the scores
that it computed: so probabilities need not move between threads to be multiplied.

Only the tile is constant: a new number of tokens compiles nothing.
"""

# The decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math

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

_SIZE = 128
"""The size of a head."""
_QUERIES = tl.constexpr(64)
"""Rows of a tile that one warpgroup computes: those of the tensor cores' instruction."""
_GROUPS = 3
_KEYS = 128
_STAGES = 3
"""Tiles of keys, and of values, in shared memory at a time."""
_REGISTERS, _COPY_REGISTERS = tl.constexpr(160), tl.constexpr(24)
_PIECES = 4
"""In how many pieces a tile is divided at most."""
_MERGED = 32
"""Rows that a program of `_merge` takes."""
_LARGEST = tl.constexpr(8.0)
_NEVER = tl.constexpr(-1e30)
_ONE = tl.constexpr(0x38)
"""1 in e4m3. ptxas 12.8 loses one of two equal pairs of floats that it rounds to e4m3."""

_TRANSPOSED = 64
"""Tokens that a program of `_transpose` takes."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention: bf16 [n, h * 128] each, rows any distance apart -> [n, h * 128]."""
    count, width = q.shape
    heads = width // _SIZE
    padded = triton.cdiv(count, _KEYS) * _KEYS
    with torch.cuda.device(q.device):
        values = torch.empty((width, padded), dtype=torch.float8_e4m3fn, device=q.device)
        _transpose[(padded // _TRANSPOSED, heads)](
            v, values, count, padded, v.stride(0), SIZE=_SIZE, TOKENS=_TRANSPOSED
        )
        out = torch.empty((count, width), dtype=q.dtype, device=q.device)
        height = _GROUPS * _QUERIES.value
        rows = triton.cdiv(count, height)
        programs = processors(q.device)
        whole, pieces = _division(heads * rows, programs, triton.cdiv(count, _KEYS))
        late = (heads * rows - whole) * pieces
        parts = torch.empty((late * height, _SIZE), dtype=torch.float32, device=q.device)
        weights = torch.empty((late * height, 2), dtype=torch.float32, device=q.device)
        _attend[(min(programs, whole + late),)](
            in_tiles(q, _QUERIES.value, _SIZE),
            in_tiles(k, _KEYS, _SIZE),
            in_tiles(values, _SIZE, _KEYS),
            out,
            parts,
            weights,
            _SIZE**-0.5 * math.log2(math.e),
            count,
            heads,
            whole,
            late,
            pieces,
            GROUPS=_GROUPS,
            STAGES=_STAGES,
        )
        if late:
            _merge[(late // pieces, height // _MERGED)](
                parts,
                weights,
                out,
                count,
                width,
                rows,
                whole,
                pieces,
                SIZE=_SIZE,
                HEIGHT=height,
                ROWS=_MERGED,
            )
    return out


def _division(tiles: int, programs: int, blocks: int) -> tuple[int, int]:
    """Return how many of *tiles* are computed whole, and in how many pieces each of the others.

    Each program has equally many whole tiles; *blocks* of keys can be divided.
    """
    rest = tiles % programs
    pieces = min(programs // rest, blocks, _PIECES) if rest else 1
    return (tiles - rest, pieces) if pieces > 1 else (tiles, 1)


@triton.jit(do_not_specialize=["count"])
def _transpose(
    v: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    padded: tl.tensor,
    stride: tl.tensor,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Round v [count, h * SIZE] to e4m3 as out [h * SIZE, padded], zero beyond *count*.

    Of each 16 tokens, place 4 * c + 2 * b + d has token 8 * b + 2 * c + d (b, d < 2; c < 4).
    """
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    lane = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    given = tl.load(
        v + token[:, None].to(tl.int64) * stride + lane[None, :],
        mask=(token < count)[:, None],
        other=0.0,
    )
    made = tl.trans(given.to(tl.float32).to(tl.float8e4nv))
    tl.store(out + lane[:, None].to(tl.int64) * padded + place[None, :], made)


@triton.jit(do_not_specialize=["count", "rows", "whole", "pieces"])
def _merge(
    parts: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    whole: tl.tensor,
    pieces: tl.tensor,
    SIZE: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Merge the parts of the tiles from *whole* on: *weights* has their sums and largest scores."""
    rest = tl.program_id(0)
    inner = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, SIZE)
    top = tl.full([ROWS], -1e20, tl.float32)
    for piece in range(pieces):
        row = (rest * pieces + piece) * HEIGHT + inner
        top = tl.maximum(top, tl.load(weights + row * 2 + 1))
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, SIZE], tl.float32)
    for piece in range(pieces):
        row = (rest * pieces + piece) * HEIGHT + inner
        fade = tl.exp2(tl.load(weights + row * 2 + 1) - top)
        total += fade * tl.load(weights + row * 2)
        part = tl.load(parts + row[:, None].to(tl.int64) * SIZE + lane[None, :])
        summed += fade[:, None] * part
    tile = whole + rest
    row = tile % rows * HEIGHT + inner
    place = out + row[:, None].to(tl.int64) * width + tile // rows * SIZE + lane[None, :]
    made = (summed / total[:, None]).to(out.dtype.element_ty)
    tl.store(place, made, mask=(row < count)[:, None])


@gluon.jit(do_not_specialize=["count", "whole", "late", "pieces"])
def _attend(
    q_tiles: gl.tensor,
    k_tiles: gl.tensor,
    v_tiles: gl.tensor,
    out: gl.tensor,
    parts: gl.tensor,
    weights: gl.tensor,
    scale: gl.tensor,
    count: gl.tensor,
    heads: gl.tensor,
    whole: gl.tensor,
    late: gl.tensor,
    pieces: gl.tensor,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Compute *whole* tiles of out [count, heads * s], and *late* parts of others.

    *scale* takes scores to powers of two.
    """
    SIZE: gl.constexpr = k_tiles.block_shape[1]
    KEYS: gl.constexpr = k_tiles.block_shape[0]
    q_held = gl.allocate_shared_memory(q_tiles.dtype, [GROUPS, _QUERIES, SIZE], q_tiles.layout)
    k_held = gl.allocate_shared_memory(k_tiles.dtype, [STAGES, KEYS, SIZE], k_tiles.layout)
    v_held = gl.allocate_shared_memory(v_tiles.dtype, [STAGES, SIZE, KEYS], v_tiles.layout)
    spread: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    one = gl.full([8, KEYS], _ONE, gl.int8, spread).to(v_tiles.dtype, bitcast=True)
    ones = gl.allocate_shared_memory(v_tiles.dtype, [8, KEYS], v_tiles.layout, one)
    q_full, q_free = ring(1, GROUPS)
    k_full, k_free = ring(STAGES, GROUPS)
    v_full, v_free = ring(STAGES, GROUPS)
    fence_async_shared()
    rows = gl.cdiv(count, GROUPS * _QUERIES)
    blocks = gl.cdiv(count, KEYS)
    held = (q_held, k_held, v_held, ones)
    bars = (q_full, q_free, k_full, k_free, v_full, v_free)
    work = (rows, blocks, whole, late, pieces)
    made = (out, parts, weights)
    gl.warp_specialize(
        [
            (_compute, (0, held, bars, work, made, scale, count, heads)),
            (_compute, (1, held, bars, work, made, scale, count, heads)),
            (_compute, (2, held, bars, work, made, scale, count, heads)),
            (_copy, (q_tiles, k_tiles, v_tiles, held, bars, work)),
        ],
        [4, 4, 1],
        [_REGISTERS, _REGISTERS, _COPY_REGISTERS],
    )


@gluon.jit
def _copy(
    q_tiles: gl.tensor,
    k_tiles: gl.tensor,
    v_tiles: gl.tensor,
    held: gl.tuple,
    bars: gl.tuple,
    work: gl.tuple,
) -> None:
    """Copy what the warpgroups compute from, as soon as there is room for it."""
    q_held, k_held, v_held, _ = held
    q_full, q_free, k_full, k_free, v_full, v_free = bars
    rows, blocks, whole, late, pieces = work
    GROUPS: gl.constexpr = q_held.shape[0]
    STAGES: gl.constexpr = k_held.shape[0]
    SIZE: gl.constexpr = k_held.shape[2]
    KEYS: gl.constexpr = k_held.shape[1]
    step = 0
    for item in range(gl.program_id(0), whole + late, gl.num_programs(0)):
        tile, begin, end = _part(item, blocks, whole, pieces)
        turn = item // gl.num_programs(0)
        lane = tile // rows * SIZE
        first = tile % rows * (GROUPS * _QUERIES)
        full = q_full.index(0)
        mbarrier.wait(q_free.index(0), (turn & 1) ^ 1)
        mbarrier.expect(full, GROUPS * q_tiles.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            place = q_held.index(group)
            tma.async_copy_global_to_shared(q_tiles, [first + group * _QUERIES, lane], full, place)
        for block in range(begin, end):
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            token = (blocks - 1 - block) * KEYS
            mbarrier.wait(k_free.index(stage), phase)
            full = k_full.index(stage)
            mbarrier.expect(full, k_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(k_tiles, [token, lane], full, k_held.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            full = v_full.index(stage)
            mbarrier.expect(full, v_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(v_tiles, [lane, token], full, v_held.index(stage))
            step += 1


@gluon.jit
def _compute(
    group: gl.constexpr,
    held: gl.tuple,
    bars: gl.tuple,
    work: gl.tuple,
    made: gl.tuple,
    scale: gl.tensor,
    count: gl.tensor,
    heads: gl.tensor,
) -> None:
    """Compute 64 rows of each tile, block of keys by block, the last and incomplete one first."""
    q_held, k_held, v_held, ones = held
    q_full, q_free, k_full, k_free, v_full, v_free = bars
    rows, blocks, whole, late, pieces = work
    out, parts, weights = made
    GROUPS: gl.constexpr = q_held.shape[0]
    KEYS: gl.constexpr = k_held.shape[1]
    SIZE: gl.constexpr = k_held.shape[2]
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 32])
    total: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    step = 0
    for item in range(gl.program_id(0), whole + late, gl.num_programs(0)):
        tile, begin, end = _part(item, blocks, whole, pieces)
        top = gl.full([_QUERIES], -1e20, gl.float32, gl.SliceLayout(1, score))
        summed = gl.zeros([_QUERIES, SIZE], gl.float32, value)
        weight = gl.zeros([_QUERIES, 8], gl.float32, total)
        mbarrier.wait(q_full.index(0), (item // gl.num_programs(0)) & 1)
        q = q_held.index(group)
        scores = _score(q, k_held, k_full, k_free, step)
        token = (blocks - 1 - begin) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, score))
        scores = gl.where((token < count)[None, :], scores, _NEVER)
        for _ in range(begin + 1, end):
            top, summed, weight = _add(
                scores, scale, top, summed, weight, v_held, ones, v_full, v_free, step
            )
            step += 1
            scores = _score(q, k_held, k_full, k_free, step)
        mbarrier.arrive(q_free.index(0))
        top, summed, weight = _add(
            scores, scale, top, summed, weight, v_held, ones, v_full, v_free, step
        )
        step += 1
        weight = gl.convert_layout(gl.max(weight, 1), gl.SliceLayout(1, value))
        inner = gl.arange(0, _QUERIES, gl.SliceLayout(1, value))
        lane = gl.arange(0, SIZE, gl.SliceLayout(0, value))
        if item < whole:
            row = (tile % rows * GROUPS + group) * _QUERIES + inner
            place = out + row[:, None].to(gl.int64) * (heads * SIZE) + tile // rows * SIZE
            mean = (summed * (1.0 / weight)[:, None]).to(out.dtype.element_ty)
            gl.store(place + lane[None, :], mean, mask=(row < count)[:, None])
        else:
            row = ((item - whole) * GROUPS + group) * _QUERIES + inner
            gl.store(parts + row[:, None].to(gl.int64) * SIZE + lane[None, :], summed)
            gl.store(weights + row * 2, weight)
            gl.store(weights + row * 2 + 1, gl.convert_layout(top, gl.SliceLayout(1, value)))


@gluon.jit
def _part(
    item: gl.tensor, blocks: gl.tensor, whole: gl.tensor, pieces: gl.tensor
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Return the tile of a work item, and its first and last block of keys."""
    late = gl.maximum(item - whole, 0)
    piece = late % pieces
    begin = gl.where(item < whole, 0, piece * blocks // pieces)
    end = gl.where(item < whole, blocks, (piece + 1) * blocks // pieces)
    return gl.minimum(item, whole + late // pieces), begin, end


@gluon.jit
def _score(
    q: gl.shared_memory_descriptor,
    k_held: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    step: gl.tensor,
) -> gl.tensor:
    """Return the products of *q* with a block of keys, float32 [64, keys]."""
    STAGES: gl.constexpr = k_held.shape[0]
    KEYS: gl.constexpr = k_held.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    stage = step % STAGES
    zero = gl.zeros([_QUERIES, KEYS], gl.float32, layout)
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    keys = k_held.index(stage).permute((1, 0))
    made = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
    made = warpgroup_mma_wait(0, deps=[made])
    mbarrier.arrive(free.index(stage))
    return made


@gluon.jit
def _add(
    scores: gl.tensor,
    scale: gl.tensor,
    top: gl.tensor,
    summed: gl.tensor,
    weight: gl.tensor,
    v_held: gl.shared_memory_descriptor,
    ones: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    step: gl.tensor,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Add a block's values and probabilities to what was *summed*, and to its *weight*."""
    STAGES: gl.constexpr = v_held.shape[0]
    ROWS: gl.constexpr = scores.shape[0]
    KEYS: gl.constexpr = scores.shape[1]
    COLUMNS: gl.constexpr = ones.shape[0]
    value: gl.constexpr = summed.type.layout
    operand: gl.constexpr = gl.DotOperandLayout(0, value, 4)
    higher = gl.maximum(top, gl.ceil(gl.max(scores, 1) * scale) - _LARGEST)
    fade = gl.exp2(top - higher)
    p = gl.exp2(scores * scale - higher[:, None])
    # In the order of `_transpose` a thread already has what it multiplies.
    p = p.reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
    p = gl.convert_layout(p.to(v_held.dtype), operand, assert_trivial=True)
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    values = v_held.index(stage).permute((1, 0))
    # The tensor cores cut what they add to 13 bits below the sum, so a long one would lose much:
    # blocks are summed here, in float32.
    zero = gl.zeros(summed.shape, gl.float32, value)
    made = warpgroup_mma(p, values, zero, use_acc=False, is_async=True)
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, weight.type.layout)
    added = warpgroup_mma(p, ones.permute((1, 0)), zero, use_acc=False, is_async=True)
    made, added = warpgroup_mma_wait(0, deps=[made, added])
    summed = summed * gl.convert_layout(fade, gl.SliceLayout(1, value))[:, None] + made
    mbarrier.arrive(free.index(stage))
    fade = gl.convert_layout(fade, gl.SliceLayout(1, weight.type.layout))
    return higher, summed, weight * fade[:, None] + added
