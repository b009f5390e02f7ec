"""Work that ends when nobody waits for it any more.

`http.disconnect` is awaited beside the work instead of polling `request.is_disconnected()`, which
never fires behind some middleware (vLLM's `with_cancellation`). The body must have been read
before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.types import Receive

from app.errors import Cancelled
from app.service import Picture, Ticket

T = TypeVar("T")


async def until_gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def pictures_of(ticket: Ticket, receive: Receive) -> list[Picture]:
    """Wait for the pictures of *ticket*; however the wait ends, nothing of it runs on."""
    try:
        return await unless_gone(receive, ticket.pictures())
    finally:
        ticket.cancel()


async def unless_gone(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """Await *work*; when the client goes first, cancel it, wait for it to end, and raise
    `Cancelled`.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait({working, leaving})
