"""Work that is cancelled when its client disconnects.

`http.disconnect` is awaited beside the work instead of polling `request.is_disconnected()`, which
never fires behind some middleware (vLLM's `with_cancellation`). The body must have been read
before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.types import Receive

from app.errors import Cancelled, DeadlineExceeded
from app.service.results import Picture
from app.service.ticket import Ticket

T = TypeVar("T")


async def until_disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def await_images(ticket: Ticket, receive: Receive) -> list[Picture]:
    """Wait for the images of *ticket*; however the wait ends, the ticket is cancelled."""
    try:
        return await unless_disconnected(receive, ticket.pictures())
    finally:
        ticket.cancel()


async def unless_disconnected(
    receive: Receive, work: Coroutine[None, None, T], *, limit_s: float | None = None
) -> T:
    """Await *work*; cancel it when the client disconnects, or after *limit_s* seconds.

    A cancelled *work* is awaited to its end.

    Raises:
        Cancelled: the client has disconnected.
        DeadlineExceeded: *limit_s* is over.
    """
    working = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(until_disconnected(receive))
    try:
        await asyncio.wait(
            {working, disconnect}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            return working.result()
        if disconnect.done():
            raise Cancelled
        raise DeadlineExceeded(
            "The request's deadline came before its pictures were read; allow more time, or send "
            "smaller or fewer pictures."
        )
    finally:
        disconnect.cancel()
        working.cancel()
        await asyncio.wait({working, disconnect})
