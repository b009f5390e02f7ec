"""What a request holds while it is read and decoded, with the real service behind real sockets: its
places until the decoder has ended, and no share of the bodies that are being read after that."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from app.api.app import create_app
from app.settings import Settings
from tests.api.sockets import listening, until
from tests.reliability.test_overload import picture_form
from tests.support.in_process import InProcess

MAX_BODY = 100_000


class HeldDecoder:
    """Decodes nothing; when it is stopped, it ends only when the test says so."""

    def __init__(self) -> None:
        self.clients: list[str] = []
        self.end = asyncio.Event()

    async def prepare(self, *arguments: object, client: str) -> None:
        self.clients.append(client)
        try:
            await asyncio.Event().wait()
        finally:
            await self.end.wait()


@pytest.fixture
async def decoder() -> HeldDecoder:
    return HeldDecoder()


@pytest.fixture
async def runtime(decoder: HeldDecoder) -> InProcess:
    runtime = InProcess(capacity=20)
    runtime.decoders = decoder
    return runtime


@pytest.fixture
async def port(runtime: InProcess) -> AsyncIterator[int]:
    app = create_app(Settings.read({}, max_body_bytes=MAX_BODY), lambda _: runtime)
    async with listening(app) as port:
        yield port


async def send(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def test_a_caller_who_leaves_keeps_the_place_until_the_decoder_has_ended(
    decoder, runtime, port
) -> None:
    """Or leavers could have any number of pictures decoded at once."""
    _, writer = await send(port, picture_form())
    await until(lambda: decoder.clients == ["address:127.0.0.1"])
    assert runtime.queue.size == 1
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(3):
            await client.get("/health/live")
    assert runtime.queue.size == 1

    decoder.end.set()
    await until(lambda: runtime.queue.size == 0)
    assert runtime.worker.made == 0


@pytest.mark.parametrize("framing", ["Content-Length: 65537", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/v1/images/edits"])
async def test_a_large_body_has_its_place_while_it_is_read(runtime, port, path, framing) -> None:
    """Or any number of them could be on their way to a queue that has no room; who leaves gives
    it back."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{framing}"
    _, writer = await send(port, f"{head}\r\n\r\n".encode())
    await until(lambda: runtime.queue.size == 1)
    writer.close()
    await until(lambda: runtime.queue.size == 0)


async def test_a_small_body_has_no_place_before_it_is_read(runtime, port) -> None:
    """It comes in one piece with its head, or can be had for nothing."""
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    _, writer = await send(port, head + b"Content-Length: 65536\r\n\r\n{")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(3):
            await client.get("/health/live")
    assert runtime.queue.size == 0
    writer.close()


async def test_a_deadline_comes_while_pictures_are_decoded(decoder, runtime, port) -> None:
    """504, and the place is free."""
    decoder.end.set()
    data = picture_form().replace(b"\r\n", b"\r\nX-Klein-Deadline-S: 0.2\r\n", 1)
    reader, writer = await send(port, data)
    async with asyncio.timeout(5):
        line = await reader.readline()
    writer.close()

    assert line == b"HTTP/1.1 504 Gateway Timeout\r\n"
    assert runtime.queue.size == 0


async def test_a_picture_that_waits_keeps_no_share_of_the_bodies(runtime, port) -> None:
    """Ten bodies of nearly the largest size are more than may be read at once; each is read after
    the one before, and all ten wait."""
    runtime.worker.release.clear()
    body = json.dumps({"prompt": "x", "size": "256x256"}) + " " * (MAX_BODY - 1000)
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        asking = []
        for count in range(1, 11):
            asking.append(
                asyncio.create_task(
                    client.post("/v1/images/generations", content=body, headers=headers)
                )
            )
            await until(
                lambda count=count: (
                    runtime.queue.size + runtime.queue.running == count or asking[-1].done()
                )
            )
        runtime.worker.release.set()
        answers = await asyncio.gather(*asking)

    assert [answer.status_code for answer in answers] == [200] * 10
