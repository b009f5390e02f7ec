"""Matmuls of int8 weights with activations of 16 bits, each as two int8 terms.

Weights stay int8 with a scale per row; an activation becomes (256 * high + low) * scale, with a
scale per token, so a matmul is two in int8. Tensor cores multiply int8 twice as fast as bf16, four
times on GeForce: it is never slower, and no weight is cast. A value's error is at most 2 ** -16 of
the largest value of its row. That is at most sqrt(k) times the root mean square of k values, so a
row is rounded no worse than bf16 rounds it, all of k = 9728 in one outlier included.

What stands before a matmul (a norm, SwiGLU, the sum of the parts of another) is in the same kernel
as the split into terms. Each function runs as a kernel of `app.engine.kernels.wide_int8_triton` on
a GPU, and as the same arithmetic in torch elsewhere. On Hopper the matmul is that of
`app.engine.kernels.wide_int8_hopper`, to the same bits.

Shapes: n tokens, d the hidden size, k and m the widths of a matmul's input and output.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from app.engine.kernels.triton_check import is_hopper, power_of_two, runs

_log = logging.getLogger(__name__)

_LIMIT = 127 * 256 + 127
"""The largest value whose terms both are int8."""
_TINY = 1e-20
"""The least amax, against a division by zero."""

# Tokens and outputs of a tile, warps of a matmul and of a row, as measured on an H100.
_ROWS, _COLUMNS, _DEPTH = 64, 128, 128
_WARPS, _ROW_WARPS, _FEED_WARPS = 4, 8, 4
_PARTS, _SHALLOW = 3, 8192
"""Into how many parts a matmul of more inputs than _SHALLOW is split."""

_HOPPER_ROWS = 128
"""Tokens of a tile on Hopper, where any matmul in parts has _PARTS: tiles are larger and fewer."""


class Terms(NamedTuple):
    """Rows as (256 * high + low) * scale: int8 [n, k] twice, float32 [n]."""

    high: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor


class _Matmul(NamedTuple):
    """What `multiply` is given."""

    terms: Terms
    weight: torch.Tensor
    scale: torch.Tensor
    own: torch.Tensor | None
    common: int


def split(x: torch.Tensor) -> Terms:
    """Split the rows of *x*, [n, k]."""
    if x.is_cuda:
        return _split_rows(x)[1]
    scale = x.float().abs().amax(dim=1).clamp(min=_TINY) / _LIMIT
    whole = (x.float() / scale[:, None]).round().int()
    high = (whole + 128) >> 8
    return Terms(high.to(torch.int8), (whole - 256 * high).to(torch.int8), scale)


def split_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, parts: torch.Tensor | None = None
) -> tuple[torch.Tensor, Terms]:
    """Return x, [n, d], with *parts* added (`multiply_in_parts`), and split RMSNorm(x) * weight."""
    if x.is_cuda:
        return _split_rows(x, weight, eps, parts)
    x = x if parts is None else add(x, parts)
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return x, split(normed.float() * weight.float())


def split_swiglu(x: torch.Tensor) -> Terms:
    """Split silu(gate) * value of gate and value beside each other: [n, 2 * k] -> [n, k]."""
    if x.is_cuda:
        rows, width = x.shape[0], x.shape[1] // 2
        terms = _empty_terms(x, width)
        _kernels().split_swiglu[(rows,)](
            x, *terms, WIDTH=width, BLOCK=power_of_two(width), num_warps=_FEED_WARPS
        )
        return terms
    gate, value = x.float().chunk(2, dim=-1)
    return split(functional.silu(gate) * value)


def add(x: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Return x, [n, d], plus the sum of *parts*, float32 [count, n, d], rounded once."""
    if x.is_cuda:
        rows, width = x.shape
        out = torch.empty_like(x)
        _kernels().add[(rows,)](
            x, parts, len(parts), out, WIDTH=width, BLOCK=power_of_two(width), num_warps=_ROW_WARPS
        )
        return out
    return (x.float() + parts.sum(0)).to(x.dtype)


def multiply(
    terms: Terms,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    own: torch.Tensor | None = None,
    common: int = 0,
) -> torch.Tensor:
    """Multiply by int8 *weight*, [m, k], with float32 *scale*, [m]: to *dtype*, [n, m].

    With *own*, bool [n], the tokens without it are padding, which comes last; whole blocks of them
    have only the first *common* outputs, and zeros or what is right after them.
    """
    if terms.high.is_cuda:
        return _multiply(terms, weight, scale, dtype, 1, own, common)[0]
    return _product(terms, weight, scale).to(dtype)


def multiply_in_parts(terms: Terms, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply as `multiply` does, in float32 parts along k that are yet to be added: [., n, m].

    A narrow output has too few tiles for all multiprocessors; parts of it have enough.
    """
    if terms.high.is_cuda:
        is_split = weight.shape[1] > _SHALLOW or _is_for_hopper(terms, weight)
        count = _PARTS if is_split else 1
        return _multiply(terms, weight, scale, torch.float32, count)
    return _product(terms, weight, scale)[None]


def fits(tokens: int, shapes: Iterable[tuple[int, int]]) -> bool:
    """Return whether the kernels take so many tokens and weights of these *shapes*, [m, k]."""
    is_whole = tokens % _ROWS == 0
    return is_whole and all(m % _COLUMNS == 0 and k % _DEPTH == 0 for m, k in shapes)


def _multiply(
    terms: Terms,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    parts: int,
    own: torch.Tensor | None = None,
    common: int = 0,
) -> torch.Tensor:
    out = scale.new_empty(parts, len(terms.high), len(weight), dtype=dtype)
    given = _Matmul(terms, weight, scale, own, common)
    if _is_for_hopper(terms, weight) and _is_right_on_hopper(given, out):
        _hopper_kernels().multiply(*given, out)
    else:
        _multiply_with_triton(given, out)
    return out


def _multiply_with_triton(given: _Matmul, out: torch.Tensor) -> None:
    terms, weight, scale, own, common = given
    parts, tokens, outputs = out.shape
    depth, stages = _depth(weight.device)
    _kernels().multiply[(tokens // _ROWS * (outputs // _COLUMNS), parts)](
        *terms,
        weight,
        scale,
        own,
        out,
        tokens,
        outputs,
        weight.shape[1],
        common,
        parts,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=depth,
        SKIPS=own is not None,
        num_warps=_WARPS,
        num_stages=stages,
    )


def _is_for_hopper(terms: Terms, weight: torch.Tensor) -> bool:
    return is_hopper(weight.device) and len(terms.high) % _HOPPER_ROWS == 0


_RIGHT_ON_HOPPER: dict[tuple[object, ...], bool] = {}


def _is_right_on_hopper(given: _Matmul, out: torch.Tensor) -> bool:
    """Return whether its kernel makes the bits of the other, which the first of a kind shows."""
    kind = given.weight.shape, out.shape, out.dtype, given.own is not None
    if kind not in _RIGHT_ON_HOPPER:
        _RIGHT_ON_HOPPER[kind] = _try_on_hopper(given, out)
    return _RIGHT_ON_HOPPER[kind]


def _try_on_hopper(given: _Matmul, out: torch.Tensor) -> bool:
    made = torch.full_like(out, float("nan"))
    kernel = "The text encoder's matmul for Hopper"
    if not runs(lambda: _hopper_kernels().multiply(*given, made), kernel):
        return False
    _multiply_with_triton(given._replace(own=None), out)
    if given.own is not None:
        is_needed = given.own[:, None] | (
            torch.arange(out.shape[2], device=out.device) < given.common
        )
        made = made.where(is_needed, out)
    if not (is_right := torch.equal(made, out)):
        _log.warning("%s is wrong here.", kernel)
    return is_right


@cache
def _depth(device: torch.device) -> tuple[int, int]:
    """Return a step's inputs and how many steps are held at once; two tiles then fit in an SM."""
    # Hopper and the large Blackwell have 228 KB of shared memory, GeForce 100 KB, Ampere up to 164.
    return (128, 3) if torch.cuda.get_device_capability(device)[0] in (9, 10) else (64, 3)


def _product(terms: Terms, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # float64 holds the integers' sum exactly.
    whole = 256 * terms.high.double() + terms.low.double()
    return ((whole @ weight.double().t()) * terms.scale[:, None] * scale).float()


def _split_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    parts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Terms]:
    rows, width = x.shape
    terms = _empty_terms(x, width)
    settled = x if parts is None else torch.empty_like(x)
    _kernels().split_rows[(rows,)](
        x,
        weight,
        parts,
        0 if parts is None else len(parts),
        settled,
        *terms,
        eps,
        WIDTH=width,
        BLOCK=power_of_two(width),
        NORMS=weight is not None,
        ADDS=parts is not None,
        num_warps=_ROW_WARPS,
    )
    return settled, terms


def _empty_terms(x: torch.Tensor, width: int) -> Terms:
    high, low = (x.new_empty(len(x), width, dtype=torch.int8) for _ in range(2))
    return Terms(high, low, x.new_empty(len(x), dtype=torch.float32))


@cache
def _kernels() -> Any:
    return importlib.import_module("app.engine.kernels.wide_int8_triton")


@cache
def _hopper_kernels() -> Any:
    return importlib.import_module("app.engine.kernels.wide_int8_hopper")
