"""How long a job will take."""

from dataclasses import replace

import pytest

from app.domain import ImageSpec, RawImage
from app.jobs.estimate import Estimator

SPEC = ImageSpec("x", 1024, 1024, 4, 1.0, 0)


def test_before_the_first_picture_it_says_nothing() -> None:
    """Zero, so that no request is refused for a guess."""
    assert Estimator().predict(SPEC) == 0.0


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 1.0),
        ({"width": 512, "height": 512}, 0.25),
        ({"num_inference_steps": 10}, 2.0),
        ({"guidance_scale": 4.0}, 10 / 6),
        ({"references": (RawImage(1024, 1024, b""),)}, 10 / 6),
    ],
)
def test_it_scales_with_the_work(change, factor) -> None:
    """Pixels, steps, branches and references each count."""
    estimator = Estimator()
    estimator.learn(SPEC, 3.0)

    assert estimator.predict(replace(SPEC, **change)) == pytest.approx(3.0 * factor)


def test_it_follows_a_change_of_speed() -> None:
    """A card that throttles to half its speed is believed within ten pictures."""
    estimator = Estimator()
    estimator.learn(SPEC, 1.0)
    for _ in range(10):
        estimator.learn(SPEC, 2.0)

    assert estimator.predict(SPEC) == pytest.approx(2.0, rel=0.05)
