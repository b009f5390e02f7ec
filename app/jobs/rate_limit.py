"""How many images a client may ask for in a minute.

One bucket for each client: it holds a minute's worth, each accepted image takes one token, and
tokens come back evenly. A client who has been away long enough to be full again is forgotten, so
callers who change their address leave nothing behind. Pure but for the clock it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_FORGET_FROM = 1024
"""Clients that are remembered before the full buckets among them are thrown away."""


class RateLimit:
    """Counts images per client; with *per_minute* 0 it lets everything pass."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._forget_at = _FORGET_FROM

    def __repr__(self) -> str:
        return f"<RateLimit {self.per_minute} per minute, {len(self._buckets)} clients>"

    def wait_s(self, client: str, images: int) -> int:
        """Whole seconds until *client* may ask for *images* more; 0 where that is now."""
        if self.per_minute == 0:
            return 0
        lacking = images - self._tokens(client)
        return math.ceil(lacking * 60 / self.per_minute) if lacking > 1e-9 else 0

    def take(self, client: str, images: int) -> None:
        """Count *images* that *client* has asked for and that were accepted."""
        if self.per_minute == 0:
            return
        self._buckets[client] = (self._tokens(client) - images, self._clock())
        if len(self._buckets) >= self._forget_at:
            self._forget()

    def _tokens(self, client: str) -> float:
        tokens, at = self._buckets.get(client, (float(self.per_minute), self._clock()))
        return min(self.per_minute, tokens + (self._clock() - at) * self.per_minute / 60)

    def _forget(self) -> None:
        """Drop who has a full bucket; look again when twice as many are left, so that it stays
        cheap."""
        self._buckets = {
            client: bucket
            for client, bucket in self._buckets.items()
            if self._tokens(client) < self.per_minute
        }
        self._forget_at = max(_FORGET_FROM, 2 * len(self._buckets))
