"""What the card says through NVML, and silence without one."""

from types import SimpleNamespace

import pytest

from app.telemetry.gpu import THROTTLE_REASONS, Gpu, GpuFacts
from tests.support.fake_nvml import FakeNvml


def test_a_card_is_read_in_base_units() -> None:
    """Bytes, a ratio, watts and degrees, under NVML's product name."""
    snapshot = Gpu(0, load_nvml=FakeNvml).read()

    assert snapshot is not None
    assert snapshot.name == "NVIDIA GeForce RTX 3060"
    assert snapshot.total_bytes == 12_884_901_888
    assert snapshot.used_bytes == 9_000_000_000
    assert snapshot.utilization_ratio == pytest.approx(0.87)
    assert snapshot.power_watts == pytest.approx(151.5)
    assert snapshot.temperature_celsius == 66.0


def test_it_is_read_at_most_once_a_second() -> None:
    """A storm of scrapes does not become a storm of NVML calls."""
    nvml, now = FakeNvml(), SimpleNamespace(s=10.0)
    card = Gpu(0, load_nvml=lambda: nvml, clock=lambda: now.s)
    card.read()
    card.read()
    assert nvml.reads == 1

    now.s += 1.0
    card.read()
    assert nvml.reads == 2


def test_without_nvml_there_is_no_reading() -> None:
    """Absent, not zero; and it is not asked again."""
    calls = []

    def load():
        calls.append(1)
        raise OSError("libnvidia-ml.so.1")

    card = Gpu(0, load_nvml=load)

    assert card.read() is None
    assert card.read() is None
    assert calls == [1]
    assert card.facts() == "libnvidia-ml.so.1"


def test_a_question_that_the_card_does_not_answer_is_left_out() -> None:
    """Some cards report no power: the other readings stand."""
    snapshot = Gpu(0, load_nvml=lambda: FakeNvml(has_power=False)).read()

    assert snapshot is not None
    assert snapshot.power_watts is None
    assert snapshot.temperature_celsius == 66.0


def test_what_holds_the_clock_down_is_told_by_reason() -> None:
    """Each bit by NVML's own name; an idle GPU's clock (0x1) is not held down; silence is None."""
    for bits, expected in (
        (0x01, set()),
        (0x04, {"sw_power_cap"}),
        (0x48, {"hw_slowdown", "hw_thermal"}),
        (0xA0, {"hw_power_brake", "sw_thermal"}),
    ):
        snapshot = Gpu(0, load_nvml=lambda bits=bits: FakeNvml(clock_reasons=bits)).read()
        assert snapshot is not None
        assert snapshot.throttled is not None
        assert {reason for reason, holds in snapshot.throttled.items() if holds} == expected

    silent = Gpu(0, load_nvml=lambda: FakeNvml(clock_reasons=None)).read()
    assert silent is not None
    assert silent.throttled is None
    assert silent.temperature_celsius == 66.0


def test_the_reasons_are_nvmls_own() -> None:
    """The bindings that the lock has know each constant, with the bit that the tests take."""
    import pynvml

    for name in THROTTLE_REASONS.values():
        assert getattr(pynvml, name) == getattr(FakeNvml, name)


def test_the_driver_is_named() -> None:
    """For doctor and the start-up error."""
    facts = Gpu(0, load_nvml=FakeNvml).facts()

    assert isinstance(facts, GpuFacts)
    assert facts.driver == "580.65.06"
    assert facts.cuda == (13, 0)
