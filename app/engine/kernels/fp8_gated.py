"""A matmul in fp8 whose result goes through SwiGLU and is cast for the next layer, on Hopper.

The tensor cores' sums never go to memory: gate and value of one output are computed by the same
program. Otherwise both would be written and read again as bf16, four times the bytes of what is
kept. The values are not rounded to bf16 in between, so a few are cast to the neighbour.

Shapes: n rows, K inputs, f the hidden size of SwiGLU.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, NamedTuple

import torch

from app.engine.kernels import blocks
from app.engine.kernels.blocks import TINY, Cast
from app.engine.kernels.fp8_linear import multiply_fp8
from app.engine.kernels.triton_check import is_hopper, runs, triton_fault

_log = logging.getLogger(__name__)

_TILE = 128
"""Outputs and inputs that the kernel takes at a time."""
_LEAST_ROWS = 1024
"""With fewer most multiprocessors would wait for the last tiles, and a library has smaller ones."""
_TRIED = 600
"""The rows of a trial, of which the last tile is not full."""
_MOST_ERROR = 0.03
"""Values next to the middle between two of e4m3 may become either."""


class Gated(NamedTuple):
    """What is multiplied: e4m3 *x* [n, K] by *weight* [2 * f, K], gates first.

    The scales and *inverse*, 1 / scale of the result, are float32 [].
    """

    x: torch.Tensor
    weight: torch.Tensor
    x_scale: torch.Tensor
    weight_scale: torch.Tensor
    inverse: torch.Tensor


def fault(device: torch.device) -> str:
    """Say why the kernel is not for *device*; empty where it may be.

    It is written for Hopper's `wgmma`, and was measured on no other card.
    """
    if not is_hopper(device):
        return "it is written for Hopper"
    return triton_fault()


def is_for(given: Gated) -> bool:
    """Return whether the kernel takes *given*, and is right, which the first of a kind shows."""
    outputs, inputs = given.weight.shape
    if len(given.x) < _LEAST_ROWS or outputs % (2 * _TILE) or inputs % _TILE:
        return False
    if fault(given.x.device):
        return False
    if (outputs, inputs) not in _RIGHT:
        _RIGHT[outputs, inputs] = _try(given._replace(x=given.x[:_TRIED]))
    return _RIGHT[outputs, inputs]


_RIGHT: dict[tuple[int, int], bool] = {}


def _try(given: Gated) -> bool:
    rows, width = len(given.x), len(given.weight) // 2
    out = torch.full((rows, width), float("nan"), device=given.x.device).to(given.x.dtype)
    if not runs(lambda: multiply(given, out), "The fp8 matmul with SwiGLU"):
        return False
    right = emulate(given).float()
    error = float((out.float() - right).norm() / right.norm().clamp(min=TINY))
    if not error < _MOST_ERROR:  # NaN too
        _log.warning("The fp8 matmul with SwiGLU is wrong here: an error of %.2g.", error)
    return error < _MOST_ERROR


def multiply(given: Gated, out: torch.Tensor) -> None:
    """Write SwiGLU of the product to *out*, e4m3 [n, f], whose rows may lie further apart."""
    _kernels().multiply(*given, out)


def emulate(given: Gated) -> torch.Tensor:
    """Compute it in two passes, the product in bf16 between them: e4m3 [n, f]."""
    product = multiply_fp8(*given[:4], torch.bfloat16)
    return blocks.join(None, product.unsqueeze(0), Cast(given.inverse))[0]


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("app.engine.kernels.fp8_gated_triton")
