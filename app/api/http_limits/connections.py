"""The table of open connections by client, and the choice of one to close for a new one.

A socket takes a file descriptor, of which a process has few, and a client can open thousands at no
cost. So their number is limited, and each client's share of it; a new connection replaces the one
that has been idle for longest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from enum import IntEnum
from typing import Protocol

from app.api.http_limits.held import MAX_BYTES, HeldAnswers, Taker
from app.api.proxies import Proxies, client_of
from app.limits import three_quarters

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
OTHER_DESCRIPTORS = 128
"""File descriptors reserved for pipes, files and sockets that are closing."""

_SAY_EVERY_S = 60.0


class Phase(IntEnum):
    """What a connection does; those of a lower value are closed first."""

    IDLE = 0
    """Idle between two requests."""
    ASKING = 1
    """Its request is incomplete, and no route waits for the rest."""
    STALLED = 2
    """Its client reads nothing of its response."""
    BUSY = 3
    """A request is read or answered: it is not closed for another."""


class Connection(Taker, Protocol):
    """What the table needs of a connection."""

    @property
    def is_answering(self) -> bool:
        """Whether a response is not completely written."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes of responses that are ready but not taken by the client."""

    def look(self, now: float) -> None:
        """Check the pace and the phase; *now* is in seconds of a monotonic clock."""


def connection_limit(descriptors: int) -> int:
    """Return the limit of connections for a process with so many file *descriptors*."""
    return min(MAX_CONNECTIONS, max(descriptors - OTHER_DESCRIPTORS, descriptors // 4))


def accepted_at_once(descriptors: int) -> int:
    """Return how many connections may be accepted before any of them is counted.

    That is a quarter of the file descriptors above the limit of connections, at most 256.
    """
    return max(1, min(256, (descriptors - connection_limit(descriptors)) // 4))


class ConnectionTable:
    """The open connections, by client and phase; used from the event loop's thread only.

    Every operation is O(1) in the number of connections, except the check of all of them every
    *look_every_s* seconds, and the search for the idlest of one client, which passes over those of
    others: a quarter of the limit at most.
    """

    def __init__(
        self,
        limit: int = MAX_CONNECTIONS,
        proxies: Proxies | None = None,
        *,
        look_every_s: float = 1.0,
        held_bytes: int = MAX_BYTES,
    ) -> None:
        self.answers = HeldAnswers(self.abort_slow, max_bytes=held_bytes)
        """The memory held by responses that are being sent."""
        self._limit = limit
        self._proxies = proxies or Proxies(())
        self._look_every_s = look_every_s
        self._phases: tuple[dict[Connection, str], ...] = tuple({} for _ in Phase)
        """The client of each connection, by phase, in the order in which they came into it."""
        self._places: dict[Connection, Phase] = {}
        self._by_client: Counter[str] = Counter()
        self._looking: asyncio.TimerHandle | None = None
        self._counts: Counter[str] = Counter()
        self._said_at = -_SAY_EVERY_S

    def __repr__(self) -> str:
        return (
            f"<ConnectionTable {len(self._places)}/{self._limit}, {len(self._by_client)} clients>"
        )

    def admit(self, connection: Connection, address: str) -> bool:
        """Admit *connection* from *address*, in place of another if need be; else return False.

        A trusted proxy may have all connections, since many clients are behind it.
        """
        client = client_of(address)
        is_over_share = self._by_client[client] >= three_quarters(
            self._limit
        ) and not self._proxies.are(address)
        is_full = is_over_share or len(self._places) >= self._limit
        if is_full and not self._make_room(client if is_over_share else None):
            self._count("refused")
            return False
        self._places[connection] = Phase.ASKING
        self._phases[Phase.ASKING][connection] = client
        self._by_client[client] += 1
        if self._looking is None:
            self._look_later()
        return True

    def move(self, connection: Connection, phase: Phase) -> None:
        """Move *connection* to *phase*; has no effect if it is in it already."""
        before = self._places.get(connection)
        if before is not None and before is not phase:
            self._phases[phase][connection] = self._phases[before].pop(connection)
            self._places[connection] = phase

    def leave(self, connection: Connection) -> None:
        """Remove *connection*, if it is in the table."""
        phase = self._places.pop(connection, None)
        if phase is None:
            return
        client = self._phases[phase].pop(connection)
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]

    def abort_slow(self, connection: Taker) -> None:
        """Close *connection* because its client is too slow."""
        self._count("slow")
        connection.abort()

    def close(self) -> tuple[int, int]:
        """Close what is left; return how many responses were aborted, and their unsent bytes."""
        aborted = [each for each in self._places if each.is_answering or each.unsent_bytes]
        left_bytes = sum(each.unsent_bytes for each in aborted)
        for connection in list(self._places):
            connection.abort()
        if self._looking is not None:
            self._looking.cancel()
        return len(aborted), left_bytes

    def _make_room(self, client: str | None) -> bool:
        """Close the idlest connection, of *client* or of all; return whether there is one."""
        idlest = (
            connection
            for phase in self._phases[: Phase.BUSY]
            for connection, owner in phase.items()
            if client is None or owner == client
        )
        connection = next(idlest, None)
        if connection is None:
            return False
        self._count("closed")
        self.leave(connection)
        connection.abort()
        return True

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(self._look_every_s, self._look)

    def _look(self) -> None:
        self._looking = None
        now = time.monotonic()
        for connection in list(self._places):
            connection.look(now)
        if self._places:
            self._look_later()

    def _count(self, event: str) -> None:
        """Count, and log one line a minute at most: whoever opens thousands would fill the disk."""
        self._counts[event] += 1
        now = time.monotonic()
        if now - self._said_at < _SAY_EVERY_S:
            return
        _log.warning(
            "Of %d connections, %d are open; to make room %d were closed, %d were refused, and "
            "%d cut that took their answers too slowly. Not said again for a minute.",
            self._limit,
            len(self._places),
            self._counts["closed"],
            self._counts["refused"],
            self._counts["slow"],
        )
        self._said_at = now
        self._counts.clear()
