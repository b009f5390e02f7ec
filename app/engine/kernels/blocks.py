"""What the blocks of transformer and text encoder compute between their matmuls.

Each function runs as one kernel of `app.engine.kernels.blocks_triton` where Triton can be used, and
as the same arithmetic in torch elsewhere. All of it is bound by memory, so operations are joined
where the result of one would only be read by the next: the residual before a norm, the cast to the
8-bit dtype that a matmul takes, the concatenation of what goes into one matmul.

Shapes: n tokens, d the hidden size, h heads of size s, f the MLP's hidden size. The batch is 1.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from app.engine.kernels.triton_check import triton_fault

FP8_LIMIT = 448.0
"""The largest finite value of float8_e4m3fn."""

# Rows and columns that a program takes at once, and its warps, as measured on an H100.
_NORM_ROWS, _NORM_WARPS = 1, 4
_ADD_ROWS, _ADD_WARPS = 4, 4
_JOIN_ROWS, _JOIN_WARPS, _COLUMNS = 4, 4, 1024
_HEAD_ROWS, _HEAD_BLOCK, _HEAD_WARPS = 4, 8, 4
_AMAX_BLOCK = 4096
_PARTIAL = 512


class Cast(NamedTuple):
    """How a value becomes e4m3: multiplied by *inverse*, 1 / scale, a float32 []."""

    inverse: torch.Tensor
    dtype: torch.dtype = torch.float8_e4m3fn

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Cast in torch."""
        return (x.float() * self.inverse).clamp(-FP8_LIMIT, FP8_LIMIT).to(self.dtype)


class Change(NamedTuple):
    """A residual that is not added yet: *gate*, [1, d], times *update*, [1, n, d]."""

    gate: torch.Tensor
    update: torch.Tensor


def norm_modulate(
    x: torch.Tensor,
    change: Change | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    cast: Cast | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x, with *change* added, and LayerNorm(x) * (1 + scale) + shift, cast: [1, n, d] each.

    *scale* and *shift* are [1, d].
    """
    kernels = _kernels(x)
    if kernels is None:
        if change is not None:
            x = x + change.gate * change.update
        made = functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
        return x, made if cast is None else cast(made)
    width, out = x.shape[-1], _like(x, cast)
    settled = x if change is None else torch.empty_like(x)
    gate, update = change or (None, None)
    rows, block = x.numel() // width, _power(width)
    kernels.norm_modulate[(-(-rows // _NORM_ROWS),)](
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
    """Return x, with *update* added, and RMSNorm(x) * weight (arXiv 1910.07467): [1, n, d] each."""
    kernels = _kernels(x)
    if kernels is None:
        x = x if update is None else x + update
        return x, _rms_norm(x, weight, eps)
    width, out = x.shape[-1], torch.empty_like(x)
    settled = x if update is None else torch.empty_like(x)
    rows = x.numel() // width
    kernels.rms_norm[(rows,)](
        x,
        update,
        settled,
        weight,
        out,
        rows,
        eps,
        WIDTH=width,
        BLOCK=_power(width),
        ROWS=1,
        UPDATES=update is not None,
        num_warps=_NORM_WARPS,
    )
    return settled, out


def gate_add(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Return x + gate * update: [1, n, d]; *gate* is [1, d]."""
    kernels = _kernels(x)
    if kernels is None:
        return x + gate * update
    width, out = x.shape[-1], torch.empty_like(x)
    rows, block = x.numel() // width, _column_block(width)
    kernels.gate_add[(-(-rows // _ADD_ROWS), -(-width // block))](
        x, gate, update, out, rows, WIDTH=width, BLOCK=block, ROWS=_ADD_ROWS, num_warps=_ADD_WARPS
    )
    return out


def join(
    heads: torch.Tensor | None, feed: torch.Tensor | None, cast: Cast | None = None
) -> torch.Tensor:
    """Return *heads* and SwiGLU(feed) beside each other, cast; one of both may be missing.

    SwiGLU is silu(gate) * value (arXiv 2002.05202). [1, h, n, s] and [1, n, 2 * f] ->
    [1, n, h * s + f]; both may be slices: only their last dimension must be contiguous.
    """
    if feed is None and cast is None:
        assert heads is not None
        return merge(heads)
    given = feed if heads is None else heads
    assert given is not None
    if _kernels(given) is not None:
        return _join(heads, feed, cast)
    parts = [merge(heads)] if heads is not None else []
    if feed is not None:
        gate, value = feed.chunk(2, dim=-1)
        parts.append(functional.silu(gate) * value)
    made = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return made if cast is None else cast(made)


def merge(heads: torch.Tensor) -> torch.Tensor:
    """Return [1, h, n, s] as [1, n, h * s], a copy only where it must be."""
    return heads.transpose(1, 2).flatten(2)


def quantize(x: torch.Tensor, cast: Cast) -> torch.Tensor:
    """Return *x* cast: [..., k]."""
    if _kernels(x) is None:
        return cast(x)
    return _join(x.reshape(1, 1, -1, x.shape[-1]), None, cast).view(x.shape)


def amax(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of *x* in float32, []."""
    kernels = _kernels(x)
    if kernels is None:
        return x.float().abs().amax()
    partial = torch.empty(_PARTIAL, dtype=torch.float32, device=x.device)
    kernels.amax[(_PARTIAL,)](x.contiguous(), partial, x.numel(), BLOCK=_AMAX_BLOCK, num_warps=4)
    return partial.amax()


def norm_rotate(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    is_interleaved: bool,
    inverses: torch.Tensor | None = None,
) -> None:
    """Write q and k, normed by heads (RMSNorm) and rotated (RoPE), to *out*; v too, if it has room.

    *qkv* is [1, n, (h + 2 * g) * s] and may be a slice, *out* is [2 or 3, n, h, s] and may have any
    strides but the last; each of the g KV heads is written once for each of its query heads. The
    weights *norms* are [s], *cos* and *sin* [n, s], equal for both of a pair of lanes. Pairs are
    neighbours where *is_interleaved*, else the halves of a head. *inverses*, float32 [3], scales
    what is written in e4m3.
    """
    parts, tokens, heads, size = out.shape
    groups = (qkv.shape[-1] // size - heads) // 2
    kernels = _kernels(qkv)
    if kernels is None:
        _norm_rotate(qkv, norms, cos, sin, eps, out, is_interleaved, inverses)
        return
    kernels.norm_rotate[(-(-tokens // _HEAD_ROWS), parts)](
        qkv,
        *norms,
        cos,
        sin,
        inverses,
        out,
        tokens,
        qkv.stride(-2),
        *out.stride()[:3],
        eps,
        HEADS=heads,
        GROUPS=groups,
        HALF=size // 2,
        ROWS=_HEAD_ROWS,
        BLOCK=min(_HEAD_BLOCK, _power(heads)),
        INTERLEAVED=is_interleaved,
        CASTS=inverses is not None,
        num_warps=_HEAD_WARPS,
    )


def _kernels(x: torch.Tensor) -> Any:
    """Return the module of kernels where they can be launched on *x*, else None."""
    return _module() if x.is_cuda and not triton_fault() else None


@cache
def _module() -> Any:
    return importlib.import_module("app.engine.kernels.blocks_triton")


def _join(heads: torch.Tensor | None, feed: torch.Tensor | None, cast: Cast | None) -> torch.Tensor:
    width = size = head_stride = row_stride = feed_width = feed_stride = 0
    if feed is not None:
        given, feed_width, feed_stride = feed, feed.shape[-1] // 2, feed.stride(-2)
    if heads is not None:
        given, size, width = heads, heads.shape[3], heads.shape[1] * heads.shape[3]
        _, head_stride, row_stride, _ = heads.stride()
    rows = given.shape[-2]
    dtype = given.dtype if cast is None else cast.dtype
    out = torch.empty(1, rows, width + feed_width, dtype=dtype, device=given.device)
    block = _column_block(max(width, feed_width))
    blocks = -(-width // block) + -(-feed_width // block)
    _module().join[(-(-rows // _JOIN_ROWS), blocks)](
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
        BLOCK=block,
        ROWS=_JOIN_ROWS,
        CASTS=cast is not None,
        num_warps=_JOIN_WARPS,
    )
    return out


def _like(x: torch.Tensor, cast: Cast | None) -> torch.Tensor:
    return torch.empty_like(x, dtype=x.dtype if cast is None else cast.dtype)


@cache
def _power(size: int) -> int:
    """Return the least power of two that is not below *size*."""
    return 1 << (size - 1).bit_length()


def _column_block(width: int) -> int:
    return min(_COLUMNS, _power(width))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _norm_rotate(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    is_interleaved: bool,
    inverses: torch.Tensor | None,
) -> None:
    parts, tokens, heads, size = out.shape
    joined = qkv.view(tokens, -1, size)
    groups = (joined.shape[1] - heads) // 2
    split = torch.split(joined, [heads, groups, groups], dim=1)
    for part in range(parts):
        made = split[part]
        if part < 2:
            made = _rotate(_rms_norm(made, norms[part], eps), cos, sin, is_interleaved)
        if inverses is not None:
            made = Cast(inverses[part], out.dtype)(made)
        out[part] = made.repeat_interleave(heads // made.shape[1], dim=1)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool
) -> torch.Tensor:
    """Apply RoPE in the dtype of *cos*: [n, h, s] -> the same."""
    wide = x.to(cos.dtype)
    if is_interleaved:
        even, odd = wide[..., ::2], wide[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype)
