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
    assert decide(deaths, now, 0).delay_s == delay


@pytest.mark.parametrize(
    ("deaths", "failed_starts", "delay"),
    [
        ([400.0], 1, 0.0),
        ([400.0, 800.0], 2, 1.0),
        ([400.0, 800.0, 1200.0], 3, None),
        ([0.0, 1800.0, 3600.0], 2, 1.0),
        ([0.0, 1800.0, 3600.0, 5400.0], 3, None),
    ],
)
def test_the_third_start_that_fails_is_the_last_however_long_it_took(
    deaths, failed_starts, delay
) -> None:
    """One start takes minutes, and may take half an hour: three of them span no ten minutes."""
    assert decide(deaths, deaths[-1], failed_starts).delay_s == delay
