"""Limits on the memory of responses that are being sent: of all, and of each client.

An image is released once it is written, so a client that reads slowly holds it for longer, and one
with many sockets holds many. Beyond the limit, the slowest connection of the client that holds most
is closed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(eq=False, slots=True)
class Holding:
    """One response that is being sent: the images of *client* that are held for it."""

    client: str
    taker: Taker
    pictures: list[bytes]
    began: float
    taken_before: int

    def bytes_per_s(self, now: float) -> float:
        """Return the mean rate so far, in bytes per second."""
        taken = self.taker.taken_bytes - self.taken_before
        return (taken + _HEAD_START_BYTES) / max(now - self.began, 1e-3)

    def release_body(self, picture: bytes) -> None:
        """Count *picture* as written and released."""
        self.pictures.remove(picture)


class HeldAnswers:
    """The responses that are being sent; used from the event loop's thread only.

    *abort* closes a connection, and so ends its response. A client's only response is never aborted
    for the client's share, nor the only one of all: however large, its request was accepted.
    """

    def __init__(
        self,
        abort: Callable[[Taker], None],
        *,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._abort = abort
        self._max_bytes = max_bytes
        self._clock = clock
        self._holdings: dict[Holding, None] = {}

    def __repr__(self) -> str:
        clients = {holding.client for holding in self._holdings}
        held_bytes = self._bytes_by_client().total()
        return f"<HeldAnswers: {len(self._holdings)} of {len(clients)} clients, {held_bytes} bytes>"

    def hold(self, client: str, taker: Taker, pictures: list[bytes]) -> Holding:
        """Count *pictures* for a response that *taker* begins to send, and make room for them."""
        holding = Holding(client, taker, pictures, self._clock(), taker.taken_bytes)
        self._holdings[holding] = None
        while slowest := self._one_too_many(client):
            self.end(slowest)
            self._abort(slowest.taker)
        return holding

    def end(self, holding: Holding) -> None:
        """Count the response as ended, sent or not; has no effect twice."""
        self._holdings.pop(holding, None)

    def _one_too_many(self, client: str) -> Holding | None:
        """Return the response to abort after one of *client* has begun, None within the limits."""
        by_client = self._bytes_by_client()
        own = [holding for holding in self._holdings if holding.client == client]
        if by_client[client] <= three_quarters(self._max_bytes) or len(own) == 1:
            if by_client.total() <= self._max_bytes or len(self._holdings) == 1:
                return None
            client = max(by_client, key=by_client.__getitem__)
        now = self._clock()
        return min(
            (holding for holding in self._holdings if holding.client == client),
            key=lambda holding: holding.bytes_per_s(now),
        )

    def _bytes_by_client(self) -> Counter[str]:
        """Sum up the images; one that a client takes with many sockets is in memory once."""
        pictures = {
            (holding.client, id(picture)): len(picture)
            for holding in self._holdings
            for picture in holding.pictures
        }
        sums: Counter[str] = Counter()
        for (client, _), size_bytes in pictures.items():
            sums[client] += size_bytes
        return sums
