"""Launches of the kernels in `blocks_triton`, which `app.engine.kernels.blocks` describes."""

from __future__ import annotations

import torch

from app.engine.kernels import blocks_triton
from app.engine.kernels.blocks import TINY, Cast, Change, merge
from app.engine.kernels.triton_check import power_of_two

# Rows and columns that a program takes at once, and its warps, as measured on an H100.
_NORM_ROWS, _NORM_WARPS = 1, 4
_ADD_ROWS, _ADD_WARPS = 4, 4
_JOIN_ROWS, _JOIN_WARPS, _COLUMNS = 2, 8, 1024
_HEAD_ROWS, _HEAD_BLOCK, _HEAD_WARPS = 2, 8, 4
_PRODUCT_ROWS, _PRODUCT_BLOCK, _PRODUCT_PART, _PRODUCT_WARPS = 128, 128, 32, 8
_AMAX_BLOCK, _PROGRAMS = 4096, 512


def norm_modulate(
    x: torch.Tensor,
    change: Change | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    cast: Cast | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel of this name."""
    width = x.shape[-1]
    out = torch.empty_like(x, dtype=x.dtype if cast is None else cast.dtype)
    settled = x if change is None else torch.empty_like(x)
    gate, update = change or (None, None)
    rows, block = x.numel() // width, power_of_two(width)
    blocks_triton.norm_modulate[(-(-rows // _NORM_ROWS),)](
        x,
        gate,
        update,
        settled,
        scale,
        shift,
        cast and cast.inverse,
        out,
        rows,
        eps,
        WIDTH=width,
        BLOCK=block,
        ROWS=_NORM_ROWS,
        UPDATES=change is not None,
        CASTS=cast is not None,
        num_warps=_NORM_WARPS,
    )
    return settled, out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, update: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel of this name."""
    width, out = x.shape[-1], torch.empty_like(x)
    settled = x if update is None else torch.empty_like(x)
    rows = x.numel() // width
    blocks_triton.rms_norm[(rows,)](
        x,
        update,
        settled,
        weight,
        out,
        rows,
        eps,
        WIDTH=width,
        BLOCK=power_of_two(width),
        ROWS=1,
        UPDATES=update is not None,
        num_warps=_NORM_WARPS,
    )
    return settled, out


def gate_add(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Launch the kernel of this name."""
    width, out = x.shape[-1], torch.empty_like(x)
    rows, block = x.numel() // width, _column_block(width)
    blocks_triton.gate_add[(-(-rows // _ADD_ROWS), -(-width // block))](
        x, gate, update, out, rows, WIDTH=width, BLOCK=block, ROWS=_ADD_ROWS, num_warps=_ADD_WARPS
    )
    return out


def add_product(x: torch.Tensor, inner: torch.Tensor, up: torch.Tensor) -> None:
    """Launch the kernel of this name."""
    rank, columns = up.shape
    rows = x.numel() // columns
    grid = -(-columns // _PRODUCT_BLOCK), -(-rows // _PRODUCT_ROWS)
    blocks_triton.add_product[grid](
        x,
        inner,
        up,
        rows,
        columns,
        rank,
        ROWS=_PRODUCT_ROWS,
        BLOCK=_PRODUCT_BLOCK,
        PART=_PRODUCT_PART,
        num_warps=_PRODUCT_WARPS,
    )


def join(
    heads: torch.Tensor | None, feed: torch.Tensor | None, cast: Cast | None = None
) -> torch.Tensor:
    """Launch the kernel of this name, unless there is nothing to compute."""
    if feed is None and cast is None:
        assert heads is not None
        return merge(heads)
    given = heads if feed is None else feed
    assert given is not None
    width = 0 if heads is None else heads.shape[1] * heads.shape[3]
    columns = width + (0 if feed is None else feed.shape[-1] // 2)
    dtype = given.dtype if cast is None else cast.dtype
    out = torch.empty(1, given.shape[-2], columns, dtype=dtype, device=given.device)
    _join(heads, feed, cast, out)
    return out


def fill(heads: torch.Tensor, cast: Cast, out: torch.Tensor) -> None:
    """Launch the kernel `join` for the heads alone."""
    _join(heads, None, cast, out)


def _join(
    heads: torch.Tensor | None, feed: torch.Tensor | None, cast: Cast | None, out: torch.Tensor
) -> None:
    width = size = head_stride = row_stride = feed_width = feed_stride = 0
    if feed is not None:
        feed_width, feed_stride = feed.shape[-1] // 2, feed.stride(-2)
    if heads is not None:
        size, width = heads.shape[3], heads.shape[1] * heads.shape[3]
        _, head_stride, row_stride, _ = heads.stride()
    rows = out.shape[-2]
    block = _column_block(max(width, feed_width))
    blocks = -(-width // block) + -(-feed_width // block)
    blocks_triton.join[(-(-rows // _JOIN_ROWS), blocks)](
        heads,
        feed,
        cast and cast.inverse,
        out,
        rows,
        head_stride,
        row_stride,
        feed_stride,
        WIDTH=width,
        SIZE=size,
        FEED=feed_width,
        OUT=out.shape[-1],
        BLOCK=block,
        ROWS=_JOIN_ROWS,
        CASTS=cast is not None,
        num_warps=_JOIN_WARPS,
    )


def find_scale(x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor) -> None:
    """Launch the kernels `amax` and `find_scale`."""
    largest = torch.empty(_PROGRAMS, dtype=torch.float32, device=x.device)
    blocks_triton.amax[(_PROGRAMS,)](
        x.contiguous(), largest, x.numel(), BLOCK=_AMAX_BLOCK, num_warps=4
    )
    blocks_triton.find_scale[(1,)](
        largest, scale, inverse, LEAST=TINY, COUNT=_PROGRAMS, num_warps=4
    )


def norm_rotate(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    rope: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    is_interleaved: bool,
) -> None:
    """Launch the kernel of this name."""
    _, heads, tokens, size = q.shape
    groups = (qkv.shape[-1] // size - heads) // 2
    blocks_triton.norm_rotate[(-(-tokens // _HEAD_ROWS), 2 if v is None else 3)](
        qkv,
        *norms,
        *rope,
        q,
        k,
        v,
        tokens,
        qkv.stride(1),
        q.stride(2),
        q.stride(1),
        eps,
        HEADS=heads,
        GROUPS=groups,
        HALF=size // 2,
        ROWS=_HEAD_ROWS,
        BLOCK=min(_HEAD_BLOCK, power_of_two(heads)),
        INTERLEAVED=is_interleaved,
        num_warps=_HEAD_WARPS,
    )


def _column_block(width: int) -> int:
    return min(_COLUMNS, power_of_two(width))
