"""Rows of measurements: the images of one size and precision as medians and p95."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from app.cli.bench.machine import Reading
from app.domain import GpuSnapshot, ImageSpec, ModelInfo, PeakMemory
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

    def __str__(self) -> str:
        return f"{self.p50:.3f} / {self.p95:.3f}"


@dataclass(frozen=True, slots=True)
class Row:
    """The images of one size at one precision; *floor_s* is None where it is not known."""

    spec: ImageSpec
    """One of them; they differ in the prompt alone."""
    info: ModelInfo
    count: int
    seconds: Mapping[str, Spread]
    gpu_s: float
    """Median of the summed seconds of `ON_THE_GPU`."""
    peak: PeakMemory | None
    usage: Reading
    """The most that was used while they were made."""
    floor_s: float | None

    @property
    def size(self) -> str:
        """The size as WIDTHxHEIGHT."""
        return f"{self.spec.width}x{self.spec.height}"

    @property
    def name(self) -> str:
        """The row's label in a chart."""
        return f"{self.info.precision} {self.size}"

    @property
    def reached(self) -> float | None:
        """Roofline seconds divided by measured seconds, 0..1."""
        return None if self.floor_s is None else self.floor_s / self.gpu_s

    def as_json(self) -> dict[str, object]:
        """Return plain data with the field names of the project's other benchmarks."""
        return {
            "name": "klein.bench",
            "width": self.spec.width,
            "height": self.spec.height,
            "steps": self.spec.num_inference_steps,
            "precision": self.info.precision,
            "plan": self.info.plan,
            "images": self.count,
            "seconds_median": round(self.seconds["total"].p50, 6),
            "seconds_p95": round(self.seconds["total"].p95, 6),
            "stages": {
                stage: {"p50": round(spread.p50, 6), "p95": round(spread.p95, 6)}
                for stage, spread in self.seconds.items()
            },
            "peak_allocated_bytes": self.peak.allocated if self.peak else None,
            "peak_reserved_bytes": self.peak.reserved if self.peak else None,
            "nvml_bytes": self.usage.gpu_bytes,
            "host_bytes": self.usage.host_bytes,
            "power_watts": self.usage.power_watts,
            "temperature_celsius": self.usage.temperature_celsius,
            "floor_s": self.floor_s,
            "reached": self.reached,
        }


def sum_up(
    spec: ImageSpec,
    info: ModelInfo,
    pictures: Sequence[Picture],
    usage: Reading,
    floor_s: float | None,
) -> Row:
    """Aggregate the *pictures* of one size into a row."""
    peaks = [picture.peak for picture in pictures if picture.peak]
    return Row(
        spec=spec,
        info=info,
        count=len(pictures),
        seconds={stage: _spread(one.seconds[stage] for one in pictures) for stage in STAGES},
        gpu_s=statistics.median(
            sum(one.seconds[stage] for stage in ON_THE_GPU) for one in pictures
        ),
        peak=PeakMemory(
            allocated=max(peak.allocated for peak in peaks),
            reserved=max(peak.reserved for peak in peaks),
        )
        if peaks
        else None,
        usage=usage,
        floor_s=floor_s,
    )


def floor_of(spec: ImageSpec, info: ModelInfo, gpu: GpuSnapshot | None) -> float | None:
    """Return the roofline seconds of *spec* on *gpu*; None where GPU or model is unknown."""
    architecture = find_model(info.model).architecture
    known = roofline.recognise(gpu.name, gpu.total_bytes) if gpu else None
    # A folder of test or demo size may have other widths.
    if known is None or info.weights_bytes < architecture.small_bytes:
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
