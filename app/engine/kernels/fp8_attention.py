"""Attention with probabilities and values in e4m3 on Hopper; queries and keys stay in bf16.

Queries and keys of 8 bit would cost a picture more than all fp8 weights do: an error of a score is
one of its exponential. An error of a probability or a value is averaged over all tokens instead.

Probabilities are multiples of powers of two, 2^(score - ceil(largest score) + 8), so their rounding
to e4m3 does not depend on the order in which keys are read. The denominator is the sum of the
rounded ones, so that they are weights that sum to 1. Values are rounded with no scale: e4m3 keeps 4
significant bits from 1/64 to 448, and its fixed steps of 1/512 below are far under what values
usually are; larger ones are cut to 448. A scale would take one more pass over the values.

The order of computation is that of FlashAttention (arXiv 2307.08691, 2407.08608): blocks of keys
pass by, and what was summed is rescaled when a row's largest score grows.

Shapes: h heads of size 128, n tokens; the batch is 1.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from typing import Any

import torch

from app.engine.kernels.triton_check import is_hopper, triton_fault

_log = logging.getLogger(__name__)

HEAD_SIZE = 128
"""The only size of heads that the kernel is written for."""

_LARGEST = 8
"""Probabilities are at most 2 ** 8; e4m3 holds up to 448."""


def fault(device: torch.device) -> str:
    """Say why the kernel is not for *device*; empty where it may be."""
    if not is_hopper(device):
        return "it is written for Hopper"
    if reason := triton_fault():
        return reason
    try:
        _kernels()
    # What an experimental part of another version of Triton raises on import cannot be known.
    except Exception as error:
        _log.info("The kernel of attention does not load: %s", error)
        return "this Triton does not offer what it is written in"
    return ""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention: [1, h, n, 128] each -> the same, rows of tokens in memory.

    Raises:
        RuntimeError: the kernel does not run here, or not on such heads.
    """
    if not q.is_cuda:
        return _emulated(q, k, v)
    if q.shape[-1] != HEAD_SIZE or q.dtype != torch.bfloat16:
        raise RuntimeError(f"The kernel takes heads of {HEAD_SIZE} in bf16.")
    try:
        made: torch.Tensor = _kernels().attend(_rows(q), _rows(k), _rows(v))
    except RuntimeError:
        raise
    # Triton's own errors have no common base, and those of its C compiler are `subprocess`'s.
    except Exception as error:
        raise RuntimeError(f"Triton could not run it ({type(error).__name__}).") from error
    return made.view(1, made.shape[0], -1, HEAD_SIZE).transpose(1, 2)


def _emulated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute what the kernel computes, with exact sums."""
    scale = q.shape[-1] ** -0.5 * math.log2(math.e)
    scores = q.float() @ k.float().mT * scale
    weights = _rounded(torch.exp2(scores - scores.amax(-1, keepdim=True).ceil() + _LARGEST))
    made = (weights @ _rounded(v) / weights.sum(-1, keepdim=True)).to(q.dtype)
    return made.transpose(1, 2).contiguous().transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return [1, h, n, s] as [n, h * s], without a copy where tokens are rows in memory."""
    return x.transpose(1, 2).flatten(2)[0]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(torch.float8_e4m3fn).max
    return x.float().clamp(-limit, limit).to(torch.float8_e4m3fn).float()


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("app.engine.kernels.fp8_attention_triton")
