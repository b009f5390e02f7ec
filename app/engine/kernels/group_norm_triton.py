"""The Triton kernels of `group_norm`, which says what they compute; imported on a card only.

Pixels are rows of channels, as in the channels_last memory format. Only the channels and the tile
are constants: a new size of picture compiles nothing.
"""

# The decorator has no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(
    pixels: tl.tensor, width: tl.tensor, CHANNELS: tl.constexpr, IS_PHASED: tl.constexpr
) -> tl.tensor:
    """Return where the channels of *pixels* begin; *width* is that of the whole map."""
    if IS_PHASED:
        y = pixels // width
        x = pixels - y * width
        window = ((y + 1) // 2).to(tl.int64) * (width // 2 + 1) + (x + 1) // 2
        return (window * 4 + (y % 2) * 2 + x % 2) * CHANNELS
    return pixels.to(tl.int64) * CHANNELS


@triton.jit
def _values(
    x: tl.tensor,
    residual: tl.tensor,
    bias: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    mask: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    ADDS: tl.constexpr,
    IS_PHASED: tl.constexpr,
) -> tl.tensor:
    """Load float32 [pixels, channels]; with ADDS the sum with residual and bias, as kept."""
    there = _places(pixels, width, CHANNELS, IS_PHASED)[:, None] + channels[None, :]
    if ADDS:
        here = _places(pixels, width, CHANNELS, False)[:, None] + channels[None, :]
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(residual + there, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(bias + channels, mask=channels < CHANNELS, other=0.0)[None, :]
        return value.to(x.dtype.element_ty).to(tl.float32)
    return tl.load(x + there, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["pixels", "width", "chunk"])
def measure(
    x: tl.tensor,
    residual: tl.tensor,
    bias: tl.tensor,
    moments: tl.tensor,
    pixels: tl.tensor,
    width: tl.tensor,
    chunk: tl.tensor,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    IS_PHASED: tl.constexpr,
) -> None:
    """Write mean and squared deviations of each channel over a chunk; with ADDS the sum into x.

    Sums are of differences from the chunk's first pixel, which keeps them small beside the spread.
    """
    # From the end, which the convolution has left in the cache.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    first = number * chunk
    channels = tl.arange(0, COLUMNS)
    is_channel = channels < CHANNELS
    one = first + tl.arange(0, 1)
    base = tl.sum(
        _values(
            x, residual, bias, one, channels, is_channel[None, :], width, CHANNELS, ADDS, IS_PHASED
        ),
        0,
    )
    tl.debug_barrier()
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    last = min(first + chunk, pixels)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < last)[:, None] & is_channel[None, :]
        value = _values(x, residual, bias, rows, channels, mask, width, CHANNELS, ADDS, IS_PHASED)
        if ADDS:
            there = rows.to(tl.int64)[:, None] * CHANNELS + channels[None, :]
            tl.store(x + there, value.to(x.dtype.element_ty), mask=mask)
        apart = tl.where(mask, value - base[None, :], 0.0)
        total += apart
        squares += apart * apart
    count = (last - first).to(tl.float32)
    offset = tl.sum(total, 0) / count
    spread = tl.maximum(tl.sum(squares, 0) - count * offset * offset, 0.0)
    out = moments + number.to(tl.int64) * 2 * CHANNELS + channels
    tl.store(out, base + offset, mask=is_channel)
    tl.store(out + CHANNELS, spread, mask=is_channel)


@triton.jit(do_not_specialize=["pixels", "chunk", "chunks"])
def merge(
    moments: tl.tensor,
    bias: tl.tensor,
    weight: tl.tensor,
    shift: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    eps: tl.tensor,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Merge the chunks' moments of a group, in a fixed order, to its channels' factor and term."""
    columns = tl.arange(0, COLUMNS)
    is_channel = columns < GROUP
    channels = tl.program_id(0) * GROUP + columns
    pending = tl.zeros((COLUMNS,), tl.float32)
    if HAS_BIAS:
        pending += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < chunks)[:, None] & is_channel[None, :]
        count = tl.minimum(pixels - rows * chunk, chunk).to(tl.float32)
        place = rows[:, None] * (2 * CHANNELS) + channels[None, :]
        mean = tl.load(moments + place, mask=mask, other=0.0) + pending[None, :]
        total += tl.where(mask, count[:, None] * mean, 0.0)
    size = pixels.to(tl.float32) * GROUP
    middle = tl.sum(tl.sum(total, 0), 0) / size
    spread = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, chunks, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < chunks)[:, None] & is_channel[None, :]
        count = tl.minimum(pixels - rows * chunk, chunk).to(tl.float32)
        place = rows[:, None] * (2 * CHANNELS) + channels[None, :]
        apart = tl.load(moments + place, mask=mask, other=0.0) + pending[None, :] - middle
        within = tl.load(moments + place + CHANNELS, mask=mask, other=0.0)
        spread += tl.where(mask, within + count[:, None] * apart * apart, 0.0)
    variance = tl.sum(tl.sum(spread, 0), 0) / size
    factor = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    factor *= tl.rsqrt(variance + eps)
    term = tl.load(shift + channels, mask=is_channel, other=0.0).to(tl.float32)
    term += (pending - middle) * factor
    tl.store(out + channels, factor, mask=is_channel)
    tl.store(out + CHANNELS + channels, term, mask=is_channel)


@triton.jit(do_not_specialize=["pixels", "width"])
def scale_silu(
    x: tl.tensor,
    coefficients: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    IS_PHASED: tl.constexpr,
    HAS_SILU: tl.constexpr,
) -> None:
    """Write silu(x * factor + term) of TILES tiles."""
    channels = tl.arange(0, COLUMNS)
    is_channel = channels < CHANNELS
    factor = tl.load(coefficients + channels, mask=is_channel, other=0.0)[None, :]
    term = tl.load(coefficients + CHANNELS + channels, mask=is_channel, other=0.0)[None, :]
    for tile in tl.static_range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (rows < pixels)[:, None] & is_channel[None, :]
        there = _places(rows, width, CHANNELS, IS_PHASED)[:, None] + channels[None, :]
        value = tl.load(x + there, mask=mask, other=0.0).to(tl.float32) * factor + term
        if HAS_SILU:
            value = value / (1 + tl.exp(-value))
        here = rows.to(tl.int64)[:, None] * CHANNELS + channels[None, :]
        tl.store(out + here, value.to(out.dtype.element_ty), mask=mask)
