"""Rows of measurements: the images of one size and precision as medians and p95."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.cli.bench.sampler import Usage
from app.domain import GpuSnapshot, ImageSpec, ModelInfo
from app.engine import roofline
from app.engine.models.registry import find_model
from app.service.results import Picture
from app.telemetry.metrics import STAGES

ON_THE_GPU = ("text", "reference", "denoise", "decode")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and 95th percentile, in seconds."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Row:
    """One size at one precision; what cannot be measured or is unknown is None."""

    width: int
    height: int
    steps: int
    precision: str
    plan: str
    count: int
    seconds: Mapping[str, Spread]
    gpu_s: float
    """Median of the summed seconds of `ON_THE_GPU`."""
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    gpu_bytes: int | None
    """Peak of NVML's used memory, less what was used before the start."""
    host_bytes: int | None
    power_watts: float | None
    temperature_celsius: float | None
    floor_s: float | None

    @property
    def name(self) -> str:
        """The row's label in a chart."""
        return f"{self.precision} {self.width}x{self.height}"

    @property
    def reached(self) -> float | None:
        """Roofline seconds divided by measured seconds, 0..1."""
        return None if self.floor_s is None else self.floor_s / self.gpu_s

    def as_json(self) -> dict[str, Any]:
        """Return plain data with the field names of the project's other benchmarks."""
        return {
            "name": "klein.bench",
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "precision": self.precision,
            "plan": self.plan,
            "images": self.count,
            "seconds_median": round(self.seconds["total"].p50, 6),
            "seconds_p95": round(self.seconds["total"].p95, 6),
            "stages": {
                stage: {"p50": round(spread.p50, 6), "p95": round(spread.p95, 6)}
                for stage, spread in self.seconds.items()
            },
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "nvml_bytes": self.gpu_bytes,
            "host_bytes": self.host_bytes,
            "power_watts": self.power_watts,
            "temperature_celsius": self.temperature_celsius,
            "floor_s": self.floor_s,
            "reached": self.reached,
        }


def sum_up(
    spec: ImageSpec,
    info: ModelInfo,
    pictures: Sequence[Picture],
    usage: Usage,
    *,
    gpu_bytes_before: int | None,
    floor_s: float | None,
) -> Row:
    """Aggregate the *pictures* of one size into a row."""
    on_gpu = (sum(one.seconds[stage] for stage in ON_THE_GPU) for one in pictures)
    taken = usage.gpu_bytes
    if taken is not None and gpu_bytes_before is not None:
        taken = max(0, taken - gpu_bytes_before)
    return Row(
        width=spec.width,
        height=spec.height,
        steps=spec.num_inference_steps,
        precision=info.precision,
        plan=info.plan,
        count=len(pictures),
        seconds={stage: _spread(one.seconds[stage] for one in pictures) for stage in STAGES},
        gpu_s=statistics.median(on_gpu),
        peak_allocated_bytes=_peak(pictures, lambda picture: picture.peak.allocated),
        peak_reserved_bytes=_peak(pictures, lambda picture: picture.peak.reserved),
        gpu_bytes=taken,
        host_bytes=usage.host_bytes,
        power_watts=usage.power_watts,
        temperature_celsius=usage.temperature_celsius,
        floor_s=floor_s,
    )


def floor_of(spec: ImageSpec, info: ModelInfo, gpu: GpuSnapshot | None) -> float | None:
    """Return the roofline seconds of *spec* on *gpu*; None where GPU or model is unknown."""
    architecture = find_model(info.model).architecture
    # A folder of test or demo size may have other widths.
    if gpu is None or info.weights_bytes < architecture.small_bytes:
        return None
    known = roofline.recognise(gpu.name, gpu.total_bytes)
    if known is None:
        return None
    found = roofline.roofline(
        architecture,
        known,
        info.precision,
        spec.width,
        spec.height,
        spec.num_inference_steps,
        branches=2 if spec.guidance_scale > 1 else 1,
    )
    return found.total_s if found else None


def _spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    return Spread(p50=statistics.median(ordered), p95=ordered[math.ceil(0.95 * len(ordered)) - 1])


def _peak(pictures: Sequence[Picture], read: Callable[[Any], int]) -> int | None:
    return max((read(picture) for picture in pictures if picture.peak), default=None)
