"""The Triton kernels of `app.engine.kernels.blocks`; importing this imports Triton.

Each program takes a few rows, one row being one token. All compute in float32 and round once, when
they store. Memory is what they cost, so loads are 16 bytes wide: rows begin at multiples of that.
Nothing is specialised on the number of rows: a new size compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LIMIT = tl.constexpr(448.0)


@triton.jit
def _store_as(
    place: tl.tensor,
    value: tl.tensor,
    inverse: tl.tensor,
    mask: tl.tensor,
    CASTS: tl.constexpr,
) -> None:
    """Store *value* in the dtype of *place*; with CASTS, that is e4m3, times *inverse*."""
    if CASTS:
        value = tl.clamp(
            value * tl.load(inverse), -_LIMIT, _LIMIT, propagate_nan=tl.PropagateNan.ALL
        )
    tl.store(place, value.to(place.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def norm_modulate(
    x: tl.tensor,
    gate: tl.tensor,
    update: tl.tensor,
    settled: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UPDATES: tl.constexpr,
    CASTS: tl.constexpr,
) -> None:
    """Write LayerNorm(x) * (1 + scale) + shift; with UPDATES x + gate * update is x, and stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    fits = column < WIDTH
    mask = (row < rows)[:, None] & fits
    place = row.to(tl.int64)[:, None] * WIDTH + column
    value = tl.load(x + place, mask, other=0).to(tl.float32)
    if UPDATES:
        change = tl.load(update + place, mask, other=0).to(tl.float32)
        value += tl.load(gate + column, fits, other=0).to(tl.float32) * change
        rounded = value.to(settled.dtype.element_ty)
        tl.store(settled + place, rounded, mask)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) / WIDTH
    centred = tl.where(fits, value - mean[:, None], 0)
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    factor = 1 + tl.load(scale + column, fits, other=0).to(tl.float32)
    made = centred * inverse_deviation[:, None] * factor
    made += tl.load(shift + column, fits, other=0).to(tl.float32)
    _store_as(out + place, made, inverse, mask, CASTS)


@triton.jit(do_not_specialize=["rows"])
def rms_norm(
    x: tl.tensor,
    update: tl.tensor,
    settled: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UPDATES: tl.constexpr,
) -> None:
    """Write RMSNorm(x) * weight; with UPDATES x + update takes the place of x, and is stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    fits = column < WIDTH
    mask = (row < rows)[:, None] & fits
    place = row.to(tl.int64)[:, None] * WIDTH + column
    value = tl.load(x + place, mask, other=0).to(tl.float32)
    if UPDATES:
        value += tl.load(update + place, mask, other=0).to(tl.float32)
        rounded = value.to(settled.dtype.element_ty)
        tl.store(settled + place, rounded, mask)
        value = rounded.to(tl.float32)
    inverse_size = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    made = value * inverse_size[:, None] * tl.load(weight + column, fits, other=0).to(tl.float32)
    tl.store(out + place, made.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def add_product(
    x: tl.tensor,
    inner: tl.tensor,
    up: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """Add inner @ up to x, in place, PART of the *width* of inner at a time.

    Multiples of 16 for *columns* and *width* need no other kernel.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within, fits = (row < rows)[:, None], (column < columns)[None, :]
    place = x + row.to(tl.int64)[:, None] * columns + column[None, :]
    value = tl.load(place, within & fits, other=0).to(tl.float32)
    for start in range(0, width, PART):
        rank = start + tl.arange(0, PART)
        left = tl.load(inner + row[:, None] * width + rank[None, :], within, other=0)
        right = tl.load(up + rank[:, None] * columns + column[None, :], fits, other=0)
        value = tl.dot(left, right, value)
    tl.store(place, value.to(x.dtype.element_ty), within & fits)


@triton.jit(do_not_specialize=["rows"])
def gate_add(
    x: tl.tensor,
    gate: tl.tensor,
    update: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Write x + gate * update."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    fits = column < WIDTH
    mask = (row < rows)[:, None] & fits
    place = row.to(tl.int64)[:, None] * WIDTH + column
    value = tl.load(x + place, mask).to(tl.float32)
    change = tl.load(update + place, mask).to(tl.float32)
    value += tl.load(gate + column, fits).to(tl.float32) * change
    tl.store(out + place, value.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def join(
    heads: tl.tensor,
    feed: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    head_stride: tl.tensor,
    row_stride: tl.tensor,
    feed_stride: tl.tensor,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    FEED: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CASTS: tl.constexpr,
) -> None:
    """Write the heads' WIDTH columns, then FEED columns silu(gate) * value of *feed*.

    The rows of *out* lie OUT apart.
    """
    block = tl.program_id(1)
    before: tl.constexpr = tl.cdiv(WIDTH, BLOCK)
    # In one program all rows have the same block of columns, from the one or the other.
    lanes = tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    out += row * OUT
    if FEED == 0:
        _merge(
            heads + row * row_stride,
            block * BLOCK + lanes,
            head_stride,
            inverse,
            out,
            row < rows,
            WIDTH,
            SIZE,
            CASTS,
        )
    elif WIDTH == 0:
        _swiglu(
            feed + row * feed_stride, block * BLOCK + lanes, inverse, out, row < rows, FEED, CASTS
        )
    elif block < before:
        _merge(
            heads + row * row_stride,
            block * BLOCK + lanes,
            head_stride,
            inverse,
            out,
            row < rows,
            WIDTH,
            SIZE,
            CASTS,
        )
    else:
        _swiglu(
            feed + row * feed_stride,
            (block - before) * BLOCK + lanes,
            inverse,
            out + WIDTH,
            row < rows,
            FEED,
            CASTS,
        )


@triton.jit
def _merge(
    heads: tl.tensor,
    column: tl.tensor,
    head_stride: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    known: tl.tensor,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    CASTS: tl.constexpr,
) -> None:
    mask = known & (column < WIDTH)
    place = heads + column // SIZE * head_stride + column % SIZE
    value = tl.load(place, mask, other=0).to(tl.float32)
    _store_as(out + column, value, inverse, mask, CASTS)


@triton.jit
def _swiglu(
    feed: tl.tensor,
    column: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    known: tl.tensor,
    FEED: tl.constexpr,
    CASTS: tl.constexpr,
) -> None:
    mask = known & (column < FEED)
    gate = tl.load(feed + column, mask, other=0).to(tl.float32)
    value = tl.load(feed + FEED + column, mask, other=0).to(tl.float32)
    _store_as(out + column, gate * tl.sigmoid(gate) * value, inverse, mask, CASTS)


@triton.jit
def _load_pairs(
    place: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load [ROWS, HEADS, 2 * HALF] from *place* [ROWS, HEADS, 1] as the two parts of each pair."""
    if INTERLEAVED:
        value = tl.load(place + tl.arange(0, 2 * HALF)[None, None, :], mask, other=0)
        first, second = tl.split(tl.reshape(value, [ROWS, HEADS, HALF, 2]))
    else:
        lane = tl.arange(0, HALF)[None, None, :]
        first = tl.load(place + lane, mask, other=0)
        second = tl.load(place + HALF + lane, mask, other=0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    place: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    dtype = place.dtype.element_ty
    if INTERLEAVED:
        value = tl.reshape(tl.join(first, second), [ROWS, HEADS, 2 * HALF])
        tl.store(place + tl.arange(0, 2 * HALF)[None, None, :], value.to(dtype), mask)
    else:
        lane = tl.arange(0, HALF)[None, None, :]
        tl.store(place + lane, first.to(dtype), mask)
        tl.store(place + HALF + lane, second.to(dtype), mask)


@triton.jit(do_not_specialize=["rows"])
def norm_rotate(
    qkv: tl.tensor,
    weight_q: tl.tensor,
    weight_k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    rows: tl.tensor,
    qkv_stride: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Write q and k normed by heads and rotated, v as it is; k and v once for each query head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    known = (row < rows)[:, None, None]
    wide = row.to(tl.int64)[:, None, None]
    source = qkv + wide * qkv_stride
    made = wide * row_stride
    if part == 2:
        if v is not None:
            for start in range(0, HEADS, BLOCK):
                head = start + tl.arange(0, BLOCK)[None, :, None]
                mask = known & (head < HEADS)
                taken = HEADS + GROUPS + head // (HEADS // GROUPS)
                lane = tl.arange(0, 2 * HALF)[None, None, :]
                value = tl.load(source + taken * (2 * HALF) + lane, mask)
                tl.store(v + made + head * head_stride + lane, value, mask)
    else:
        # Both of a pair are turned by one angle.
        one = tl.zeros([1, 1, 1], tl.int32)
        table = wide * (2 * HALF)
        angle_cos, _ = _load_pairs(cos + table, known, HALF, ROWS, 1, INTERLEAVED)
        angle_sin, _ = _load_pairs(sin + table, known, HALF, ROWS, 1, INTERLEAVED)
        weight = weight_q
        out = q
        if part == 1:
            weight = weight_k
            out = k
        w_first, w_second = _load_pairs(weight + one, one == 0, HALF, 1, 1, INTERLEAVED)
        for start in range(0, HEADS, BLOCK):
            head = start + tl.arange(0, BLOCK)[None, :, None]
            mask = known & (head < HEADS)
            taken = head
            if part == 1:
                taken = HEADS + head // (HEADS // GROUPS)
            first, second = _load_pairs(
                source + taken * (2 * HALF), mask, HALF, ROWS, BLOCK, INTERLEAVED
            )
            squares = tl.sum(first * first + second * second, 2) / (2 * HALF)
            size = tl.rsqrt(squares + eps)[:, :, None]
            first, second = first * size * w_first, second * size * w_second
            _store_pairs(
                out + made + head * head_stride,
                first * angle_cos - second * angle_sin,
                second * angle_cos + first * angle_sin,
                mask,
                HALF,
                ROWS,
                BLOCK,
                INTERLEAVED,
            )


@triton.jit
def amax(x: tl.tensor, out: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Write the largest |x| of each program's share of *x*, a flat tensor of *size* elements."""
    largest = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(begin, size, tl.num_programs(0) * BLOCK):
        value = tl.load(x + start + lane, start + lane < size, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    tl.store(out + tl.program_id(0), tl.max(largest))


@triton.jit
def find_scale(
    largest: tl.tensor,
    scale: tl.tensor,
    inverse: tl.tensor,
    LEAST: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """Write the scale of e4m3 that is due to COUNT values of `amax`, and 1 / scale."""
    top = tl.maximum(tl.max(tl.load(largest + tl.arange(0, COUNT))), LEAST)
    found = top * (1 / 448.0)
    tl.store(scale, found)
    tl.store(inverse, 1 / found)
