"""Every metric of the service: names, labels and buckets are defined here and nowhere else.

All metrics live in one process, so there is no multiprocess directory; the worker sends its numbers
over the pipe. Labels take values from fixed sets only: never a prompt, an id or anything else that
a client writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from app.domain import (
    Device,
    Generated,
    GpuSnapshot,
    Loss,
    ModelInfo,
    PeakMemory,
    Status,
    WorkerStage,
    WorkerStatus,
)
from app.request_context import current_request

STAGES = ("queue", "text", "reference", "denoise", "decode", "encode", "total")
OUTCOMES = (
    "ok", "invalid", "unauthorized", "rejected", "cancelled", "deadline", "oom", "error",
)  # fmt: skip
REJECTIONS = ("queue_full", "loading", "draining", "worker_down", "rate_limit")

IMAGE_BUCKETS = (
    .005, .01, .02, .05, .1, .2, .35, .5, .75, 1, 1.5, 2, 3, 4, 6, 8, 12, 20, 30, 60, 120, 300,
)  # fmt: skip
STEP_BUCKETS = (.01, .02, .05, .1, .2, .3, .5, .75, 1, 2, 5)  # fmt: skip
LOAD_BUCKETS = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5)  # fmt: skip
MOST_ADAPTERS = 64
"""Names that `adapter` has as values; those of more are `other`."""
OTHER = "other"
_OPENMETRICS = re.compile(r"(?:^|,)\s*application/openmetrics-text\s*(?:[;,]|$)")
VRAM_BUCKETS = (*(half * 5e8 for half in range(4, 33)), 24e9, 48e9, 80e9, 160e9)


STATUS_GAUGES: dict[str, tuple[str, Callable[[Status], float]]] = {
    "klein_queue_size": (
        "Images that wait, those whose pictures are still decoded included.",
        lambda status: status.queue_size,
    ),
    "klein_queue_capacity": ("Images that may wait.", lambda status: status.queue_capacity),
    "klein_requests_running": (
        "Images on the GPU or on their way from it.",
        lambda status: status.running,
    ),
    "klein_ready": ("1 where a request would be taken.", lambda status: status.is_ready),
    "klein_workers_left_out": (
        "Workers that were given up while others go on.",
        lambda status: sum(each.is_left_out for each in status.workers),
    ),
    "klein_estimated_wait_seconds": (
        "How long a new image would wait.",
        lambda status: status.estimated_wait_s,
    ),
}
"""Gauges that show the service's state: what they say, and where it stands."""


class Metrics:
    """The service's registry: updated on the event loop's thread, scraped from any thread."""

    def __init__(self, *, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._version = version
        self._make_histograms(registry)
        self._make_counters(registry)
        self._make_gauges(registry)
        self._gpus = _GpuCollector()
        registry.register(self._gpus)

    def _make_histograms(self, registry: CollectorRegistry) -> None:
        self._wake_duration = Histogram(
            "klein_wake_duration_seconds",
            "Seconds from the start of a worker that slept until it was ready.",
            ["gpu", "uuid"],
            buckets=IMAGE_BUCKETS,
            registry=registry,
        )
        self._image_duration = Histogram(
            "klein_image_duration_seconds",
            "Seconds per image by stage, on this GPU.",
            ["gpu", "uuid", "stage"],
            buckets=IMAGE_BUCKETS,
            registry=registry,
        )
        self._image_peak = Histogram(
            "klein_image_peak_vram_bytes",
            "The most memory that torch held on the GPU during one image.",
            ["gpu", "uuid", "kind"],
            buckets=VRAM_BUCKETS,
            registry=registry,
        )
        self._request_duration = Histogram(
            "klein_request_duration_seconds",
            "Seconds from a request's first byte to its answer's last.",
            ["route", "outcome"],
            buckets=IMAGE_BUCKETS,
            registry=registry,
        )
        self._queue_wait = Histogram(
            "klein_queue_wait_seconds",
            "Seconds that an image waited for the GPU.",
            buckets=IMAGE_BUCKETS,
            registry=registry,
        )
        self._step_duration = Histogram(
            "klein_step_duration_seconds",
            "Seconds per denoising step.",
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._adapter_load = Histogram(
            "klein_adapter_load_seconds",
            "Seconds to bring an adapter (LoRA) to where the layers read it, by source.",
            ["source"],
            buckets=LOAD_BUCKETS,
            registry=registry,
        )

    def _make_counters(self, registry: CollectorRegistry) -> None:
        self._adapter_loads = Counter(
            "klein_adapter_loads",
            "Adapters (LoRA) that were brought to where the layers read them, by name and source.",
            ["adapter", "source"],
            registry=registry,
        )
        self._adapter_names: set[str] = set()
        self._requests = Counter(
            "klein_requests",
            "Requests by route and outcome.",
            ["route", "outcome"],
            registry=registry,
        )
        self._rejected = Counter(
            "klein_requests_rejected",
            "Requests that could not be taken, by reason.",
            ["reason"],
            registry=registry,
        )
        self._images = Counter(
            "klein_images", "Finished images by mode.", ["mode"], registry=registry
        )
        self._pixels = Counter(
            "klein_image_pixels", "Pixels of finished images.", registry=registry
        )
        self.images_out_of_memory = Counter(
            "klein_oom", "Images that failed for want of GPU memory.", registry=registry
        )
        self.lost_workers = Counter(
            "klein_worker_restarts",
            "Workers lost, by reason.",
            ["gpu", "uuid", "reason"],
            registry=registry,
        )
        self._wakes = Counter(
            "klein_worker_wakes",
            "Wakes of workers that slept, by cause.",
            ["gpu", "uuid", "cause"],
            registry=registry,
        )
        self._busy = Counter(
            "klein_gpu_busy_seconds",
            "Seconds that the GPU worked on images.",
            ["gpu", "uuid"],
            registry=registry,
        )
        self._cache = Counter(
            "klein_prompt_cache_requests",
            "Prompts looked up in the embedding cache, by result.",
            ["result"],
            registry=registry,
        )
        self._reference_cache = Counter(
            "klein_reference_cache_requests",
            "References looked up in the latents' cache, by result.",
            ["result"],
            registry=registry,
        )
        # Present from the first scrape on, at 0.
        for counter, values in (
            (self._rejected, REJECTIONS),
            (self._images, ("generate", "edit")),
            (self._cache, ("hit", "miss")),
            (self._reference_cache, ("hit", "miss")),
        ):
            for value in values:
                counter.labels(value)

    def _make_gauges(self, registry: CollectorRegistry) -> None:
        self._last_peak = Gauge(
            "klein_last_image_peak_vram_bytes",
            "The most memory that torch held on the GPU during the last image.",
            ["gpu", "uuid", "kind"],
            registry=registry,
        )
        self._load_duration = Gauge(
            "klein_model_load_duration_seconds",
            "Seconds from the last worker's start to its first picture.",
            ["gpu", "uuid"],
            registry=registry,
        )
        self._adapter_bytes = Gauge(
            "klein_adapter_bytes",
            "Memory that adapters (LoRA) take on the GPU, or of the host without one.",
            ["gpu", "uuid"],
            registry=registry,
        )
        self._build_info = Gauge(
            "klein_build_info", "Versions.", ["version", "torch", "cuda"], registry=registry
        )
        self._model_info = Gauge(
            "klein_model_info",
            "What is served and how.",
            ["gpu", "uuid", "model", "revision", "precision", "plan"],
            registry=registry,
        )

    def watch(self, read: Callable[[], Status], read_lag_s: Callable[[], float]) -> None:
        """Read the service's state and the event loop's lag, in seconds, at every scrape."""

        def value_of(field: Callable[[Status], float]) -> float:
            return field(read())

        for name, (text, field) in STATUS_GAUGES.items():
            Gauge(name, text, registry=self.registry).set_function(partial(value_of, field))
        self.registry.register(_WorkerCollector(read))
        Gauge(
            "klein_event_loop_lag_seconds",
            "How late the event loop woke, the most in the last minute.",
            registry=self.registry,
        ).set_function(read_lag_s)

    def add_device(self, device: Device) -> None:
        """Show the counts of lost workers of *device* from the first scrape on, at 0."""
        for reason in Loss:
            self.lost_workers.labels(*_labels(device), reason)

    def watch_gpu(
        self, read: Callable[[], GpuSnapshot | None], torch_memory: Callable[[], PeakMemory | None]
    ) -> None:
        """Read a GPU's state, and the memory that torch holds on it, at every scrape."""
        self._gpus.add(read, torch_memory)

    def worker_lost(self, device: Device, reason: Loss) -> None:
        """Count the lost worker of *device*."""
        self.lost_workers.labels(*_labels(device), reason).inc()

    def worker_woken(self, device: Device, cause: str, seconds: float) -> None:
        """Count a wake of *device*'s worker, *seconds* from its start until it was ready."""
        self._wakes.labels(*_labels(device), cause).inc()
        self._wake_duration.labels(*_labels(device)).observe(seconds)

    def model_ready(self, info: ModelInfo, load_s: float, device: Device) -> None:
        """Set the gauges of a model that *device* has; *load_s* is since its worker's start."""
        labels = _labels(device)
        self._load_duration.labels(*labels).set(load_s)
        self._adapter_bytes.labels(*labels).set(0)
        self._build_info.clear()
        self._build_info.labels(self._version, info.torch, info.cuda or "none").set(1)
        self._model_info.remove_by_labels({"uuid": device.uuid})
        self._model_info.labels(*labels, info.model, info.revision, info.precision, info.plan).set(
            1
        )

    def image_finished(
        self, generated: Generated, seconds: dict[str, float], mode: str, device: Device
    ) -> None:
        """Count a finished image of *device*.

        *seconds* has one entry per name in `STAGES`; *mode* is `generate` or `edit`.
        """
        labels = _labels(device)
        for stage, value in seconds.items():
            self._image_duration.labels(*labels, stage).observe(value, _exemplar())
        self._queue_wait.observe(seconds["queue"], _exemplar())
        for step in generated.timings.steps:
            self._step_duration.observe(step)
        if peak := generated.peak:
            for kind, size in (("allocated", peak.allocated), ("reserved", peak.reserved)):
                self._image_peak.labels(*labels, kind).observe(size)
                self._last_peak.labels(*labels, kind).set(size)
        if generated.is_prompt_cached is not None:
            self._cache.labels("hit" if generated.is_prompt_cached else "miss").inc()
        for is_cached in generated.are_references_cached:
            self._reference_cache.labels("hit" if is_cached else "miss").inc()
        for load in generated.lora_loads:
            self._adapter_loads.labels(self._adapter_label(load.name), load.source).inc()
            self._adapter_load.labels(load.source).observe(load.seconds)
        self._adapter_bytes.labels(*labels).set(generated.lora_bytes)
        self._images.labels(mode).inc()
        self._pixels.inc(generated.image.width * generated.image.height)
        self._busy.labels(*labels).inc(generated.timings.total)

    def _adapter_label(self, name: str) -> str:
        """Return the label's value for the adapter *name*, which the directory gave it."""
        if name not in self._adapter_names:
            if len(self._adapter_names) == MOST_ADAPTERS:
                return OTHER
            self._adapter_names.add(name)
        return name

    def request_finished(self, route: str, outcome: str, seconds: float) -> None:
        """Count a finished request and its *seconds*.

        *route* is a template, never a client's path; *outcome* is one of `OUTCOMES`.
        """
        self._requests.labels(route, outcome).inc()
        self._request_duration.labels(route, outcome).observe(seconds, _exemplar())

    def request_rejected(self, reason: str) -> None:
        """Count a rejected request; *reason* is one of `REJECTIONS`."""
        self._rejected.labels(reason).inc()

    def scrape(self) -> Scrape:
        """Read every metric; in the event loop's thread, which owns what is read."""
        return Scrape(tuple(self.registry.collect()))


class Scrape(CollectorRegistry):
    """What one scrape has read.

    Reading takes a millisecond, writing it as text ten and more: that is for another thread.
    """

    def __init__(self, families: tuple[Metric, ...]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Return what was read."""
        return iter(self._families)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return the body and its content type, to one that sent *accept*.

        It is Prometheus' text format, or OpenMetrics where that is listed: only it has exemplars.
        """
        if _OPENMETRICS.search(accept):
            body = openmetrics.generate_latest(self)  # type: ignore[no-untyped-call]
            return body, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self), CONTENT_TYPE_LATEST


def _exemplar() -> dict[str, str] | None:
    """Return what leads from a bucket to the request's trace; None where it has none."""
    context = current_request.get(None)
    return {"trace_id": context.trace.id} if context and context.trace else None


def _labels(device: Device) -> tuple[str, str]:
    """Return the values of `gpu` and `uuid`; two GPUs of one kind have the same name."""
    return device.name, device.uuid


_WORKER_STATES: dict[str, tuple[str, Callable[[WorkerStatus], bool]]] = {
    "klein_worker_up": ("1 where a worker process is there.", lambda worker: worker.is_up),
    "klein_worker_asleep": (
        "1 where the worker sleeps, and has no process, until it is needed.",
        lambda worker: worker.stage == WorkerStage.ASLEEP,
    ),
    "klein_worker_yielding": (
        "1 where the worker sleeps because another program has the card.",
        lambda worker: worker.is_yielding,
    ),
}
"""Gauges of each worker: what they say, and where they hold."""


@dataclass(frozen=True, slots=True)
class _WorkerCollector(Collector):
    """Reads which workers there are at each scrape."""

    read: Callable[[], Status]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield a family for each of `_WORKER_STATES`."""
        workers = self.read().workers
        for name, (text, holds) in _WORKER_STATES.items():
            family = GaugeMetricFamily(name, text, labels=["gpu", "uuid"])
            for worker in workers:
                family.add_metric(_labels(worker.device), holds(worker))
            yield family


_READINGS: dict[str, tuple[str, Callable[[GpuSnapshot, PeakMemory | None], float | None]]] = {
    "memory_used_bytes": ("Used memory of the GPU.", lambda gpu, torch: gpu.used_bytes),
    "memory_total_bytes": ("Memory of the GPU.", lambda gpu, torch: gpu.total_bytes),
    "utilization_ratio": (
        "Share of time that the GPU was busy.",
        lambda gpu, torch: gpu.utilization_ratio,
    ),
    "power_watts": ("Power that the GPU draws.", lambda gpu, torch: gpu.power_watts),
    "temperature_celsius": ("Temperature of the GPU.", lambda gpu, torch: gpu.temperature_celsius),
    "torch_allocated_bytes": (
        "Memory of the GPU that torch's tensors hold between images.",
        lambda gpu, torch: torch.allocated if torch else None,
    ),
    "torch_reserved_bytes": (
        "Memory of the GPU that torch keeps reserved between images.",
        lambda gpu, torch: torch.reserved if torch else None,
    ),
}


class _GpuCollector(Collector):
    """Reads the GPUs at each scrape; yields nothing without one."""

    def __init__(self) -> None:
        self._gpus: list[
            tuple[Callable[[], GpuSnapshot | None], Callable[[], PeakMemory | None]]
        ] = []

    def add(
        self, read: Callable[[], GpuSnapshot | None], torch_memory: Callable[[], PeakMemory | None]
    ) -> None:
        """Read one more."""
        self._gpus.append((read, torch_memory))

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield one metric family per value that NVML reports, with one sample for each GPU."""
        now = [(snapshot, memory()) for read, memory in self._gpus if (snapshot := read())]
        for name, (text, value_of) in _READINGS.items():
            family = GaugeMetricFamily(f"klein_gpu_{name}", text, labels=["gpu", "uuid"])
            for snapshot, memory in now:
                if (value := value_of(snapshot, memory)) is not None:
                    family.add_metric([snapshot.name, snapshot.uuid], value)
            if family.samples:
                yield family
        throttled = GaugeMetricFamily(
            "klein_gpu_throttled",
            "1 where the GPU's clock is held down, by reason.",
            labels=["gpu", "uuid", "reason"],
        )
        for snapshot, _ in now:
            for reason, holds in (snapshot.throttled or {}).items():
                throttled.add_metric([snapshot.name, snapshot.uuid, reason], holds)
        if throttled.samples:
            yield throttled
