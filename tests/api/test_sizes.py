"""The rule about sizes, as a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.models.registry import find_spec
from app.limits import Limits

KLEIN = Limits.of(find_spec("flux.2-klein-4b"), 4_194_304)
SHAPES = Limits.of(find_spec("shapes"), 4_194_304)
SIDES = st.integers(min_value=0, max_value=200_000)


@given(SIDES, SIDES)
def test_the_nearest_size_is_always_valid(width, height):
    """Whatever was asked for, the hint can be pasted."""
    for rule in (KLEIN, SHAPES):
        rule.check_size(*rule.nearest(width, height))


@given(st.integers(4, 256), st.integers(4, 256))
def test_a_valid_size_is_its_own_nearest(columns, rows):
    """Nothing is moved without need."""
    width, height = 16 * columns, 16 * rows
    try:
        KLEIN.check_size(width, height)
    except Exception:
        return

    assert (width, height) == KLEIN.nearest(width, height)


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [((1920, 1080), (1920, 1088)), ((5000, 5000), (2048, 2048)), ((32, 96), (64, 192))],
)
def test_the_ratio_is_kept(asked, nearest):
    """As far as multiples of 16 allow, of small sizes too."""
    assert nearest == KLEIN.nearest(*asked)
