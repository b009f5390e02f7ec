"""Pictures behind links, for clients that read only `url`: in memory, bounded, and gone after a
while.

A name is 128 random bits, so knowing it is the right to read it. Only the event loop touches the
store, and nothing of it is ever written to a disk.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_BYTES = 256 * 1024 * 1024
MAX_COUNT = 10_000


@dataclass(frozen=True, slots=True)
class Link:
    """One picture that can be fetched until *expires_at*."""

    data: bytes = field(repr=False)
    media_type: str
    expires_at: float


class LinkStore:
    """Keeps the newest pictures; the oldest go first, whether for age, for bytes or for number."""

    def __init__(
        self,
        *,
        lifetime_s: float,
        max_bytes: int = MAX_BYTES,
        max_count: int = MAX_COUNT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lifetime_s = lifetime_s
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._clock = clock
        self._links: OrderedDict[str, Link] = OrderedDict()
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<LinkStore: {len(self._links)} links, {self._bytes} bytes>"

    def put(self, data: bytes, *, format: str, media_type: str) -> str:
        """Keep a picture and return its name."""
        name = f"{secrets.token_hex(16)}.{format}"
        self._links[name] = Link(data, media_type, self._clock() + self.lifetime_s)
        self._bytes += len(data)
        self._settle()
        return name

    def get(self, name: str) -> Link | None:
        """Find a picture that is still there."""
        self._settle()
        return self._links.get(name)

    def _settle(self) -> None:
        """Let go of what is too old, then of the oldest until the rest fits."""
        now = self._clock()
        while self._links:
            oldest = next(iter(self._links.values()))
            is_full = self._bytes > self._max_bytes or len(self._links) > self._max_count
            if oldest.expires_at > now and not is_full:
                return
            self._links.popitem(last=False)
            self._bytes -= len(oldest.data)
