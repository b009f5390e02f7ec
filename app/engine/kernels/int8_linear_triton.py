"""The Triton kernels of `int8_linear`, which says what they compute; imported on a card only.

Only widths are constants: a new number of rows compiles nothing.
"""

# The decorator has no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_TINY = tl.constexpr(1e-12)
_LIMIT = tl.constexpr(127.0)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: a float32 of less than 2 ** 22 is rounded to an integer by adding it."""
_PARTS = 3
_ROWS, _COLUMNS, _DEPTH, _BAND = 128, 256, 128, 8


def quantize(
    x: torch.Tensor | None,
    feed: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated rows of [x, SwiGLU(feed)], int8 [n, K], and their float32 scales [n]."""
    given = feed if x is None else x
    assert given is not None
    before = 0 if x is None else x.shape[1]
    width = before + (0 if feed is None else feed.shape[1] // 2)
    rows = given.shape[0]
    values = torch.empty((rows, width), dtype=torch.int8, device=given.device)
    scales = torch.empty(rows, dtype=torch.float32, device=given.device)
    part = max(256, triton.next_power_of_2(-(-width // _PARTS)))
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
        num_warps=max(4, part // 512),
        num_stages=1,
    )
    return values, scales


def multiply(
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply int8 [n, K] by the transpose of int8 [N, K], scale, and add: bf16 [n, N]."""
    count, depth = values.shape
    outputs = weight.shape[0]
    made = torch.empty((count, outputs), dtype=torch.bfloat16, device=values.device)
    block = [_ROWS, _COLUMNS // 2]
    _multiply[(-(-count // _ROWS) * -(-outputs // _COLUMNS),)](
        TensorDescriptor.from_tensor(values, [_ROWS, _DEPTH]),
        TensorDescriptor.from_tensor(weight, [_COLUMNS, _DEPTH]),
        TensorDescriptor.from_tensor(made, block),
        None if residual is None else TensorDescriptor.from_tensor(residual, block),
        scales,
        weight_scale,
        gate,
        count,
        outputs,
        depth,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        BAND=_BAND,
        num_warps=8,
        num_stages=4,
    )
    return made


@functools.cache
def _hadamard(device: torch.device) -> torch.Tensor:
    """Return the regular Hadamard matrix of size 16, times 4, on *device*: all 1 and -1."""
    four = 1 - 2 * torch.eye(4).flip(1)
    return torch.kron(four, four).to(device, torch.bfloat16)


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
) -> None:
    """Quantize one row, which three parts of PART columns hold."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PART)
    j = PART + i
    k = 2 * PART + i
    if x is not None:
        x += row * x_stride
    if feed is not None:
        feed += row * feed_stride
    a = _load(x, feed, i, BEFORE, WIDTH)
    b = _load(x, feed, j, BEFORE, WIDTH)
    c = _load(x, feed, k, BEFORE, WIDTH)
    if scale is not None:
        mean = tl.sum(a + b + c) / WIDTH
        a = tl.where(i < WIDTH, a - mean, 0.0)
        b = tl.where(j < WIDTH, b - mean, 0.0)
        c = tl.where(k < WIDTH, c - mean, 0.0)
        inverse = tl.rsqrt(tl.sum(a * a + b * b + c * c) / WIDTH + eps)
        a = _modulate(a * inverse, scale, shift, i, WIDTH)
        b = _modulate(b * inverse, scale, shift, j, WIDTH)
        c = _modulate(c * inverse, scale, shift, k, WIDTH)
    a = _rotate(a, hadamard, PART)
    b = _rotate(b, hadamard, PART)
    c = _rotate(c, hadamard, PART)
    amax = tl.max(tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.abs(c)))
    amax = tl.maximum(amax, 16 * _TINY)
    tl.store(scales + row, amax / (16 * _LIMIT))
    factor = _LIMIT / amax
    values += row * WIDTH
    tl.store(values + i, _round(a * factor), mask=i < WIDTH)
    tl.store(values + j, _round(b * factor), mask=j < WIDTH)
    tl.store(values + k, _round(c * factor), mask=k < WIDTH)


@triton.jit
def _load(
    x: tl.tensor,
    feed: tl.tensor,
    columns: tl.tensor,
    BEFORE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Load *columns* of a row of [x, SwiGLU(feed)] as float32; 0 past the end."""
    if feed is None:
        made = tl.load(x + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    else:
        inner = columns - BEFORE
        mask = (columns >= BEFORE) & (columns < WIDTH)
        gate = tl.load(feed + inner, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(feed + (WIDTH - BEFORE) + inner, mask=mask, other=0.0).to(tl.float32)
        made = gate * tl.sigmoid(gate) * value
        if BEFORE > 0:
            first = tl.load(x + columns, mask=columns < BEFORE, other=0.0).to(tl.float32)
            made = tl.where(columns < BEFORE, first, made)
    return made


@triton.jit
def _modulate(
    x: tl.tensor, scale: tl.tensor, shift: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    mask = columns < WIDTH
    factor = 1 + tl.load(scale + columns, mask=mask, other=0.0).to(tl.float32)
    return x * factor + tl.load(shift + columns, mask=mask, other=0.0).to(tl.float32)


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


@triton.jit
def _round(x: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, halves to even."""
    return ((x + _ROUND) - _ROUND).to(tl.int8)


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    values: tl.tensor,
    weight: tl.tensor,
    made: tl.tensor,
    residual: tl.tensor,
    scales: tl.tensor,
    weight_scale: tl.tensor,
    gate: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    depth: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Compute one tile, of ROWS x COLUMNS; tiles go in bands of BAND rows of tiles."""
    program = tl.program_id(0)
    high, wide = tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS)
    first = program // (BAND * wide) * BAND
    size = min(high - first, BAND)
    inside = program % (BAND * wide)
    row = (first + inside % size) * ROWS
    column = inside // size * COLUMNS
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for step in range(tl.cdiv(depth, DEPTH)):
        left = values.load([row, step * DEPTH])
        right = weight.load([column, step * DEPTH])
        sums = tl.dot(left, right.T, sums, out_dtype=tl.int32)
    # In two halves, which take fewer registers and less shared memory.
    HALF: tl.constexpr = COLUMNS // 2
    left, right = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1)))
    i = row + tl.arange(0, ROWS)
    factor = tl.load(scales + i, mask=i < rows, other=0.0)[:, None]
    _finish(left, factor, row, column, made, residual, weight_scale, gate, outputs, HALF)
    _finish(right, factor, row, column + HALF, made, residual, weight_scale, gate, outputs, HALF)


@triton.jit
def _finish(
    sums: tl.tensor,
    factor: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    made: tl.tensor,
    residual: tl.tensor,
    weight_scale: tl.tensor,
    gate: tl.tensor,
    outputs: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Scale int32 *sums*, add them to the residual if any, and write them."""
    j = column + tl.arange(0, COLUMNS)
    mask = j < outputs
    out = sums.to(tl.float32) * factor * tl.load(weight_scale + j, mask=mask, other=0.0)[None, :]
    if residual is not None:
        amount = tl.load(gate + j, mask=mask, other=0.0).to(tl.float32)[None, :]
        out = residual.load([row, column]).to(tl.float32) + amount * out
    made.store([row, column], out.to(tl.bfloat16))
