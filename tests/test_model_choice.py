"""Which cards compute, by what KLEIN_DEVICE says and what NVML tells."""

from __future__ import annotations

import logging

import pytest

from app import model_choice
from app.domain import Device
from app.errors import StartupError
from app.model_choice import Choice, choose_devices, choose_model, largest_card
from app.settings import Settings
from app.telemetry.cards import VISIBLE, Cards
from tests.support.fake_nvml import FakeCard, FakeNvml

GB = 1_000_000_000
A, B, C = "GPU-aaaa", "GPU-bbbb", "GPU-cccc"
MACHINE = (
    FakeCard(A, bus=1, used_bytes=9 * GB),
    FakeCard(B, bus=2, name="NVIDIA GeForce GTX 1050", total_bytes=2 * GB, used_bytes=GB),
    FakeCard(C, bus=3, name="NVIDIA GeForce RTX 4090", total_bytes=24 * GB, used_bytes=GB),
)
FREE = tuple(FakeCard(each.uuid, each.bus, used_bytes=GB) for each in MACHINE)
KLEIN = Choice("flux.2-klein-4b", None, "a test")
DEMO = Choice("shapes", None, "a test")


@pytest.fixture(autouse=True)
def _cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "torch_cuda", lambda: "13.0")


def cards(*given: FakeCard, visible: str | None = None) -> Cards:
    environ = {} if visible is None else {VISIBLE: visible}
    return Cards(load_nvml=lambda: FakeNvml(*given), environ=environ)


def no_driver() -> None:
    raise OSError("libnvidia-ml.so.1")


def chosen(device: str, choice: Choice = KLEIN, *given: FakeCard, **more: str) -> list[str]:
    settings = Settings(device=device)
    return [each.uuid for each in choose_devices(settings, choice, cards(*given, **more))]


@pytest.mark.parametrize("choice", [KLEIN, DEMO], ids=["klein", "demo"])
def test_cards_come_in_the_order_of_the_setting(choice: Choice) -> None:
    """By any name, and as CUDA_VISIBLE_DEVICES counts."""
    assert chosen("2,0", choice, *FREE) == [C, A]
    assert chosen("0000:02:00.0,GPU-a", choice, *FREE) == [B, A]
    assert chosen("0", choice, *FREE, visible="1") == [B]
    assert chosen("0,1", choice, *FREE, visible=f"{C},{A}") == [C, A]
    assert chosen("all", choice, *FREE, visible="2,1") == [C, B]


@pytest.mark.parametrize("choice", [KLEIN, DEMO], ids=["klein", "demo"])
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("0,3", r"there is no card 3; this machine has 3, counted from 0\. `nvidia-smi -L`"),
        ("0,GPU-a", r"names card 0 twice; leave one name out"),
    ],
)
def test_a_name_that_cannot_be_followed_ends_the_start(
    choice: Choice, device: str, said: str
) -> None:
    """Also where the others could."""
    with pytest.raises(StartupError, match=said):
        chosen(device, choice, *FREE)


def test_a_card_that_is_named_and_cannot_serve_is_named() -> None:
    """By its number, with the reason; each of several."""
    with pytest.raises(StartupError, match=r"^Card 1: NVIDIA GeForce GTX 1050 has 1\.0 GB free"):
        chosen("2,1", KLEIN, *MACHINE)
    with pytest.raises(StartupError, match=r"Card 1: .*Card 0: NVIDIA GeForce RTX 3060 has 3\.9"):
        chosen("1,0", KLEIN, *MACHINE)


def test_of_all_those_that_can_serve_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    """The others are left out, and the log says why; the demo fits everywhere."""
    with caplog.at_level(logging.WARNING):
        assert chosen("all", KLEIN, *MACHINE) == [C]

    assert ["Card 0" in each for each in caplog.messages] == [True, False]
    assert "Card 1: NVIDIA GeForce GTX 1050 has 1.0 GB free" in caplog.messages[1]
    assert chosen("all", DEMO, *MACHINE) == [A, B, C]


def test_none_that_can_serve_ends_the_start() -> None:
    """With the reason of each."""
    with pytest.raises(StartupError, match=r"Card 0: .* Card 1: "):
        chosen("all", KLEIN, *MACHINE[:2])


@pytest.mark.parametrize("device", ["0", "1", "all", "GPU-aaaa"])
def test_without_a_driver_klein_is_refused(device: str) -> None:
    """With NVML's reason, and a way out."""
    with pytest.raises(StartupError, match=r"libnvidia-ml\.so\.1\. Install a driver") as refused:
        choose_devices(Settings(device=device), KLEIN, Cards(load_nvml=no_driver, environ={}))

    assert "KLEIN_DEVICE=cpu" in refused.value.message


def test_without_cuda_in_torch_klein_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a card is looked for."""
    monkeypatch.setattr(model_choice, "torch_cuda", lambda: None)
    with pytest.raises(StartupError, match="built without CUDA"):
        chosen("0", KLEIN, *FREE)


def test_without_a_driver_the_demo_computes_on_the_cpu() -> None:
    """Unless a card is named, of which torch may know more than NVML."""
    none = Cards(load_nvml=no_driver, environ={})

    assert choose_devices(Settings(), DEMO, none) == (Device(None, "cpu", "cpu"),)
    (named,) = choose_devices(Settings(device="1"), DEMO, none)
    assert (named.torch_index, named.visible) == (1, "")
    for device in ("GPU-a", "all"):
        with pytest.raises(StartupError, match="No NVIDIA card can be used"):
            choose_devices(Settings(device=device), DEMO, none)


def test_processes_without_a_card_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """One takes what torch gives it; of several each has a share, and at least one core."""
    monkeypatch.setattr(model_choice.os, "sched_getaffinity", lambda process: set(range(8)))
    none = cards(*FREE)

    assert choose_devices(Settings(device="cpu"), KLEIN, none) == (Device(None, "cpu", "cpu"),)
    three = choose_devices(Settings(device="cpu:3"), KLEIN, none)
    assert [(each.uuid, each.threads) for each in three] == [
        ("cpu:0", 2),
        ("cpu:1", 2),
        ("cpu:2", 2),
    ]
    assert {each.torch_index for each in three} == {None}
    many = choose_devices(Settings(device="cpu:16"), KLEIN, none)
    assert {each.threads for each in many} == {1}


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("0", "NVIDIA GeForce RTX 3060 can hold it"),
        ("1", "NVIDIA GeForce GTX 1050 has less than 6 GB"),
        ("1,2", "NVIDIA GeForce RTX 4090 can hold it"),
        ("all", "NVIDIA GeForce RTX 4090 can hold it"),
        ("7", "no CUDA card was found"),
        ("cpu:2", "KLEIN_DEVICE is cpu"),
    ],
)
def test_auto_goes_by_the_largest_card_that_is_named(device: str, reason: str) -> None:
    """A small one beside it is then refused, or left out of all."""
    settings = Settings(device=device)

    assert choose_model(settings, largest_card(settings, cards(*MACHINE))).reason == reason
