"""Lag of the event loop: the first sign that something blocks it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

INTERVAL_S = 0.01
WINDOW_S = 60.0


class LoopLag:
    """Measures the event loop's lag in `run`; `read` returns the maximum of a sliding window.

    Reading changes nothing, so a scrape hides nothing from the next one.
    """

    def __init__(
        self, *, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._clock = clock
        # Decreasing: only a value larger than all that follow it can become the maximum.
        self._most: deque[tuple[float, float]] = deque()

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            started = self._clock()
            await asyncio.sleep(INTERVAL_S)
            took_s = self._clock() - started
            # A block that begins just after a wake is hidden by the sleep, so the whole interval
            # counts: the lag is up to one interval too large and never too small.
            self.note(took_s if took_s > 2 * INTERVAL_S else took_s - INTERVAL_S)

    def note(self, lag_s: float) -> None:
        """Record one measurement, in seconds, at the current time."""
        while self._most and self._most[-1][1] <= lag_s:
            self._most.pop()
        self._most.append((self._clock(), lag_s))
        while self._most[0][0] <= self._clock() - self._window_s:
            self._most.popleft()

    def read(self) -> float:
        """Return the largest lag of the window, in seconds; 0 where nothing was measured."""
        since = self._clock() - self._window_s
        return next((max(0.0, lag_s) for when, lag_s in tuple(self._most) if when > since), 0.0)
