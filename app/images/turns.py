"""A fixed number of places that clients take in turns, however many requests of one client wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Turns:
    """Gives *size* places; a freed one goes to the client that holds the fewest.

    Of equals it goes to the client served longest ago: while another waits without any, no client
    gets a second. Used from the event loop's thread only.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._held: Counter[str] = Counter()
        self._lines: dict[str, dict[asyncio.Future[None], None]] = {}
        """Waiting requests, one queue per client; the client whose turn is next first."""

    def __repr__(self) -> str:
        waiting = sum(map(len, self._lines.values()))
        return f"<Turns {self._free} free, {waiting} of {len(self._lines)} clients waiting>"

    @asynccontextmanager
    async def of(self, client: str) -> AsyncGenerator[None, None]:
        """Hold a place for *client*, once its turn has come."""
        await self._enter(client)
        try:
            yield
        finally:
            self._leave(client)

    async def _enter(self, client: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(client, {})[turn] = None
        self._settle()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(client, turn)
            else:
                self._leave(client)  # its turn came in the same moment
            raise

    def _leave(self, client: str) -> None:
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._settle()

    def _remove(self, client: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(client, {})
        line.pop(turn, None)
        if not line:
            self._lines.pop(client, None)

    def _settle(self) -> None:
        """Give the free places to waiting clients."""
        while self._free and self._lines:
            client = min(self._lines, key=self._held.__getitem__)
            line = self._lines.pop(client)
            turn = next(iter(line))
            del line[turn]
            if line:
                self._lines[client] = line  # behind all others
            if not turn.done():
                turn.set_result(None)
                self._free -= 1
                self._held[client] += 1
