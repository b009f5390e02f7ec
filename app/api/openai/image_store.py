"""The image store for clients that read only `url`: in memory, bounded, with expiry.

A name is 128 random bits, so knowing it is the permission to read. The store is used from the event
loop's thread only, and never written to a disk.

No client evicts all images of the others: while others have images, one client has at most three
quarters of the store, and when it is full, a client with more than an equal share evicts its own.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from app.limits import three_quarters

MAX_BYTES = 256 * 1024 * 1024
MAX_COUNT = 10_000


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One encoded image that can be fetched until *expires_at*."""

    data: bytes = field(repr=False)
    media_type: str
    expires_at: float
    client: str = ""


@dataclass(slots=True)
class _Share:
    """The images of one client in the store, oldest first."""

    names: OrderedDict[str, None] = field(default_factory=OrderedDict)
    bytes: int = 0


class ImageStore:
    """A bounded store of encoded images, each client's within its share.

    The oldest are evicted first, by age, by bytes and by number.
    """

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
        self._links: OrderedDict[str, StoredImage] = OrderedDict()
        self._bytes = 0
        self._shares: defaultdict[str, _Share] = defaultdict(_Share)

    def __repr__(self) -> str:
        return f"<ImageStore: {len(self._links)} links, {self._bytes} bytes>"

    def put(self, data: bytes, *, format: str, media_type: str, client: str) -> str:
        """Store an encoded image of *client* and return its name."""
        self._forget_old()
        name = f"{secrets.token_hex(16)}.{format}"
        self._links[name] = StoredImage(data, media_type, self._clock() + self.lifetime_s, client)
        self._bytes += len(data)
        share = self._shares[client]
        share.names[name] = None
        share.bytes += len(data)
        self._make_room(client)
        return name

    def get(self, name: str) -> StoredImage | None:
        """Return an image that is still stored, or None."""
        self._forget_old()
        return self._links.get(name)

    def _forget_old(self) -> None:
        now = self._clock()
        while self._links and next(iter(self._links.values())).expires_at <= now:
            self._drop(next(iter(self._links)))

    def _make_room(self, client: str) -> None:
        """Evict images until all limits hold after *client* has stored one."""
        # A client alone had the whole store; now there is another one.
        for holder in tuple(self._shares) if len(self._shares) == 2 else (client,):
            while len(self._shares) > 1 and self._has_too_much(holder):
                self._drop_oldest_of(holder)
        if self._is_over():
            self._drop_from_the_largest(client)

    def _is_over(self) -> bool:
        return self._bytes > self._max_bytes or len(self._links) > self._max_count

    def _has_too_much(self, client: str) -> bool:
        share = self._shares[client]
        return share.bytes > three_quarters(self._max_bytes) or len(share.names) > three_quarters(
            self._max_count
        )

    def _drop_from_the_largest(self, client: str) -> None:
        """Evict from *client* where it has more than an equal share, else from the largest client.

        The image just stored is never evicted. The largest is found with one heap.
        """
        largest = [(-self._part(name), name) for name in self._shares if name != client]
        heapq.heapify(largest)
        while self._is_over():
            if not largest or self._has_spare(client):
                self._drop_oldest_of(client)
                continue
            _, holder = heapq.heappop(largest)
            self._drop_oldest_of(holder)
            if holder in self._shares:
                heapq.heappush(largest, (-self._part(holder), holder))

    def _has_spare(self, client: str) -> bool:
        return len(self._shares[client].names) > 1 and self._part(client) > 1 / len(self._shares)

    def _part(self, client: str) -> float:
        """Return the fraction of the store that *client* has, by bytes or number, the larger."""
        share = self._shares[client]
        return max(share.bytes / self._max_bytes, len(share.names) / self._max_count)

    def _drop_oldest_of(self, client: str) -> None:
        self._drop(next(iter(self._shares[client].names)))

    def _drop(self, name: str) -> None:
        link = self._links.pop(name)
        self._bytes -= len(link.data)
        share = self._shares[link.client]
        del share.names[name]
        share.bytes -= len(link.data)
        if not share.names:
            del self._shares[link.client]
