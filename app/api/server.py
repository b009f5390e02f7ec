"""The HTTP server around the app: uvicorn, with our limits on a connection, without its signals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from app.api.protocol import GuardedProtocol


class Server(uvicorn.Server):
    """Uvicorn without its signal handlers: whoever runs it decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signals alone."""
        yield


def make_server(app: FastAPI) -> Server:
    """Make the server for *app*."""
    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            # Whose X-Forwarded-For counts, `app.api.proxies` decides; uvicorn trusts 127.0.0.1.
            proxy_headers=False,
            http=GuardedProtocol,
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=30,
        )
    )
