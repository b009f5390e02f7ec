"""A fixed number of places that clients take in turns, however many requests of one client wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Turns:
    """Gives *size* places; a freed one goes to the client that holds the fewest.

    Of equals it goes to the client served longest ago: while another waits without any, no client
    gets a second. Used from the event loop's thread only.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._holders: list[str] = []
        """The client of each place that is held."""
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        """Requests in the order of their arrival, those of the client served last behind others."""

    def __repr__(self) -> str:
        free, clients = self._size - len(self._holders), {client for client, _ in self._waiting}
        return f"<Turns {free} free, {len(self._waiting)} of {len(clients)} clients waiting>"

    @asynccontextmanager
    async def of(self, client: str) -> AsyncGenerator[None, None]:
        """Hold a place for *client*, once its turn has come."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((client, turn))
        self._settle()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():  # perhaps it came in the same moment
                self._holders.remove(client)
            self._settle()

    def _settle(self) -> None:
        """Give the free places to waiting clients."""
        self._waiting = [each for each in self._waiting if not each[1].done()]
        while self._waiting and len(self._holders) < self._size:
            client, turn = min(self._waiting, key=lambda each: self._holders.count(each[0]))
            self._waiting.remove((client, turn))
            self._waiting.sort(key=lambda each: each[0] == client)
            self._holders.append(client)
            turn.set_result(None)
