"""A live service with scripted pictures, and an app on fakes for what needs no worker."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from functools import partial

import pytest

from app.api.http_limits.connections import ConnectionTable
from app.api.http_limits.protocol import GuardedProtocol
from tests.api.conftest import client as client
from tests.api.conftest import runtime as runtime
from tests.api.conftest import serve as serve
from tests.api.conftest import service as service
from tests.support.server import Server

KEY = "canary-key-31415926"


@pytest.fixture(scope="session")
def scripted_service() -> Iterator[Server]:
    """One service for many tests: without keys, as most people run it at home."""
    with Server(module="tests.support.scripted_engine", model="shapes", device="cpu") as server:
        yield server


def guarded(
    protocol: type[GuardedProtocol] = GuardedProtocol, table: ConnectionTable | None = None
) -> partial[GuardedProtocol]:
    """What uvicorn makes for each connection of one server."""
    return partial(protocol, table=table or ConnectionTable())


def send_raw(server: Server, data: bytes, *, timeout_s: float = 20.0) -> bytes:
    """Send *data* as it is and read until the service hangs up or says nothing more."""
    with connect(server, timeout_s=timeout_s) as connection:
        with contextlib.suppress(OSError):  # refused before its end
            connection.sendall(data)
        return read_all(connection)


def connect(server: Server, *, timeout_s: float = 20.0) -> socket.socket:
    """A connection of its own."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


def read_all(connection: socket.socket) -> bytes:
    """Read until the other end hangs up; a reset counts as that."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while block := connection.recv(65_536):
            answer += block
    return answer
