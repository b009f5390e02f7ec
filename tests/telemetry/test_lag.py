"""How late the event loop was, seen through a window that slides."""

from __future__ import annotations

import asyncio

import pytest

from app.telemetry.lag import LoopLag


class Clock:
    """A clock that stands until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_reading_changes_nothing() -> None:
    """Whoever scrapes without a key hides nothing from the operator's next scrape."""
    lag = LoopLag(window_s=60, clock=Clock())
    lag.note(0.5)
    lag.note(0.1)

    assert [lag.read() for _ in range(3)] == [0.5, 0.5, 0.5]


def test_the_most_of_the_last_minute_is_told() -> None:
    """A lag is forgotten when its minute is over, then the next largest counts."""
    clock = Clock()
    lag = LoopLag(window_s=60, clock=clock)
    for now, seconds in ((0.0, 0.2), (10.0, 0.9), (20.0, 0.3), (30.0, -0.01)):
        clock.now = now
        lag.note(seconds)

    seen = {}
    for now in (30.0, 69.0, 70.0, 79.0, 80.0, 200.0):
        clock.now = now
        seen[now] = lag.read()
    assert seen == {30.0: 0.9, 69.0: 0.9, 70.0: 0.3, 79.0: 0.3, 80.0: 0.0, 200.0: 0.0}


def test_what_is_kept_is_bounded() -> None:
    """A day of measurements leaves no more than a minute's."""
    clock = Clock()
    lag = LoopLag(window_s=60, clock=clock)
    for number in range(20_000):
        clock.now = number * 0.05
        lag.note(1.0 - number * 1e-6)

    assert len(lag._most) <= 60 / 0.05 + 1


async def test_a_freeze_is_told_in_full_wherever_it_begins() -> None:
    """Also right after the gauge went to sleep, when its own sleep hides most of the freeze."""
    clock = Clock()
    lag = LoopLag(clock=clock)
    running = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    clock.now += 0.06  # this is the freeze
    async with asyncio.timeout(5):
        while not lag.read():  # noqa: ASYNC110 - it measures in its own time
            await asyncio.sleep(0)
    running.cancel()

    assert lag.read() == pytest.approx(0.06)
