"""The HTTP server around the app: uvicorn, with our limits on connections, without its signals."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
from collections.abc import Iterable, Iterator
from functools import partial

import uvicorn
from fastapi import FastAPI

from app.api.http_limits.connections import ConnectionTable, accepted_at_once, connection_limit
from app.api.http_limits.protocol import GuardedProtocol
from app.api.proxies import Proxies

_log = logging.getLogger(__name__)

BACKLOG = 2048
"""The listen backlog: connections that the kernel holds until they are accepted."""
_SHUTDOWN_S = 30


class Server(uvicorn.Server):
    """Uvicorn without its signal handlers: whoever runs it decides when it ends.

    Used from the event loop's thread only.
    """

    def __init__(self, config: uvicorn.Config, table: ConnectionTable) -> None:
        super().__init__(config)
        self._table = table

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield

    def end(self, *, answers_s: float = _SHUTDOWN_S) -> None:
        """Shut down; responses that are not sent after *answers_s* seconds are cut off."""
        self.config.timeout_graceful_shutdown = max(1, math.ceil(answers_s))
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with our own backlog: uvicorn uses one number for it and for accepts at once."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the responses, then log how many were cut off."""
        await super().shutdown(sockets)
        answers, left_bytes = self._table.close()
        if answers:
            _log.warning(
                "%d answers were cut, with %d bytes not taken by their clients.",
                answers,
                left_bytes,
            )


def make_server(
    app: FastAPI, *, descriptors: int = 2048, trusted_proxies: Iterable[str] = ()
) -> Server:
    """Make the server for *app*.

    *descriptors* is the process's limit of file descriptors; each of *trusted_proxies* is an
    address or a network.
    """
    table = ConnectionTable(connection_limit(descriptors), Proxies(trusted_proxies))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        # `app.api.proxies` decides whose X-Forwarded-For is trusted; uvicorn trusts 127.0.0.1.
        proxy_headers=False,
        http=partial(GuardedProtocol, table=table),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        backlog=accepted_at_once(descriptors),
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    return Server(config, table)
