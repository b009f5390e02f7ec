"""Which cards there are, in which order, and by which names they are found."""

from __future__ import annotations

import pytest

from app.domain import Device
from app.telemetry.cards import VISIBLE, Cards
from tests.support.fake_nvml import FakeCard, FakeNvml

A, B, C = "GPU-aaaa1111-2222", "GPU-aabb3333-4444", "GPU-cccc5555-6666"
MIG = "MIG-dddd7777-8888"
THREE = (
    FakeCard(A, bus=0x0A),
    FakeCard(B, bus=0x65, name="NVIDIA GeForce RTX 4070"),
    FakeCard(C, bus=0xB1),
)


def cards(*given: FakeCard, visible: str | None = None) -> Cards:
    """Those of a machine with *given*, where *visible* is CUDA_VISIBLE_DEVICES."""
    nvml = FakeNvml(*(given or THREE))
    return Cards(load_nvml=lambda: nvml, environ={} if visible is None else {VISIBLE: visible})


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [A, B, C]),
        ("0,1,2", [A, B, C]),
        ("2,0", [C, A]),
        (" 1 ", [B]),
        (f"{C},{A}", [C, A]),
        ("GPU-c,GPU-aabb", [C, B]),
        (f"1,{A}", [B, A]),
        ("", []),
        ("-1", []),
        ("2,-1,0", [C]),
        ("0,7,1", [A]),
        ("1,nothing,0", [B]),
        ("GPU-c,GPU-aa,GPU-aaaa", [C]),
        ("0,1,0", []),
        ("1st,0", [B, A]),  # it reads as many digits as there are
    ],
)
def test_what_is_visible_to_cuda_is_counted_from_0(
    visible: str | None, expected: list[str]
) -> None:
    """The list ends at its first entry that is no card, and one that is named twice leaves none."""
    found = cards(visible=visible).visible()

    assert [each.uuid for each in found] == expected
    assert [each.index for each in found] == list(range(len(expected)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0", C),
        ("1", A),
        ("GPU-c", C),
        (A, A),
        ("0000:0a:00.0", A),
        ("0000:b1:00.0", C),
    ],
)
def test_a_name_means_the_same_card_everywhere(name: str, expected: str) -> None:
    """With permuted CUDA_VISIBLE_DEVICES: the number is not NVML's, and its readings are."""
    permuted = cards(visible="2,0")
    found = permuted.find(name)

    assert isinstance(found, Device)
    assert (found.uuid, found.visible, found.torch_index) == (expected, expected, 0)
    reading = permuted.open(found).read()
    assert reading is not None
    assert reading.uuid == expected


@pytest.mark.parametrize(
    ("visible", "name", "said"),
    [
        (None, "3", "there is no card 3; this machine has 3, counted from 0"),
        ("2,0", "2", f"there is no card 2; {VISIBLE} leaves 2, counted from 0"),
        ("2,0", B, f"{VISIBLE} leaves 2"),
        (None, "0000:66:00.0", "there is no card 0000:66:00.0"),
        (None, "GPU-aa", "GPU-aa stands for 2 cards; name one by its whole UUID"),
        ("", "0", f"{VISIBLE} leaves no card"),
    ],
)
def test_a_name_without_a_card_is_told_why(visible: str | None, name: str, said: str) -> None:
    """The number there are, and who leaves so many."""
    found = cards(visible=visible).find(name)

    assert isinstance(found, str)
    assert said in found


def test_a_card_is_told_as_nvml_and_the_kernel_call_it() -> None:
    """Name, memory, and the PCI id in the form of /sys."""
    assert cards().visible()[1] == Device(
        1, "NVIDIA GeForce RTX 4070", B, 12_884_901_888, B, "0000:65:00.0"
    )


def test_a_card_that_is_divided_is_its_parts() -> None:
    """CUDA shows the first alone under the card's number, and each under its UUID."""
    other = MIG.replace("d", "e")
    divided = (FakeCard(A, parts=(MIG, other)), FakeCard(B))

    assert [each.uuid for each in cards(*divided).visible()] == [MIG, other, B]
    assert [each.uuid for each in cards(*divided, visible="1,0").visible()] == [B, MIG]
    assert [each.uuid for each in cards(*divided, visible=other).visible()] == [other]
    found = cards(*divided).find("MIG-e")
    assert isinstance(found, Device)
    reading = cards(*divided).open(found).read()
    assert reading is not None
    assert (reading.name, reading.uuid) == (found.name, other)
    assert reading.total_bytes == found.total_bytes


def test_a_card_that_is_lost_hides_no_other() -> None:
    """It fell off its bus; the others are counted without it, as CUDA does."""

    class Lost(FakeNvml):
        def nvmlDeviceGetName(self, card: int) -> str:
            if card == 1:
                raise self.NVMLError("GPU is lost")
            return super().nvmlDeviceGetName(card)

    found = Cards(load_nvml=lambda: Lost(*THREE), environ={}).visible()

    assert [(each.index, each.uuid) for each in found] == [(0, A), (1, C)]


def test_without_a_driver_there_is_none() -> None:
    """NVML is asked once, and its reason is kept."""
    calls = []

    def load() -> None:
        calls.append(1)
        raise OSError("libnvidia-ml.so.1")

    none = Cards(load_nvml=load, environ={})

    assert none.visible() == ()
    assert none.find("0") == "libnvidia-ml.so.1"
    assert calls == [1]
