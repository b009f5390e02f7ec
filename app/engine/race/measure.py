"""Holds a race on a card: errors first, then seconds at the sizes of the model's own step.

Every weight format that `auto` may take, bf16 beside them, and every attention kernel. A matmul too
large for `_ROOM` is timed in pieces of equal size: a part of its rows and outputs, with the time
scaled up. The time is the GPU's alone, as in a step, where the host is far ahead. Where our
kernels run, fp8 quantizes its input in one pass, as the blocks do.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from app import __version__
from app.engine import torch_private
from app.engine.models.entry import Architecture, Matmul
from app.engine.modules.attention import (
    KERNELS,
    AttentionKernel,
    plain_attention,
    relative_error,
)
from app.engine.quantization.formats import FORMATS, WeightFormat, automatic
from app.engine.quantization.select import GpuCapabilities
from app.engine.race.kept import CARD, race_once, recall
from app.engine.race.results import Lap, Results, Winner, faults, settle, wrong
from app.telemetry.gpu import Gpu, GpuFacts

_log = logging.getLogger(__name__)

_ROUNDS = 7
_CALLS = 3
_SPIN_CYCLES = 6_000_000
"""A few milliseconds, in which the host queues the calls of a round."""
_MOST_SPIN_CYCLES = 32 * _SPIN_CYCLES
_WARM_S = 0.2
_FADE_S = 1.5
"""After so long NVML's load no longer contains our own race."""
_MOST_SPREAD = 0.25
_MOST_BUSY = 0.3

_WEIGHT_BYTES = 90_000_000
_ROOM = 110_000_000
"""Bytes of a matmul's input, with what is made of it, and output."""
_COPIES = 8
"""A weight for timing is made of equal parts, so that quantizing it takes little memory."""
_ERROR_ROWS, _ERROR_OUTPUTS, _ERROR_HEADS, _ERROR_QUERIES = 256, 512, 4, 512


def race(
    device: torch.device,
    architecture: Architecture,
    cache: Path,
    *,
    has_kernels: bool,
    again: bool = False,
) -> Results:
    """Return the race that was kept for this card, or hold it: some seconds, 256 MB of the card.

    *has_kernels*: whether ours will run; *again* holds it in any case.
    """

    def run() -> Results:
        begun = time.perf_counter()
        made = settle(
            partial(hold, device, architecture, has_kernels=has_kernels),
            partial(time.sleep, _FADE_S),
        )
        _log.info("The card was timed in %.1f s.", time.perf_counter() - begun)
        return made

    key = _key(device, architecture, has_kernels=has_kernels)
    return race_once(cache, key, run, again=again, is_outdated=_is_outdated)


def known(
    device: torch.device, architecture: Architecture, cache: Path, *, has_kernels: bool
) -> Results | None:
    """Return the race that was kept for this card, if any."""
    kept = recall(cache, _key(device, architecture, has_kernels=has_kernels))
    return None if kept is None or _is_outdated(kept) else kept


def capabilities(results: Results, winner: Winner) -> GpuCapabilities:
    """Return what the choice of the precision has to know of a race."""
    left_out = faults(results.linears, is_timed=not results.disturbed)
    return GpuCapabilities(
        results.capability,
        frozenset(each.name for each in automatic() if each.name not in left_out),
        left_out,
        fastest=winner.linears,
        told=winner.reason,
        broken={
            lap.name: fault
            for lap in results.linears
            if (fault := wrong(lap))
            and not FORMATS[lap.name].substitute
            and not FORMATS[lap.name].missing()
        },
    )


@torch.no_grad()
def hold(device: torch.device, architecture: Architecture, *, has_kernels: bool) -> Results:
    """Hold one race and free its memory."""
    busy = _busy(device)
    spreads: list[float] = []
    warm(device)
    linears = [
        _linear_lap(each, device, architecture, spreads, has_kernels=has_kernels)
        for each in (*automatic(), FORMATS["bf16"])
    ]
    attention = [
        _attention_lap(name, kernel, device, architecture, spreads)
        for name, kernel in reversed(KERNELS.items())
    ]
    torch.cuda.empty_cache()
    if not busy and spreads and max(spreads) > _MOST_SPREAD:
        busy = f"equal runs differed by {max(spreads):.0%}"
    capability = torch.cuda.get_device_capability(device)
    return Results(capability, tuple(linears), tuple(attention), disturbed=busy)


def linear_error(wanted: WeightFormat, device: torch.device, inputs: int) -> float:
    """Return the relative error of a product in *wanted*, both factors heavy-tailed."""
    generator = torch.Generator(device).manual_seed(0)
    weight = _heavy((_ERROR_OUTPUTS, inputs), generator)
    x = _heavy((_ERROR_ROWS, inputs), generator)
    made = wanted.build(weight, torch.bfloat16)(x)
    return relative_error(made, x.float() @ weight.float().t())


def attention_error(
    kernel: AttentionKernel, device: torch.device, tokens: int, head_size: int
) -> float:
    """Return the relative error of *kernel* against float32, the larger of two.

    Queries and keys are normed by heads, as the blocks norm them, and all three heavy-tailed. The
    second time values are off zero, which shows sums that a kernel cuts off.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = _heavy((3, 1, _ERROR_HEADS, tokens, head_size), generator).float()
    q, k = (nn.functional.rms_norm(each, (head_size,)) for each in (q, k))
    q, k, v = (each.bfloat16() for each in (q, k, v))
    first = q[:, :, :_ERROR_QUERIES].float()
    return max(
        (
            relative_error(
                kernel.call(q, k, values)[:, :, :_ERROR_QUERIES],
                plain_attention(first, k.float(), values.float()),
            )
            for values in (v, v + 1)
        ),
        key=lambda error: (math.isnan(error), error),
    )


def piece(matmul: Matmul, rows: int, *, has_kernels: bool) -> tuple[int, int]:
    """Return the rows and outputs of the equal pieces in which *matmul* is timed."""
    outputs = matmul.outputs
    while 2 * matmul.inputs * outputs > _WEIGHT_BYTES:
        outputs //= 2
    # bf16 and a byte; eagerly, float32 copies too.
    bytes_in = matmul.inputs * (3 if has_kernels else 17)
    while rows * (bytes_in + 2 * outputs) > _ROOM:
        rows //= 2
    return rows, outputs


def repeated_layer(
    wanted: WeightFormat, inputs: int, outputs: int, device: torch.device
) -> nn.Module:
    """Build a layer of *wanted* for timing, whose weight is one part again and again."""
    layers = wanted.layers()
    part = torch.randn(outputs // _COPIES, inputs, device=device, dtype=torch.bfloat16)
    tensors = (part,) if layers.quantize is None else layers.quantize(part)
    return layers.make(*map(_repeated, tensors)).to(device)


def _repeated(tensor: torch.Tensor) -> torch.Tensor:
    """Repeat *tensor* along its first dimension; as bytes, which every dtype can be copied as."""
    if not tensor.dim():
        return tensor
    return torch.cat([tensor.view(torch.uint8)] * _COPIES).view(tensor.dtype)


def _linear_lap(
    wanted: WeightFormat,
    device: torch.device,
    architecture: Architecture,
    spreads: list[float],
    *,
    has_kernels: bool,
) -> Lap:
    lap = partial(
        Lap,
        wanted.name,
        bound=wanted.max_error,
        must_win=wanted.must_win,
        is_reference=wanted.reason is None,
    )
    if missing := wanted.missing():
        return lap(fault=missing)
    try:
        error = linear_error(wanted, device, architecture.width)
        seconds = sum(
            _matmul_seconds(wanted, each, architecture.step_tokens, device, spreads, has_kernels)
            for each in architecture.matmuls
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        _log.info("A matmul in %s does not run here: %s", wanted.name, failure)
        return lap(fault=_failing(wanted))
    return lap(seconds, error)


def _matmul_seconds(
    wanted: WeightFormat,
    matmul: Matmul,
    tokens: int,
    device: torch.device,
    spreads: list[float],
    has_kernels: bool,
) -> float:
    torch.cuda.empty_cache()
    rows, outputs = piece(matmul, tokens, has_kernels=has_kernels)
    fused = wanted.layers().fused
    layer = repeated_layer(wanted, matmul.inputs, outputs, device)
    multiply = fused(layer) if fused is not None and has_kernels else layer
    x = torch.randn(rows, matmul.inputs, device=device, dtype=torch.bfloat16)
    pieces = tokens / rows * matmul.outputs / outputs
    return matmul.count * pieces * gpu_seconds(lambda: multiply(x), spreads)


def _attention_lap(
    name: str,
    kernel: AttentionKernel,
    device: torch.device,
    architecture: Architecture,
    spreads: list[float],
) -> Lap:
    lap = partial(Lap, name, bound=kernel.max_error, is_challenger=kernel.must_win)
    if fault := kernel.fault(device):
        return lap(fault=fault)
    torch.cuda.empty_cache()
    tokens, size = architecture.step_tokens, architecture.head_size
    shape = (3, 1, tokens, architecture.heads, size)
    try:
        error = attention_error(kernel, device, tokens, size)
        # Laid out as the blocks have them.
        q, k, v = torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(2, 3)
        seconds = gpu_seconds(lambda: kernel.call(q, k, v), spreads)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        _log.info("%s's attention does not run here: %s", kernel.name, failure)
        return lap(fault="it does not run here")
    return lap(seconds * (architecture.double_blocks + architecture.single_blocks), error)


def gpu_seconds(run: Callable[[], object], spreads: list[float]) -> float:
    """Return the median seconds of a call on the GPU; its spread goes to *spreads*.

    The calls of a round are queued while the GPU waits. A round for which it waited too briefly
    would count the host's time too: it is left out, and the next wait is twice as long.
    """
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    # The first calls compile kernels and make plans.
    for _ in range(_CALLS):
        run()
    times: list[float] = []
    cycles = _SPIN_CYCLES
    while len(times) < _ROUNDS:
        torch_private.spin(cycles)
        begin.record()
        for _ in range(_CALLS):
            run()
        end.record()
        is_queued = not begin.query()  # type: ignore[no-untyped-call]
        end.synchronize()
        if is_queued or cycles >= _MOST_SPIN_CYCLES:
            times.append(begin.elapsed_time(end) / 1e3 / _CALLS)
        else:
            cycles *= 2
    times.sort()
    median = statistics.median(times)
    spreads.append((times[-2] - times[1]) / median)
    return median


def card_key(device: torch.device, **facts: str) -> dict[str, str]:
    """Return what a kept race depends on: the card, the driver, all versions, and *facts*."""
    told = _gpu(device).facts()
    card = torch.cuda.get_device_properties(device)
    return {
        CARD: f"{card.name} {card.total_memory >> 20} MiB {card.multi_processor_count}",
        "driver": told.driver if isinstance(told, GpuFacts) else "",
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "comfy-kitchen": _version("comfy-kitchen"),
        "klein-server": __version__,
    } | facts


def warm(device: torch.device) -> None:
    """Compute until the GPU has raised its clocks."""
    x = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    until = time.perf_counter() + _WARM_S
    while time.perf_counter() < until:
        x @ x
        torch.cuda.synchronize(device)


def _gpu(device: torch.device) -> Gpu:
    """Find torch's card in NVML, which numbers them in another way."""
    card = torch.cuda.get_device_properties(device)
    return Gpu(f"{'MIG' if ' MIG ' in card.name else 'GPU'}-{card.uuid}")


def _busy(device: torch.device) -> str:
    """Say what NVML tells of others on the GPU, on which nothing of ours runs yet."""
    now = _gpu(device).read()
    load = now.utilization_ratio if now else None
    return f"others used {load:.0%} of it" if load is not None and load > _MOST_BUSY else ""


def _heavy(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw from Student's t distribution with 5 degrees of freedom, in bf16."""
    draw = partial(torch.randn, shape, generator=generator, device=generator.device)
    squares = sum((draw().square() for _ in range(5)), torch.zeros((), device=generator.device))
    return (draw() / (squares / 5).sqrt()).bfloat16()


def _key(device: torch.device, architecture: Architecture, *, has_kernels: bool) -> dict[str, str]:
    return card_key(
        device,
        kernels=str(has_kernels),
        step=f"{architecture.step_tokens} x {architecture.heads} {architecture.matmuls}",
    )


def _is_outdated(results: Results) -> bool:
    """Return whether a library that a format lacked has been mended: its version may be the same.

    Only such a library is imported to find out.
    """
    return any(
        lap.fault and wanted.package and lap.fault != _failing(wanted) and not wanted.missing()
        for lap in results.linears
        for wanted in (FORMATS[lap.name],)
    )


def _failing(wanted: WeightFormat) -> str:
    return f"{wanted.kernel}'s product does not run here"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
