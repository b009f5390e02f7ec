"""Probes: run each 8-bit kernel once and compare it with bf16.

A compute capability is not enough: fp8 may be compiled in and still be refused by a driver or a
wheel's architecture list, so a small matmul has to be correct. int8, which comes from a library,
also has to be faster than bf16 at klein's own size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import nn

from app.engine.models.entry import Architecture
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from app.engine.modules.attention import (
    TOLERANCE,
    relative_error,
)
from app.engine.quantization import int8_kernel, linear
from app.engine.quantization.select import GpuCapabilities

_log = logging.getLogger(__name__)
_ROUNDS = 4


def probe_gpu(
    device: torch.device, architecture: Architecture = FLUX2_KLEIN_4B
) -> GpuCapabilities | None:
    """Return which 8-bit kernels run on *device*; None for the CPU."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if _is_right(device, lambda weight: linear.Fp8Linear(*linear.quantize_fp8(weight))):
        return GpuCapabilities(capability, has_fp8=True, has_int8=False)
    note = int8_fault(device, architecture)
    return GpuCapabilities(capability, has_fp8=False, has_int8=not note, int8_note=note)


def int8_fault(device: torch.device, architecture: Architecture) -> str:
    """Return why int8 is not faster on *device*; an empty string where it is."""
    if int8_kernel.fused_matmul() is None:
        return "comfy-kitchen, the extra `int8`, is not installed"
    if not _is_right(device, linear.rotated_int8):
        return "comfy-kitchen's product does not agree with bf16 here"
    ours, plain = _race(device, *architecture.widest_matmul)
    torch.cuda.empty_cache()
    _log.info("A matmul in int8 takes %.2f ms, in bf16 %.2f ms", 1e3 * ours, 1e3 * plain)
    return "" if ours < plain else f"{ours / plain:.2f} times bf16's time on this card"


def _race(device: torch.device, rows: int, inputs: int, outputs: int) -> tuple[float, float]:
    """Return the seconds of a matmul of these sizes in int8 and in bf16."""
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    layer = linear.rotated_int8(weight)
    return _seconds(lambda: layer(x)), _seconds(lambda: x @ weight.t())


def _is_right(device: torch.device, make: Callable[[torch.Tensor], nn.Module]) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(256, 512, device=device, generator=generator)
    x = torch.randn(64, 512, device=device, generator=generator).bfloat16()
    try:
        layer = make(weight)
        error = relative_error(layer(x), x @ weight.bfloat16().t())
    except RuntimeError as failure:
        _log.info("A matmul in 8 bit does not run here: %s", failure)
        return False
    return error < TOLERANCE


def _seconds(run: Callable[[], object]) -> float:
    """Return the least seconds of a few synchronized runs on the GPU, after a warm-up run."""
    times: list[float] = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])
