"""When a dead worker is replaced, and when the service gives up."""

import pytest

from app.worker.restarts import decide


@pytest.mark.parametrize(
    ("deaths", "now", "delay"),
    [
        ([100.0], 100.0, 0.0),
        ([100.0, 150.0], 150.0, 1.0),
        ([100.0, 150.0, 200.0], 200.0, None),
        ([100.0, 150.0, 701.0], 701.0, 1.0),
        ([100.0, 800.0], 800.0, 0.0),
    ],
)
def test_the_third_death_in_ten_minutes_is_the_last(deaths, now, delay) -> None:
    """Back-off grows with every death without a picture between; old ones are forgotten."""
    assert decide(deaths, now).delay_s == delay
