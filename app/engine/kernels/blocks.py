"""What the blocks of transformer and text encoder compute between their matmuls.

Each function runs as one kernel of `app.engine.kernels.blocks_triton` where Triton can be used, and
elsewhere as it is written here, in torch. All of it is bound by memory, so operations are joined
where the result of one would only be read by the next: the residual before a norm, the cast to the
8-bit dtype that a matmul takes, the concatenation of what goes into one matmul.

Shapes: n tokens, d the hidden size, h heads of size s, f the MLP's hidden size. The batch is 1.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.nn import functional

from app.engine.kernels.triton_check import raise_unrelated, triton_fault

_log = logging.getLogger(__name__)

FP8_LIMIT = 448.0
"""The largest finite value of float8_e4m3fn."""

TINY = 1e-12
"""The least amax, against a division by zero."""

Inputs = ParamSpec("Inputs")
Made = TypeVar("Made")


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


def _as_kernel(compute: Callable[Inputs, Made]) -> Callable[Inputs, Made]:
    """Launch the kernel of the same name on a GPU; *compute* elsewhere, and once that has failed.

    Whether a kernel can be compiled shows at its first launch, before it has written anything.
    """
    name, failures = compute.__name__, set[str]()

    @functools.wraps(compute)
    def call(*inputs: Inputs.args, **options: Inputs.kwargs) -> Made:
        is_cuda = any(each.is_cuda for each in inputs if isinstance(each, torch.Tensor))
        if not is_cuda or failures or triton_fault():
            return compute(*inputs, **options)
        try:
            made: Made = getattr(_launches(), name)(*inputs, **options)
        # Triton's errors have no common base.
        except Exception as error:
            raise_unrelated(error)
            failures.add(type(error).__name__)
            _log.warning("The kernel %s does not run here; torch computes it.", name, exc_info=True)
            return compute(*inputs, **options)
        return made

    return call


@functools.cache
def _launches() -> Any:
    return importlib.import_module("app.engine.kernels.blocks_launch")


@_as_kernel
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
    if change is not None:
        x = x + change.gate * change.update
    made = functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
    return x, made if cast is None else cast(made)


@_as_kernel
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, update: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x, with *update* added, and RMSNorm(x) * weight (arXiv 1910.07467): [1, n, d] each."""
    x = x if update is None else x + update
    return x, _rms_norm(x, weight, eps)


@_as_kernel
def gate_add(x: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Return x + gate * update: [1, n, d]; *gate* is [1, d]."""
    return x + gate * update


@_as_kernel
def add_product(x: torch.Tensor, inner: torch.Tensor, up: torch.Tensor) -> None:
    """Add inner @ up to *x*, [..., out], in place; *inner* is [..., r] and *up* [r, out].

    On a GPU r is a multiple of 32.
    """
    x.view(-1, x.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), up)


@_as_kernel
def join(
    heads: torch.Tensor | None, feed: torch.Tensor | None, cast: Cast | None = None
) -> torch.Tensor:
    """Return *heads* and SwiGLU(feed) beside each other, cast; one of both may be missing.

    SwiGLU is silu(gate) * value (arXiv 2002.05202). [1, h, n, s] and [1, n, 2 * f] ->
    [1, n, h * s + f]; both may be slices: only their last dimension must be contiguous.
    """
    parts = [merge(heads)] if heads is not None else []
    if feed is not None:
        gate, value = feed.chunk(2, dim=-1)
        parts.append(functional.silu(gate) * value)
    made = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return made if cast is None else cast(made)


@_as_kernel
def fill(heads: torch.Tensor, cast: Cast, out: torch.Tensor) -> None:
    """Write *heads*, cast, to the first columns of *out*: [1, h, n, s] and [1, n, m]."""
    made = cast(merge(heads))
    out[..., : made.shape[-1]] = made


def merge(heads: torch.Tensor) -> torch.Tensor:
    """Return [1, h, n, s] as [1, n, h * s], a copy only where it must be."""
    return heads.transpose(1, 2).flatten(2)


def quantize(x: torch.Tensor, cast: Cast) -> torch.Tensor:
    """Return *x* cast: [..., k]."""
    return join(x.reshape(1, 1, -1, x.shape[-1]), None, cast).view(x.shape)


@_as_kernel
def find_scale(x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor) -> None:
    """Write max |x| / 448 to *scale*, and its inverse, float32 [] each: nothing is cut by it."""
    # A GPU divides by a scalar through its reciprocal, a CPU exactly. A difference in the last bit
    # would round all values half way between two fp8 numbers the other way.
    scale.copy_(x.float().abs().amax().clamp(min=TINY) * (1 / FP8_LIMIT))
    inverse.copy_(1 / scale)


@_as_kernel
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
    """Write *q* and *k*, normed by heads (RMSNorm) and rotated (RoPE), and *v*, where it is given.

    *qkv* is [1, n, (h + 2 * g) * s] and may be a slice. The others are [1, h, n, s] with the same
    strides, of which the last is 1; each of the g KV heads is written once for each of its query
    heads. The weights *norms* are [s], cos and sin of *rope* [n, s], equal for both of a pair of
    lanes. Pairs are neighbours where *is_interleaved*, else the halves of a head.
    """
    _, heads, tokens, size = q.shape
    joined = qkv.view(tokens, -1, size)
    groups = (joined.shape[1] - heads) // 2
    parts = torch.split(joined, [heads, groups, groups], dim=1)
    for part, norm, out in zip(parts, (*norms, None), (q, k, v), strict=True):
        if out is None:
            continue
        if norm is not None:
            part = rotate(_rms_norm(part, norm, eps), *rope, is_interleaved=is_interleaved)
        out[0] = part.repeat_interleave(heads // part.shape[1], dim=1).transpose(0, 1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool
) -> torch.Tensor:
    """Apply RoPE in torch, in the dtype of *cos*, [n, s]: [n, h, s] -> the same."""
    wide = x.to(cos.dtype)
    if is_interleaved:
        even, odd = wide[..., ::2], wide[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype)
