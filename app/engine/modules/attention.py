"""Attention kernels, and the probe that selects one for this GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.nn import functional

_log = logging.getLogger(__name__)

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes query, key and value, each [1, h, n, 128], and returns the same shape and dtype."""


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention with the SDPA backend that PyTorch selects."""
    return functional.scaled_dot_product_attention(q, k, v)


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Compute attention with cuDNN's kernel, which is written for Hopper and Blackwell."""
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[
        0
    ]
    return result


TOLERANCE = 0.08
"""The largest `relative_error` at which a kernel counts as correct."""

_HOPPER = (9, 0)


def choose_attention(device: torch.device) -> tuple[Attention, str]:
    """Choose the attention kernel, and return it with its name for the feature list.

    cuDNN's on Hopper and newer where it runs and agrees with PyTorch's, else PyTorch's own choice.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        return plain_attention, "attention by torch"
    q, k, v = torch.randn(3, 1, 24, 640, 128, device=device, dtype=torch.bfloat16)
    try:
        error = relative_error(cudnn_attention(q, k, v), plain_attention(q, k, v))
    except RuntimeError as failure:
        _log.info("cuDNN's attention does not run here: %s", failure)
        return plain_attention, "attention by torch"
    return (
        (cudnn_attention, "attention by cuDNN")
        if error < TOLERANCE
        else (plain_attention, "attention by torch")
    )


def relative_error(made: torch.Tensor, right: torch.Tensor) -> float:
    """Return ||made - right|| / ||right||, computed in float32."""
    return float((made.float() - right.float()).norm() / right.float().norm())
