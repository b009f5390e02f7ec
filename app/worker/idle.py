"""Puts workers to sleep that nobody has needed for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from app.worker.rest import Cause

_LOOK_S = (0.05, 1.0)
"""Between two looks, at least and at most."""


class IdleSleep:
    """Has *sleep* called once *is_busy* has been false for *after_s* seconds; `run` is a task."""

    def __init__(
        self,
        after_s: float,
        is_busy: Callable[[], bool],
        sleep: Callable[[Cause], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._after_s = after_s
        self._is_busy = is_busy
        self._sleep = sleep
        self._clock = clock
        self._idle_since = clock()

    async def run(self) -> None:
        """Look a few times in the period, until cancelled."""
        while True:
            await asyncio.sleep(min(max(_LOOK_S[0], self._after_s / 4), _LOOK_S[1]))
            self.look()

    def look(self) -> None:
        """Put them to sleep if it is time."""
        now = self._clock()
        if self._is_busy():
            self._idle_since = now
        elif now - self._idle_since >= self._after_s:
            self._idle_since = now
            self._sleep(Cause.IDLE)
