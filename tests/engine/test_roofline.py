"""The floors: operations counted from klein's shapes, divided by datasheet rates."""

from __future__ import annotations

import sys

import pytest

from app.engine.models.registry import find_model
from app.engine.roofline import GPUS, find_gpu, picture_work, recognise, roofline

KLEIN = find_model("flux.2-klein-4b").architecture


def seconds(key: str, precision: str, side: int = 1024, **more: int) -> float:
    """The whole floor of a square picture of four steps."""
    card = find_gpu(key)
    assert card is not None
    found = roofline(KLEIN, card, precision, side, side, 4, **more)
    assert found is not None
    return found.total_s


def test_the_work_of_one_picture_is_that_of_kleins_shapes() -> None:
    """1024x1024 in 4 steps: 28.27 + 6.55 TFLOP a step, 2.91 for the prompt, 10.47 to decode."""
    work = picture_work(KLEIN, 1024, 1024, 4)

    assert work.linears / 4e12 == pytest.approx(28.27, abs=0.005)
    assert work.rest / 4e12 == pytest.approx(6.55, abs=0.005)
    assert work.text / 1e12 == pytest.approx(2.91, abs=0.005)
    assert work.decode / 1e12 == pytest.approx(10.47, abs=0.005)


@pytest.mark.parametrize(
    ("key", "precision", "expected"),
    [
        ("rtx-3060", "bf16", 5.99),
        ("rtx-3060", "int8", 2.66),
        ("rtx-4070", "bf16", 2.62),
        ("rtx-4070", "fp8", 1.65),
        ("rtx-4070", "int8", 1.16),
        ("rtx-4090", "fp8", 0.58),
        ("rtx-5090", "fp8", 0.46),
        ("h200", "fp8", 0.10),
        ("h200", "bf16", 0.15),
    ],
)
def test_the_floors_are_those_computed_by_hand(key, precision, expected) -> None:
    """Seconds per picture at 1024x1024, rounded to hundredths."""
    assert round(seconds(key, precision), 2) == expected


def test_a_reference_image_costs_more_than_its_tokens() -> None:
    """One of the same size makes 76.7 TFLOP a step, since attention grows with the square."""
    work = picture_work(KLEIN, 1024, 1024, 4, references=1)

    assert (work.linears + work.rest) / 4e12 == pytest.approx(76.7, abs=0.05)


def test_fp8_on_ampere_saves_no_time() -> None:
    """Its tensor cores know no fp8: what is stored in 8 bit is computed in bf16."""
    assert seconds("rtx-3060", "fp8") == seconds("rtx-3060", "bf16")


def test_guidance_doubles_the_transformers_work() -> None:
    """Both branches run in each step; the picture is still decoded once."""
    one, two = picture_work(KLEIN, 512, 512, 4), picture_work(KLEIN, 512, 512, 4, branches=2)

    assert two.linears == 2 * one.linears
    assert two.decode == one.decode


def test_a_precision_without_a_rate_has_no_floor() -> None:
    """fp32 runs on other units than the table knows; no number is better than a wrong one."""
    assert roofline(KLEIN, GPUS[0], "fp32", 512, 512, 4) is None


@pytest.mark.parametrize(
    "typed", ["rtx-3060", "RTX 3060", "rtx3060", "NVIDIA GeForce RTX 3060", "rtx-3060-12gb"]
)
def test_a_card_is_found_as_people_write_it(typed) -> None:
    """Dashes, blanks, the vendor's name and the memory size make no difference."""
    found = find_gpu(typed)

    assert found is not None
    assert found.name == "NVIDIA GeForce RTX 3060"


def test_a_card_of_the_same_name_and_other_memory_is_another_card() -> None:
    """The 3060 with 8 GB has a narrower bus, and a laptop's 3060 another chip."""
    assert recognise("NVIDIA GeForce RTX 3060", 12288 << 20) is find_gpu("rtx-3060")
    assert recognise("NVIDIA GeForce RTX 3060", 8192 << 20) is None
    assert recognise("NVIDIA GeForce RTX 3060 Laptop GPU", 12288 << 20) is None


def test_every_key_is_unique_and_found() -> None:
    """What the table offers can be asked for."""
    assert len({card.key for card in GPUS}) == len(GPUS)
    assert all(find_gpu(card.key) is card for card in GPUS)


def test_floors_need_no_torch() -> None:
    """The module is plain arithmetic, so that a computed answer comes at once."""
    assert "torch" not in vars(sys.modules["app.engine.roofline"])
