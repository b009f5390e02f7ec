"""What the answers that clients are taking keep in memory: a limit for all of it, and each client's
share.

A picture is let go of once it is written, so whoever reads slowly keeps it for longer, and whoever
has many sockets keeps many. Beyond the limit, the slowest connection of the client that keeps most
is cut.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from app.limits import three_quarters

MAX_BYTES = 512 * 1024 * 1024
_HEAD_START_BYTES = 1024 * 1024
"""As if taken before, so that who has only begun is not the slowest."""


class Taker(Protocol):
    """A connection, as far as it takes an answer."""

    @property
    def taken_bytes(self) -> int:
        """All that its client has taken so far."""

    def abort(self) -> None:
        """Close now."""


class Holding:
    """One answer that is being taken: the pictures of *client* that are kept for it."""

    def __init__(self, client: str, taker: Taker, pictures: Iterable[bytes], now: float) -> None:
        self.client = client
        self.taker = taker
        self.pictures = list(pictures)
        self._began = now
        self._taken_before = taker.taken_bytes

    def bytes_per_s(self, now: float) -> float:
        """How fast it has been taken so far."""
        taken = self.taker.taken_bytes - self._taken_before
        return (taken + _HEAD_START_BYTES) / max(now - self._began, 1e-3)


class HeldAnswers:
    """Used from the event loop's thread only. *cut* closes a connection, whose answer ends then.

    A client's only answer is never cut for its own share, nor the only one of all: however large
    it is, it was allowed to be asked for.
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
        # A picture behind a link may be fetched by many sockets, and is there once.
        self._keepers: Counter[tuple[str, int]] = Counter()
        self._by_client: Counter[str] = Counter()
        self._bytes = 0

    def __repr__(self) -> str:
        count = sum(map(len, self._holdings.values()))
        return f"<HeldAnswers: {count} of {len(self._holdings)} clients, {self._bytes} bytes>"

    def hold(self, client: str, taker: Taker, pictures: Iterable[bytes]) -> Holding:
        """Count *pictures* for an answer that *taker* begins to take, and make room for them."""
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
        """*picture* is written."""
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
        """The answer is written, or nobody takes it any more; has no effect twice."""
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
