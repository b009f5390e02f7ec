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

from app.engine.models.entry import Architecture
from app.engine.models.flux2_klein import FLUX2_KLEIN_4B
from app.engine.modules.attention import TOLERANCE, relative_error
from app.engine.quantization.formats import WeightFormat, automatic
from app.engine.quantization.select import GpuCapabilities

_log = logging.getLogger(__name__)
_ROUNDS = 4


def probe_gpu(
    device: torch.device, architecture: Architecture = FLUX2_KLEIN_4B
) -> GpuCapabilities | None:
    """Probe the formats in their order until one runs on *device*; return None for the CPU."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    faults: dict[str, str] = {}
    for each in automatic():
        if not (fault := each.fault(device, architecture)):
            return GpuCapabilities(capability, frozenset([each.name]), faults)
        faults[each.name] = fault
    return GpuCapabilities(capability, frozenset(), faults)


def kernel_fault(wanted: WeightFormat, device: torch.device, architecture: Architecture) -> str:
    """Say why the matmul of *wanted* is wrong or too slow on *device*; return "" if it is not."""
    if not _is_right(wanted, device):
        return f"{wanted.kernel}'s product does not agree with bf16 here"
    if not wanted.must_win or device.type != "cuda":
        return ""
    ours, plain = _race(wanted, device, *architecture.widest_matmul)
    torch.cuda.empty_cache()
    _log.info("A matmul in %s takes %.2f ms, in bf16 %.2f ms", wanted.name, 1e3 * ours, 1e3 * plain)
    return "" if ours < plain else f"{ours / plain:.2f} times bf16's time on this card"


def _race(
    wanted: WeightFormat, device: torch.device, rows: int, inputs: int, outputs: int
) -> tuple[float, float]:
    """Return the seconds of a matmul of these sizes in *wanted* and in bf16."""
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    layer = wanted.build(weight, weight.dtype)
    return _seconds(lambda: layer(x)), _seconds(lambda: x @ weight.t())


def _is_right(wanted: WeightFormat, device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(256, 512, device=device, generator=generator)
    x = torch.randn(64, 512, device=device, generator=generator).bfloat16()
    try:
        error = relative_error(wanted.build(weight, x.dtype)(x), x @ weight.bfloat16().t())
    except RuntimeError as failure:
        _log.info("A matmul in %s does not run here: %s", wanted.name, failure)
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
