"""The Triton kernels of `app.engine.kernels.wide_int8`; importing this imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_terms(
    value: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Split one row, [BLOCK] in float32, of which WIDTH are stored."""
    column = tl.arange(0, BLOCK)
    fits = column < WIDTH
    scale = tl.maximum(tl.max(tl.abs(value)), 1e-20) / 32639.0
    whole = tl.floor(value / scale + 0.5).to(tl.int32)
    upper = (whole + 128) >> 8
    tl.store(high + row * WIDTH + column, upper.to(tl.int8), fits)
    tl.store(low + row * WIDTH + column, (whole - 256 * upper).to(tl.int8), fits)
    tl.store(scales + row, scale)


@triton.jit
def _summed(
    x: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    row: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return a row of *x* plus those of *count* *parts*, in float32, rounded as *x* is."""
    column = tl.arange(0, BLOCK)
    fits = column < WIDTH
    value = tl.load(x + row * WIDTH + column, fits, other=0).to(tl.float32)
    for part in range(count):
        start = parts + (part * tl.num_programs(0) + row) * WIDTH
        value += tl.load(start + column, fits, other=0)
    return value.to(x.dtype.element_ty)


@triton.jit
def split_rows(
    x: tl.tensor,
    weight: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    settled: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    scales: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    """Split a row of *x*; with ADDS first add the *parts*, with NORMS take RMSNorm(x) * weight."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    fits = column < WIDTH
    if ADDS:
        rounded = _summed(x, parts, count, row, WIDTH, BLOCK)
        tl.store(settled + row * WIDTH + column, rounded, fits)
    else:
        rounded = tl.load(x + row * WIDTH + column, fits, other=0)
    value = rounded.to(tl.float32)
    if NORMS:
        value *= tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
        value = value.to(x.dtype.element_ty).to(tl.float32)
        value *= tl.load(weight + column, fits, other=0).to(tl.float32)
    _store_terms(value, high, low, scales, row, WIDTH, BLOCK)


@triton.jit
def split_swiglu(
    x: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    scales: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Split silu(gate) * value of a row, [2 * WIDTH]."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    fits = column < WIDTH
    place = x + row * 2 * WIDTH + column
    gate = tl.load(place, fits, other=0).to(tl.float32)
    value = tl.load(place + WIDTH, fits, other=0).to(tl.float32)
    _store_terms(gate * tl.sigmoid(gate) * value, high, low, scales, row, WIDTH, BLOCK)


@triton.jit
def add(
    x: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write a row of *x* plus those of *count* *parts*."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    rounded = _summed(x, parts, count, row, WIDTH, BLOCK)
    tl.store(out + row * WIDTH + column, rounded, column < WIDTH)


@triton.jit
def multiply(
    high: tl.tensor,
    low: tl.tensor,
    scales: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    own: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    common: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SKIPS: tl.constexpr,
) -> None:
    """Write a tile, or one of its *parts* along the inputs, of (256 * high + low) * weight^T.

    The tiles of one block of weights follow one another, so that these are read once. With SKIPS
    padding has only the outputs before *common*, and zeros after them.
    """
    row_block = tl.program_id(0) % (tokens // ROWS)
    column_block = tl.program_id(0) // (tokens // ROWS)
    steps = tl.cdiv(inputs // DEPTH, parts)
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, inputs // DEPTH)
    if SKIPS:
        is_needed = (column_block * COLUMNS < common) | tl.load(own + row_block * ROWS)
        end = tl.where(is_needed, end, begin)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    row_place = row[:, None] * inputs + depth[None, :]
    column_place = column[:, None] * inputs + depth[None, :]
    upper = tl.zeros((ROWS, COLUMNS), tl.int32)
    lower = tl.zeros((ROWS, COLUMNS), tl.int32)
    for step in range(begin, end):
        factor = tl.load(weight + column_place + step * DEPTH).T
        upper = tl.dot(tl.load(high + row_place + step * DEPTH), factor, upper, out_dtype=tl.int32)
        lower = tl.dot(tl.load(low + row_place + step * DEPTH), factor, lower, out_dtype=tl.int32)
    value = 256.0 * upper.to(tl.float32) + lower.to(tl.float32)
    value *= tl.load(scales + row)[:, None] * tl.load(weight_scale + column)[None, :]
    place = (tl.program_id(1) * tokens + row[:, None]) * outputs + column[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty))
