"""Runs each fast kernel once and compares it with bf16: a capability number alone proves nothing.

Rowwise or tensorwise fp8 may be compiled in and still be refused by a driver or a wheel's
architecture list, so what counts is that a small product comes out right; and of int8, which comes
from a library, that it is faster at klein's own size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import nn

from app.engine import fused_int8, linear
from app.engine.blocks import Attention, cudnn_attention, plain_attention
from app.engine.precision import CardFacts

_log = logging.getLogger(__name__)

_TOLERANCE = 0.08
# klein's widest product at a megapixel: 4096 image tokens and 512 words.
_TOKENS = 4608
_WIDTHS = (3072, 27648)
_ROUNDS = 4
_HOPPER = (9, 0)


def probe_card(device: torch.device) -> CardFacts | None:
    """Find out what the card can do; None for the processor."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if _is_right(device, lambda weight: linear.Fp8Linear(*linear.quantise_fp8(weight))):
        return CardFacts(capability, has_fp8=True, has_int8=False)
    note = int8_fault(device)
    return CardFacts(capability, has_fp8=False, has_int8=not note, int8_note=note)


def int8_fault(device: torch.device) -> str:
    """Say why int8 would gain nothing on this card; nothing where it would."""
    if fused_int8.fused_product() is None:
        return "comfy-kitchen, the extra `int8`, is not installed"
    if not _is_right(device, linear.rotated_int8):
        return "comfy-kitchen's product does not agree with bf16 here"
    ours, plain = _race(device)
    torch.cuda.empty_cache()
    _log.info("A product in int8 takes %.2f ms, in bf16 %.2f ms", 1e3 * ours, 1e3 * plain)
    return "" if ours < plain else f"{ours / plain:.2f} times bf16's time on this card"


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


def _race(device: torch.device) -> tuple[float, float]:
    """Time klein's widest product in int8 and in bf16, in seconds."""
    weight = torch.randn(_WIDTHS[::-1], device=device, dtype=torch.bfloat16)
    x = torch.randn(_TOKENS, _WIDTHS[0], device=device, dtype=torch.bfloat16)
    layer = linear.rotated_int8(weight)
    return _seconds(lambda: layer(x)), _seconds(lambda: x @ weight.t())


def _is_right(device: torch.device, make: Callable[[torch.Tensor], nn.Module]) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(256, 512, device=device, generator=generator)
    x = torch.randn(64, 512, device=device, generator=generator).bfloat16()
    try:
        layer = make(weight)
        error = _difference(layer(x), x @ weight.bfloat16().t())
    except RuntimeError as failure:
        _log.info("A product in 8 bit does not run here: %s", failure)
        return False
    return error < _TOLERANCE


def _seconds(run: Callable[[], object]) -> float:
    """Time a product on the card: the best of a few, after one to warm up."""
    times: list[float] = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _difference(made: torch.Tensor, right: torch.Tensor) -> float:
    return float((made.float() - right.float()).norm() / right.float().norm())
