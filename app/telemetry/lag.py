"""How late the event loop wakes: the first sign that something blocks it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

INTERVAL_S = 0.01
WINDOW_S = 60.0


class LoopLag:
    """Measures in `run`; `read` gives the most within a window that slides, and changes nothing: a
    scrape hides nothing from the next one.
    """

    def __init__(
        self, *, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._clock = clock
        # Only what is later than all that follows it can ever be the most.
        self._most: deque[tuple[float, float]] = deque()

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            started = self._clock()
            await asyncio.sleep(INTERVAL_S)
            took_s = self._clock() - started
            # What begins just after a wake is hidden by the sleep; what counts is told in full,
            # so up to one interval too large and never too small.
            is_lag = took_s > 2 * INTERVAL_S
            self.note(took_s if is_lag else took_s - INTERVAL_S)

    def note(self, lag_s: float) -> None:
        """Take one measurement, in seconds, of now."""
        while self._most and self._most[-1][1] <= lag_s:
            self._most.pop()
        self._most.append((self._clock(), lag_s))
        while self._most[0][0] <= self._clock() - self._window_s:
            self._most.popleft()

    def read(self) -> float:
        """The longest lag of the window, in seconds; 0 where nothing was measured."""
        since = self._clock() - self._window_s
        return next((max(0.0, lag_s) for when, lag_s in tuple(self._most) if when > since), 0.0)
