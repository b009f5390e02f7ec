"""Runs each fast kernel once and compares it with bf16: a capability number alone proves nothing.

Rowwise or tensorwise fp8 may be compiled in and still be refused by a driver or a wheel's
architecture list, so what counts is that a small product comes out right.
"""

from __future__ import annotations

import logging

import torch

from app.engine import linear
from app.engine.blocks import Attention, cudnn_attention, plain_attention
from app.engine.precision import CardFacts

_log = logging.getLogger(__name__)

_TOLERANCE = 0.08
_HOPPER = (9, 0)


def probe_card(device: torch.device) -> CardFacts | None:
    """Find out what the card can do; None for the processor."""
    if device.type != "cuda":
        return None
    return CardFacts(
        capability=torch.cuda.get_device_capability(device),
        has_fp8=_works(device, "fp8"),
        has_int8=False,
    )


def choose_attention(device: torch.device) -> tuple[Attention, str]:
    """Choose the attention kernel: cuDNN's on Hopper and newer where it runs, else torch's
    choice.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        return plain_attention, "attention by torch"
    q, k, v = torch.randn(3, 1, 24, 640, 128, device=device, dtype=torch.bfloat16)
    try:
        error = _difference(cudnn_attention(q, k, v), plain_attention(q, k, v))
    except RuntimeError as failure:
        _log.info("cuDNN's attention does not run here: %s", failure)
        return plain_attention, "attention by torch"
    return (
        (cudnn_attention, "attention by cuDNN")
        if error < _TOLERANCE
        else (plain_attention, "attention by torch")
    )


def _works(device: torch.device, kind: str) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(256, 512, device=device, generator=generator)
    x = torch.randn(64, 512, device=device, generator=generator).bfloat16()
    try:
        layer = linear.Fp8Linear(*linear.quantise_fp8(weight))
        error = _difference(layer(x), x @ weight.bfloat16().t())
    except RuntimeError as failure:
        _log.info("The %s product does not run here: %s", kind, failure)
        return False
    return error < _TOLERANCE


def _difference(made: torch.Tensor, right: torch.Tensor) -> float:
    return float((made.float() - right.float()).norm() / right.float().norm())
