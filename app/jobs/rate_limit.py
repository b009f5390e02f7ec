"""Limit the images per minute and client with a token bucket.

A bucket holds a minute's worth of tokens, each accepted image takes one, and tokens refill evenly.
A client whose bucket is full again is forgotten, so clients that change their address take no
memory. Pure but for the clock passed in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_FORGET_FROM = 1024
"""Number of clients at which full buckets are first dropped."""


class RateLimit:
    """One token bucket per client; *per_minute* 0 means no limit."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._forget_at = _FORGET_FROM

    def __repr__(self) -> str:
        return f"<RateLimit {self.per_minute} per minute, {len(self._buckets)} clients>"

    def wait_s(self, client: str, images: int) -> int:
        """Return whole seconds until *client* has tokens for *images*; 0 means now."""
        if self.per_minute == 0:
            return 0
        lacking = images - self._tokens(client)
        return math.ceil(lacking * 60 / self.per_minute) if lacking > 1e-9 else 0

    def take(self, client: str, images: int) -> None:
        """Take the tokens of *images* that were accepted from *client*."""
        if self.per_minute == 0:
            return
        self._buckets[client] = (self._tokens(client) - images, self._clock())
        if len(self._buckets) >= self._forget_at:
            self._forget()

    def _tokens(self, client: str) -> float:
        tokens, at = self._buckets.get(client, (float(self.per_minute), self._clock()))
        return min(self.per_minute, tokens + (self._clock() - at) * self.per_minute / 60)

    def _forget(self) -> None:
        """Drop full buckets; next at twice the number left, so the amortised cost is constant."""
        self._buckets = {
            client: bucket
            for client, bucket in self._buckets.items()
            if self._tokens(client) < self.per_minute
        }
        self._forget_at = max(_FORGET_FROM, 2 * len(self._buckets))
