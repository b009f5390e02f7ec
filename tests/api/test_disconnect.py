"""A client that goes away stops its work; with sockets, not mocks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import httpx
import pytest

from app.api.app import create_app
from app.settings import Settings
from tests.api.sockets import listening, until

PROMPT = json.dumps({"prompt": "a"}).encode()
ROUTES = ("/generate", "/v1/images/generations", "/v1/images")
LIMIT_S = 5.0


@pytest.fixture(params=["httptools", "h11"])
async def port(runtime, request):
    """The port of a server on fakes, with either of uvicorn's parsers."""
    app = create_app(Settings.read({}, max_body_bytes=100_000), lambda _: runtime)
    async with listening(app, http=request.param) as port:
        yield port


async def send(port: int, route: str, body: bytes, *, length: int | None = None):
    """Send a request by hand and return the open connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def drop(writer: asyncio.StreamWriter) -> None:
    """Cut the connection."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.parametrize("route", ROUTES)
async def test_a_client_that_goes_stops_its_job(port, runtime, service, caplog, route):
    """At once, whether the job waits or runs; counted as cancelled and logged as 499."""
    caplog.set_level(logging.INFO, logger="app.api.access")
    service.script.release = asyncio.Event()
    _, writer = await send(port, route, PROMPT)
    async with asyncio.timeout(LIMIT_S):
        await service.asked.wait()
        await drop(writer)
        await service.tickets[0].ended.wait()
        await until(lambda: runtime.metrics.finished)

    assert service.tickets[0].was_cancelled
    assert runtime.metrics.finished == [(route, "cancelled")]
    assert [record.status for record in caplog.records if hasattr(record, "status")] == [499]


async def test_a_client_that_goes_during_its_upload_leaves_nothing(port, runtime, service):
    """No job, and the request is counted."""
    _, writer = await send(port, "/generate", b'{"prompt"', length=1000)
    await asyncio.sleep(0.05)
    await drop(writer)
    await until(lambda: runtime.metrics.finished)

    assert not service.tickets
    assert runtime.metrics.finished == [("/generate", "cancelled")]


async def test_a_clients_own_timeout_stops_its_job(port, service):
    """As an SDK does it: the connection is closed when the time is over."""
    service.script.release = asyncio.Event()
    async with httpx.AsyncClient(timeout=0.3) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"http://127.0.0.1:{port}/generate", json={"prompt": "a"})
        async with asyncio.timeout(LIMIT_S):
            await service.tickets[0].ended.wait()

    assert service.tickets[0].was_cancelled


async def test_another_clients_job_goes_on(port, service):
    """One caller's leaving never ends another's work."""
    service.script.release = asyncio.Event()
    _, leaving = await send(port, "/generate", PROMPT)
    reader, staying = await send(port, "/generate", PROMPT)
    async with asyncio.timeout(LIMIT_S):
        await until(lambda: len(service.tickets) == 2)
        await drop(leaving)
        await until(lambda: service.waiting == 1)
        service.script.release.set()
        line = await reader.readline()
    await drop(staying)

    assert line == b"HTTP/1.1 200 OK\r\n"


async def test_a_refused_body_leaves_the_connection_usable(port, service):
    """413 comes while the client still sends; the rest is thrown away, the next one heard."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        headers = {"content-type": "application/json"}
        for body in (b"x" * 300_000, chunks(100, b"x" * 3000)):
            response = await client.post("/generate", content=body, headers=headers)
            after = await client.get("/health/live")

            assert (response.status_code, after.status_code) == (413, 200)
    assert not service.tickets


async def test_a_body_that_dawdles_is_given_up(runtime, service):
    """400 when its time is over, though the client still holds the line."""
    app = create_app(Settings.read({}, body_limit_s=0.1), lambda _: runtime)
    async with listening(app) as port:
        reader, writer = await send(port, "/generate", b'{"prompt"', length=1000)
        async with asyncio.timeout(LIMIT_S):
            line = await reader.readline()
        await drop(writer)

    assert line == b"HTTP/1.1 400 Bad Request\r\n"
    assert not service.tickets


async def test_a_picture_may_take_longer_than_a_body(runtime, service):
    """The limit ends with the body's last byte."""
    service.script.release = asyncio.Event()
    app = create_app(Settings.read({}, body_limit_s=0.05), lambda _: runtime)
    async with listening(app) as port:
        reader, writer = await send(port, "/generate", PROMPT)
        await asyncio.sleep(0.15)
        service.script.release.set()
        async with asyncio.timeout(LIMIT_S):
            line = await reader.readline()
        await drop(writer)

    assert line == b"HTTP/1.1 200 OK\r\n"


async def chunks(count: int, chunk: bytes):
    """A body without a length."""
    for _ in range(count):
        yield chunk
