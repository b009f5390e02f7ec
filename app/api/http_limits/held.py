"""Limits on the memory of responses that are being sent: of all, and of each client.

An image is released once it is written, so a client that reads slowly holds it for longer, and one
with many sockets holds many. Beyond the limit, the slowest connection of the client that holds most
is closed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from app.limits import three_quarters

MAX_BYTES = 512 * 1024 * 1024
_HEAD_START_BYTES = 1024 * 1024
"""Counted as taken from the start, so that a new response is not the slowest."""


class Taker(Protocol):
    """A connection, as far as it sends a response."""

    @property
    def taken_bytes(self) -> int:
        """Bytes that its client has taken so far."""

    def abort(self) -> None:
        """Close now."""


class Holding:
    """One response that is being sent: the images of *client* that are held for it."""

    def __init__(self, client: str, taker: Taker, pictures: Iterable[bytes], now: float) -> None:
        self.client = client
        self.taker = taker
        self.pictures = list(pictures)
        self._began = now
        self._taken_before = taker.taken_bytes

    def bytes_per_s(self, now: float) -> float:
        """Return the mean rate so far, in bytes per second."""
        taken = self.taker.taken_bytes - self._taken_before
        return (taken + _HEAD_START_BYTES) / max(now - self._began, 1e-3)


class HeldAnswers:
    """The responses that are being sent; used from the event loop's thread only.

    *cut* closes a connection, and so ends its response. A client's only response is never cut off
    for the client's share, nor the only one of all: however large, its request was accepted.
    """

    def __init__(
        self,
        cut: Callable[[Taker], None],
        *,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cut = cut
        self._max_bytes = max_bytes
        self._clock = clock
        self._holdings: dict[str, dict[Holding, None]] = {}
        # An image in the image store may be sent to many sockets, and is in memory once.
        self._keepers: Counter[tuple[str, int]] = Counter()
        self._by_client: Counter[str] = Counter()
        self._bytes = 0

    def __repr__(self) -> str:
        count = sum(map(len, self._holdings.values()))
        return f"<HeldAnswers: {count} of {len(self._holdings)} clients, {self._bytes} bytes>"

    def hold(self, client: str, taker: Taker, pictures: Iterable[bytes]) -> Holding:
        """Count *pictures* for a response that *taker* begins to send, and make room for them."""
        holding = Holding(client, taker, pictures, self._clock())
        self._holdings.setdefault(client, {})[holding] = None
        for picture in holding.pictures:
            key = (client, id(picture))
            self._keepers[key] += 1
            if self._keepers[key] == 1:
                self._count(client, len(picture))
        self._make_room(client)
        return holding

    def release_body(self, holding: Holding, picture: bytes) -> None:
        """Count *picture* as written and released."""
        at = next((at for at, each in enumerate(holding.pictures) if each is picture), None)
        if at is None:
            return
        del holding.pictures[at]
        key = (holding.client, id(picture))
        self._keepers[key] -= 1
        if not self._keepers[key]:
            del self._keepers[key]
            self._count(holding.client, -len(picture))

    def end(self, holding: Holding) -> None:
        """Count the response as ended, sent or not; has no effect twice."""
        for picture in tuple(holding.pictures):
            self.release_body(holding, picture)
        holdings = self._holdings.get(holding.client, {})
        holdings.pop(holding, None)
        if not holdings:
            self._holdings.pop(holding.client, None)

    def _count(self, client: str, size_bytes: int) -> None:
        self._bytes += size_bytes
        self._by_client[client] += size_bytes
        if not self._by_client[client]:
            del self._by_client[client]

    def _make_room(self, client: str) -> None:
        share = three_quarters(self._max_bytes)
        while self._by_client[client] > share and len(self._holdings[client]) > 1:
            self._cut_slowest_of(client)
        while self._bytes > self._max_bytes and self._is_shared():
            self._cut_slowest_of(max(self._by_client, key=self._by_client.__getitem__))

    def _is_shared(self) -> bool:
        return len(self._holdings) > 1 or any(len(each) > 1 for each in self._holdings.values())

    def _cut_slowest_of(self, client: str) -> None:
        now = self._clock()
        slowest = min(self._holdings[client], key=lambda each: each.bytes_per_s(now))
        self.end(slowest)
        self._cut(slowest.taker)
