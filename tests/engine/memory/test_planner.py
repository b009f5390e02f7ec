"""The memory plan: which card holds what, with reasons, and the largest picture it admits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.engine.adapters.shapes import linear_shapes, slot_bytes
from app.engine.memory.planner import (
    CONTEXT_BYTES,
    GB,
    PLANS,
    Plan,
    Weights,
    peak_bytes,
    plan_memory,
)
from app.engine.models.registry import find_model

ARCHITECTURE = find_model("flux.2-klein-4b").architecture
WITH_KERNELS, WITHOUT = ARCHITECTURE.with_kernels, ARCHITECTURE.without_kernels
# klein 4B's networks as they lie on the card: one byte for each weight of a block.
KLEIN = Weights(
    transformer=4_070_000_000,
    encoder=2_730_000_000,
    decoder=99_000_000,
    image_encoder=69_000_000,
)
SMALL_DECODER = Weights(KLEIN.transformer, KLEIN.encoder, 56_000_000, KLEIN.image_encoder)
MEGAPIXEL = 1024 * 1024
LIMIT = 4 * MEGAPIXEL


def plan(free_gb: float, weights: Weights = KLEIN, rates=WITH_KERNELS, **changes):
    values = {"default_pixels": MEGAPIXEL, "limit_pixels": LIMIT} | changes
    return plan_memory(int(free_gb * GB), weights, ARCHITECTURE, rates, **values)


@pytest.mark.parametrize(
    ("free_gb", "name", "largest"),
    [
        # What a card has free with a display on it: 24, 16, 12, 10, 8 and 6 GB.
        (23.5, "resident", LIMIT),
        (15.5, "resident", LIMIT),
        (11.3, "resident", LIMIT),
        (10.5, "resident", LIMIT),
        (9.4, "resident", 6000 * 256),
        (9.0, "resident tiled", 1_400_000),
        (8.4, "resident tiled", MEGAPIXEL),
        (7.4, "streamed", LIMIT),
        (6.5, "streamed", MEGAPIXEL),
        (5.7, "streamed tiled", MEGAPIXEL),
    ],
)
def test_the_fastest_plan_that_fits_is_taken(free_gb, name, largest):
    """From a 24 GB card down to one of 6 GB: the plan, and at least this size."""
    found = plan(free_gb)

    assert found.name == name
    assert found.max_pixels[0] >= largest
    assert found.peak_bytes <= free_gb * GB - CONTEXT_BYTES


def test_the_reasons_name_what_was_refused():
    """Numbers for each plan that was tried, and for the one that was taken."""
    assert plan(9.0).reasons == (
        "8.4 GB may be used (9.0 GB free)",
        "resident would need 8.5 GB",
        "resident tiled needs 7.6 GB",
    )


def test_a_card_that_is_too_small_gets_no_plan():
    """Four gigabytes hold not even the transformer."""
    assert plan(4.5) is None


@pytest.mark.parametrize("free_gb", [6.5, 7.5, 8.5, 9.5, 10.5, 12.0, 16.0])
@pytest.mark.parametrize("weights", [KLEIN, SMALL_DECODER])
@pytest.mark.parametrize("rates", [WITH_KERNELS, WITHOUT])
def test_no_admitted_size_needs_more_than_there_is(free_gb, weights, rates):
    """The largest size fits, the next one does not, and references only make it smaller."""
    found = plan(free_gb, weights, rates)
    budget = free_gb * GB - CONTEXT_BYTES

    assert list(found.max_pixels) == sorted(found.max_pixels, reverse=True)
    assert found.max_pixels[0] >= MEGAPIXEL
    for references, pixels in enumerate(found.max_pixels):
        assert pixels % 4096 == 0
        if pixels:
            assert (
                peak_bytes(found.name, weights, ARCHITECTURE, rates, pixels, references) <= budget
            )
        if pixels < ARCHITECTURE.exact_pixels - 4096 and pixels < LIMIT:
            more = peak_bytes(found.name, weights, ARCHITECTURE, rates, pixels + 4096, references)
            assert more > budget


def test_arithmetic_without_kernels_needs_more():
    """Without them the same card may get a smaller plan, never a larger one."""
    for free_gb in (6.5, 7.5, 8.5, 9.0, 9.5, 10.5, 12.0):
        ranks = [PLANS.index(plan(free_gb, KLEIN, rates).name) for rates in (WITH_KERNELS, WITHOUT)]
        assert ranks == sorted(ranks)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_is_asked_for_is_taken(name):
    """The operator's word goes over the order; the reason says so."""
    found = plan(24.0, asked=name)

    assert found.name == name
    assert found.reasons[-1].endswith("as asked for")
    assert found.name.is_streamed == ("streamed" in name)
    assert found.name.is_tiled == ("tiled" in name)


@pytest.mark.parametrize(
    ("name", "bar"),
    [("resident", 8.9), ("resident tiled", 7.9), ("streamed", 6.0), ("streamed tiled", 5.0)],
)
def test_a_megapixel_stays_within_the_envelope(name, bar):
    """What each plan reckons with for 1024x1024 is at most what it is meant to take."""
    assert peak_bytes(Plan(name), KLEIN, ARCHITECTURE, WITH_KERNELS, MEGAPIXEL) <= bar * GB


@pytest.mark.parametrize(("name", "following"), [*zip(PLANS, (*PLANS[1:], None), strict=True)])
def test_each_plan_is_taken_to_its_last_byte(name, following):
    """Where its default image just fits; with one byte less it is the next plan's turn."""
    enough = peak_bytes(name, KLEIN, ARCHITECTURE, WITH_KERNELS, MEGAPIXEL) + CONTEXT_BYTES
    found, less = (
        plan_memory(
            free, KLEIN, ARCHITECTURE, WITH_KERNELS, default_pixels=MEGAPIXEL, limit_pixels=LIMIT
        )
        for free in (enough, enough - 1)
    )

    assert found.name is name
    assert (less.name if less else None) is following


def test_references_that_have_no_room_are_not_admitted():
    """Each takes its share of the picture's pixels, down to none at all."""
    found = plan(6.6, rates=WITHOUT)

    assert found.max_pixels[0] >= MEGAPIXEL
    assert found.max_pixels[-1] == 0


@pytest.mark.parametrize("name", PLANS)
def test_adapters_take_their_bytes_in_every_plan(name):
    """On cards of 8 and 6 GB too: what slots of a rank take is not free for a picture."""
    adapters = slot_bytes(linear_shapes(ARCHITECTURE), 32)
    plain, with_adapters = (
        plan(11.3, replace(KLEIN, adapters=each), asked=name) for each in (0, adapters)
    )

    assert 92_000_000 <= adapters <= 100_000_000
    assert with_adapters.peak_bytes - plain.peak_bytes == adapters
