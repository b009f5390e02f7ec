"""How late the event loop wakes: the first sign that something blocks it."""

from __future__ import annotations

import asyncio
import time

INTERVAL_S = 0.05


class LoopLag:
    """Measures in `run`; `read` gives the most since the last reading."""

    def __init__(self) -> None:
        self._most = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            started = time.monotonic()
            await asyncio.sleep(INTERVAL_S)
            self._most = max(self._most, time.monotonic() - started - INTERVAL_S)

    def read(self) -> float:
        """The longest lag in seconds since the last reading."""
        most, self._most = self._most, 0.0
        return most
