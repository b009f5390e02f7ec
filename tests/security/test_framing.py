"""Where a message ends is never guessed: an Upgrade, a CONNECT, a coding or a trailer cannot make
the service read a body as a request, or a request as a body."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import pairwise

import pytest

from tests.api.sockets import listening
from tests.security.conftest import guarded

HOST = b"Host: localhost\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"


async def echo(scope, receive, send) -> None:
    """ASGI: answers with what it was asked, as JSON."""
    if scope["type"] != "http":
        raise RuntimeError("no lifespan")
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    names = [name.decode() for name, _ in scope["headers"]]
    found = json.dumps({"path": scope["path"], "body": body.decode(), "names": names}).encode()
    headers = [(b"content-length", b"%d" % len(found))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": found})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """One server for all, in a thread of its own: starting and ending it takes longer than any
    test.
    """
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with listening(echo, http=guarded()) as number:
            started.set_result((number, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    number, loop, stop = started.result(10)
    yield number
    loop.call_soon_threadsafe(stop.set)
    thread.join()


async def ask(port: int, *segments: bytes) -> list[dict]:
    """All answers until the service hangs up: what was asked, or the error's status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.transport.get_extra_info("socket").setsockopt(6, 1, 1)
        for segment in segments:
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            answer = await reader.read()
    found = []
    while answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        found.append({"status": int(head.split()[1]), **json.loads(rest[:length])})
        answer = rest[length:]
    return found


def framed(body: bytes, *, is_chunked: bool) -> bytes:
    """The end of a head, and *body*."""
    if not is_chunked:
        return b"Content-Length: %d\r\n\r\n" % len(body) + body
    half = len(body) // 2
    return b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n%x;a=b\r\n%s\r\n0\r\n\r\n" % (
        half,
        body[:half],
        len(body) - half,
        body[half:],
    )


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("wish", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("cut", ["whole", "behind the head", "in the body", "bytes"])
async def test_an_upgrade_is_ignored_and_the_body_read(port, wish, is_chunked, cut) -> None:
    """RFC 9110 7.8: the request is answered as if nothing had been wished, however it is cut into
    segments, its body is no request, and the connection goes on."""
    request = b"POST /asked HTTP/1.1\r\n" + HOST + wish + framed(SMUGGLED, is_chunked=is_chunked)
    at = {
        "whole": [0],
        "behind the head": [request.index(b"\r\n\r\n") + 4],
        "in the body": [request.index(b"GET /smug")],
        "bytes": list(range(1, len(request))),
    }[cut]
    edges = [0, *at, len(request)]
    segments = [request[a:b] for a, b in pairwise(edges)]
    found = await ask(port, *segments, LAST)

    assert [answer["path"] for answer in found] == ["/asked", "/last"]
    assert found[0]["body"] == SMUGGLED.decode()


@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_an_upgrade_without_a_body_leaves_the_connection_in_step(port, method) -> None:
    """Three of them, sent ahead, and one more request: four answers."""
    wish = method + b" /asked HTTP/1.1\r\n" + HOST + WEBSOCKET + b"Content-Length: 0\r\n\r\n"
    found = await ask(port, wish * 3 + LAST)

    assert [answer["path"] for answer in found] == ["/asked"] * 3 + ["/last"]


async def test_a_tunnel_cannot_be_had(port) -> None:
    """CONNECT is refused, and what follows is not run."""
    head = b"CONNECT a:443 HTTP/1.1\r\n" + HOST
    found = await ask(port, head + framed(SMUGGLED, is_chunked=False) + SMUGGLED)

    assert [answer["status"] for answer in found] == [400]


@pytest.mark.parametrize(
    "lines",
    [
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: identity, chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"Transfer-Encoding: chunked;q=1\r\n",
        b"Transfer-Encoding:\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3\r\nContent-Length: 3\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: +3\r\n",
    ],
)
@pytest.mark.parametrize("wish", [b"", H2C], ids=["plain", "upgrade"])
async def test_a_body_without_a_clear_end_is_refused(port, lines, wish) -> None:
    """Anything but `chunked`, once, or one length: 400, and the connection ends."""
    head = b"POST /asked HTTP/1.1\r\n" + HOST + wish + lines + b"\r\n"
    found = await ask(port, head + b"0\r\n\r\n" + SMUGGLED)

    assert [answer["status"] for answer in found] == [400]


async def test_chunks_need_http_1_1(port) -> None:
    """RFC 9112 6.1: in HTTP/1.0 the framing is faulty."""
    head = b"POST /asked HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"

    assert [answer["status"] for answer in await ask(port, head + b"0\r\n\r\n")] == [400]


@pytest.mark.parametrize("value", [b"chunked", b"Chunked", b"  chunked "])
async def test_chunked_is_read_however_it_is_written(port, value) -> None:
    """Its case does not count, nor the space around it."""
    head = b"POST /asked HTTP/1.1\r\n" + HOST + b"Transfer-Encoding:" + value + b"\r\n\r\n"
    found = await ask(port, head + b"3\r\nabc\r\n0\r\n\r\n" + LAST)

    assert [answer["body"] for answer in found] == ["abc", ""]


@pytest.mark.parametrize("wish", [b"", H2C], ids=["plain", "upgrade"])
async def test_a_trailer_is_no_header(port, wish) -> None:
    """It comes after all checks of the head, so it is dropped, also in a request behind."""
    head = b"POST /asked HTTP/1.1\r\n" + HOST + wish + b"Transfer-Encoding: chunked\r\n\r\n"
    found = await ask(
        port, head, b"3\r\nabc\r\n", b"0\r\nAuthorization: Bearer x\r\nX-Late: 1\r\n\r\n", LAST
    )

    assert [answer["body"] for answer in found] == ["abc", ""]
    assert not {"authorization", "x-late"} & {n for answer in found for n in answer["names"]}


@pytest.mark.parametrize("ahead", [b"3\r\nabc\r\n0\r\nx: ", b"1;x=", b"3\r\nabc\r\n0\r\n"])
async def test_a_trailer_or_an_extension_without_end_is_refused(port, ahead) -> None:
    """431 after the 64 kB that a head may have, not after what fills the memory."""
    head = b"POST /asked HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    more = b"a: b\r\n" * 300 if ahead.endswith(b"0\r\n") else b"a" * 100_000

    assert [answer["status"] for answer in await ask(port, head + ahead + more)] == [431]
