"""An app on fakes, and clients that speak to it without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from tests.api.apps import app_on
from tests.api.targets import BASE_URL, LIFETIME_S, MAX_BODY
from tests.support.fakes import FakeRuntime, FakeService
from tests.support.server import Server


@pytest.fixture
def runtime():
    """What the app serves; tests script it."""
    return FakeRuntime()


@pytest.fixture
def service(runtime: FakeRuntime) -> FakeService:
    """The service of that runtime."""
    return runtime.service


@pytest.fixture
async def serve(runtime: FakeRuntime):
    """Start an app with settings of the test's own; returns a client to it."""
    async with AsyncExitStack() as stack:

        async def start(**settings) -> httpx.AsyncClient:
            return await stack.enter_async_context(client_of(app_on(runtime, **settings)))

        yield start


@pytest.fixture
async def client(serve) -> httpx.AsyncClient:
    """A client to an app with default settings."""
    return await serve()


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run the lifespan around a client that calls the app directly."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client,
    ):
        yield client


def error_of(response: httpx.Response) -> dict[str, object]:
    """Read the error object, which has exactly four keys."""
    error = response.json()["error"]

    assert {"message", "type", "param", "code"} == set(error)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]

    return error


@pytest.fixture(scope="session")
def live_klein(tiny_klein: Path) -> Iterator[Server]:
    """A live service with a tiny random klein checkpoint; links live for a second."""
    settings = {"model": tiny_klein, "device": "cpu", "max_body_bytes": MAX_BODY}
    with Server(f"lifetime={LIFETIME_S}", module="tests.api.live", **settings) as server:
        yield server


@pytest.fixture(scope="session")
def live_scripted() -> Iterator[Server]:
    """A live service with klein's ids and limits, whose scripted engine takes no time."""
    settings = {"model": "flux.2-klein-4b", "device": "cpu", "max_body_bytes": MAX_BODY}
    words = ("slow=0", f"lifetime={LIFETIME_S}")
    with Server(*words, module="tests.api.live", **settings) as server:
        yield server
