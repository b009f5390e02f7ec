"""A real server on a real socket, in the test's own event loop, so that tests can wait for
events.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn
from fastapi import FastAPI

from app.api.server import make_server


class _QuietServer(uvicorn.Server):
    """Leaves the signals to pytest."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def listening(app: FastAPI, **options) -> AsyncIterator[int]:
    """Serve *app* on a free port of the loopback address; yields the port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, **options)
    server = _QuietServer(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[int]:
    """Do the same with the server that `klein serve` runs, which has our own HTTP protocol."""
    server = make_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.end()
            await serving


async def until(holds: Callable[[], object], limit_s: float = 30.0) -> None:
    """Wait until *holds* says yes; for states that set no event."""
    async with asyncio.timeout(limit_s):
        while not holds():  # noqa: ASYNC110 - what is waited for belongs to the code under test
            await asyncio.sleep(0.002)
