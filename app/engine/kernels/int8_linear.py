"""A linear layer in int8 of rotated rows, with what stands before and after it in a block.

Two kernels on Hopper. The first reads the input once: it applies LayerNorm and modulation, or
SwiGLU, rotates each row in groups of 256 by a Hadamard matrix (ConvRot, arXiv 2512.03673), and
writes it as int8 with one scale. The second multiplies on the tensor cores (`wgmma`) and applies
both scales to its sums, which never go to memory. Gate and residual are a kernel of their own: in
the second they saved 5 % of it, and its error rose from 0.17 to 0.32 %, so some results were wrong.

Shapes: n rows, K inputs, N outputs, f the hidden size of SwiGLU. The batch size is always 1.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from app.engine import torch_private
from app.engine.kernels import blocks
from app.engine.kernels.triton_check import is_hopper, raise_unrelated, triton_fault

_log = logging.getLogger(__name__)

GROUP = 256
"""The rotation group of the kernels."""

TINY = 1e-12
"""The least amax of a row, against a division by zero."""

_LIMIT = 127.0
_EXACT_SUM = 1024
"""The sum of so many int8 products is at most 2 ** 24, which float32 represents exactly."""
_MOST_INPUTS = 12288
"""What a row may have, which the first kernel holds in registers."""
_TRIED = 600
"""The rows of a trial: more than a few of the kernel's tiles, and none that they fill."""
_TRIED_OUTPUTS = 8192
"""How many outputs of a trial are looked at: all would take a race beyond its memory."""
_MOST_ERROR = 0.02


class Weights(NamedTuple):
    """What a layer multiplies by."""

    values: torch.Tensor
    """int8 [N, K], rotated along K in groups of *group*."""
    scales: torch.Tensor
    """Of the rows of *values*, float32 [N]."""
    group: int = GROUP


class Modulation(NamedTuple):
    """What stands before a layer: LayerNorm(x) * (1 + scale) + shift, both [1, K]."""

    scale: torch.Tensor
    shift: torch.Tensor
    eps: float


class Addition(NamedTuple):
    """What stands after a layer: residual + gate * y, of [1, n, N] and [1, N]."""

    residual: torch.Tensor
    gate: torch.Tensor


class Operands(NamedTuple):
    """What a layer multiplies, [x, SwiGLU(feed)] of which one may be missing, and its surroundings.

    Of all tensors only the last dimension needs to be contiguous.
    """

    x: torch.Tensor | None = None
    """[1, n, K - f]; with *modulation* all of the input."""
    feed: torch.Tensor | None = None
    """[1, n, 2 * f]: the gate of SwiGLU, then its value."""
    modulation: Modulation | None = None
    addition: Addition | None = None

    @property
    def given(self) -> torch.Tensor:
        """Return one of the inputs, for its shape and dtype."""
        given = self.feed if self.x is None else self.x
        assert given is not None
        return given


def fault(device: torch.device) -> str:
    """Say why the kernels are not for *device*; empty where they may be.

    They are written for Hopper's `wgmma`, and were measured on no other card.
    """
    if not is_hopper(device):
        return "they are written for Hopper"
    return triton_fault()


def is_right(weights: Weights, operands: Operands) -> bool:
    """Return whether the kernels run for such operands, and right, which the first of a kind show.

    Triton needs a C compiler and a folder to run from, and each kind of operands code of its own.
    """
    kind = (weights.values.shape[1], *(each is None for each in operands))
    if kind not in _RIGHT:
        _RIGHT[kind] = _try(weights, operands)
    return _RIGHT[kind]


_RIGHT: dict[tuple[int, ...], bool] = {}


def _try(weights: Weights, operands: Operands) -> bool:
    x, feed, modulation, addition = operands
    if addition is not None:
        addition = addition._replace(residual=addition.residual[..., :_TRIED, :])
    operands = Operands(
        None if x is None else x[..., :_TRIED, :],
        None if feed is None else feed[..., :_TRIED, :],
        modulation,
        addition,
    )
    try:
        made = multiply(weights, operands)[..., :_TRIED_OUTPUTS].float()
    # Triton's errors have no common base, and the C compiler's are those of `subprocess`.
    except Exception as failure:
        raise_unrelated(failure)
        _log.warning("The int8 layers' own kernels do not run here.", exc_info=True)
        return False
    rotation = hadamard(weights.group).to(made.device)
    # With an addition an output is as wide as the residual, which is narrower.
    values, scales, group = weights
    seen = Weights(values[:_TRIED_OUTPUTS], scales[:_TRIED_OUTPUTS], group)
    right = emulate(seen, rotation, operands).float()
    error = float((made - right).norm() / right.norm().clamp(min=TINY))
    if not error < _MOST_ERROR:  # NaN too
        _log.warning("The int8 layers' own kernels are wrong here: an error of %.2g.", error)
    return error < _MOST_ERROR


def fits(weights: Weights) -> bool:
    """Return whether the kernels take a layer of *weights*."""
    outputs, inputs = weights.values.shape
    return weights.group == GROUP and inputs <= _MOST_INPUTS and outputs % 8 == 0


def multiply(weights: Weights, operands: Operands) -> torch.Tensor:
    """Multiply *operands* in bf16: [1, n, N]."""
    if operands.x is not None and operands.feed is not None and operands.x.shape[-1] % GROUP:
        # A group would lie in both.
        joined = _input(operands).to(operands.x.dtype)
        operands = operands._replace(x=joined, feed=None)
    scale, shift, eps = operands.modulation or (None, None, 0.0)
    kernels, given = _kernels(), operands.given
    with torch.cuda.device(given.device):
        rows = kernels.quantize(_rows(operands.x), _rows(operands.feed), scale, shift, eps)
        made: torch.Tensor = kernels.multiply(*rows, weights.values, weights.scales)
        made = made[: given.numel() // given.shape[-1]].view(*given.shape[:-1], -1)
        if operands.addition is None:
            return made
        residual, gate = operands.addition
        return blocks.gate_add(residual, gate, made)


def emulate(weights: Weights, rotation: torch.Tensor, operands: Operands) -> torch.Tensor:
    """Compute `multiply` in torch and in any dtype; *rotation* is `hadamard` of the group."""
    rows = _input(operands)
    flat = rotate(rows.flatten(0, -2), rotation)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / _LIMIT
    product = _int_mm((flat / scale).round().to(torch.int8), weights.values).float()
    made = (product * scale * weights.scales).view(*rows.shape[:-1], -1).to(operands.given.dtype)
    if operands.addition is None:
        return made
    residual, gate = operands.addition
    return (residual.float() + gate.float() * made.float()).to(made.dtype)


def _input(operands: Operands) -> torch.Tensor:
    """Return what is rotated, float32 [1, n, K], rounded to the inputs' dtype."""
    parts = []
    if operands.x is not None:
        x = operands.x.float()
        if operands.modulation is not None:
            scale, shift, eps = operands.modulation
            x = functional.layer_norm(x, x.shape[-1:], eps=eps)
            x = x * (1 + scale.float()) + shift.float()
        parts.append(x)
    if operands.feed is not None:
        gate, value = operands.feed.float().chunk(2, dim=-1)
        parts.append(functional.silu(gate) * value)
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return joined.to(operands.given.dtype).float()


def hadamard(size: int) -> torch.Tensor:
    """Return the regular, orthonormal and symmetric Hadamard matrix of *size*, a power of four.

    Regular: all rows have the same sum, so a constant added to a group does not accumulate in one
    element (ConvRot, arXiv 2512.03673).
    """
    matrix, four = torch.ones(1, 1), 1 - 2 * torch.eye(4).flip(1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)


def rotate(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Multiply each group of *rows*, [M, K], along K by *rotation*, [group, group]."""
    groups = rows.reshape(rows.shape[0], -1, len(rotation))
    return (groups @ rotation.to(rows.dtype)).reshape(rows.shape)


def _int_mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply exactly: int8 [M, K] times the transpose of int8 [N, K] -> int32 [M, N]."""
    if not rows.is_cuda:
        return _int_mm_on_processor(rows, weight)
    count = rows.shape[0]
    if count <= 16:  # torch's kernel needs more than 16 rows on CUDA
        rows = functional.pad(rows, (0, 0, 0, 32 - count))
    return torch_private.int_mm(rows, weight)[:count]


def _int_mm_on_processor(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply in float32 in pieces along K, each short enough to be exact.

    Many times faster than integers on CPUs without int8 instructions.
    """
    pieces = zip(*(torch.split(each, _EXACT_SUM, 1) for each in (rows, weight)), strict=True)
    return torch.stack([(x.float() @ w.float().t()).int() for x, w in pieces]).sum(
        0, dtype=torch.int32
    )


def _rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a [1, n, c] tensor as [n, c], not copied."""
    return None if tensor is None else tensor.flatten(0, -2)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("app.engine.kernels.int8_linear_triton")
