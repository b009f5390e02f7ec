"""The table of open connections by client, and the choice of one to close for a new one.

A socket takes a file descriptor, of which a process has few, and a client can open thousands at no
cost. So their number is limited, and each client's share of it; a new connection replaces the one
that has been idle for longest.
"""

from __future__ import annotations

import asyncio
import logging
import time
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


class Connection(Protocol):
    """What the table needs of a connection."""

    @property
    def is_answering(self) -> bool:
        """Whether a response is not completely written."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes of responses that are ready but not taken by the client."""

    @property
    def taken_bytes(self) -> int:
        """Bytes that the client has taken so far."""

    def abort(self) -> None:
        """Close now."""

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


class _Shelf:
    """Connections by phase, in the order in which they came into it."""

    def __init__(self) -> None:
        self._rows: tuple[dict[Connection, None], ...] = tuple({} for _ in Phase)
        self.count = 0

    def put(self, connection: Connection, phase: Phase) -> None:
        self._rows[phase][connection] = None
        self.count += 1

    def remove(self, connection: Connection, phase: Phase) -> None:
        del self._rows[phase][connection]
        self.count -= 1

    def first_to_go(self) -> Connection | None:
        rows = self._rows[: Phase.BUSY]
        return next((next(iter(row)) for row in rows if row), None)


class ConnectionTable:
    """The open connections, by client and phase; used from the event loop's thread only.

    Every operation is O(1) in the number of connections, except the check of all of them every
    *look_every_s* seconds.
    """

    def __init__(
        self,
        limit: int = MAX_CONNECTIONS,
        proxies: Proxies | None = None,
        *,
        look_every_s: float = 1.0,
        held_bytes: int = MAX_BYTES,
    ) -> None:
        self.answers = HeldAnswers(self.cut, max_bytes=held_bytes)
        """The memory held by responses that are being sent."""
        self._limit = limit
        self._proxies = proxies or Proxies(())
        self._share = three_quarters(limit)
        self._look_every_s = look_every_s
        self._all = _Shelf()
        self._of_client: dict[str, _Shelf] = {}
        self._places: dict[Connection, tuple[str, Phase]] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._closed = self._refused = self._cut = 0
        self._said_at = -_SAY_EVERY_S

    def __repr__(self) -> str:
        return f"<ConnectionTable {self._all.count}/{self._limit}, {len(self._of_client)} clients>"

    def admit(self, connection: Connection, address: str) -> bool:
        """Admit *connection* from *address*, in place of another if need be; else return False.

        A trusted proxy may have all connections, since many clients are behind it.
        """
        client = client_of(address)
        shelf = None if self._proxies.are(address) else self._of_client.get(client)
        if shelf is not None and shelf.count >= self._share:
            has_room = self._make_room(shelf)
        else:
            has_room = self._all.count < self._limit or self._make_room(self._all)
        if not has_room:
            self._refused += 1
            self._say()
            return False
        self._put(connection, client, Phase.ASKING)
        if self._looking is None:
            self._look_later()
        return True

    def move(self, connection: Connection, phase: Phase) -> None:
        """Move *connection* to *phase*; has no effect if it is in it already."""
        place = self._places.get(connection)
        if place is not None and place[1] is not phase:
            self.leave(connection)
            self._put(connection, place[0], phase)

    def leave(self, connection: Connection) -> None:
        """Remove *connection*, if it is in the table."""
        place = self._places.pop(connection, None)
        if place is None:
            return
        client, phase = place
        shelf = self._of_client[client]
        self._all.remove(connection, phase)
        shelf.remove(connection, phase)
        if not shelf.count:
            del self._of_client[client]

    def cut(self, connection: Taker) -> None:
        """Close *connection* because its client is too slow."""
        self._cut += 1
        self._say()
        connection.abort()

    def close(self) -> tuple[int, int]:
        """Close what is left; return how many responses were cut off, and their unsent bytes."""
        cut = [each for each in self._places if each.is_answering or each.unsent_bytes]
        left_bytes = sum(each.unsent_bytes for each in cut)
        for connection in list(self._places):
            connection.abort()
        if self._looking is not None:
            self._looking.cancel()
        return len(cut), left_bytes

    def _put(self, connection: Connection, client: str, phase: Phase) -> None:
        self._places[connection] = (client, phase)
        self._all.put(connection, phase)
        self._of_client.setdefault(client, _Shelf()).put(connection, phase)

    def _make_room(self, shelf: _Shelf) -> bool:
        connection = shelf.first_to_go()
        if connection is None:
            return False
        self._closed += 1
        self._say()
        self.leave(connection)
        connection.abort()
        return True

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self._look_every_s, self._look)

    def _look(self) -> None:
        self._looking = None
        now = time.monotonic()
        for connection in list(self._places):
            connection.look(now)
        if self._places:
            self._look_later()

    def _say(self) -> None:
        """Log one line a minute at most: a client that opens thousands would fill the disk else."""
        now = time.monotonic()
        if now - self._said_at < _SAY_EVERY_S:
            return
        _log.warning(
            "Of %d connections, %d are open; to make room %d were closed, %d were refused, and "
            "%d cut that took their answers too slowly. Not said again for a minute.",
            self._limit,
            self._all.count,
            self._closed,
            self._refused,
            self._cut,
        )
        self._said_at = now
        self._closed = self._refused = self._cut = 0
