"""The Triton kernels of `int8_linear`, which says what they compute; imported on a card only.

Only widths are constants: a new number of rows compiles nothing.
"""

# The decorator has no types, and tuples grow in loops that are unrolled.
# mypy: disable-error-code="untyped-decorator, assignment"

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from app.engine.kernels.int8_linear import hadamard
from app.engine.kernels.triton_check import processors

_TINY = tl.constexpr(1e-12)
_LIMIT = tl.constexpr(127.0)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: a float32 of less than 2 ** 22 is rounded to an integer by adding it."""
_PART, _WARPS = 1024, 4
"""How many columns of a row are handled at once, and by how many warps."""
_ROWS, _COLUMNS, _DEPTH, _BAND = 128, 256, 128, 8


def quantize(
    x: torch.Tensor | None,
    feed: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated rows of [x, SwiGLU(feed)], int8 [m, K], and their float32 scales [m].

    There are m - n more than were given, up to whole tiles of `multiply`, which nothing is written
    to: a tile that its rows did not fill had wrong results on a card.
    """
    given = feed if x is None else x
    assert given is not None
    before = 0 if x is None else x.shape[1]
    width = before + (0 if feed is None else feed.shape[1] // 2)
    rows = given.shape[0]
    padded = -(-rows // _ROWS) * _ROWS
    values = torch.empty((padded, width), dtype=torch.int8, device=given.device)
    scales = torch.empty(padded, dtype=torch.float32, device=given.device)
    # Parts that lie in x or in the feed, each of a power of two.
    part = math.gcd(before, width, _PART)
    _quantize[(rows,)](
        x,
        feed,
        scale,
        shift,
        _hadamard(given.device),
        values,
        scales,
        0 if x is None else x.stride(0),
        0 if feed is None else feed.stride(0),
        eps,
        BEFORE=before,
        WIDTH=width,
        PART=part,
        PARTS=width // part,
        num_warps=_WARPS,
        num_stages=1,
    )
    return values, scales


def multiply(
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """Multiply int8 [m, K] by the transpose of int8 [N, K], and scale: bf16 [m, N].

    m is a multiple of a tile's rows.
    """
    rows, depth = values.shape
    outputs = weight.shape[0]
    made = torch.empty((rows, outputs), dtype=torch.bfloat16, device=values.device)
    tiles = rows // _ROWS * -(-outputs // _COLUMNS)
    # The setting is of the thread, and one call may be another thread's.
    triton.set_allocator(_allocate)
    _multiply[(min(tiles, processors(values.device)),)](
        values,
        weight,
        made,
        scales,
        weight_scale,
        rows,
        outputs,
        depth,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        BAND=_BAND,
        num_warps=4,
        num_stages=4,
    )
    return made


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Return memory for the descriptors of a launch, which torch gives back in its stream's order.

    torch aligns to 512 bytes, more than any descriptor asks for.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def _hadamard(device: torch.device) -> torch.Tensor:
    """Return the regular Hadamard matrix of size 16, times 4, on *device*: all 1 and -1."""
    return (4 * hadamard(16)).to(device, torch.bfloat16)


@triton.jit
def _quantize(
    x: tl.tensor,
    feed: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    hadamard: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    x_stride: tl.tensor,
    feed_stride: tl.tensor,
    eps: tl.tensor,
    BEFORE: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Quantize one row, in PARTS of PART columns that stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    if x is not None:
        x += row * x_stride
    if feed is not None:
        feed += row * feed_stride
    inside = tl.arange(0, PART)
    parts = ()
    for number in tl.static_range(PARTS):
        parts += (_load(x, feed, number * PART, inside, BEFORE, WIDTH),)
    if scale is not None:
        parts = _modulate(parts, scale, shift, inside, eps, WIDTH, PART, PARTS)
    amax = tl.zeros((PART,), dtype=tl.float32)
    turned = ()
    for number in tl.static_range(PARTS):
        turned += (_rotate(parts[number], hadamard, PART),)
        amax = tl.maximum(amax, tl.abs(turned[number]))
    most = tl.maximum(tl.max(amax), 16 * _TINY)
    tl.store(scales + row, most / (16 * _LIMIT))
    factor = _LIMIT / most
    values += row * WIDTH
    for number in tl.static_range(PARTS):
        # Rounded to the nearest integer, halves to even.
        rounded = (turned[number] * factor + _ROUND) - _ROUND
        tl.store(values + number * PART + inside, rounded.to(tl.int8))


@triton.jit
def _load(
    x: tl.tensor,
    feed: tl.tensor,
    start: tl.constexpr,
    inside: tl.tensor,
    BEFORE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Load the columns from *start* on of a row of [x, SwiGLU(feed)], as float32."""
    if feed is None or start < BEFORE:
        made = tl.load(x + start + inside).to(tl.float32)
    else:
        gate = tl.load(feed + (start - BEFORE) + inside).to(tl.float32)
        value = tl.load(feed + (WIDTH - BEFORE) + (start - BEFORE) + inside).to(tl.float32)
        made = gate * tl.sigmoid(gate) * value
    return made


@triton.jit
def _modulate(
    parts: tl.tuple,
    scale: tl.tensor,
    shift: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tuple:
    """Return LayerNorm(row) * (1 + scale) + shift."""
    total = tl.zeros((PART,), dtype=tl.float32)
    for number in tl.static_range(PARTS):
        total += parts[number]
    mean = tl.sum(total) / WIDTH
    total = tl.zeros((PART,), dtype=tl.float32)
    for number in tl.static_range(PARTS):
        total += (parts[number] - mean) * (parts[number] - mean)
    inverse = tl.rsqrt(tl.sum(total) / WIDTH + eps)
    made = ()
    for number in tl.static_range(PARTS):
        columns = number * PART + inside
        normed = (parts[number] - mean) * inverse
        factor = 1 + tl.load(scale + columns).to(tl.float32)
        made += (normed * factor + tl.load(shift + columns).to(tl.float32),)
    return made


@triton.jit
def _rotate(x: tl.tensor, hadamard: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Rotate *x*, [SIZE], in groups of 256, times 16.

    A group is a matrix [16, 16], which Hadamard matrices of 16 multiply from both sides.
    """
    i = tl.arange(0, 16)
    h = tl.load(hadamard + i[:, None] * 16 + i[None, :])
    x = tl.dot(tl.reshape(x, (SIZE // 16, 16)).to(tl.bfloat16), h)
    x = tl.reshape(tl.permute(tl.reshape(x, (SIZE // 256, 16, 16)), (0, 2, 1)), (SIZE // 16, 16))
    x = tl.dot(x, h.to(tl.float32), input_precision="tf32")
    return tl.reshape(tl.permute(tl.reshape(x, (SIZE // 256, 16, 16)), (0, 2, 1)), (SIZE,))


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    values: tl.tensor,
    weight: tl.tensor,
    made: tl.tensor,
    scales: tl.tensor,
    weight_scale: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    depth: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Compute every so many tiles of ROWS x COLUMNS, which go in bands of BAND rows of tiles.

    The compiler gives the loads to warps of their own, which fill the next tile's buffers while the
    others write the last one.
    """
    HALF: tl.constexpr = COLUMNS // 2
    left = tl.make_tensor_descriptor(values, [rows, depth], [depth, 1], [ROWS, DEPTH])
    right = tl.make_tensor_descriptor(weight, [outputs, depth], [depth, 1], [COLUMNS, DEPTH])
    out = tl.make_tensor_descriptor(made, [rows, outputs], [outputs, 1], [ROWS, HALF])
    high, wide = tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), warp_specialize=True):
        first = tile // (BAND * wide) * BAND
        inside = tile % (BAND * wide)
        size = min(high - first, BAND)
        row = (first + inside % size) * ROWS
        column = inside // size * COLUMNS
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for step in range(tl.cdiv(depth, DEPTH)):
            a = left.load([row, step * DEPTH])
            b = right.load([column, step * DEPTH])
            sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
        factor = tl.load(scales + row + tl.arange(0, ROWS))[:, None]
        # In two halves, which take fewer registers and less shared memory.
        c, d = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
        _finish(c, factor, row, column, out, weight_scale, outputs, HALF)
        _finish(d, factor, row, column + HALF, out, weight_scale, outputs, HALF)


@triton.jit
def _finish(
    sums: tl.tensor,
    factor: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    out: tl.tensor,
    weight_scale: tl.tensor,
    outputs: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Scale int32 *sums* and write them."""
    j = column + tl.arange(0, COLUMNS)
    mask = j < outputs
    made = sums.to(tl.float32) * factor * tl.load(weight_scale + j, mask=mask, other=0.0)[None, :]
    out.store([row, column], made.to(tl.bfloat16))
