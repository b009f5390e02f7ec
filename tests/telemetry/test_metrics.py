"""What a scrape says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.domain import (
    Device,
    Generated,
    LoraLoad,
    ModelInfo,
    PeakMemory,
    RawImage,
    StageTimings,
    Status,
    WorkerStage,
)
from app.telemetry.gpu import Gpu
from app.telemetry.metrics import MOST_ADAPTERS, OTHER, OUTCOMES, Metrics
from tests.support.fake_nvml import FakeNvml

INFO = ModelInfo(
    model="flux.2-klein-4b",
    revision="e7b7dc2",
    device="NVIDIA GeForce RTX 3060",
    precision="fp8",
    precision_reason="",
    plan="resident/tiled",
    plan_reasons=(),
    max_pixels=(),
    torch="2.13.0",
    cuda="13.0",
)
RTX = Device(0, "NVIDIA GeForce RTX 3060", "GPU-1")
TWIN = Device(1, "NVIDIA GeForce RTX 3060", "GPU-2")
PEAK = PeakMemory(7_370_000_000, 7_830_000_000)
SECONDS = {"queue": 0.5, "text": 0.02, "reference": 0.0, "denoise": 2.4, "decode": 0.3}
SECONDS |= {"encode": 0.01, "total": 3.3}


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(version="1.2.3")
    status = Status(
        stage=WorkerStage.READY, is_ready=True, progress=None, reason="", info=INFO, queue_size=3,
        queue_capacity=32, running=1, estimated_wait_s=4.5, worker_restarts=0,
    )  # fmt: skip
    metrics.watch(lambda: status, lambda: 0.002)
    metrics.watch_gpu(Gpu(0, load_nvml=FakeNvml).read, lambda: PEAK)
    metrics.model_ready(INFO, 21.0, RTX)
    metrics.image_finished(
        Generated(
            RawImage(1024, 1024, b""),
            StageTimings(0.02, 0.0, 2.4, 0.3, (0.6,) * 4),
            PEAK,
            512,
            False,
            True,
        ),
        SECONDS,
        "generate",
        RTX,
    )
    return metrics


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample, or None where the scrape has none."""
    return metrics.registry.get_sample_value(name, labels)


def test_the_owner_of_a_card_sees_what_it_does(metrics) -> None:
    """Seconds by stage and the peak memory of each image, under the card's own name."""
    card = {"gpu": "NVIDIA GeForce RTX 3060", "uuid": "GPU-1"}

    assert sample(metrics, "klein_image_duration_seconds_sum", **card, stage="denoise") == 2.4
    assert sample(metrics, "klein_image_duration_seconds_sum", **card, stage="total") == 3.3
    peak = sample(metrics, "klein_last_image_peak_vram_bytes", **card, kind="reserved")
    assert peak == 7_830_000_000
    bucket = {"kind": "allocated", "le": "7.5e+09"}
    assert sample(metrics, "klein_image_peak_vram_bytes_bucket", **card, **bucket) == 1
    assert sample(metrics, "klein_step_duration_seconds_count") == 4


def test_lookups_of_references_are_counted_one_by_one(metrics) -> None:
    """Of one edit some may be at hand and others not; where none is looked up, none counts."""
    generated = Generated(
        RawImage(64, 64, b""),
        StageTimings(0.02, 0.1, 2.4, 0.3),
        None,
        512,
        False,
        are_references_cached=(True, False, True),
    )
    metrics.image_finished(generated, SECONDS, "edit", RTX)

    counts = [
        sample(metrics, "klein_reference_cache_requests_total", result=result)
        for result in ("hit", "miss")
    ]
    assert counts == [2, 1]


def test_adapters_are_counted_by_name_and_source(metrics) -> None:
    """Of names there are 64 at most, more are `other`; bytes are those of the last picture."""
    before = Generated(RawImage(64, 64, b""), StageTimings(0.02, 0.1, 2.4, 0.3), None, 5, False)
    for number in range(MOST_ADAPTERS + 3):
        load = LoraLoad(f"style-{number}", 0.004, "host" if number else "disk")
        made = replace(before, lora_loads=(load,) * 2, lora_bytes=number)
        metrics.image_finished(made, SECONDS, "generate", RTX)

    loads = "klein_adapter_loads_total"
    assert sample(metrics, loads, adapter="style-0", source="disk") == 2
    assert sample(metrics, loads, adapter=f"style-{MOST_ADAPTERS - 1}", source="host") == 2
    assert sample(metrics, loads, adapter=f"style-{MOST_ADAPTERS}", source="host") is None
    assert sample(metrics, loads, adapter=OTHER, source="host") == 6
    assert sample(metrics, "klein_adapter_load_seconds_count", source="disk") == 2
    assert sample(metrics, "klein_adapter_bytes", gpu=RTX.name, uuid=RTX.uuid) == MOST_ADAPTERS + 2

    metrics.model_ready(INFO, 21.0, RTX)
    assert (
        sample(metrics, "klein_adapter_bytes", gpu=RTX.name, uuid=RTX.uuid) == 0
    )  # A new worker holds none.


def test_gauges_are_read_at_the_scrape(metrics) -> None:
    """Queue, readiness and waiting time are those of the moment."""
    assert sample(metrics, "klein_queue_size") == 3
    assert sample(metrics, "klein_ready") == 1
    assert sample(metrics, "klein_estimated_wait_seconds") == 4.5
    assert sample(metrics, "klein_event_loop_lag_seconds") == 0.002


def test_the_card_is_scraped(metrics) -> None:
    """NVML's readings carry the card's name and uuid."""
    labels = {
        "gpu": "NVIDIA GeForce RTX 3060",
        "uuid": "GPU-00000000-1111-2222-3333-444444444444",
    }
    assert sample(metrics, "klein_gpu_memory_used_bytes", **labels) == 9_000_000_000
    assert sample(metrics, "klein_gpu_power_watts", **labels) == 151.5
    assert sample(metrics, "klein_gpu_torch_reserved_bytes", **labels) == 7_830_000_000


def test_without_a_card_its_metrics_are_absent() -> None:
    """Absent, not zero."""
    metrics = Metrics(version="1")
    metrics.watch_gpu(lambda: None, lambda: None)

    assert b"klein_gpu_memory" not in metrics.scrape().exposition()[0]


def test_outcomes_are_counted_by_route(metrics) -> None:
    """One counter and one histogram per route and outcome."""
    for outcome in OUTCOMES:
        metrics.request_finished("/generate", outcome, 0.1)

    assert all(
        sample(metrics, "klein_requests_total", route="/generate", outcome=outcome) == 1
        for outcome in OUTCOMES
    )


def test_a_new_worker_replaces_what_is_said_of_the_model(metrics) -> None:
    """One model_info at a time, also after a restart with another plan."""
    import dataclasses

    metrics.model_ready(dataclasses.replace(INFO, plan="streamed/tiled"), 5.0, RTX)
    text = metrics.scrape().exposition()[0].decode()

    assert text.count("klein_model_info{") == 1
    assert 'plan="streamed/tiled"' in text
